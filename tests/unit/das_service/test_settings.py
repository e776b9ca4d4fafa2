"""Settings: what is refused, and that the documentation says what there is."""

from pathlib import Path

import pytest
from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings

from das_service.settings import Settings, SettingsError, load_settings
from das_service.settings_table import BEGIN, END, build_table, replace_table

CONFIGURATION = Path(__file__).parents[3] / "docs" / "configuration.md"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"DAS_{name.upper()}", raising=False)


def test_an_unknown_variable_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"unknown setting DAS_COMIT_ROWS; docs/configuration\.md lists them"):
        load_settings({"DAS_COMIT_ROWS": "3", "DAS_COMMIT_ROWS": "3", "PATH": "/bin"})


def test_a_value_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAS_COMMIT_ROWS", "many")
    with pytest.raises(SettingsError, match="DAS_COMMIT_ROWS: Input should be a valid integer"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("BIND", "foo", "'foo' is not host:port"),
        ("BIND", "1.2.3.4:", "is not host:port"),
        ("PROBE_BIND", "0.0.0.0:65536", "is not host:port"),
        ("PROBE_BIND", "a:\u00b2", "is not host:port"),
        ("TABLES_URI", "gs://bucket/tables", "is not a path, file:// or s3://"),
        ("SNAPSHOTS_URI", "https://host/x", "is not a path, file:// or s3://"),
        ("REDIS_URL", "log:secret", "does not begin with redis://"),
        ("REDIS_URL", "http://:secret@[", "Invalid IPv6 URL"),
        ("TOKEN", "secr\u00e9t", "has a character that no header can hold"),
        ("STORAGE_OPTIONS", "{'a': 1}", "storage_options"),
    ],
)
def test_a_value_that_can_not_work_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(f"DAS_{name}", value)
    with pytest.raises(SettingsError, match=message) as refused:
        load_settings()
    assert "secr" not in str(refused.value)


@pytest.mark.parametrize(("value", "token"), [("abc\n", "abc"), ("", None), (" \n", None)])
def test_white_space_around_a_token_is_left_out(monkeypatch: pytest.MonkeyPatch, value: str, token: str | None) -> None:
    monkeypatch.setenv("DAS_TOKEN", value)
    found = load_settings().token
    assert (found and found.get_secret_value()) == token


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAS_COMMIT_ROWS", "7")
    monkeypatch.setenv("DAS_STORAGE_OPTIONS", '{"region": "eu"}')
    settings = load_settings()
    assert (settings.commit_rows, settings.storage_options) == (7, {"region": "eu"})


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAS_TOKEN", "abc123")
    monkeypatch.setenv("DAS_REDIS_URL", "redis://:abc123@log:6379/0")
    assert "abc123" not in repr(load_settings())


def test_every_setting_says_what_it_is_for() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_the_documentation_lists_the_settings() -> None:
    """`python -m das_service.settings_table` writes the table."""
    written = CONFIGURATION.read_text(encoding="utf-8")
    assert written.split(BEGIN)[1].split(END)[0].strip() == build_table()


def test_the_table_says_types_bounds_defaults_and_hides_no_column_mark() -> None:
    class Few(BaseSettings):
        size: int = Field(2 * 1024 * 1024, ge=1024, description="A size.")
        ratio: float = Field(0.5, gt=0, le=1, description="a | b")
        secret: SecretStr | None = Field(None, description="Hidden.")

    assert build_table(Few).splitlines()[2:] == [
        "| `DAS_SIZE` | integer, >= `1024` | 2 MiB | A size. |",
        "| `DAS_RATIO` | number, > `0`, <= `1` | `0.5` | a \\| b |",
        "| `DAS_SECRET` | text, secret | not set | Hidden. |",
    ]


def test_the_rest_of_the_document_stays() -> None:
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replace_table(document) == f"before\n{BEGIN}\n{build_table()}\n{END}\nafter\n"
