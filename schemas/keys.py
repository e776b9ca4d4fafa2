"""Redis keys, partitions and digests. All keys of a partition share a hash tag, so one script touches one slot.

The 16-byte digest of an example_id (xxh3_128 of its UTF-8) is made once, at the door: its second half chooses the
partition, its first half is the int64 that joins start from, the whole is the example's key in the online store.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

REGISTRY = "das:registry"
BEATS = "das:beats"
COMPACT = "das:compact"  # hash: dataset -> request of `das compact` that the sink has not met yet
CLOSED_THROUGH = "das:closed-through"  # hash: dataset -> microseconds: what is closed later has a later closed_at
PROBE = "das:probe"


def digests(example_ids: Iterable[bytes]) -> bytes:
    """Give the 16-byte digests of the ids (UTF-8), one after the other."""
    digest = xxhash.xxh3_128_digest
    return b"".join(map(digest, example_ids))


def digest_array(example_ids: pa.Array) -> pa.Array:
    """Give the digests of a string array without nulls as fixed_size_binary(16)."""
    blob = digests(example_ids.cast(pa.binary()).to_pylist())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(example_ids), [None, pa.py_buffer(blob)])


def digest_words(digest: pa.Array) -> NDArray[np.uint64]:
    """Give a fixed_size_binary(16) array without nulls as (B, 2) unsigned words."""
    data = np.frombuffer(digest.buffers()[1], np.uint8)
    first, last = 16 * digest.offset, 16 * (digest.offset + len(digest))
    return data[first:last].view("<u8").reshape(-1, 2)


def digest_bytes(digest: pa.Array) -> bytes:
    """Give the digests of the array as one blob."""
    return digest_words(digest).tobytes()


def example_hashes(digest: pa.Array) -> NDArray[np.int64]:
    """Give the int64 that the tables' `_example_hash` column holds."""
    return np.ascontiguousarray(digest_words(digest)[:, 0]).view(np.int64)


def partitions_of(digest: pa.Array, num_partitions: int) -> NDArray[np.int64]:
    """Give each example's partition."""
    return (digest_words(digest)[:, 1] % np.uint64(num_partitions)).astype(np.int64)


def tag(dataset: str, partition: int) -> str:
    """Give the hash tag of a partition."""
    return f"{{{dataset}.{partition}}}"


def counters(dataset: str, partition: int) -> str:
    """Hash: epoch; per log its last sequence number, cumulative rows and bytes, and where the kept part begins.

    After a loss also what survived of it; of a rescore log how many rows are planned for it and not in it yet.
    """
    return f"{tag(dataset, partition)}:counters"


def log(dataset: str, partition: int, kind: str) -> str:
    """Stream of that kind: examples, rescore:<fm>, scored:<fm> or dead:<fm>."""
    return f"{tag(dataset, partition)}:{kind}"


def generation(dataset: str, partition: int, fm: str) -> str:
    """Number that a publishing worker must know: raised when a snapshot is withdrawn."""
    return f"{tag(dataset, partition)}:generation:{fm}"


def attempts(dataset: str, partition: int, fm: str, kind: str) -> str:
    """Hash: id of an entry of that kind of log -> the row ranges of it that are being tried."""
    return f"{tag(dataset, partition)}:attempts:{fm}:{kind}"


def chunk(dataset: str, partition: int, kind: str, content: bytes | memoryview) -> bytes:
    """Mark of a chunk that was logged in that kind of log, by the digest of its content."""
    digest = xxhash.xxh3_128(f"{kind}/".encode())
    digest.update(content)
    return f"{tag(dataset, partition)}:chunk:".encode() + digest.digest()


def online_prefix(dataset: str, partition: int, fm: str) -> bytes:
    """What an example's online key begins with; its digest follows."""
    return f"{tag(dataset, partition)}={fm}:".encode()


def group(fm: str) -> str:
    """Consumer group of an FM."""
    return f"fm:{fm}"


def owner(role: str) -> str:
    """Which process works while the others of its role stand by."""
    return f"das:owner:{role}"
