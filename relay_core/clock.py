"""How long ago something was sent."""

from __future__ import annotations

import time
from functools import partial

_SLEEPLESS = getattr(time, "CLOCK_BOOTTIME", None)

sent_now = time.monotonic if _SLEEPLESS is None else partial(time.clock_gettime, _SLEEPLESS)
"""The time of a send, in seconds, by a clock that goes on while this machine sleeps, where there is one: so does the
server's, by which it tells a repeated send's job from an older one of the same id."""
