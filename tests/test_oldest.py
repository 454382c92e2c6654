"""What relay says it works with is what `make oldest` tests."""

from __future__ import annotations

from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

EXTRAS = ("", "fast", "metrics", "celery", "dramatiq", "schedule")


def test_the_oldest_versions_that_are_tested_are_those_that_are_allowed() -> None:
    lines = Path(__file__).with_name("oldest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    allowed = {}
    for requirement in map(Requirement, requires("relay-queue") or ()):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in EXTRAS):
            for bound in requirement.specifier:
                if bound.operator == ">=":
                    allowed[requirement.name] = Version(bound.version)
    assert {name: Version(tested[name]) for name in allowed} == allowed
