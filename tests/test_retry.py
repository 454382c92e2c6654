"""When a failed job runs again, if nobody says otherwise."""

from __future__ import annotations

import pytest

from relay_core import Broker, RetryPolicy


def test_the_default_is_exponential_from_a_second_to_ten_minutes() -> None:
    plain = RetryPolicy(jitter=False)
    assert [plain.delay(n) for n in range(12)] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600]
    assert RetryPolicy() == RetryPolicy(base=1.0, factor=2.0, ceiling=600.0, max_retries=20, jitter=True)
    assert Broker("relay://127.0.0.1:1/0").settings.retry == RetryPolicy()


@pytest.mark.parametrize(("retries", "longest"), [(0, 1.0), (3, 8.0), (30, 600.0)])
def test_full_jitter_spreads_the_waits_over_all_the_time_there_is(retries: int, longest: float) -> None:
    waits = [RetryPolicy().delay(retries) for _ in range(1000)]
    assert 0 <= min(waits) < longest / 10
    assert longest * 0.9 < max(waits) <= longest
    assert longest * 0.4 < sum(waits) / len(waits) < longest * 0.6


def test_a_job_that_was_retried_beyond_all_floats_waits_for_the_ceiling() -> None:
    assert RetryPolicy(jitter=False).delay(100_000) == 600.0


def test_a_policy_travels_as_plain_numbers_and_unknown_ones_are_ignored() -> None:
    policy = RetryPolicy(base=0.5, factor=3.0, ceiling=60.0, max_retries=7, jitter=False)
    assert RetryPolicy.from_dict({**policy.to_dict(), "invented_later": 1.0}) == policy


def test_dead_jobs_are_kept_for_seven_days_unless_told_otherwise() -> None:
    assert Broker("relay://127.0.0.1:1/0").settings.keep_ms == 7 * 24 * 3600 * 1000
