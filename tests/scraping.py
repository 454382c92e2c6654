"""Reading what a registry or an endpoint exposes."""

from __future__ import annotations

import urllib.request

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """Value by (name, sorted labels)."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Scrape:
    """One look: `scrape("relay_jobs_claimed_total", queue="mail")` is a value, or None where there is no sample."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = samples(text)

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.samples.get((name, tuple(sorted(labels.items()))))

    def names(self) -> set[str]:
        return {name for name, _labels in self.samples}

    def counts(self) -> dict[str, float]:
        """Counters that have counted something, and histograms' counts: name and label values -> value."""
        return {
            " ".join([name, *(value for _label, value in labels)]): value
            for (name, labels), value in self.samples.items()
            if name.endswith(("_total", "_count")) and value
        }


def scrape_registry(registry: Collector) -> Scrape:
    return Scrape(generate_latest(registry).decode())  # type: ignore[arg-type]


def scrape_url(url: str) -> Scrape:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return Scrape(reply.read().decode())
