"""One plugin manager per broker, and the ways in which hooks are called."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
from pluggy import HookImpl

from relay_core import hooks
from relay_core.errors import InvalidArgument, NotYet, PluginError
from relay_core.job import Job, JobSummary, StoredJob
from relay_core.validation import seconds

logger = logging.getLogger("relay.plugins")

_NAMES = frozenset(name for name in vars(hooks) if name.startswith("relay_"))


def _problem(impl: HookImpl) -> str:
    """Why it cannot be called as a hook, or nothing."""
    function, plugin = impl.function, impl.plugin
    if impl.wrapper or impl.hookwrapper:
        return "a wrapper; relay calls plain hooks only"
    if inspect.iscoroutinefunction(function):
        return "an async function, and would never be awaited; make it a plain one"
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        return "a generator, and its body would never run; make it a plain function"
    if inspect.isclass(plugin) and inspect.isfunction(inspect.getattr_static(plugin, function.__name__, None)):
        return "a method, and needs an instance; give that in place of its class"
    return ""


@lru_cache(maxsize=1)
def _entry_points() -> tuple[EntryPoint, ...]:
    """Looked up once per process: it reads the metadata of every installed distribution."""
    return tuple(entry_points(group=hooks.PROJECT))


def _load(entry: EntryPoint) -> object:
    try:
        return entry.load()
    except Exception as error:
        raise PluginError(
            f"plugin {entry.name!r} ({entry.value}) cannot be imported: {error!r}; uninstall or mend it"
        ) from error


def listed(plugins: Iterable[object]) -> list[object]:
    """As a list. Raises TypeError for one plugin that is in none."""
    if not isinstance(plugins, Iterable) or isinstance(plugins, (str, bytes, Mapping)):
        raise TypeError(f"plugins must be a list of objects or modules, got {plugins!r}; write plugins=[...]")
    return list(plugins)


class Plugins:
    """The plugins of one broker.

    Hooks that nobody implements cost one attribute look-up and send nothing.

    :param plugins: objects or modules with `hookimpl` functions, registered in this order
    :param installed: also load the entry-point group `relay`. Default True

    Raises PluginError for a misspelt hook name, an async implementation, one without its mark, or a plugin given twice.
    """

    def __init__(self, plugins: Iterable[object] = (), *, installed: bool = True) -> None:
        self._manager = pluggy.PluginManager(hooks.PROJECT)
        self._manager.add_hookspecs(hooks)
        self._known: dict[str, list[HookImpl]] = {}
        self.adapters: dict[str, str] = {}
        self._internal: list[str] = []
        if installed:
            for entry in _entry_points():
                self.register(_load(entry))
        for plugin in listed(plugins):
            self.register(plugin)

    def register(self, plugin: object) -> None:
        """Add a plugin; what it says wrong is a PluginError, and it is not added."""
        try:
            name = self._manager.register(plugin, self._name(plugin))
            self._known = {}
        except (ValueError, pluggy.PluginValidationError) as error:
            raise PluginError(f"plugin {plugin!r} cannot be registered: {error}") from error
        if name is None:
            raise PluginError(f"plugin {plugin!r} is blocked")
        try:
            self._check(plugin)
        except PluginError:
            self.unregister(plugin)
            raise
        mine = [impl for impl in self._impls("relay_register_adapter") if impl.plugin is plugin]
        self._call_each(mine, "relay_register_adapter", register=self._register_adapter)

    def _name(self, plugin: object) -> str:
        """Of a module its path, else that of the class; further ones of a class are numbered."""
        kind = type(plugin)
        name = first = getattr(plugin, "__name__", None) or f"{kind.__module__}.{kind.__qualname__}"
        count = 1
        while self._manager.has_plugin(name):
            count += 1
            name = f"{first}#{count}"
        return str(name)

    def _register_adapter(self, name: str, description: str, internal: Iterable[str] = ()) -> None:
        self.adapters[name] = description
        self._internal += internal

    def is_internal(self, queue: str) -> bool:
        """True for a queue in which the processes of a framework talk to each other."""
        return any(fnmatchcase(queue, pattern) for pattern in self._internal)

    def unregister(self, plugin: object) -> None:
        """Take a plugin out again; its hooks are not called any more. Raises PluginError where it is not registered."""
        if not self._manager.is_registered(plugin):
            raise PluginError(f"plugin {plugin!r} cannot be unregistered: it is not registered here")
        self._manager.unregister(plugin)
        self._known = {}

    def _check(self, plugin: object) -> None:
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"plugin {plugin!r}: {error}; see relay_core/hooks.py for the names") from error
        callers = self._manager.get_hookcallers(plugin) or []
        for caller in callers:
            for impl in caller.get_hookimpls():
                if impl.plugin is plugin and (problem := _problem(impl)):
                    raise PluginError(f"plugin {plugin!r}: {caller.name} is {problem}")
        for name in sorted(_NAMES - {caller.name for caller in callers}):
            found = getattr(plugin, name, None)
            if callable(found) and not hasattr(found, f"{hooks.PROJECT}_spec"):
                raise PluginError(f"plugin {plugin!r}: {name} is not marked with hookimpl, and would never be called")
        if not callers:
            raise PluginError(f"plugin {plugin!r} has no hooks: mark its functions with hookimpl")

    def _impls(self, name: str) -> list[HookImpl]:
        """Remembered until a plugin comes or goes: several hooks are asked for each job."""
        table = self._known  # of this moment: a plugin that comes while this looks makes a new one
        known = table.get(name)
        if known is None:
            caller: pluggy.HookCaller = getattr(self._manager.hook, name)
            known = table[name] = caller.get_hookimpls()
        return known

    def _in_order(self, name: str) -> Iterator[HookImpl]:
        """As pluggy calls them: last registered first, `tryfirst` before, `trylast` after."""
        return reversed(self._impls(name))

    @staticmethod
    def _call(impl: HookImpl, arguments: Mapping[str, Any]) -> Any:
        return impl.function(*(arguments[name] for name in impl.argnames))

    def _call_each(self, impls: Iterable[HookImpl], name: str, **arguments: Any) -> None:
        for impl in impls:
            try:
                self._call(impl, arguments)
            except (Exception, SystemExit):  # a hook does not end the thread of a worker either
                logger.exception("plugin %s: %s raised; the job goes on", impl.plugin_name, name)

    def wants(self, name: str) -> bool:
        """True when some plugin implements this hook."""
        return bool(self._impls(name))

    @property
    def alter_jobs(self) -> bool:
        """True when some plugin has a say in what is enqueued, and where."""
        return self.wants("relay_encode_payload") or self.wants("relay_route_job") or self.wants("relay_add_headers")

    def notify(self, name: str, **arguments: Any) -> None:
        """Tell every plugin; one that raises is logged and does not stop the others."""
        if self._impls(name):
            self._call_each(self._in_order(name), name, **arguments)

    def tell_buried(self, job: Job, error: str, again: bool) -> bool:
        """Tell the plugins of a job that a claim or reap buried. False: it has to be told again, for one says NotYet.

        :param again: all were told before, and one said so: only those that take the parameter `again` are told now
        """
        name = "relay_job_dead"
        arguments = {"job": job, "reason": "max_deliveries", "error": error, "again": again}
        able = [impl for impl in self._in_order(name) if "again" in impl.argnames]
        waiting = again and not able  # then it is for a plugin that other processes have
        for impl in able if again else self._in_order(name):
            try:
                self._call(impl, arguments)
            except NotYet as why:
                if impl not in able:
                    logger.error("plugin %s: %s raised NotYet, but takes no `again`", impl.plugin_name, name)
                    continue
                waiting = True
                logger.debug("plugin %s: %s of job %s: not yet: %s", impl.plugin_name, name, job.id, why)
            except (Exception, SystemExit):  # as above
                logger.exception("plugin %s: %s raised; the job goes on", impl.plugin_name, name)
        return not waiting

    def retry_delay(self, job: Job, error: BaseException | str | None, delay: float) -> float:
        """The seconds that the first plugin to answer says, else `delay`; nonsense is logged and passed over."""
        for impl, answer in self._answers("relay_retry_delay", job=job, error=error, delay=delay):
            try:
                return seconds("delay", answer)
            except InvalidArgument as problem:
                logger.error("plugin %s: relay_retry_delay: %s; the next one is asked", impl.plugin_name, problem)
        return delay

    def describe(self, job: Job | StoredJob) -> JobSummary | None:
        """What the first plugin that knows this job says of it."""
        for _impl, summary in self._answers("relay_describe_job", job=job):
            found: JobSummary = summary
            return found
        return None

    def _answers(self, name: str, **arguments: Any) -> Iterator[tuple[HookImpl, Any]]:
        """Who answered what, one after the other, so that no more are asked than needed."""
        for impl in self._in_order(name):
            try:
                answer = self._call(impl, arguments)
            except (Exception, SystemExit):  # as above
                logger.exception("plugin %s: %s raised; the next one is asked", impl.plugin_name, name)
                continue
            if answer is not None:
                yield impl, answer

    def route(self, queue: str, payload: bytes, headers: Mapping[str, str]) -> str:
        """The queue to use. What a plugin raises goes to the caller."""
        for impl in self._in_order("relay_route_job"):
            answer = self._call(impl, {"queue": queue, "payload": payload, "headers": headers})
            if answer is None:
                continue
            if not isinstance(answer, str):
                raise PluginError(
                    f"plugin {impl.plugin_name}: relay_route_job must return a queue's name or None, "
                    f"got {type(answer).__name__}"
                )
            return answer
        return queue

    def headers(self, queue: str, payload: bytes, headers: Mapping[str, str]) -> Mapping[str, str]:
        """The headers with what plugins add. What a plugin raises goes to the caller."""
        for impl in self._in_order("relay_add_headers"):
            added = self._call(impl, {"queue": queue, "payload": payload, "headers": headers})
            if added is None:
                continue
            if not isinstance(added, Mapping):
                raise PluginError(
                    f"plugin {impl.plugin_name}: relay_add_headers must return a mapping, got {type(added).__name__}"
                )
            headers = {**headers, **added}
        return headers

    def encode(self, payload: bytes, queue: str) -> bytes:
        """Run the payload through the chain. What a plugin raises goes to the caller."""
        for impl in self._in_order("relay_encode_payload"):
            payload = self._transformed(impl, "relay_encode_payload", payload, queue)
        return payload

    def decode(self, payload: bytes, queue: str) -> bytes:
        """The reverse chain: what was applied last is undone first."""
        for impl in self._impls("relay_decode_payload"):
            payload = self._transformed(impl, "relay_decode_payload", payload, queue)
        return payload

    def _transformed(self, impl: HookImpl, name: str, payload: bytes, queue: str) -> bytes:
        answer = self._call(impl, {"payload": payload, "queue": queue})
        if answer is None:
            return payload
        if not isinstance(answer, bytes):
            raise PluginError(f"plugin {impl.plugin_name}: {name} must return bytes, got {type(answer).__name__}")
        return answer

    def register_commands(self, group: Any) -> None:
        """Let plugins add click commands to the `relay` command."""
        self.notify("relay_register_commands", group=group)
