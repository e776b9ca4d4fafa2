"""TaobaoAd as impressions with time stamps: one Parquet file per day, from the raw files of Tianchi's data set 56.

`python -m experiments.data.taobao_ad SOURCE FOLDER`, where SOURCE has the files as they are published, unpacked (.csv)
or each compressed again (.csv.gz):

    raw_sample      user, time_stamp, adgroup_id, pid, nonclk, clk          26 M impressions of 8 days in May 2017
    ad_feature      adgroup_id, cate_id, campaign_id, customer, brand, price
    user_profile    userid, cms_segid, cms_group_id, final_gender_code, age_level, pvalue_level, shopping_level,
                    occupation, new_user_class_level                         about 5 % of the users have none
    behavior_log    user, time_stamp, btag, cate, brand                      700 M; may be absent: no histories then

A day begins at midnight in Beijing, as the data set's own split has it (seven days to train on, the last to test on);
event times are UTC. A file holds example_id, event_time and the features of `dataset_spec`, then `click` (float32, 0 or
1), in the order (event_time, example_id). A history is what the user did strictly before the impression: the category,
brand (0: unknown) and kind (pv, cart, fav, buy) of the last so many behaviours, oldest first. Equal rows of raw_sample
are told apart by a number at the end of their id.

DuckDB does the work in bounded memory, spilling into the folder; users go through it in buckets. The data is Alibaba's,
under the licence on its page: https://tianchi.aliyun.com/dataset/56.
"""

import argparse
import gzip
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress, TaskID

from schemas.dataset import TIMESTAMP

Progressed: TypeAlias = Callable[[str, int, int], None]
LABEL_COLUMN: Final = "click"
_FILES: Final[dict[str, dict[str, str]]] = {
    "raw_sample": {
        "user": "BIGINT", "time_stamp": "BIGINT", "adgroup_id": "BIGINT", "pid": "VARCHAR", "nonclk": "TINYINT",
        "clk": "TINYINT",
    },
    "ad_feature": {
        "adgroup_id": "BIGINT", "cate_id": "BIGINT", "campaign_id": "BIGINT", "customer": "BIGINT", "brand": "BIGINT",
        "price": "DOUBLE",
    },
    "user_profile": {
        "userid": "BIGINT", "cms_segid": "BIGINT", "cms_group_id": "BIGINT", "final_gender_code": "BIGINT",
        "age_level": "BIGINT", "pvalue_level": "BIGINT", "shopping_level": "BIGINT", "occupation": "BIGINT",
        "new_user_class_level": "BIGINT",
    },
    "behavior_log": {
        "user": "BIGINT", "time_stamp": "BIGINT", "btag": "VARCHAR", "cate": "BIGINT", "brand": "BIGINT",
    },
}  # fmt: skip
_OPTIONAL: Final = ("behavior_log",)
_AD: Final = ("cate_id", "campaign_id", "customer", "brand")
_PROFILE: Final = tuple(_FILES["user_profile"])[1:]
_HISTORY: Final = {"history_cates": "cate", "history_brands": "brand", "history_kinds": "btag"}
_BEIJING_SECONDS: Final = 8 * 3600
_BUCKETS: Final = 64
_WORK: Final = ".taobao-ad"
_ROW_GROUP_ROWS: Final = 131_072


@dataclass(frozen=True, slots=True, kw_only=True)
class DayFile:
    """One day (YYYY-MM-DD, in Beijing) of impressions on disk."""

    day: str
    path: Path
    num_rows: int
    num_positives: int


def dataset_spec(*, history_length: int = 50) -> dict[str, Any]:
    """Give the dataset to declare; history_length 0: without histories."""
    category = {"type": "category", "value_type": "int64"}
    lists = [
        {"name": name, "type": "category_list", "value_type": "string" if column == "btag" else "int64",
         "max_length": history_length} for name, column in _HISTORY.items()
    ]  # fmt: skip
    return {
        "entity_key": ["user_id"],
        "features": [
            *({"name": name, **category} for name in ("user_id", "adgroup_id")),
            {"name": "pid", "type": "category", "value_type": "string"},
            *({"name": name, **category, "nullable": True} for name in (*_AD, *_PROFILE)),
            *({"name": name, **category} for name in ("hour", "weekday")),
            {"name": "price", "type": "float", "nullable": True},
            *(lists if history_length else ()),
        ],
        "tasks": [{"name": LABEL_COLUMN, "label_window_seconds": 3600, "negative_if_silent": True}],
        "partitions": 4,
        "table_granularity": "day",
        "max_age_days": None,
    }


