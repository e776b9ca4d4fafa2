"""Joins of a caller's Parquet file with the supervision tables, in a process of its own, so that its memory counts.

`python -m loadtest.join das` joins by reference, window by window in the caller's order, to Arrow. `python -m
loadtest.join floor` is the floor: the same files joined on example_id by one DuckDB statement to Arrow, in no order (so
with the id among its columns), and with as much memory as it wants. Both read the caller's path from each line of stdin
and answer with a line of JSON; DAS_REDIS_URL and DAS_TABLES_URI say where server and tables are.
"""

import argparse
import json
import os
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb

from das_service.folder import Folder
from das_service.freed_memory import keep_freed_memory
from das_service.redis_client import connect
from das_service.registry import Registry, parse_catalog
from das_service.settings import Settings, load_settings
from das_service.supervision.answer import PRESENT, LookupQuery
from das_service.supervision.answer_size import bytes_per_row
from das_service.supervision.augment_files import iter_joined, list_sources, open_duck
from das_service.supervision.join import OfflineJoin, window_rows
from das_service.tables.offline_store import TableReader, table_place
from loadtest.lines import peak_mb
from schemas.tables import supervision_table

DATASET, FM = "load", "teacher"
_BATCH_ROWS = 100_000
_FLOOR = """
SELECT c.example_id, s.snapshot_id, s.trained_through, s.scored_at, s.click__logit, s.buy__logit, s.hidden
FROM read_parquet($caller) c JOIN read_parquet($files) s ON c.example_id = s.example_id
"""


def join_by_reference(caller: Path, settings: Settings) -> int:
    """Join as `das augment` does, up to the Arrow columns; give how many rows have supervision."""
    tables = Folder(settings.tables_uri)
    query = LookupQuery(fms=(FM,), embedding_format="encoded")
    with connect(settings) as client, closing(open_duck(settings.duckdb_memory_bytes)) as duck:
        catalog = parse_catalog(Registry(client, tables).read_copy())
        join = OfflineJoin(duck, tables, catalog, DATASET, query, client=client)
        rows = window_rows(bytes_per_row(catalog.fm(DATASET, FM).outputs, query, as_json=False))
        num_rows = 0
        for _, joined in iter_joined(list_sources(caller), join, window_rows=rows):
            num_rows += int(joined.counts[FM][PRESENT])
            del joined
        return num_rows


def join_in_one_statement(caller: Path, settings: Settings) -> int:
    """Join by the floor's statement; give how many rows come out."""
    reader = TableReader(table_place(Folder(settings.tables_uri), DATASET, supervision_table(FM)))
    reader.refresh()
    files = reader.files_of_days()
    config = {"threads": os.cpu_count() or 1, "preserve_insertion_order": False}
    with duckdb.connect(":memory:", config=config) as connection:
        joined = connection.sql(_FLOOR, params={"caller": [str(caller)], "files": files})
        return sum(batch.num_rows for batch in joined.to_arrow_reader(_BATCH_ROWS))


JOINS = {"das": join_by_reference, "floor": join_in_one_statement}


def run(which: str, caller: Path, settings: Settings) -> dict[str, Any]:
    """Give rows, seconds and the peak of this process's resident memory so far."""
    start = time.perf_counter()
    num_rows = JOINS[which](caller, settings)
    seconds = time.perf_counter() - start
    return {"rows": num_rows, "seconds": seconds, "peak_mb": peak_mb()}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=sorted(JOINS))
    which, settings = parser.parse_args().which, load_settings()
    if which == "das":
        keep_freed_memory()  # as `das augment` does
    for line in sys.stdin:
        print(json.dumps(run(which, Path(line.rstrip("\n")), settings)), flush=True)


if __name__ == "__main__":
    main()
