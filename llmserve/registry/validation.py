"""Errors of pydantic as problems of a registry."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

    from llmserve.registry import yaml_positions

_SECRETS = frozenset({"api_keys", "admin_key", "hf_token"})  # keys whose values stay hidden
_SHOWN = 80  # characters of a value
_COMPLETE = frozenset({"missing", "value_error"})  # errors whose message needs no value
_TYPES = {
    "boolean": "true or false",
    "dictionary": "a mapping",
    "integer": "an integer",
    "list": "a list",
    "number": "a number",
    "string": "text",
    "tuple": "a list",
}


def report(
    document: yaml_positions.Document, error: ValidationError, path: yaml_positions.Path
) -> None:
    """Add one problem for each place in the file; `path` is the place of the validated value."""
    found: dict[yaml_positions.Path, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_place(document, detail, path), []).append(detail)
    for place, details in found.items():
        document.problem(place, _message(details, place, document.written.get(place)))


def kind(value: object) -> str:
    """What YAML calls a value, with its article."""
    kinds = {list: "a list", str: "text", int: "a number", float: "a number", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), "a mapping")


def _place(
    document: yaml_positions.Document, detail: ErrorDetails, path: yaml_positions.Path
) -> yaml_positions.Path:
    """The place of an error in the file: its `loc` without the branches of unions."""
    steps = [step for step in detail["loc"] if isinstance(step, int) or step.isidentifier()]
    place = (*path, *steps)
    if detail["type"] == "missing":
        return place
    while len(place) > len(path) and place not in document.lines:
        place = place[:-1]
    return place


def _message(details: list[ErrorDetails], place: yaml_positions.Path, written: str | None) -> str:
    """One message for the errors of a place; `written` is a value that is not text in YAML."""
    value = details[0]["input"]
    is_secret = bool(_SECRETS & set(place))
    message = " or ".join(dict.fromkeys(map(_expected, details)))
    if written and message == "must be text":
        shown = "this" if is_secret else written
        return f"must be text; {shown} is {kind(value)} in YAML, so put it in quotes"
    shown = repr(value) if isinstance(value, str | int | float | bool) else kind(value)
    is_complete = any(detail["type"] in _COMPLETE for detail in details)
    return message if is_complete or is_secret or len(shown) > _SHOWN else f"{message}; got {shown}"


def _expected(detail: ErrorDetails) -> str:
    match detail["type"]:
        case "missing":
            return "is missing"
        case "value_error":
            return detail["msg"].removeprefix("Value error, ")
        case "byte_size" | "byte_size_unit":
            return "must be a size such as 12GiB or 500MB"
        case _:
            # "Input should be a valid integer, unable to parse string as an integer"
            message = detail["msg"].partition(", unable")[0].replace("Input should", "must")
            return re.sub(r"a valid (\w+)", lambda m: _TYPES.get(m[1], m[0]), message)