def build_impressions(
    source: Path,
    folder: Path,
    *,
    history_length: int = 50,
    memory_bytes: int = 2_000_000_000,
    num_threads: int = 2,
    on_progress: Progressed | None = None,
) -> tuple[DayFile, ...]:
    """Give one `day_YYYY-MM-DD.parquet` in folder per day of raw_sample, in order; files of earlier runs go.

    Without behavior_log in source there are no histories. on_progress receives what is done, how far, and of how much.

    Raises:
        FileNotFoundError: A file that is needed is not in source.
        ValueError: A file has other columns or a value that is none of theirs; history_length is negative.
    """
    if history_length < 0:
        raise ValueError(f"history_length is {history_length}; it is 0 or more")
    places, say = _find_files(source), on_progress or (lambda *_: None)
    length = history_length if "behavior_log" in places else 0
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / _WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    config = {
        "threads": num_threads, "memory_limit": f"{memory_bytes}B", "temp_directory": str(work / "spill"),
        "preserve_insertion_order": False,
    }  # fmt: skip
    try:
        with duckdb.connect(":memory:", config=config) as con:
            con.execute("SET enable_progress_bar = false")
            days = _split(con, places, work, with_behaviours=length > 0, on_progress=say)
            if length:
                _add_histories(con, work, length=length, on_progress=say)
            files = []
            for number, day in enumerate(days):
                say("days", number, len(days))
                files.append(_write_day(con, work, day=day, length=length))
            say("days", len(days), len(days))
        for stale in folder.glob("day_????-??-??.parquet"):
            stale.unlink()
        return tuple(replace(file, path=file.path.rename(folder / file.path.name)) for file in files)
    except duckdb.Error as error:
        raise ValueError(_told(error)) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _find_files(source: Path) -> dict[str, Path]:
    """Give where each file is, once its columns are known to be the right ones."""
    found = {}
    for name, columns in _FILES.items():
        path = next((path for ending in (".csv", ".csv.gz") if (path := source / f"{name}{ending}").is_file()), None)
        if path is not None:
            _check_columns(path, columns)
            found[name] = path
        elif name not in _OPTIONAL:
            raise FileNotFoundError(
                f"{source} has no {name}.csv; unpack the files of https://tianchi.aliyun.com/dataset/56 there"
            )
    return found


def _check_columns(path: Path, columns: dict[str, str]) -> None:
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            names = [name.strip() for name in file.readline(10_000).split(",")]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if names != list(columns):
        raise ValueError(f"{path} has the columns {', '.join(names)}; it should have {', '.join(columns)}")


def _csv(path: Path, columns: dict[str, str]) -> str:
    listed = ", ".join(f"'{name}': '{kind}'" for name, kind in columns.items())
    quoted = str(path).replace("'", "''")
    options = "auto_detect = false, header = true, delim = ',', nullstr = ['', 'NULL']"
    return f"read_csv('{quoted}', {options}, columns = {{{listed}}})"


def _told(error: duckdb.Error) -> str:
    """Give what DuckDB says in one line; of a CSV file its name, the line, and what is wrong with it."""
    lines = str(error).splitlines()
    file = next((line.split("=", 1)[1].strip() for line in lines if line.startswith("  file =")), None)
    return lines[0] if file is None else f"{file}: {'; '.join(lines[:3]).split(': ', 1)[-1]}"


