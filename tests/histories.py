"""How the model tests run their random histories."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings


def histories(variable: str, default: int, steps: int) -> settings:
    """The same ones each time, or as many others as the environment variable says. A failing one is made as short as it
    can be with RELAY_MODEL_SHRINK=1: that takes minutes."""
    return settings(
        max_examples=int(os.environ.get(variable, default)),
        stateful_step_count=steps,
        deadline=None,
        derandomize=variable not in os.environ,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink] if "RELAY_MODEL_SHRINK" in os.environ else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
