"""Tool calls in growing text: JSON objects between tags. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass
class Call:
    """A call, possibly incomplete. Its arguments are the text of a JSON object."""

    begin: int  # of its tag, in the text
    end: int | None = None  # of its end tag, or of what could be a call
    name: str | None = None
    arguments: str | None = None
    is_complete: bool = False
    is_broken: bool = False  # invalid JSON, or not a call


class Calls:
    """Reads each character once. A tag inside a JSON string belongs to that string."""

    def __init__(self, start: str, end: str) -> None:
        self._start = start
        self._end = end
        self._position = 0
        self._open: _Members | None = None
        self.text = ""
        self.found: list[Call] = []

    @property
    def outside_end(self) -> int:
        """Where the text ends that belongs neither to an open call nor to the beginning of a tag."""
        return self._position if self._open is None else self.found[-1].begin

    def feed(self, delta: str) -> None:
        self.text += delta
        while self._read_outside() if self._open is None else self._read_inside(self._open):
            pass

    def finish(self) -> None:
        """End the text, in which the last call may lack its end tag. An open call is broken."""
        if self._open is not None:
            self._open.is_broken = not self._open.is_closed
            self._close(len(self.text))
        self._position = len(self.text)

    def _read_outside(self) -> bool:
        begin = self.text.find(self._start, self._position)
        if begin < 0:
            self._position = len(self.text) - self._overlap(self._start)
            return False
        self._position = begin + len(self._start)
        self.found.append(Call(begin))
        self._open = _Members()
        return True

    def _read_inside(self, members: _Members) -> bool:
        call = self.found[-1]
        self._position = members.read(self.text, self._position)
        call.name = members.name
        call.arguments = members.arguments(self.text)
        if members.is_broken:
            self._close(self._position)
            return True
        if not members.is_closed:
            return False
        ends = []
        if (end := self.text.find(self._end, self._position)) >= 0:
            ends.append(end + len(self._end))
        if (begin := self.text.find(self._start, self._position)) >= 0:
            ends.append(begin)  # a call without an end tag
        if ends:
            self._close(min(ends))
        return bool(ends)

    def _close(self, end: int) -> None:
        call = self.found[-1]
        members, self._open = self._open, None
        call.end = self._position = end
        call.is_complete = members is not None and not members.is_broken
        if call.is_complete and members is not None and members.argument_span is None:
            call.arguments = "{}"
        call.is_broken = (
            not call.is_complete or not call.name or not isinstance(_loaded(call.arguments), dict)
        )

    def _overlap(self, tag: str) -> int:
        """Return how many characters at the end of the text can begin a tag."""
        lengths = range(min(len(tag) - 1, len(self.text) - self._position), 0, -1)
        return next((each for each in lengths if self.text.endswith(tag[:each])), 0)


class _Members:
    """The members `name` and `arguments` of a JSON object, read character by character."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_closed = False
        self.is_broken = False
        self._depth = 0
        self._in_string = self._escaped = False
        self._string = (0, 0)
        self._key: str | None = None
        self._value = 0  # where the value of `_key` begins
        self.argument_span: tuple[int, int | None] | None = None

    def arguments(self, text: str) -> str | None:
        """Return the arguments so far; None before the brace, and for other values."""
        if self.argument_span is None:
            return None
        begin, end = self.argument_span
        value = text[begin:end].lstrip()
        if value.startswith("{"):
            return value if end is None else value.rstrip()
        if (
            value.startswith('"') and end is not None
        ):  # some models write the object as a JSON string
            inner = _loaded(value)
            return inner if isinstance(inner, str) and isinstance(_loaded(inner), dict) else None
        return None

    def read(self, text: str, position: int) -> int:
        """Read from `position`; return where reading stopped."""
        for at in range(position, len(text)):
            if self.is_closed:
                return at
            self._next(text, at)
            if self.is_broken:
                return at
        return len(text)

    def _next(self, text: str, at: int) -> None:
        character = text[at]
        if self._in_string:
            self._in_text(character, at)
        elif character == '"':
            self._in_string, self._string = True, (at, at)
        elif character in "{[":
            self._depth += 1
            self.is_broken = self._depth == 1 and character == "["
        elif character in "}]":
            if self._depth == 1:
                self._end_value(text, at)
            self._depth -= 1
            self.is_closed = self._depth == 0
            self.is_broken = self._depth < 0
        elif self._depth == 0:
            self.is_broken = not character.isspace()
        elif self._depth == 1 and character == ":":
            self._begin_value(text, at)
        elif self._depth == 1 and character == ",":
            self._end_value(text, at)

    def _in_text(self, character: str, at: int) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string, self._string = False, (self._string[0], at + 1)
        elif character == "\n":
            self.is_broken = True  # invalid in a JSON string

    def _begin_value(self, text: str, at: int) -> None:
        begin, end = self._string
        self._key, self._value = text[begin + 1 : end - 1], at + 1
        if self._key == "arguments":
            self.argument_span = (at + 1, None)

    def _end_value(self, text: str, at: int) -> None:
        if self._key == "arguments":
            self.argument_span = (self._value, at)
        elif self._key == "name":
            name = _loaded(text[self._value : at])
            self.name = name if isinstance(name, str) else None
        self._key = None


def _loaded(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None
