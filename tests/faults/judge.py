"""Compares the ledger with Valkey and the tables, row by row: plain redis-py, deltalake and pyarrow, none of our joins.

lost         acknowledged, and not in `examples`
duplicated   an id with more than one row in `examples` or in the supervision
altered      a row whose columns, or whose supervision (offline or online), are not what they must be
unaccounted  in `examples`, and neither in the supervision nor in the dead letters
dead_letters examples that were given up for a model that fails on none: held to blame for kills from outside
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import redis
import xxhash
from deltalake import DeltaTable

from schemas.dataset import DatasetSpec
from tests.fakes import expected_supervision
from tests.faults.traffic import SPEC, Ledger, rows


@dataclass(frozen=True)
class Verdict:
    acked_rows: int
    lost: int
    duplicated: int
    altered: int
    unaccounted: int
    dead_letters: int


def judge(ledger: Ledger, tables: Path, client: redis.Redis, *, dataset: str, fm: str, sent_rows: int) -> Verdict:
    """Give the verdict on a service that has worked everything off."""
    acked = {f"{n:032x}" for first, count in ledger.ranges() for n in range(first, first + count)}
    examples = _table(tables / dataset / "examples")
    supervision = _table(tables / dataset / "supervision" / fm)
    dead = _table(tables / dataset / "dead_letters" / fm)
    ids = examples["example_id"].to_pylist()
    scored_ids = supervision["example_id"].to_pylist()
    known = set(scored_ids) | set(dead["example_id"].to_pylist())
    return Verdict(
        acked_rows=len(acked),
        lost=len(acked - set(ids)),
        duplicated=len(ids) - len(set(ids)) + len(scored_ids) - len(set(scored_ids)),
        altered=_altered_examples(examples, sent_rows) + _altered_supervision(supervision, client, dataset, fm),
        unaccounted=len(set(ids) - known),
        dead_letters=dead.num_rows,
    )


def _table(path: Path) -> pa.Table:
    return pa.table(DeltaTable(path).to_pyarrow_dataset().to_table()) if path.exists() else pa.table({"example_id": []})


def _altered_examples(examples: pa.Table, sent_rows: int) -> int:
    expected = rows(0, sent_rows)
    place = pc.index_in(examples["example_id"], expected["example_id"].combine_chunks())
    invented = place.null_count
    kept, want = examples.filter(pc.is_valid(place)), expected.take(pc.drop_null(place))
    altered = np.zeros(kept.num_rows, bool)
    for name in ("event_time", "price", "user", "item"):
        same = pc.fill_null(pc.equal(kept[name], want[name]), False)
        both_null = pc.and_(pc.is_null(kept[name]), pc.is_null(want[name]))
        altered |= ~np.asarray(pc.or_(same, both_null))
    for name, plain in (("tags", lambda v: v), ("image", lambda v: np.array(v, "<f4").tobytes())):
        pairs = zip(kept[name].to_pylist(), want[name].to_pylist(), strict=True)
        altered |= np.array([a != plain(b) for a, b in pairs], bool)
    return invented + int(altered.sum())


def _altered_supervision(supervision: pa.Table, client: redis.Redis, dataset: str, fm: str) -> int:
    spec = DatasetSpec.model_validate(SPEC)
    numbers = [int(text, 16) for text in supervision["example_id"].to_pylist()]
    if not numbers:
        return 0
    inputs = rows(0, max(numbers) + 1).take(pa.array(numbers))
    logits, embeddings = expected_supervision(inputs, spec)
    stored = np.asarray(supervision["click__logit"])
    altered = ~np.isclose(stored, logits["click"], rtol=1e-5, atol=1e-5)
    packed = {name: supervision[name].to_pylist() for name in embeddings}
    for name, values in embeddings.items():
        pairs = zip(packed[name], values, strict=True)
        altered |= np.array([not _close(a, bytes(b)) for a, b in pairs], bool)
    altered |= _differs_online(supervision, packed, client, dataset, fm)
    return int(altered.sum())


def _close(a: bytes, b: bytes) -> bool:
    return bool(np.allclose(np.frombuffer(a, "<f2"), np.frombuffer(b, "<f2"), atol=2e-3))


def _differs_online(
    supervision: pa.Table, packed: Mapping[str, list[bytes]], client: redis.Redis, dataset: str, fm: str
) -> np.ndarray:
    """Compare each online value, read by its documented layout, with the offline row."""
    partitions = SPEC["partitions"]
    names = []
    for example_id in supervision["example_id"].to_pylist():
        digest = xxhash.xxh3_128_digest(example_id.encode())
        partition = int.from_bytes(digest[8:], "little") % partitions
        names.append(f"{{{dataset}.{partition}}}={fm}:".encode() + digest)
    values = [value for i in range(0, len(names), 5000) for value in client.mget(names[i : i + 5000])]
    logits = np.asarray(supervision["click__logit"], np.float32)
    (vectors,) = packed.values()
    rows_ = zip(values, logits, vectors, strict=True)
    return np.array(
        [value is None or value[24:28] != logit.tobytes() or value[28:] != vec for value, logit, vec in rows_]
    )
