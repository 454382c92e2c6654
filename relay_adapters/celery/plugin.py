"""What relay knows of celery."""

from collections.abc import Callable

from relay_core.hooks import hookimpl


@hookimpl
def relay_register_adapter(register: Callable[[str, str], None]) -> None:
    register("celery", "celery on relay")
