"""A bar on stderr for the calls of the client that take long. It is drawn by rich, which the client does without."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from das_service.client.errors import DasClientError
from das_service.client.ingest import IngestResult

Account = TypeVar("Account", int, IngestResult)  # rows done, or what became of them


@contextmanager
def shown_progress(
    what: str,
    data: Any,  # noqa: ANN401 - what is sent
    on_progress: Callable[[Account], None] | None,
    *,
    progress: bool,
) -> Iterator[Callable[[Account], None]]:
    """Give what is to hear each account so far: it moves the bar and calls on_progress, where these are wanted.

    The bar has an end where data is a table or a frame. Where stderr is no terminal, only its end is written.

    Raises:
        DasClientError: The bar can't be drawn: rich is not installed (code `no_rich`).
    """
    listeners = [] if on_progress is None else [on_progress]

    def tell(account: Account) -> None:
        for listener in listeners:
            listener(account)

    if not progress:
        yield tell
        return
    try:
        from rich import progress as bars  # noqa: PLC0415 - the client works without
        from rich.console import Console  # noqa: PLC0415
    except ModuleNotFoundError as error:
        detail = "progress=True draws with rich, which is not installed: pip install rich"
        raise DasClientError(detail, code="no_rich") from error
    count = bars.TextColumn("{task.description}: {task.completed:,.0f} rows")
    columns = (count, bars.BarColumn(), bars.TimeElapsedColumn(), bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=_num_rows(data))
        listeners.insert(0, lambda account: bar.update(task, completed=_num_done(account)))
        yield tell


def _num_done(account: int | IngestResult) -> int:
    return account if isinstance(account, int) else account.accepted + account.rejected


def _num_rows(data: Any) -> int | None:  # noqa: ANN401
    """Give the rows of an Arrow table or batch, or of a frame; None for what is read as it is sent."""
    if hasattr(data, "num_rows"):
        return int(data.num_rows)
    return len(data) if hasattr(data, "columns") and hasattr(data, "__len__") else None
