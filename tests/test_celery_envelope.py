"""A message as a payload: what goes in comes out, and nothing of it needs to be known."""

from __future__ import annotations

import base64
import json
from datetime import datetime, timezone
from typing import Any

import pytest
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st

from relay_adapters.celery.messages.envelope import head_of, pack, pack_stored, unpack


def message(**changed: Any) -> dict[str, Any]:
    return {
        "body": b"[[1, 2], {}, {}]",
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"id": "x", "eta": None, "when": datetime(2030, 1, 1, tzinfo=timezone.utc)},
        "properties": {"priority": 3, "delivery_info": {"exchange": "", "routing_key": "celery"}},
        **changed,
    }


def test_what_is_packed_is_unpacked_with_its_types() -> None:
    assert unpack(pack(message())) == message()


@pytest.mark.parametrize("body", [b"", b"\x80\x04N.", b"a\nb\n", "text"])
def test_a_body_travels_as_it_is(body: Any) -> None:
    expected = body.encode() if isinstance(body, str) else body
    assert unpack(pack(message(body=body)))["body"] == expected


def test_of_a_stored_message_a_body_in_base64_and_a_delivery_tag_are_not_kept() -> None:
    properties = {**message()["properties"], "body_encoding": "base64", "delivery_tag": "t"}
    packed = pack_stored(message(body=base64.b64encode(b"\x00\xff").decode(), properties=properties))
    assert unpack(packed) == message(body=b"\x00\xff")


def test_a_stored_message_of_another_client_may_lack_headers_and_body() -> None:
    """As some clients that are not Python's write theirs."""
    properties = {"body_encoding": "base64", "delivery_tag": "t"}
    found = unpack(pack_stored({"body": None, "headers": None, "properties": properties}))
    assert (found["body"], found["headers"], found["properties"]) == (b"", None, {})


def test_what_a_published_message_says_of_an_earlier_delivery_is_not_kept_and_not_believed() -> None:
    properties = {**message()["properties"], "body_encoding": "base64", "delivery_tag": "t"}
    assert unpack(pack(message(body=b"AP8=", properties=properties))) == message(body=b"AP8=")


def test_a_property_that_json_cannot_hold_is_left_out_as_amqp_does() -> None:
    properties = {**message()["properties"], "correlation_id": "c", "signal": object()}
    assert head_of(pack(message(properties=properties)))["properties"] == {
        **message()["properties"],
        "correlation_id": "c",
    }


def test_a_header_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError):
        pack(message(headers={"id": object()}))


@pytest.mark.parametrize(
    "payload", [b"", b"not JSON", b"[]", b"{}", b"\xff\xfe", b'{"properties":{},"task":[]}', b'{"task":{}}']
)
def test_what_is_no_message_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError):
        unpack(payload)


def task(**changed: Any) -> dict[str, Any]:
    """As Celery sends one."""
    return {
        "body": b"[[], {}, {}]",
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {
            "lang": "py", "task": "shop.pay", "id": "i", "shadow": None, "eta": None, "expires": None, "group": None,
            "group_index": None, "retries": 0, "timelimit": [None, None], "root_id": "i", "parent_id": None,
            "argsrepr": "()", "kwargsrepr": "{}", "origin": "gen1@host", "ignore_result": False,
            "replaced_task_nesting": 0, "stamped_headers": None, "stamps": {},
        },
        "properties": {
            "correlation_id": "i", "reply_to": "r", "delivery_mode": 2, "priority": 0,
            "delivery_info": {"exchange": "", "routing_key": "celery"},
        },
        **changed,
    }  # fmt: skip


def test_celery_s_own_headers_are_those_that_are_not_stored_where_they_are_plain() -> None:
    app = Celery(set_as_current=False)
    sent = app.amqp.as_task_v2("i", "shop.pay", root_id="i", argsrepr="()", kwargsrepr="{}", origin="gen1@host")
    assert sent.headers == task()["headers"]
    assert json.loads(pack(task()).partition(b"\n")[0]) == {
        "task": {"id": "i", "task": "shop.pay", "origin": "gen1@host"},
        "properties": {"reply_to": "r", "delivery_info": {"exchange": "", "routing_key": "celery"}},
    }


_ANY = (
    st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from(["i", "py", "()"]) | st.lists(st.none(), max_size=3)
)


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys((*task()["headers"], "trace"), _ANY)),
    st.fixed_dictionaries({}, optional=dict.fromkeys(("correlation_id", "delivery_mode", "priority", "type"), _ANY)),
    st.sets(st.sampled_from([*task()["headers"], "correlation_id", "delivery_mode", "priority"]), max_size=2),
    st.sampled_from(["application/json", "application/x-python-serialize", None]),
    st.sampled_from(["utf-8", "binary", None]),
)
def test_a_task_is_unpacked_as_it_was_packed_whatever_it_says_and_lacks(
    headers: dict[str, Any],
    properties: dict[str, Any],
    without: set[str],
    content_type: str | None,
    encoding: str | None,
) -> None:
    sent = task(**{"content-type": content_type, "content-encoding": encoding})
    for part, own in (("headers", headers), ("properties", properties)):
        sent[part] = {name: value for name, value in (sent[part] | own).items() if name not in without}
    found = unpack(pack(sent))
    assert found == sent
    assert [*found["headers"]] == [*sent["headers"]] or "trace" in headers


def test_who_changes_a_message_changes_no_other() -> None:
    packed = pack(task())
    unpack(packed)["headers"]["stamps"]["mine"] = unpack(packed)["headers"]["timelimit"][0] = 1
    assert unpack(packed) == task()
