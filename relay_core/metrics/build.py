"""`relay_build_info`: which relay, on which Python."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import relay_core


class BuildCollector(Collector):
    """One sample, always 1, whose labels tell the versions."""

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("relay_build_info", "The running relay", labels=["version", "python"])
        family.add_metric([relay_core.__version__, platform.python_version()], 1)
        yield family
