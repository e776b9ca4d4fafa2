"""The table of docs/configuration.md, made from the settings; `python -m das_service.settings_table` writes it."""

import json
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from das_service.settings import MIB, Settings

BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"
_TYPES = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", SecretStr: "text, secret"}


def build_table(settings: type[BaseSettings] = Settings) -> str:
    """Give the settings as a Markdown table, one row per variable, in their order."""
    rows = ["| variable | value | default | meaning |", "|---|---|---|---|"]
    for name, field in settings.model_fields.items():
        cells = [f"`DAS_{name.upper()}`", _kind(field), _default(field), field.description or ""]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def replace_table(document: str) -> str:
    """Give the document with the present table between its markers."""
    before, rest = document.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{build_table()}\n{END}{after}"


def _kind(field: FieldInfo) -> str:
    kinds = [kind for kind in _members(field.annotation) if kind is not type(None)]
    text = " or ".join(_words(kind) for kind in kinds)
    bounds = [_bound(item) for item in field.metadata]
    return ", ".join([text, *[bound for bound in bounds if bound]])


def _members(annotation: Any) -> tuple[Any, ...]:  # noqa: ANN401 - a type
    return get_args(annotation) if get_origin(annotation) in {Union, types.UnionType} else (annotation,)


def _words(kind: Any) -> str:  # noqa: ANN401 - a type
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    return _TYPES.get(kind, "JSON object")


def _bound(item: object) -> str:
    for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        value = getattr(item, attribute, None)
        if value is not None:
            return f"{sign} {_number(value)}"
    return ""


def _default(field: FieldInfo) -> str:
    value = field.get_default()
    if value is None:
        return "not set"
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, bool | dict):
        return f"`{json.dumps(value)}`"
    return f"`{value}`" if not isinstance(value, int) else _number(value)


def _number(value: float) -> str:
    return f"{value // MIB} MiB" if isinstance(value, int) and value >= MIB and value % MIB == 0 else f"`{value}`"


def main() -> None:
    """Bring docs/configuration.md, or the file that is named, up to date."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/configuration.md")
    path.write_text(replace_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
