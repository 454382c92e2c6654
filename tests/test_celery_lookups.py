"""A setting of a Celery app is what Celery's own search finds, in every kind of configuration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.app.defaults import _OLD_SETTING_KEYS, SETTING_KEYS
from celery.app.utils import Settings

from relay_adapters.celery.sending import lookups

lookups.install()
STOCK = Settings.__getitem__.relay_stock


def plain() -> Celery:
    app = Celery("plain", broker="memory://", set_as_current=False)
    app.conf.task_ignore_result = True
    app.add_defaults({"worker_prefetch_multiplier": 7})
    return app


def old_names() -> Celery:
    app = Celery("old", set_as_current=False)
    app.conf.update(CELERY_IGNORE_RESULT=True, CELERYD_PREFETCH_MULTIPLIER=3, BROKER_URL="memory://")
    return app


def a_module() -> Celery:
    app = Celery("module", set_as_current=False)
    app.config_from_object(SimpleNamespace(task_ignore_result=True, broker_url="memory://", own_setting=5))
    return app


def with_a_prefix() -> Celery:
    """As a Django project configures it."""
    app = Celery("django", set_as_current=False)
    settings = SimpleNamespace(CELERY_TASK_IGNORE_RESULT=True, CELERY_BROKER_URL="memory://", DEBUG=True)
    app.config_from_object(settings, namespace="CELERY")
    return app


def outcome(find: Callable[..., Any], *args: Any) -> Any:
    try:
        return find(*args)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("made", [plain, old_names, a_module, with_a_prefix], ids=lambda made: made.__name__)
def test_each_setting_is_what_celery_says_it_is(made: Callable[[], Celery]) -> None:
    app = made()
    assert app.conf.task_ignore_result is True
    names = {*SETTING_KEYS, *_OLD_SETTING_KEYS, "own_setting", "DEBUG", "CELERY_task_ignore_result", "no_such", ""}
    for _ in range(2):
        for name in sorted(names):
            expected = outcome(STOCK, app.conf, name)
            assert outcome(Settings.__getitem__, app.conf, name) == expected, name
            if isinstance(expected, tuple) and expected and expected[0] is KeyError:
                assert app.conf.get(name, "default") == "default"
                with pytest.raises(AttributeError):
                    getattr(app.conf, name)
        # changed while the app runs, by new and by old names
        app.conf.task_ignore_result = False
        app.conf["CELERY_TASK_SERIALIZER"] = "pickle"
        app.conf.own_setting = 6
    assert app.conf.own_setting == 6


def test_a_default_is_found_without_celerys_search(monkeypatch: pytest.MonkeyPatch) -> None:
    conf = plain().conf
    assert conf.broker_url == "memory://"  # the first look makes the configuration
    searched: list[str] = []

    def noted(_conf: Any, key: str) -> Any:
        searched.append(key)
        return STOCK(_conf, key)

    monkeypatch.setattr(Settings, "__getitem__", noted)
    monkeypatch.setattr(Settings, "__getitem__", lookups._asking(Settings))
    assert (conf.task_always_eager, conf.task_default_queue, searched) == (False, "celery", [])
    # set here, and a default, too: which of them counts is Celery's to say
    assert (conf.task_ignore_result, conf.worker_prefetch_multiplier) == (True, 7)
    assert searched == ["task_ignore_result", "worker_prefetch_multiplier"]


def test_settings_that_make_what_they_lack_are_left_to_celery() -> None:
    app = plain()
    app.add_defaults(defaultdict(lambda: "made", task_default_queue="own"))
    assert (app.conf.task_default_queue, app.conf.no_such) == ("own", "made")


def test_an_app_on_relay_looks_its_settings_up_like_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "__getitem__", STOCK)
    app = Celery("relayed", broker="relay://127.0.0.1:1", set_as_current=False)
    with app.connection_for_write() as connection:
        assert connection.transport
    assert Settings.__getitem__.relay_stock is STOCK
