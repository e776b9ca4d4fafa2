"""What the measurements say, for people: a table at the end of the run, result files, and the README's "Measured".

`python -m loadtest.report` renders the newest result file into the README again.
"""

import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "loadtest" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->"
_RATIO = "ratio: of the medians of all rounds. quartiles: of each round's own ratio, so that the ratio may lie outside."
_WHAT = {
    "ingest": (
        "ingest over HTTP, {chunk_rows:,}-row Arrow chunks, answered after the fsync",
        "XADD of the same entries, as many connections",
    ),
    "lookup": (
        "lookup of {ids:,} random ids over HTTP, 5 % unknown, {keys:,} keys in the store",
        "MGET of the same keys with redis-py",
    ),
    "worker": (
        "worker, compute-bound FM, from XREADGROUP to the reply of the publish script",
        "the model's forward over the same batches, ready-made",
    ),
    "worker_free": ("worker, nearly free FM", "likewise"),
    "sink": (
        "sink, from the log to durable rows of `examples`, {commit_rows:,} a commit",
        "`write_deltalake` of the same rows, no repeats looked for, no fsync",
    ),
    "augment": (
        "augment by reference to Arrow, {rows:,} rows in the order of time, peak {peak_mb:,} MB",
        "the same join as one unordered DuckDB statement",
    ),
    "augment_http": ("augment over HTTP, the same rows, peak of the API {peak_mb:,} MB", "likewise"),
    "batches": (
        "training batches to Arrow, {rows:,} closed rows with features, labels and supervision, in ready order, peak "
        "{peak_mb:,} MB",
        "the join of the three tables as one unordered DuckDB statement",
    ),
    "batches_http": ("training batches over HTTP, the same rows, peak of the API {peak_mb:,} MB", "likewise"),
    "loader": (
        "the loader, {rows:,} such rows to tensors in batches of {batch_rows:,}, peak of the trainer {peak_mb:,} MB",
        "the joined rows from Parquet with pyarrow, to the same tensors",
    ),
}


def lines(record: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Give (what, its floor, the line) of each line that the record has."""
    for name, (what, floor) in _WHAT.items():
        if name in record:
            yield what.format(**record[name]), floor, record[name]


def machine(folder: Path) -> dict[str, Any]:
    """Give what the numbers depend on; the folder is where everything is written."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.processor())
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "filesystem": filesystem(folder),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def filesystem(folder: Path) -> str:
    """Give the type of the file system that a folder lies on."""
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    place = folder.resolve()
    return next((mounts[parent] for parent in (place, *place.parents) if parent in mounts), "unknown")


def print_table(console: Console, record: Mapping[str, Any]) -> None:
    """Print the record so that a person sees which stage is how far from its floor."""
    table = Table(title="Measured", box=box.SIMPLE_HEAVY, title_justify="left", caption=_RATIO, caption_justify="left")
    table.add_column("stage", max_width=60)
    for name in ("rows/s", "floor", "ratio", "quartiles"):
        table.add_column(name, justify="right")
    for what, _, line in lines(record):
        low, high = line["quartiles"]["ratio"]
        row = (f"{line['rows_per_s']:,}", f"{line['floor_rows_per_s']:,}", f"{line['ratio']:.2f}")
        table.add_row(what, *row, f"{low:.2f}-{high:.2f}")
    console.print(table)
    for text in _remarks(record):
        console.print(text)


def _remarks(record: Mapping[str, Any]) -> Iterator[str]:
    if "end_to_end" in record:
        found = record["end_to_end"]
        used = ", ".join(f"{role} {s:.1f}" for role, s in found["cpu_seconds_per_million"].items())
        yield (
            f"End to end, {found['examples']:,} rows with a nearly free FM, from the first POST to the last row in "
            "lookup and in Delta, before the server's first rewrite of its log: "
            f"{found['examples_per_s']:,} examples/s. CPU seconds for a million rows: {used}."
        )
    if "sink" in record:
        spent = record["sink"]["seconds_per_million"]
        yield (
            f"For a million rows the sink looks for repeats for {spent['dedup']:.2f} s and waits for fsync for "
            f"{spent['fsync']:.2f} s."
        )
    if "augment" in record:
        random = record["augment"]["random_order"]
        peak_mb = record["augment"].get("to_parquet_peak_mb")  # older results lack it
        peak = "" if peak_mb is None else f", peak {peak_mb:,} MB"
        yield (
            "By reference, rows in random order, one round that nothing has warmed up: "
            f"{random['rows_per_s']:,} rows/s, {random['ratio']:.2f} of the floor. "
            "In the order of time with the Parquet file written: "
            f"{record['augment']['to_parquet_rows_per_s']:,} rows/s{peak}."
        )


def to_markdown(record: Mapping[str, Any]) -> str:
    """Give the README's table."""
    on = record["machine"]
    rows = [
        f"| {what} | {line['rows_per_s']:,} | {line['floor_rows_per_s']:,} ({floor}) | {line['ratio']:.2f} |"
        for what, floor, line in lines(record)
    ]
    head = (
        f"{record['date']}, {on['cores']} cores ({on['cpu']}, {on['memory_gb']} GB, {on['filesystem']}), generator, "
        f"roles and server sharing them. The machine's load at the start was {on['load_at_start']}."
    )
    return "\n".join(
        [head, "", "| what | rows/s | floor of the same run | ratio |", "|---|---|---|---|", *rows, ""]
    ) + ("\n" + "\n\n".join(_remarks(record)) + "\n")


def write_result(record: Mapping[str, Any], name: str) -> Path:
    """Keep the record as loadtest/results/<date>-<name>.json and render it into the README."""
    path = RESULTS / f"{record['date']}-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    render_readme()
    return path


def newest_result() -> dict[str, Any]:
    """Give the result of the whole bench that was finished last."""
    results = [dict(json.loads(path.read_text())) for path in RESULTS.glob("*.json")]
    return max(results, key=lambda record: str(record.get("finished_at", "")))


def rendered(readme: str, record: Mapping[str, Any]) -> str:
    """Give the README with its table made anew from the record."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{to_markdown(record)}{END}{after}"


def render_readme() -> None:
    """Bring the README's table up to date."""
    README.write_text(rendered(README.read_text(), newest_result()))


if __name__ == "__main__":
    render_readme()
