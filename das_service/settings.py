"""Settings: read once from DAS_* variables into a frozen value. docs/configuration.md lists them; a test compares."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableSettingError

MIB = 1024 * 1024
_LAST_PORT = 65_535


class SettingsError(Exception):
    """A DAS_* variable is unknown or has a value that does not fit."""


class Settings(BaseSettings):
    """Everything that a role can be told from outside."""

    model_config = SettingsConfigDict(env_prefix="DAS_", frozen=True, extra="forbid")

    # where things are
    redis_url: SecretStr = Field(SecretStr("redis://127.0.0.1:6379/0"), description="Redis or Valkey server.")
    tables_uri: str = Field("das-data/tables", description="Folder of the Delta tables: a path, file:// or s3://.")
    snapshots_uri: str = Field("das-data/snapshots", description="Folder of the published snapshots, likewise.")
    storage_options: dict[str, str] = Field({}, description="JSON handed to deltalake for an object store.")
    api_url: str = Field("http://127.0.0.1:8000", description="Where clients and the command line find the API.")
    token: SecretStr | None = Field(None, description="Bearer token that clients and the command line send.")

    # who may
    bind: str = Field("127.0.0.1:8000", description="host:port of the API; without tokens only a loopback host.")
    tokens_file: Path | None = Field(
        None,
        description='JSON file of tokens: [{"name", "sha256" of the token, "scopes": ["ingest", "read", "admin"]}].',
    )
    probe_bind: str = Field("127.0.0.1:0", description="host:port of /metrics and /health of worker and sink; 0 = any.")

    # the door
    durability: Literal["fsync", "relaxed"] = Field("fsync", description="relaxed = ingest on a server that may lose.")
    max_body_bytes: int = Field(64 * MIB, ge=1024, description="Largest request body; 413 above it.")
    max_decoded_bytes: int = Field(256 * MIB, ge=1024, description="Largest request once decompressed and decoded.")
    max_rows: int = Field(100_000, ge=1, description="Most rows of one request.")
    max_answer_bytes: int = Field(
        256 * MIB,
        ge=MIB,
        description="Largest lookup, or augment as JSON (numbers count 16-fold); 413 above it.",
    )
    max_concurrent_requests: int = Field(16, ge=1, description="Data requests at once; 429 above it.")
    body_timeout_seconds: float = Field(30.0, gt=0, description="Longest wait for a caller to send or to read on.")
    max_backlog_bytes: int = Field(1024 * MIB, ge=MIB, description="Most bytes in the logs of one dataset; 429 above.")
    max_memory_ratio: float = Field(0.9, gt=0, le=1, description="Ingest stops above this share of maxmemory.")
    disk_reserve_bytes: int = Field(1024 * MIB, ge=0, description="Free bytes that ingest leaves; 507 below.")
    max_augment_bytes: int = Field(1024 * MIB, ge=MIB, description="Largest table sent to augment; 413 above it.")
    max_concurrent_augments: int = Field(2, ge=1, description="Tables augmented at once; 429 above it.")
    max_concurrent_readers: int = Field(32, ge=1, description="Readers of batches at once; 429 above it.")
    batches_memory_bytes: int = Field(
        512 * MIB, ge=16 * MIB, description="What the pages of all readers of batches may take together, about."
    )
    spool_folder: Path | None = Field(None, description="Where sent tables lie meanwhile; default: the system's own.")
    log_folder: Path | None = Field(None, description="Folder of the server's AOF, where it is on this machine.")

    # the sink
    commit_rows: int = Field(200_000, ge=1, description="A commit is made at the latest after so many rows.")
    commit_bytes: int = Field(128 * MIB, ge=MIB, description="... or so many bytes.")
    commit_seconds: float = Field(5.0, gt=0, description="... or so long after the first waiting row.")
    commit_event_days: int = Field(32, ge=1, description="Most event days of one commit.")
    close_wait_seconds: float = Field(
        3600.0, ge=0, description="How long after its receipt an example whose window is over waits for its scores."
    )
    compact_files: int = Field(64, ge=2, description="Small files of an event day at which the sink compacts it.")
    compact_target_bytes: int = Field(128 * MIB, ge=MIB, description="Size that compaction aims at.")
    retention_hours: int = Field(168, ge=24, description="How long files that compaction replaced stay readable.")
    duckdb_memory_bytes: int = Field(
        512 * MIB, ge=64 * MIB, description="Memory of a process's DuckDB; das augment: half as much again."
    )

    # the worker
    device: str = Field("auto", description="auto, cpu or cuda[:n].")
    bf16: bool = Field(default=False, description="Autocast the forward to bfloat16.")
    torch_threads: int = Field(1, ge=1, description="Threads of torch, OMP and BLAS in a worker.")
    batch_rows: int = Field(20_000, ge=1, description="Rows that a worker takes from the log at once, about.")
    catch_up_bytes: int = Field(512 * MIB, ge=MIB, description="Backlog at which an optional FM leaves the log.")

    # every role
    instance: str | None = Field(None, description="Name of this process among its peers; default: host, pid, random.")
    restarts: int = Field(0, ge=0, description="How often a supervisor has restarted this process (das up sets it).")
    dead_after_seconds: float = Field(5.0, gt=0, description="A peer whose beat stands still so long is dead.")
    drain_seconds: float = Field(20.0, gt=0, description="Longest time to finish work after SIGTERM.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")

    @field_validator("bind", "probe_bind")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdecimal() or int(port) > _LAST_PORT:
            raise ValueError(f"{value!r} is not host:port")
        return value

    @field_validator("tables_uri", "snapshots_uri")
    @classmethod
    def _place(cls, value: str) -> str:
        if urlsplit(value).scheme not in {"", "file", "s3", "s3a"}:
            raise ValueError(f"{value!r} is not a path, file:// or s3://")
        return value

    @field_validator("redis_url")
    @classmethod
    def _server(cls, value: SecretStr) -> SecretStr:  # the messages do not repeat it: it may hold a password
        if urlsplit(value.get_secret_value()).scheme not in {"redis", "rediss", "unix"}:
            raise ValueError("it does not begin with redis://, rediss:// or unix://")
        return value

    @field_validator("token")
    @classmethod
    def _header_value(cls, value: SecretStr | None) -> SecretStr | None:
        token = "" if value is None else value.get_secret_value().strip()  # files tend to add a line's end
        if not token.isascii() or not token.isprintable():
            raise ValueError("it has a character that no header can hold")
        return SecretStr(token) if token else None


def load_settings(environment: Mapping[str, str] | None = None, **overrides: Any) -> Settings:  # noqa: ANN401
    """Give the settings of this process.

    Raises:
        SettingsError: A DAS_* variable is unknown (a misspelt one would be ignored otherwise) or has a bad value.
    """
    environment = os.environ if environment is None else environment
    known = {f"DAS_{name}".upper() for name in Settings.model_fields}
    unknown = sorted(name for name in environment if name.upper().startswith("DAS_") and name.upper() not in known)
    if unknown:
        raise SettingsError(f"unknown setting {', '.join(unknown)}; docs/configuration.md lists them")
    try:
        return Settings(**overrides)
    except UnreadableSettingError as error:
        raise SettingsError(f"{error}: {error.__cause__}") from error
    except ValidationError as error:
        problems = "; ".join(
            f"DAS_{'.'.join(str(part) for part in item['loc'])}".upper() + f": {item['msg']}" for item in error.errors()
        )
        raise SettingsError(problems) from error
