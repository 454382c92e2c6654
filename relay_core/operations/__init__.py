"""What a broker does, without saying how: generators that yield steps and are sent their results.

A step is a Command (answered by its result, or the error is thrown in), a list of Commands (answered by a
list of results and errors), a Raw command, or a Wait. `broker.py` drives them over a blocking or an asyncio
store, so that there is one copy of the logic, and it is tested without either.
"""

from relay_core.operations.claiming import Claiming
from relay_core.operations.ending import error_text
from relay_core.operations.enqueueing import Enqueueing
from relay_core.operations.settings import Settings
from relay_core.operations.steps import Flow, Raw, Step, Wait, Waited

__all__ = ["Flow", "Operations", "Raw", "Settings", "Step", "Wait", "Waited", "error_text"]


class Operations(Enqueueing, Claiming):
    """The moves, as flows."""
