"""The metrics of contract 9, in a registry of their own per process. Never an id as a label value."""

import platform
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_STAGE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROW_BUCKETS = (1, 10, 100, 500, 1000, 2500, 5000, 10_000, 20_000, 50_000, 100_000)


def package_version() -> str:
    """Give the version of this service."""
    try:
        return version("das-service")
    except PackageNotFoundError:
        return "0.0.0+source"


class Metrics:
    """What a role counts and measures; every role exposes the same names and fills its own."""

    def __init__(self, role: str) -> None:
        self.registry = registry = CollectorRegistry()
        self.build = Gauge(
            "das_build_info", "Version of the service.", ["role", "version", "python"], registry=registry
        )
        self.build.labels(role, package_version(), platform.python_version()).set(1)
        self.ready = Gauge("das_ready", "Whether this process finds nothing wrong, at the scrape.", registry=registry)
        self.ingest_rows = Counter(
            "das_ingest_rows", "Rows at the door.", ["dataset", "result", "reason"], registry=registry
        )
        self.label_rows = Counter(
            "das_label_rows", "Labels at the door.", ["dataset", "result", "reason"], registry=registry
        )
        self.late_labels = Counter(
            "das_late_labels", "Labels that came after their window or their example's closing.", ["dataset"],
            registry=registry,
        )  # fmt: skip
        self.watermark = Gauge(
            "das_watermark_timestamp_seconds", "Event time up to which no more examples are expected.",
            ["dataset", "partition"], registry=registry,
        )  # fmt: skip
        self.duplicate_labels = Counter("das_duplicate_labels", "Repeats of a label.", ["dataset"], registry=registry)
        self.request_seconds = Histogram(
            "das_request_duration_seconds", "Time of a request.", ["route", "code"], registry=registry
        )
        self.backlog_entries = Gauge(
            "das_log_backlog_entries", "Entries that a reader has yet to finish.", ["dataset", "kind", "group"],
            registry=registry,
        )  # fmt: skip
        self.backlog_bytes = Gauge(
            "das_log_backlog_bytes", "Bytes kept in a log.", ["dataset", "kind"], registry=registry
        )
        self.oldest_age_seconds = Gauge(
            "das_log_oldest_age_seconds",
            "Age of the oldest entry that is kept.",
            ["dataset", "kind"],
            registry=registry,
        )
        self.durability = Gauge(
            "das_log_durability_info", "Whether acknowledged rows are on disk.", ["mode"], registry=registry
        )
        self.forward_rows = Counter(
            "das_fm_forward_rows", "Rows that a model was run on.", ["dataset", "fm", "snapshot"],
            registry=registry,
        )  # fmt: skip
        self.wasted_rows = Counter(
            "das_fm_wasted_rows", "Rows that a model was run on in vain: another worker or snapshot had them.",
            ["dataset", "fm"], registry=registry,
        )  # fmt: skip
        self.shadow_rows = Counter(
            "das_shadow_rows", "Rows for the shadow: scored, skipped (it is behind, or ended), failed.",
            ["dataset", "fm", "result"], registry=registry,
        )  # fmt: skip
        self.publish_gap_seconds = Histogram(
            "das_publish_gap_seconds", "Time in which rows waited and nothing was published, up to each publish.",
            ["dataset", "fm"], buckets=_STAGE_BUCKETS, registry=registry,
        )  # fmt: skip
        self.switch_gap_seconds = Gauge(
            "das_switch_gap_seconds", "The same time before the first publish of the snapshot at work.",
            ["dataset", "fm"], registry=registry,
        )  # fmt: skip
        self.worker_snapshot = Gauge(
            "das_worker_snapshot_info", "The snapshot that a worker scores with what it reads from now on.",
            ["dataset", "fm", "snapshot"], registry=registry,
        )  # fmt: skip
        self.unreadable_entries = Counter(
            "das_fm_unreadable_entries", "Entries that no worker can read; the sink keeps them in dead_chunks.",
            ["dataset", "fm"], registry=registry,
        )  # fmt: skip
        self.batch_rows = Histogram(
            "das_fm_batch_rows", "Rows of a forward.", ["dataset", "fm"], buckets=_ROW_BUCKETS, registry=registry
        )
        self.stage_seconds = Histogram(
            "das_stage_seconds", "Time of a stage.", ["role", "stage"], buckets=_STAGE_BUCKETS, registry=registry
        )
        self.scored_rows = Counter(
            "das_scored_rows", "Supervision rows committed.", ["dataset", "fm"], registry=registry
        )
        self.committed_rows = Counter(
            "das_committed_rows", "Rows committed to a table.", ["dataset", "table"], registry=registry
        )
        self.duplicates = Counter(
            "das_duplicate_examples", "Repeats of an example, same content.", ["dataset"], registry=registry
        )
        self.conflicting = Counter(
            "das_conflicting_examples", "Repeats with another content or event_time.", ["dataset"], registry=registry
        )
        self.dead_letters = Gauge(
            "das_dead_letters", "Examples that an FM failed on.", ["dataset", "fm"], registry=registry
        )
        self.dead_chunks = Counter(
            "das_dead_chunks", "Entries that no table takes, put into dead_chunks.", ["dataset", "kind"],
            registry=registry,
        )  # fmt: skip
        self.lookup_rows = Counter("das_lookup_rows", "Rows looked up.", ["dataset", "fm", "status"], registry=registry)
        self.coverage = Gauge(
            "das_coverage_ratio",
            "Share of looked-up rows with usable supervision.",
            ["dataset", "fm"],
            registry=registry,
        )
        self.freshness_gap_seconds = Gauge(
            "das_freshness_gap_seconds", "event_time - trained_through of the newest scored row.", ["dataset", "fm"],
            registry=registry,
        )  # fmt: skip
        self.supervision_age_seconds = Gauge(
            "das_supervision_age_seconds", "scored_at - event_time of the newest scored row.", ["dataset", "fm"],
            registry=registry,
        )  # fmt: skip
        self.commit_seconds = Histogram(
            "das_commit_seconds", "Time of a durable commit.", ["dataset", "table"], buckets=_STAGE_BUCKETS,
            registry=registry,
        )  # fmt: skip
        self.table_files = Gauge("das_table_files", "Active files of a table.", ["dataset", "table"], registry=registry)
        self.snapshot = Gauge(
            "das_snapshot_info",
            "Snapshots and their states.",
            ["dataset", "fm", "snapshot", "state"],
            registry=registry,
        )

    def render(self) -> bytes:
        """Give the text that Prometheus scrapes."""
        return generate_latest(self.registry)
