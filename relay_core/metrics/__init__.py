"""Prometheus metrics, by prometheus-client: `pip install 'relay-queue[metrics]'`. docs/metrics.md lists them all."""

try:
    import prometheus_client as _needed  # noqa: F401
except ImportError as error:
    raise ModuleNotFoundError(
        f"relay_core.metrics needs prometheus-client ({error}): pip install 'relay-queue[metrics]'", name=error.name
    ) from error

from relay_core.metrics.build import BuildCollector
from relay_core.metrics.depths import DepthCollector
from relay_core.metrics.exporter import StoreCollector
from relay_core.metrics.recorder import LATENCY_BUCKETS, Recorder
from relay_core.metrics.server import Endpoint, MetricsServer, parse_address

__all__ = [
    "LATENCY_BUCKETS",
    "BuildCollector",
    "DepthCollector",
    "Endpoint",
    "MetricsServer",
    "Recorder",
    "StoreCollector",
    "parse_address",
]
