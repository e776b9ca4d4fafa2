"""Where tests/fetch_prometheus.sh puts its programs, and what is skipped without them."""

import pytest

from tests.docker.dockerfile import ROOT

PROMETHEUS = ROOT / ".venv" / "prometheus" / "prometheus"
PROMTOOL = PROMETHEUS.with_name("promtool")
needs_prometheus = pytest.mark.skipif(
    not PROMTOOL.exists(), reason="no prometheus: tests/fetch_prometheus.sh found none on the PATH and no apt"
)
