"""`das lookup`: supervision by example_id, as a table, JSON or Parquet."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from das_service.cli.output import AsJson, InputError, Url, read_text, say_json, say_table, warn

if TYPE_CHECKING:
    import pyarrow as pa

_SHOWN_VALUES = 4


def lookup(
    dataset: Annotated[str, typer.Argument(help="Name of the dataset.")],
    example_ids: Annotated[list[str] | None, typer.Argument(help="Ids of the examples.")] = None,
    fms: Annotated[list[str] | None, typer.Option("--fm", help="FM to ask; may be given several times.")] = None,
    outputs: Annotated[
        list[str] | None, typer.Option("--output", help="Only these tasks and embeddings; several times.")
    ] = None,
    ids_file: Annotated[str | None, typer.Option("--ids-file", help="File with one id a line, `-` for stdin.")] = None,
    embedding_format: Annotated[
        str, typer.Option("--embedding-format", help="encoded, float16 or float32.")
    ] = "float32",
    out: Annotated[Path | None, typer.Option("--out", help="Write a Parquet file instead of printing.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Print what the FMs said of examples: one row per id, in the order given, with a status each.

    Statuses: present, pending (not scored yet), missing, failed, leaky, stale.

    Example: das lookup ads --fm teacher a1 a2 a3

    Example: das lookup ads --fm teacher --ids-file ids.txt --out supervision.parquet
    """
    from das_service.client import Client

    ids = [*(example_ids or []), *(_read_ids(ids_file) if ids_file else [])]
    if not ids:
        raise InputError("name example ids, or a file of them with --ids-file")
    if embedding_format not in {"encoded", "float16", "float32"}:
        raise InputError(f"--embedding-format {embedding_format} is not encoded, float16 or float32")
    with Client(url) as client:
        wanted = fms or _only_fm(client.list_fms(dataset), dataset)
        table = client.lookup(
            dataset,
            ids,
            fms=wanted,
            outputs=outputs or None,
            embedding_format=embedding_format,  # type: ignore[arg-type]
        )
    if out is not None:
        import pyarrow.parquet as pq

        pq.write_table(table, out)
        warn(f"{table.num_rows} rows in {out}")
    elif as_json:
        say_json(table.to_pylist())
    else:
        _print_table(table)


def _read_ids(path: str) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def _only_fm(fms: list[dict[str, object]], dataset: str) -> list[str]:
    names = [str(fm["fm"]) for fm in fms]
    if len(names) != 1:
        raise InputError(f"say which FM with --fm; dataset {dataset} has {', '.join(names) or 'none yet'}")
    return names


def _print_table(table: "pa.Table") -> None:
    rows = [[_cell(row[name]) for name in table.column_names] for row in table.to_pylist()]
    say_table(table.column_names, rows, empty="")


def _cell(value: object) -> object:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, list):
        shown = ", ".join(f"{float(item):.3g}" for item in value[:_SHOWN_VALUES])
        return f"[{shown}{', ...' if len(value) > _SHOWN_VALUES else ''}]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value