def _split(
    con: duckdb.DuckDBPyConnection,
    places: dict[str, Path],
    work: Path,
    *,
    with_behaviours: bool,
    on_progress: Progressed,
) -> list[str]:
    """Write the impressions with their features, and the behaviours, into buckets of users; give the days there are."""
    for name, path in places.items():
        con.execute(f"CREATE VIEW {name} AS SELECT * FROM {_csv(path, _FILES[name])}")
    _refuse_repeats(con, places, "ad_feature", "adgroup_id")
    _refuse_repeats(con, places, "user_profile", "userid")
    buckets = _BUCKETS if with_behaviours else 1
    total = 1 + with_behaviours
    on_progress("files", 0, total)
    _check_samples(con)
    of_ad, of_user = ", ".join(f"a.{name}" for name in (*_AD, "price")), ", ".join(f"u.{name}" for name in _PROFILE)
    con.execute(
        f"COPY (SELECT s.user AS user_id, s.adgroup_id, s.pid, s.time_stamp, s.clk, {of_ad}, {of_user}, "
        "row_number() OVER (PARTITION BY s.user, s.time_stamp, s.adgroup_id, s.pid ORDER BY s.clk) AS copy, "
        f"strftime(make_timestamp((s.time_stamp + {_BEIJING_SECONDS}) * 1000000), '%Y-%m-%d') AS day, "
        f"s.user % {buckets} AS bucket FROM raw_sample s LEFT JOIN ad_feature a USING (adgroup_id) "
        f"LEFT JOIN user_profile u ON u.userid = s.user) TO '{_at(work, 'samples')}' "
        "(FORMAT parquet, PARTITION_BY (bucket, day))"
    )
    on_progress("files", 1, total)
    if with_behaviours:
        con.execute(
            f"COPY (SELECT *, user % {buckets} AS bucket FROM behavior_log) TO '{_at(work, 'behaviours')}' "
            "(FORMAT parquet, PARTITION_BY (bucket))"
        )
        on_progress("files", total, total)
    found = {path.name.removeprefix("day=") for path in work.glob("samples/bucket=*/day=*")}
    return sorted(found)


def _refuse_repeats(con: duckdb.DuckDBPyConnection, places: dict[str, Path], name: str, key: str) -> None:
    found = con.sql(f"SELECT {key} FROM {name} GROUP BY {key} HAVING count(*) > 1 ORDER BY {key} LIMIT 1").fetchall()
    if found:
        raise ValueError(f"{places[name]} has {key} {found[0][0]} more than once: of which one are the impressions?")


def _check_samples(con: duckdb.DuckDBPyConnection) -> None:
    keys = ("user", "time_stamp", "adgroup_id", "pid")
    ((unlabelled, unnamed),) = con.sql(
        "SELECT count(*) FILTER (clk IS NULL OR nonclk IS NULL OR clk NOT IN (0, 1) OR nonclk <> 1 - clk), "
        f"count(*) FILTER ({' OR '.join(f'{key} IS NULL' for key in keys)}) FROM raw_sample"
    ).fetchall()
    if unlabelled:
        raise ValueError(f"raw_sample has {unlabelled} rows whose clk and nonclk are not 0 and 1, or 1 and 0")
    if unnamed:
        raise ValueError(f"raw_sample has {unnamed} rows without {', '.join(keys[:-1])} or {keys[-1]}")


