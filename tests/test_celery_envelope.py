"""A message as a payload: what goes in comes out, and nothing of it needs to be known."""

from __future__ import annotations

import base64
from datetime import datetime, timezone
from typing import Any

import pytest

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


@pytest.mark.parametrize("payload", [b"", b"not JSON", b"[]", b"{}", b"\xff\xfe"])
def test_what_is_no_message_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError):
        unpack(payload)
