"""What a Celery worker has to know of a store in which tasks wait: installed in worker processes only.

Celery's `revoke` marks a task in the memory of the workers that run now; one that waits in the store is taken out of
it. `inspect scheduled` and `inspect query_task` tell of what waits in a worker's memory; here it is in the store.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import Any

from kombu.utils.functional import maybe_list

from relay_adapters.celery.failover import Refusals
from relay_adapters.celery.holding import children, chords
from relay_adapters.celery.messages.envelope import unpack
from relay_adapters.celery.messages.ids import ids_of
from relay_adapters.celery.messages.protocol import arguments_of, told_of
from relay_adapters.celery.options import is_relay, safe_text, url_of
from relay_adapters.celery.workers import given, revoking, spoiled
from relay_adapters.celery.workerstate import is_worker
from relay_core import Broker

logger = logging.getLogger("relay.celery")

_LISTED = 1000
"""Most waiting tasks of a queue that `inspect scheduled` lists, the next due first."""

_AFTER_A_LOSS = 1.0
"""Seconds until a lost connection of control's own is made again."""

_REQUEST = "relay_adapters.celery.workers.request:Request"


def install(**_: Any) -> None:
    """Where this process is a worker, or becomes one. Repeating it is harmless."""
    if "celery" not in sys.modules:
        return
    if "celery.worker.control" not in sys.modules:
        from celery.signals import worker_init

        worker_init.connect(install)
        return
    from celery.app.task import Task
    from celery.concurrency import prefork
    from celery.concurrency.asynpool import AsynPool
    from celery.events import EventDispatcher
    from celery.worker import strategy
    from celery.worker.control import Panel
    from celery.worker.pidbox import gPidbox

    children.install(prefork)
    chords.install()
    if Task.Request == "celery.worker.request:Request":
        Task.Request = _REQUEST
    if not isinstance(Panel.data["revoke"], _Revoke):
        Panel.data["revoke"] = _Revoke(Panel.data["revoke"])
        Panel.data["revoke_by_stamped_headers"] = _RevokeByStamps(Panel.data["revoke_by_stamped_headers"])
        Panel.data["scheduled"] = _Scheduled(Panel.data["scheduled"])
        Panel.data["dump_schedule"] = Panel.data["scheduled"]
        Panel.data["query_task"] = _QueryTask(Panel.data["query_task"])
        strategy.create_request_cls = _derived(strategy.create_request_cls)
        AsynPool.flush = given.remembering(AsynPool.flush)
        gPidbox.loop = _connected_again(gPidbox.loop)
        EventDispatcher._publish = _dropped_in_an_outage(EventDispatcher._publish)
    if is_worker():
        _install_in_consumer()


def _install_in_consumer() -> None:
    """Once Celery has loaded it, and not sooner: it takes Celery's tracer by name as it is loaded, after agents and
    pools had their chance to replace that. It asks for a transport before anything else, so this comes in time."""
    from celery.worker.consumer.connection import Connection as Connecting
    from celery.worker.consumer.consumer import Consumer
    from celery.worker.consumer.mingle import Mingle

    if "relay" not in vars(Consumer):
        Consumer.relay = True
        Consumer.create_task_handler = spoiled.reading(Consumer.create_task_handler)
        Consumer.on_decode_error = spoiled.kept(Consumer.on_decode_error)
        Consumer.on_unknown_task = spoiled.named(Consumer.on_unknown_task)
        Consumer.on_connection_error_after_connected = _refused(Consumer.on_connection_error_after_connected)
        Mingle.start = _mingle_at_first(Mingle.start)
        Connecting.info = _without_passwords(Connecting.info)


def _derived(stock: Callable[..., type]) -> Callable[..., type]:
    """Of a task with a class for its requests of its own, they are relay's too."""

    def create_request_cls(base: type, *args: Any, **options: Any) -> type:
        from relay_adapters.celery.workers.request import Request

        if not issubclass(base, Request):
            base = type(base.__name__, (Request, base), {})
        return stock(base, *args, **options)

    return create_request_cls


def _refused(stock: Callable[..., None]) -> Callable[..., None]:
    """A worker whose broker refuses what it needs is not to connect again and again."""

    def ended(consumer: Any, error: BaseException) -> None:
        if getattr(consumer.connection.transport, "keeps_mail", False):
            Refusals.of(consumer.connection).ended(url_of(consumer.connection), error)
        stock(consumer, error)

    return ended


def _mingle_at_first(stock: Callable[..., None]) -> Callable[..., None]:
    """Celery's mingle waits a second for the answers of other workers, and no task runs in that time. After a
    reconnect there is nothing to ask for: what was broadcast meanwhile waits in the worker's mailbox."""

    def start(step: Any, consumer: Any) -> None:
        again = consumer.restart_count > 0 and getattr(consumer.connection.transport, "keeps_mail", False)
        if not again:
            stock(step, consumer)

    return start


def _dropped_in_an_outage(stock: Callable[..., None]) -> Callable[..., None]:
    """While the server of all mailboxes is away alone, nobody reads events. Celery would keep them all, and try them
    again with each one that comes: more and more in each turn of its loop."""

    def publish(dispatcher: Any, event: Any, producer: Any, *args: Any, **options: Any) -> None:
        topology = None
        with suppress(Exception):  # what is the matter is found out, and seen to, by Celery's own method
            topology = getattr(producer.channel, "topology", None)
        if topology is None or not topology.outage.on:
            stock(dispatcher, event, producer, *args, **options)

    return publish


