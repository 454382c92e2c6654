"""Builders of every command: pure functions from a queue's keys and plain values to a `Command`.

They are the only Python that knows the order of a script's KEYS and ARGV.
"""

from relay_core.commands.command import Command
from relay_core.commands.moves import (
    Ack,
    ClaimReply,
    Finish,
    Grant,
    LongWay,
    Nack,
    NewJob,
    Verdict,
    ack,
    claim,
    enqueue,
    extend,
    finish,
    nack,
    promote,
    reap,
    release,
)
from relay_core.commands.upkeep import (
    Adopted,
    QueueStats,
    adopt,
    audit,
    cancel,
    configure,
    list_jobs,
    purge,
    requeue,
    show,
    stats,
)
from relay_core.commands.workers import WorkerInfo, beat, roster

__all__ = [
    "Ack",
    "Adopted",
    "ClaimReply",
    "Command",
    "Finish",
    "Grant",
    "LongWay",
    "Nack",
    "NewJob",
    "QueueStats",
    "Verdict",
    "WorkerInfo",
    "ack",
    "adopt",
    "audit",
    "beat",
    "cancel",
    "claim",
    "configure",
    "enqueue",
    "extend",
    "finish",
    "list_jobs",
    "nack",
    "promote",
    "purge",
    "reap",
    "release",
    "requeue",
    "roster",
    "show",
    "stats",
]
