"""Recurring jobs: plans that are kept in the store, and one job per tick however many processes run them.

>>> broker.schedule("nightly", "reports", b"{}", cron="0 3 * * *", tz="Europe/Berlin")
>>> broker.schedule("heartbeat", "checks", b"ping", every=30.0, missed="skip")
>>> ScheduleRunner(broker).run()

`ScheduleRunner`, `relay schedule run` and `relay worker --schedule` do the same.
"""

from relay_core.schedule.flows import Round
from relay_core.schedule.plan import Schedule, Scheduled
from relay_core.schedule.runner import ScheduleRunner

__all__ = ["Round", "Schedule", "ScheduleRunner", "Scheduled"]