def _connected_again(stock: Callable[..., None]) -> Callable[..., None]:
    """Under gevent and eventlet, control has a connection of its own. Where that alone is lost, Celery's greenlet ends
    of it, and the worker hears of no command until it loses its other connection, too."""

    def loop(box: Any, consumer: Any) -> None:
        while True:
            try:
                return stock(box, consumer)
            except consumer.connection_errors as error:
                connection, stopped = consumer.connection, box._node_shutdown
                if connection is None:
                    return None  # the worker lost its other one, and has stopped this greenlet to start another
                if not getattr(connection.transport, "keeps_mail", False):
                    raise
                # nor is it made again where the worker is about to notice that it lost the other one
                if stopped is None or stopped.wait(_AFTER_A_LOSS):
                    return None
                logger.warning("pidbox: its connection was lost, and is made again: %s", error)

    return loop


def _without_passwords(stock: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Of what `inspect stats` tells of a worker's broker, Celery takes out the password where kombu has it apart. Here
    it is in the URL, which kombu leaves whole."""

    def info(step: Any, consumer: Any) -> dict[str, Any]:
        found = stock(step, consumer)
        broker = found.get("broker")
        if isinstance(broker, dict) and is_relay(str(broker.get("hostname"))):
            alternates = [safe_text(str(url)) for url in broker.get("alternates") or ()]
            found["broker"] = {**broker, "hostname": safe_text(broker["hostname"]), "alternates": alternates}
        return found

    return info


class _Command:
    """A remote control command of Celery's, and what the store adds to it."""

    def __init__(self, stock: Callable[..., Any]) -> None:
        self._stock = stock
        self.__name__ = stock.__name__
        self.__doc__ = stock.__doc__


class _Revoke(_Command):
    def __call__(self, state: Any, task_id: Any, *args: Any, **options: Any) -> Any:
        from celery.worker import state as worker_state

        ids = [id for id in maybe_list(task_id) or () if isinstance(id, str)]
        # a task whose next try is taken out is to find itself revoked when it ends, in whatever thread that is
        worker_state.revoked.update(ids)
        # before Celery's own, which may wait for a result backend that is not there
        for revoker in _revokers(state):
            revoker.by_ids(ids)
        return self._stock(state, task_id, *args, **options)


class _RevokeByStamps(_Command):
    def __call__(self, state: Any, headers: Any, *args: Any, **options: Any) -> Any:
        answer = self._stock(state, headers, *args, **options)
        for revoker in _revokers(state):
            revoker.by_stamps(revoking.stamps_of(headers))
        return answer


class _Scheduled(_Command):
    def __call__(self, state: Any, *args: Any, **options: Any) -> Any:
        found = self._stock(state, *args, **options)
        for broker, queues in _consumed(state):
            for queue in queues:
                for job in broker.jobs(queue, "delayed", limit=_LISTED):
                    try:
                        found.append(_as_listed(unpack(job.payload), state.hostname))
                    except Exception:  # whatever a client has written there
                        continue
        return found


class _QueryTask(_Command):
    def __call__(self, state: Any, ids: Any, *args: Any, **options: Any) -> Any:
        found = self._stock(state, ids, *args, **options)
        wanted = {ids} if isinstance(ids, str) else set(ids or ())
        for broker, queues in _consumed(state):
            for queue in queues:
                for task_id in wanted - set(found):
                    for id, payload in revoking.payloads(broker, queue, ids_of(task_id)).items():
                        job = broker.show(queue, id)
                        if job is not None and job.state == "delayed":
                            with suppress(Exception):  # as above
                                found[task_id] = ("scheduled", _as_listed(unpack(payload), state.hostname)["request"])
        return found


def _as_listed(message: MutableMapping[str, Any], hostname: str) -> dict[str, Any]:
    """A waiting task as Celery lists those of its own timers."""
    told, properties = told_of(message), message["properties"]
    info = properties.get("delivery_info") or {}
    # of one that is no JSON, what the client wrote of them, so that nothing is unpickled
    args, kwargs = arguments_of(message) or (told.get("argsrepr"), told.get("kwargsrepr"))
    return {
        "eta": told["eta"],
        "priority": 6,
        "request": {
            "id": told["id"],
            "name": told["task"],
            "args": args,
            "kwargs": kwargs,
            "type": told["task"],
            "hostname": hostname,
            "time_start": None,
            "acknowledged": False,
            "delivery_info": {
                "exchange": info.get("exchange"),
                "routing_key": info.get("routing_key"),
                "priority": properties.get("priority"),
                "redelivered": False,
            },
            "worker_pid": None,
        },
    }


def _revokers(state: Any) -> list[revoking.Revoker]:
    events = state.consumer.event_dispatcher
    return [revoking.Revoker(state.app, broker, queues, events, state.hostname) for broker, queues in _consumed(state)]


def _consumed(state: Any) -> list[tuple[Broker, tuple[str, ...]]]:
    """The broker and queues of a worker's tasks, where it consumes from relay."""
    consumer = state.consumer.task_consumer
    channel: Any = consumer.channel if consumer is not None else None
    return [(channel.broker, channel.consumed)] if isinstance(getattr(channel, "broker", None), Broker) else []
