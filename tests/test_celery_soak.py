"""The soak of benchmarks/celery_soak.py, short: mixed load in every pool, with a blow every second and a half."""

from __future__ import annotations

import random

import pytest

from benchmarks.celery_soak import soak


@pytest.mark.slow
def test_no_task_is_lost_early_or_run_twice_without_a_cause() -> None:
    random.seed(20)
    outcome = soak(14.0, rate=60, kill_every=1.5)
    assert outcome.well, str(outcome)
    assert outcome.sent > 100
    assert outcome.blows
