"""Payloads are encrypted in the store by AES-GCM: `Broker(url, plugins=[Encryption({"2026a": key}, "2026a")])`.

Needs `pip install cryptography`. The store, its backups and its replicas see no payload; they do see queue names, job
ids, headers, dedup keys and the errors that handlers raise.

To change keys, in this order: give the new one to every process (`{"2026a": old, "2026b": new}`), then let all write
with it (`write_with="2026b"`), and drop the old one when no job that was stored with it is left, dead ones included.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from relay_core import hookimpl

MAGIC = b"\x00re1"
"""What a stored payload begins with that this plugin wrote; then the length of the key's name, its name, the nonce."""

_NONCE = 12


class CannotDecrypt(Exception):
    """The payload is not ours, was changed, or its key is not here. The job goes to dead with its payload as it is:
    once the key is here, `relay dlq requeue` gives it another try."""


class Encryption:
    """Each payload is bound to its queue: moved to another one in the store, it does not decrypt.

    :param keys: 16, 24 or 32 bytes by a name of at most 255 bytes; make one by `os.urandom(32)`
    :param write_with: the name of the key for new payloads; the others are for reading
    :param accept_plain: also read payloads that are not encrypted. Default False; True is for the time in which not
        every process that enqueues has the plugin yet
    """

    def __init__(self, keys: Mapping[str, bytes], write_with: str, *, accept_plain: bool = False) -> None:
        if write_with not in keys:
            raise ValueError(f"write_with names the key {write_with!r}, which is not among {sorted(keys)}")
        self._ciphers: dict[bytes, AESGCM] = {}
        for name, key in keys.items():
            if not 0 < len(name.encode()) < 256:
                raise ValueError(f"the name of a key must have 1 to 255 bytes, got {name!r}")
            if not isinstance(key, bytes) or len(key) not in (16, 24, 32):
                raise ValueError(f"key {name!r} must have 16, 24 or 32 bytes")  # and is not shown
            self._ciphers[name.encode()] = AESGCM(key)
        self._name = write_with.encode()
        self._accept_plain = accept_plain

    @classmethod
    def from_environment(cls, variable: str = "RELAY_KEYS", *, accept_plain: bool = False) -> Encryption:
        """From `2026b:<base64>,2026a:<base64>`: the first key writes, all read."""
        keys: dict[str, bytes] = {}
        for part in os.environ.get(variable, "").split(","):
            name, colon, text = part.strip().partition(":")
            if not colon:
                raise ValueError(f"{variable} must be name:base64,name:base64, the one to write with first")
            try:
                keys[name] = base64.b64decode(text, validate=True)
            except ValueError:
                raise ValueError(f"{variable}: key {name!r} is not base64") from None
        return cls(keys, next(iter(keys)), accept_plain=accept_plain)

    def __repr__(self) -> str:
        return f"Encryption({[name.decode() for name in self._ciphers]}, write_with={self._name.decode()!r})"

    @hookimpl
    def relay_encode_payload(self, payload: bytes, queue: str) -> bytes:
        head = MAGIC + bytes([len(self._name)]) + self._name
        nonce = os.urandom(_NONCE)
        return head + nonce + self._ciphers[self._name].encrypt(nonce, payload, head + queue.encode())

    @hookimpl
    def relay_decode_payload(self, payload: bytes, queue: str) -> bytes | None:
        if not payload.startswith(MAGIC):
            if self._accept_plain:
                return None
            raise CannotDecrypt(f"a payload of queue {queue!r} is not encrypted, and plain ones are not accepted")
        start = len(MAGIC) + 1
        end = start + payload[len(MAGIC)] if len(payload) > len(MAGIC) else start
        name, nonce, body = payload[start:end], payload[end : end + _NONCE], payload[end + _NONCE :]
        cipher = self._ciphers.get(name)
        if cipher is None:
            raise CannotDecrypt(f"a payload of queue {queue!r} is encrypted with key {name!r}, which is not here")
        try:
            return cipher.decrypt(nonce, body, payload[:end] + queue.encode())
        except (InvalidTag, ValueError) as error:
            raise CannotDecrypt(
                f"a payload of queue {queue!r} was changed, or belongs to another queue, or key {name!r} differs"
            ) from error