def _add_histories(con: duckdb.DuckDBPyConnection, work: Path, *, length: int, on_progress: Progressed) -> None:
    """Write each bucket's impressions again, with what their users did before."""
    buckets = sorted(work.glob("samples/bucket=*"))
    lists = ", ".join(f"list({column} ORDER BY nth) AS {name}" for name, column in _HISTORY.items())
    types = {"cate": "BIGINT", "brand": "BIGINT", "btag": "VARCHAR"}
    last = ", ".join(
        f"coalesce(list_slice(whole.{name}, greatest(place.nth - {length - 1}, 1), place.nth), []::{types[column]}[]) "
        f"AS {name}" for name, column in _HISTORY.items()
    )  # fmt: skip
    for number, bucket in enumerate(buckets):
        on_progress("histories", number, len(buckets))
        done = work / "behaviours" / bucket.name
        rows = f"read_parquet('{_at(done, '*.parquet')}')" if done.exists() else "(FROM behavior_log LIMIT 0)"
        con.execute(
            "CREATE OR REPLACE TEMP VIEW past AS SELECT *, row_number() OVER (PARTITION BY user ORDER BY time_stamp, "
            "btag, cate, brand) AS nth FROM (SELECT * REPLACE (coalesce(cate, 0) AS cate, coalesce(brand, 0) AS brand) "
            f"FROM {rows})"
        )
        con.execute(
            f"COPY (WITH whole AS (SELECT user, {lists} FROM past GROUP BY user), "
            "place AS (SELECT user, time_stamp, max(nth) AS nth FROM past GROUP BY user, time_stamp) "
            f"SELECT s.*, {last} FROM read_parquet('{_at(bucket, '*/*.parquet')}', hive_partitioning = true, "
            "hive_types_autocast = false) s "
            "ASOF LEFT JOIN place ON s.user_id = place.user AND s.time_stamp > place.time_stamp "
            f"LEFT JOIN whole ON whole.user = place.user) TO '{_at(work, 'joined')}' "
            "(FORMAT parquet, PARTITION_BY (bucket, day), APPEND)"
        )
        shutil.rmtree(bucket)
        shutil.rmtree(done, ignore_errors=True)
    on_progress("histories", len(buckets), len(buckets))


def _write_day(con: duckdb.DuckDBPyConnection, work: Path, *, day: str, length: int) -> DayFile:
    local = f"time_stamp + {_BEIJING_SECONDS}"
    columns = {
        "example_id": "concat_ws('-', user_id, time_stamp, adgroup_id, pid, nullif(copy, 1))",
        "event_time": "time_stamp * 1000000",
        "hour": f"({local}) // 3600 % 24",
        "weekday": f"(({local}) // 86400 + 3) % 7",  # 1970-01-01 was a Thursday; Monday is 0
        LABEL_COLUMN: "clk",
    }
    schema, where = _file_schema(length), "joined" if length else "samples"
    chosen = ", ".join(f"{columns.get(name, name)} AS {name}" for name in schema.names)
    rows = con.sql(
        f"SELECT {chosen} FROM read_parquet('{_at(work, where)}/*/day={day}/*.parquet') ORDER BY event_time, example_id"
    )
    path = work / f"day_{day}.parquet"
    num_rows = num_positives = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in rows.to_arrow_reader(_ROW_GROUP_ROWS):
            table = pa.Table.from_batches([batch]).cast(schema)
            writer.write_table(table)
            num_rows += table.num_rows
            num_positives += int(table[LABEL_COLUMN].to_numpy().sum())
    return DayFile(day=day, path=path, num_rows=num_rows, num_positives=num_positives)


def _file_schema(length: int) -> pa.Schema:
    types = {"float": pa.float32(), "int64": pa.int64(), "string": pa.string()}
    fields = [
        pa.field("example_id", pa.string(), nullable=False), pa.field("event_time", TIMESTAMP, nullable=False)
    ]  # fmt: skip
    for feature in dataset_spec(history_length=length)["features"]:
        kind = types[feature.get("value_type", feature["type"])]
        is_list = feature["type"] == "category_list"
        fields.append(pa.field(feature["name"], pa.list_(kind) if is_list else kind, nullable="nullable" in feature))
    return pa.schema([*fields, pa.field(LABEL_COLUMN, pa.float32(), nullable=False)])


def _at(folder: Path, name: str) -> str:
    """Give a path as it stands in a statement."""
    return str(folder / name).replace("'", "''")


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; give the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.data.taobao_ad",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="the folder with raw_sample.csv and the others")
    parser.add_argument("folder", type=Path, help="where the days go")
    parser.add_argument("--history-length", type=int, default=50, help="behaviours at most; 0: none")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    tasks: dict[str, TaskID] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        progress.update(tasks[what], completed=done)

    try:
        with Progress(console=console) as progress:
            files = build_impressions(
                options.source, options.folder, history_length=options.history_length, on_progress=show
            )
    except (FileNotFoundError, ValueError) as error:
        console.print(f"[red]{error}[/red]")
        return 1
    for file in files:
        print(f"{file.path}: {file.num_rows:,} impressions, {file.num_positives:,} clicked")
    return 0


if __name__ == "__main__":
    sys.exit(main())
