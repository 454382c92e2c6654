"""Messages on their way into jobs, beside Dramatiq's own way. No server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dramatiq.broker import MessageProxy
from dramatiq.encoder import Encoder, JSONEncoder, MessageData, PickleEncoder
from dramatiq.message import Message, get_encoder, set_encoder

from relay_adapters.dramatiq.message import Holding, Lease, RelayMessage, encoded, with_options
from relay_core import Job


class Other(Message[None]):
    """A user's own kind of message."""

    def encode(self) -> bytes:
        return b"other"


class Sorted(JSONEncoder):
    """A user's own kind of encoder."""

    def encode(self, data: MessageData) -> bytes:
        return super().encode(dict(sorted(data.items())))


@pytest.fixture(params=[JSONEncoder, Sorted, PickleEncoder], ids=lambda kind: kind.__name__)
def encoder(request: pytest.FixtureRequest) -> Iterator[Encoder]:
    before, chosen = get_encoder(), request.param()
    set_encoder(chosen)
    yield chosen
    set_encoder(before)


def message(kind: type[Message[None]] = Message) -> Message[None]:
    return kind("q", "actor", (1, "é\n", None, [2.5]), {"a": {"b": True}}, {"max_retries": 3, "z": [1]}, "id", 12)


@pytest.mark.parametrize("kind", [Message, Other])
def test_a_message_is_encoded_byte_for_byte_as_by_dramatiq(encoder: Encoder, kind: type[Message[None]]) -> None:
    given = message(kind)
    assert encoded(given) == given.encode()
    assert encoded(MessageProxy(given)) == given.encode()
    changed = with_options(given, {"z": 1, "y": 2})
    assert encoded(changed) == given.copy(options={"z": 1, "y": 2}).encode()


@pytest.mark.parametrize("kind", [Message, Other])
def test_a_message_with_more_options_is_a_copy(kind: type[Message[None]]) -> None:
    given = message(kind)
    changed = with_options(given, {"z": 1, "y": 2})
    assert type(changed) is kind
    assert changed == given.copy(options={"z": 1, "y": 2})
    assert given == message(kind)
    assert with_options(MessageProxy(given), {"z": 1, "y": 2}) == changed  # type: ignore[arg-type]


def test_what_no_json_holds_is_refused_as_by_dramatiq() -> None:
    strange = message().copy(options={"what": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        encoded(strange)


def test_a_delivered_message_shows_the_fields_of_its_message_and_shares_its_options() -> None:
    given = message()
    job = Job("id", "q", given.encode(), 0.0, 0.0, 0, 1, 0, "1:1:a", 0.0, 0.0)
    shown = RelayMessage(given, Lease(job), Holding())
    for name, value in vars(given).items():
        assert getattr(shown, name) is value
    shown.options["retries"] = 1  # as the Retries middleware does
    assert shown == given
    assert shown.encode() == given.encode() == message().copy(options={"retries": 1}).encode()
    assert shown.copy(options={"eta": 1}).options == {**given.options, "eta": 1}
