"""JSON text of clients: its cost, measured before parsing, and its value. Pure.

orjson holds the GIL for a whole call, so a thread alone does not free the event loop.
No call gets more than COST_LIMIT units, REST_LIMIT bytes outside long strings, or one piece of
a long string.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from typing import Any

import orjson

from llmserve.errors import BodyTooLarge, RequestError, quoted

# Units: a number, true, false and null cost 1, a string 2, a key, an object and an array 5.
COST_LIMIT = 400_000
REST_LIMIT = 8 * 2**20  # bytes of a body without its long strings
TEXT_LIMIT = 8 * 2**20  # bytes of a string, except ASCII of a key in DATA_KEYS
KEY_LIMIT = 16 * 2**10  # bytes of a key; longer strings are long strings

LIGHT_BYTES = 64 * 2**10
LIGHT_MARKS = 2000  # brackets, colons, commas and quotes, inside strings too
# Keys with base64 in bodies of OpenAI, Anthropic and vLLM.
DATA_KEYS = frozenset(
    {"url", "data", "file_data", "image_url", "audio_url", "video_url", "input_audio", "image"}
    | {"audio", "video", "image_embeds", "audio_embeds", "video_embeds", "prompt_embeds"}
)

_SLICE = KEY_LIMIT  # bytes of one scan step
_PIECE = 16 * _SLICE  # bytes of a long string that are decoded at once
_IS_KEY = re.compile(rb"[ \t\r\n]*:")
_LOW_SURROGATE = re.compile(rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}")

Buffer = bytes | bytearray


def is_light(buffer: Buffer) -> bool:
    """Return whether the event loop can parse a JSON text, by its size and marks."""
    if len(buffer) > LIGHT_BYTES:
        return False
    return len(buffer) - len(buffer.translate(None, b'{[:,"')) <= LIGHT_MARKS


def load(buffer: Buffer) -> Any:
    """Return the value of a JSON text. Integers beyond 64 bits become floats (RFC 8259, 6).

    Raises RequestError, whose message has no part of the text, and BodyTooLarge.
    """
    if is_light(buffer):
        return _loads(buffer)
    scan = Scan(buffer)
    scan.run()
    if not scan.long:
        return _loads(buffer)
    mark = secrets.token_hex(16)  # unknown to the client, so not in its text
    value = _loads(scan.rest(mark), lambda at: scan.position(at, mark))
    texts = {f"{mark}{i}": each.text(buffer) for i, each in enumerate(scan.long)}
    return _replace_marks(value, texts)


@dataclass(slots=True)
class LongString:
    """The content of a string, from `start` to `end`, and positions where it may be cut."""

    start: int
    end: int = 0
    cuts: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.end - self.start

    def text(self, buffer: Buffer) -> str:
        text, plain = "", True
        for start, end in zip([self.start, *self.cuts], [*self.cuts, self.end], strict=True):
            piece = _loads(b'"' + buffer[start:end] + b'"', lambda at, start=start: start - 1 + at)
            plain = plain and piece.isascii()
            if not plain and len(self) > TEXT_LIMIT:
                raise BodyTooLarge(
                    f"A string in the body has {len(self)} bytes and is not ASCII; "
                    f"the limit is {TEXT_LIMIT}. Send a shorter text."
                )
            text += piece  # CPython extends a string with one reference in place
        return text


class Scan:
    """Measures the cost of a JSON text and finds its long strings, slice by slice.

    `cost` is an upper bound for a parser that stops at a mistake, too.
    """

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.cost = 0
        self.long: list[LongString] = []
        self._lifted = 0  # bytes in `long`
        self._open: LongString | None = None  # the string that continues in the next slice

    def run(self) -> None:
        """Scan the text. Raises BodyTooLarge at the first limit, RequestError for a key."""
        at = 0
        while at < len(self.buffer):
            at = self._step(at)
            self._check(at)
        if self._open is not None:
            raise _invalid("a string does not end", self._open.start)

    def rest(self, mark: str) -> bytes:
        """Return the text with `mark` and a number in place of each long string."""
        parts: list[Buffer] = []
        at = 0
        for i, each in enumerate(self.long):
            parts += [self.buffer[at : each.start], f"{mark}{i}".encode()]
            at = each.end
        return b"".join([*parts, self.buffer[at:]])

    def position(self, at: int, mark: str) -> int:
        """Return the position in the text of byte `at` of its rest."""
        for i, each in enumerate(self.long):
            if at <= each.start:
                break
            at += len(each) - len(f"{mark}{i}")
        return at

    def _step(self, at: int) -> int:
        """Scan the slice at `at`; return the position of the next one."""
        piece = self.buffer[at : at + _SLICE]
        if self._open is None or b'"' in piece or b"\\" in piece:
            piece = piece.replace(b"\\\\", b"..").replace(b'\\"', b"..")
            self._count(piece, at)
        if self._open is None:
            return at + len(piece)
        end = max(_boundary(self.buffer, piece, at), self._open.start)
        if end - (self._open.cuts or [self._open.start])[-1] >= _PIECE:
            self._open.cuts.append(end)
        return end

    def _count(self, piece: Buffer, at: int) -> None:
        """Add the cost of a piece without escaped quotes: two quotes enclose a string."""
        parts = piece.split(b'"')
        inside = self._open is not None
        outside = b"".join(parts[inside::2])
        nested = len(outside) - len(outside.translate(None, b"{[:"))
        self.cost += outside.count(b",") + 4 * nested + len(parts) // 2
        if len(parts) == 1:
            return
        if self._open is not None:
            self._close(self._open, at + len(parts[0]))
        begun = (len(parts) + inside) % 2 == 0
        self._open = LongString(at + len(piece) - len(parts[-1])) if begun else None

    def _close(self, string: LongString, end: int) -> None:
        string.end = end
        if len(string) <= KEY_LIMIT:
            return
        if _IS_KEY.match(self.buffer, end + 1, end + 1 + _SLICE):
            raise RequestError(
                f"A key in the body has {len(string)} bytes; the limit is {KEY_LIMIT}. "
                "Send a shorter key.",
            )
        self.long.append(string)
        self._lifted += len(string)

    def _check(self, at: int) -> None:
        if self.cost > COST_LIMIT:
            raise BodyTooLarge(
                f"The body costs more than {COST_LIMIT} units: a string costs 2; a key, an object "
                "and an array 5; any other value 1. Send fewer values at once."
            )
        rest = (at if self._open is None else self._open.start) - self._lifted
        if rest > REST_LIMIT:
            raise BodyTooLarge(
                f"The body has more than {REST_LIMIT} bytes, the limit without strings of more "
                f"than {KEY_LIMIT} bytes. Send fewer values at once."
            )


def _boundary(buffer: Buffer, piece: Buffer, at: int) -> int:
    """Return the end of a slice within a string, moved to the start of a character."""
    end = at + len(piece)
    if end >= len(buffer):
        return end
    found = piece.rfind(b"\\", max(0, len(piece) - 6))
    if found >= 0:
        start = at + found
        return start + 6 if _LOW_SURROGATE.match(buffer, start) else start
    for _ in range(3):
        end -= buffer[end] & 0xC0 == 0x80  # a byte inside a UTF-8 sequence
    return end


def _loads(text: Buffer, position: Any = int) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise _invalid(error.msg, position(error.pos)) from None


def _invalid(what: str, at: int) -> RequestError:
    return RequestError(
        f"The body is not valid JSON: {what} at character {at}.", code="invalid_json"
    )


def _replace_marks(value: Any, texts: dict[str, str]) -> Any:
    """Return `value` with its marks replaced by their strings."""
    holder = [value]
    unseen: list[Any] = [holder]
    while unseen:
        one = unseen.pop()
        for key, each in one.items() if type(one) is dict else enumerate(one):
            if type(each) is str:
                if each in texts:
                    one[key] = _checked(key, texts[each])
            elif type(each) is dict or type(each) is list:
                unseen.append(each)
    return holder[0]


def _checked(key: str | int, text: str) -> str:
    if len(text) > TEXT_LIMIT and key not in DATA_KEYS:
        name = key if isinstance(key, str) else None
        raise BodyTooLarge(
            f"{quoted(str(key))} has {len(text)} characters; the limit is {TEXT_LIMIT}, except for "
            "images, audio and video in base64. Send a shorter text.",
            param=name and name[:200],
        )
    return text
