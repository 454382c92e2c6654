"""Who tells the result backends of this process."""

from __future__ import annotations

from relay_adapters.telling import Teller

teller = Teller("celery", "task")
