"""Payloads are compressed in the store: `Broker(url, plugins=[Compression()])`.

Every process that enqueues or claims needs the plugin. Add it to the workers first: they read what was stored
without it as well.
"""

from __future__ import annotations

import zlib
from typing import Any

from relay_core import hookimpl

MAGIC = b"\x00rz1"
"""What a stored payload begins with that this plugin wrote; the byte after it names the codec."""

_AS_IS, _ZLIB, _ZSTD = b"-", b"z", b"s"


class Compression:
    """Compresses what is long enough and becomes shorter.

    :param codec: `zlib`, or `zstd`, which needs `pip install zstandard`; either reads what the other wrote
    :param level: of the codec: zlib 1 to 9, zstd 1 to 22. Default: the codec's own
    :param least: bytes from which on a payload is compressed. Default 1 KiB
    :param most: bytes to which a payload may grow when it is decompressed; one that would grow further goes to dead.
        Default 64 MiB
    """

    def __init__(
        self, codec: str = "zlib", *, level: int | None = None, least: int = 1024, most: int = 64 * 2**20
    ) -> None:
        if codec not in ("zlib", "zstd"):
            raise ValueError(f"codec must be zlib or zstd, got {codec!r}")
        if codec == "zstd":
            _zstandard()
        self.codec, self.level, self.least, self.most = codec, level, least, most

    # Compression comes before encryption on the way in, and so after it on the way out, in whichever order the
    # plugins were given: what is encrypted does not compress.

    @hookimpl(tryfirst=True)
    def relay_encode_payload(self, payload: bytes) -> bytes | None:
        if len(payload) >= self.least:
            packed = self._compress(payload)
            if len(packed) < len(payload):
                return packed
        # a payload that happens to begin as ours do must be told from them
        return MAGIC + _AS_IS + payload if payload.startswith(MAGIC) else None

    @hookimpl(tryfirst=True)
    def relay_decode_payload(self, payload: bytes) -> bytes | None:
        if not payload.startswith(MAGIC):
            return None
        codec, body = payload[len(MAGIC) : len(MAGIC) + 1], payload[len(MAGIC) + 1 :]
        if codec == _AS_IS:
            return body
        if codec == _ZLIB:
            return self._inflate(body)
        if codec == _ZSTD:
            return self._unzstd(body)
        raise ValueError(f"the payload is compressed by a codec that this plugin does not know: {codec!r}")

    def _compress(self, payload: bytes) -> bytes:
        if self.codec == "zlib":
            return MAGIC + _ZLIB + zlib.compress(payload, -1 if self.level is None else self.level)
        compressor = _zstandard().ZstdCompressor(level=3 if self.level is None else self.level)
        packed: bytes = compressor.compress(payload)
        return MAGIC + _ZSTD + packed

    def _inflate(self, body: bytes) -> bytes:
        stream = zlib.decompressobj()
        payload = stream.decompress(body, self.most)
        if stream.unconsumed_tail:
            raise self._too_long()
        if not stream.eof:
            raise ValueError("the compressed payload is cut short")
        return payload

    def _unzstd(self, body: bytes) -> bytes:
        zstandard = _zstandard()
        size = zstandard.frame_content_size(body)
        if not 0 <= size <= self.most:
            raise self._too_long()
        payload: bytes = zstandard.ZstdDecompressor().decompress(body, max_output_size=self.most)
        return payload

    def _too_long(self) -> ValueError:
        return ValueError(f"the payload would have more than {self.most} bytes; raise `most` if that is right")


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError("codec zstd needs the package zstandard: pip install zstandard") from error
    return zstandard
