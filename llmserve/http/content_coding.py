"""Bounded decoding of request bodies (RFC 9110, 8.4.1). Pure."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import zstandard

from llmserve.errors import BodyTooLarge, RequestError, UnsupportedEncoding, quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

_OUTPUT = 256 * 2**10  # bytes of one step, at most
# A zstd decoder has no limit on its output. A block of 4 bytes has up to 128 KiB of output.
_ZSTD_INPUT = 256
_ZSTD_WINDOW = 8 * 2**20  # RFC 9659
_GZIP_INPUT = 64 * 2**10  # zlib copies what it has not consumed
_FRAMES = 1000  # gzip members or zstd frames of a body: each needs a new decoder


class _Decoder(Protocol):
    """The common attributes of zlib's and zstandard's decoders."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...


D = TypeVar("D", bound=_Decoder)


def coding_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the coding of a body; None for a plain body. Raises UnsupportedEncoding."""
    values = [value for name, value in headers if name == b"content-encoding"]
    if not values:
        return None
    names = [name.strip().lower() for name in b",".join(values).decode("latin-1").split(",")]
    codings = [name for name in names if name not in ("", "identity")]
    if not codings:
        return None
    if len(codings) > 1 or codings[0] not in DECODERS:
        raise UnsupportedEncoding(
            f"The Content-Encoding {quoted(', '.join(codings))} is not supported; "
            f"supported: {', '.join(ALLOWED)}. Send the body in one of these or without one.",
            ALLOWED,
        )
    return codings[0]


def decode(coding: str, data: bytes | bytearray, limit: int) -> bytearray:
    """Return decoded bytes. Raises BodyTooLarge beyond `limit`, RequestError for bad data."""
    whole = bytearray()
    try:
        for piece in DECODERS[coding](data):
            whole += piece
            if len(whole) > limit:
                raise BodyTooLarge(
                    f"The decoded body is larger than server.max_body, {limit} bytes. "
                    "Send a smaller body."
                )
    except (zlib.error, zstandard.ZstdError):
        raise _invalid("is damaged", coding) from None
    return whole


def _gzip(data: bytes | bytearray) -> Iterator[bytes]:
    return _inflated(data, 16 + zlib.MAX_WBITS)


def _deflate(data: bytes | bytearray) -> Iterator[bytes]:
    """Decode zlib's format, with or without its header: clients send both."""
    has_header = data[:1] and data[0] & 0x0F == 8 and int.from_bytes(data[:2], "big") % 31 == 0
    return _inflated(data, zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)


def _inflated(data: bytes | bytearray, wbits: int) -> Iterator[bytes]:
    frames = _Frames(lambda: zlib.decompressobj(wbits), "gzip" if wbits > 15 else "deflate")
    for piece in _slices(data, _GZIP_INPUT):
        rest = piece
        while rest:
            decoder = frames.current()
            yield decoder.decompress(rest, _OUTPUT)
            rest = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
    while not frames.ended and (more := frames.current().decompress(b"", _OUTPUT)):
        yield more
    frames.end()


def _zstd(data: bytes | bytearray) -> Iterator[bytes]:
    made = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frames = _Frames(made.decompressobj, "zstd")
    for piece in _slices(data, _ZSTD_INPUT):
        rest = piece
        while rest:
            decoder = frames.current()
            yield decoder.decompress(rest)
            rest = decoder.unused_data if decoder.eof else b""
    frames.end()


class _Frames(Generic[D]):
    """Creates a decoder for each frame of a body."""

    def __init__(self, make: Callable[[], D], coding: str) -> None:
        self._make, self._coding = make, coding
        self._current = make()
        self._count = 1

    @property
    def ended(self) -> bool:
        return self._current.eof

    def current(self) -> D:
        if self.ended:
            self._count += 1
            if self._count > _FRAMES:
                raise _invalid(f"has more than {_FRAMES} frames", self._coding)
            self._current = self._make()
        return self._current

    def end(self) -> None:
        if not self.ended:
            raise _invalid("ends early", self._coding)


def _slices(data: bytes | bytearray, size: int) -> Iterator[bytes]:
    return (bytes(data[at : at + size]) for at in range(0, len(data), size))


def _invalid(what: str, coding: str) -> RequestError:
    return RequestError(
        f"The body {what}; its Content-Encoding is {coding}. Send a complete {coding} body.",
        code="invalid_encoding",
    )


DECODERS: Mapping[str, Callable[[bytes | bytearray], Iterator[bytes]]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "zstd": _zstd,
}
ALLOWED = ("gzip", "deflate", "zstd")
