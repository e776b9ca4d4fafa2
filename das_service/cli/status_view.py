"""The one screen of `das status`, made of two looks at the service."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

_SEPARATOR = " · "
_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60))


def build_view(state: Mapping[str, Any], former: Mapping[str, Any], *, seconds: float) -> RenderableType:
    """Give the screen. former: an earlier look, `seconds` ago, for the rates."""
    parts: list[RenderableType] = [_verdict(state), _roles(state)]
    for name, dataset in sorted(state.get("datasets", {}).items()):
        before = former.get("datasets", {}).get(name, dataset)
        parts += ["", _dataset(name, dataset, before, seconds)]
        for fm_name, fm in sorted(dataset.get("fms", {}).items()):
            parts.append(_fm(fm_name, fm, before.get("fms", {}).get(fm_name, fm), seconds))
    return Group(*parts)


def _verdict(state: Mapping[str, Any]) -> str:
    word = "[bold green]ready[/]" if state["ready"] else "[bold red]not ready[/]"
    lines = [f"{word}  {escape(str(state['url']))}"]
    lines += [f"  [red]![/] {escape(str(problem))}" for problem in state.get("problems", [])]
    return "\n".join([*lines, *[f"  [yellow]![/] {escape(str(notice))}" for notice in state.get("notices", [])]])


def _roles(state: Mapping[str, Any]) -> RenderableType:
    if not state["roles"]:
        return ""
    table = _table("role", "pid", "restarts", "")
    for role in sorted(state["roles"], key=lambda role: str(role["role"])):
        dead = role.get("pid") is None or (role.get("alive") is False and role.get("instance", "").find("no beat") < 0)
        restarts = role.get("restarts", 0)
        table.add_row(
            str(role["role"]),
            str(role.get("pid") or "-"),
            f"[yellow]{restarts}[/]" if restarts else "0",
            "[red]down[/]" if dead else "",
        )
    return table


def _dataset(name: str, dataset: Mapping[str, Any], before: Mapping[str, Any], seconds: float) -> RenderableType:
    words = [
        f"accepted {_count(dataset.get('accepted'))} ({_rate(dataset, before, 'accepted', seconds)})",
        f"distinct {_count(dataset.get('distinct'))}",
        f"duplicates {_count(dataset.get('duplicates'))}",
        f"conflicting {_count(dataset.get('conflicting'))}",
        *_diverted(dataset),
        f"in the log {_count(dataset.get('in_log'))}",
        f"logs {_bytes(dataset.get('backlog_bytes'))}",
    ]
    if dataset.get("closed"):
        words.append(f"closed {_count(dataset['closed'])} (up to {str(dataset.get('watermark') or '-')[:19]})")
        words.append(f"late labels {_count(dataset.get('late_labels'))}")
    return f"[bold]dataset {escape(name)}[/]  {_SEPARATOR.join(words)}"


def _fm(name: str, fm: Mapping[str, Any], before: Mapping[str, Any], seconds: float) -> RenderableType:
    failed = fm.get("failed") or 0
    words = [
        f"snapshot {escape(str(fm['active']))}" if fm.get("active") else "[yellow]no snapshot is active[/]",
        f"scored {_count(fm.get('scored'))} ({_rate(fm, before, 'scored', seconds)})",
        f"pending {_count(fm.get('pending'))}, the oldest {_age(fm.get('oldest_age_seconds'))}",
        f"[red]failed {failed:,}[/]" if failed else "failed 0",
        *_diverted(fm),
        f"coverage {_ratio(fm.get('coverage'))}",
        f"freshness gap {_gap(fm.get('trained_through'))}",
    ]
    return f"  FM {escape(name)}{'' if fm.get('required', True) else ' (optional)'}  {_SEPARATOR.join(words)}"


def _diverted(counts: Mapping[str, Any]) -> list[str]:
    """Give what no table takes, in words; nothing while there is nothing."""
    diverted = counts.get("diverted") or 0
    return [f"[red]diverted {diverted:,}[/]"] if diverted else []


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    return table


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _rate(now: Mapping[str, Any], before: Mapping[str, Any], field: str, seconds: float) -> str:
    gained = now.get(field, 0) - before.get(field, 0)
    return f"{gained / seconds:,.0f}/s" if seconds > 0 else "-/s"


def _gap(trained_through: str | None) -> str:
    """Give how far an event of now is from the last label that the snapshot saw."""
    if trained_through is None:
        return "-"
    return _age((datetime.now(UTC) - datetime.fromisoformat(trained_through)).total_seconds())


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, size in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
