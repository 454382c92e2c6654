"""Children of a fork of the test's process."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def child_of(work: Callable[[], object], fork: Callable[[], int] = os.fork) -> int:
    """The process id of a child that does it, and ends: with 0 where it returns something true, with 1 where not, and
    with 2 where it raises. It never goes on with its parent's tests."""
    child = fork()
    if child == 0:
        code = 2
        try:
            code = 0 if work() else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def code_of(child: int) -> int:
    """The exit code of a child, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
