"""The only place that talks to redis-py: commands go in, results or relay's own errors come out.

`attempts` and `topology` decide without I/O what to send, repeat and give up; the shells only do it:
`SyncStore` blocks, `AsyncStore` awaits, both pipeline with `run_many`; `Bell`, `Reader` and `Sender` are driven by
file descriptor.
"""

from relay_core.connection.aio import AsyncStore
from relay_core.connection.aiobell import AsyncBell
from relay_core.connection.bell import Bell, readable
from relay_core.connection.reader import Entry, Reader
from relay_core.connection.replies import AWAY
from relay_core.connection.resting import RestingBells
from relay_core.connection.sender import Sender
from relay_core.connection.sync import SyncStore

__all__ = [
    "AWAY",
    "AsyncBell",
    "AsyncStore",
    "Bell",
    "Entry",
    "Reader",
    "RestingBells",
    "Sender",
    "SyncStore",
    "readable",
]
