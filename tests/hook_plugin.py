"""A plugin as a distribution would install it: a module that an entry point names."""

from collections.abc import Callable

from relay_core import hookimpl


@hookimpl
def relay_register_adapter(register: Callable[[str, str], None]) -> None:
    register("from_entry_point", "found by its entry point")


class Object:
    """The same as an object."""

    @hookimpl
    def relay_register_adapter(self, register: Callable[..., None]) -> None:
        register("from_object", "found by its entry point")


an_object = Object()
