"""What the published tests import from their `tests.common`, which is not in the source distribution."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pika
import pytest
from dramatiq import Worker

RABBITMQ_CREDENTIALS = pika.credentials.PlainCredentials("guest", "guest")

skip_in_ci = skip_with_gevent = pytest.mark.skipif(False, reason="runs here")
skip_without_gevent = pytest.mark.skipif(True, reason="gevent is not active")
skip_on_windows = pytest.mark.skipif(platform.system() == "Windows", reason="not on Windows")
skip_on_pypy = pytest.mark.skipif(platform.python_implementation() == "PyPy", reason="not on PyPy")
skip_unless_rabbit_mq = pytest.mark.skipif(True, reason="no RabbitMQ")


@contextmanager
def worker(*args: Any, **kwargs: Any) -> Iterator[Worker]:
    made = Worker(*args, **kwargs)
    made.start()
    try:
        yield made
    finally:
        made.stop()
