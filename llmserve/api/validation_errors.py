"""Which of the mistakes that pydantic finds in a body its client gets to read. Pure.

pydantic reports the mistakes of every branch of a union. Branches for another kind of object,
by its `type` or `role`, are left out. The message names the deepest place of the rest, and
everything that is allowed there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmserve.errors import RequestError, quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pydantic_core import ErrorDetails

    from llmserve.errors import LLMServeError

_KINDS = frozenset({"type", "role"})  # keys that tell one kind of object from another
_OF_ANOTHER_KIND = frozenset({"literal_error", "enum", "union_tag_invalid", "missing"})
_DEEPEST = 32  # steps of a path in a message
_ALLOWED = 16  # of what a value may be
_OWN_WORDS = 500  # characters of a message of vLLM's

# What a value must be, by the first word of pydantic's type of an error.
_TYPES = {
    "string": "a string",
    "int": "an integer",
    "float": "a number",
    "decimal": "a number",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "iterable": "a list",
    "generator": "a list",
    "dict": "an object",
    "mapping": "an object",
    "model": "an object",
    "dataclass": "an object",
    "none": "null",
}
# The same where the value has the right type; the names are pydantic's.
_LIMITS = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "a finite number",
    "int_from_float": "an integer",
    "int_parsing_size": "an integer of fewer digits",
    "string_too_short": "a string of at least {min_length} characters",
    "string_too_long": "a string of at most {max_length} characters",
    "string_unicode": "a string of valid Unicode",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "union_tag_invalid": "{expected_tags}",
}
# Of an object that a key tells from others: the key is not one of them, or is not there.
_TAGS = {"union_tag_invalid": "union_tag_invalid", "union_tag_not_found": "missing"}

Path = tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """One of pydantic's errors, and where in the body it is."""

    path: Path
    loc: tuple[int | str, ...]
    kind: str
    ctx: dict[str, Any]
    value: Any
    message: str

    @classmethod
    def of(cls, detail: ErrorDetails, body: Any) -> Found:
        ctx, kind, value = detail.get("ctx", {}), detail["type"], detail.get("input")
        path = path_of(detail["loc"], body, missing=kind == "missing")
        if kind in _TAGS:
            key = ctx["discriminator"].strip("'")
            path, kind = (*path, key), _TAGS[kind]
            value = value.get(key) if isinstance(value, dict) else None
        return cls(path, detail["loc"], kind, ctx, value, detail["msg"])


def mistake(details: Iterable[ErrorDetails], body: Any) -> RequestError:
    """Where a body is wrong, what came and what is allowed. Quotes no text of the body."""
    found = _relevant([Found.of(each, body) for each in details], 0, (), body)
    worst = max(found, key=lambda each: (len(each.path), _is_of_another_kind(each)))
    path = worst.path
    here = [each for each in found if each.path == path]
    param = ".".join(path[:_DEEPEST]) or None
    name = quoted(param, 200) if param else "The body"
    if here[0].kind == "missing":
        return RequestError(f"{name} is required.", param=param, code="missing_required_parameter")
    for each in here:
        if (own := _own_error(each, param)) is not None:
            return own
    allowed = list(dict.fromkeys(filter(None, map(_allowed, here))))
    if not allowed or (param is None and here[0].value is not body):
        return RequestError(f"{name} has a value that is not allowed.", param=param)
    return RequestError(f"{name} must be {_either(allowed)}; it is {_came(here)}.", param=param)


# Names that vLLM has for one thing; a body has one of them.
_SYNONYMS = (
    ("max_tokens", "max_completion_tokens", "max_output_tokens"),
    ("input_tokens", "input_text", "messages", "input", "prompt", "documents", "query"),
    ("stop", "stop_sequences"),
)


def name_as_sent(error: LLMServeError, body: dict[str, Any]) -> None:
    """Let an error speak of a field by the name that the body has for it."""
    name = error.param
    if name is None or name in body:
        return
    for names in _SYNONYMS:
        sent = next((each for each in names if each in body), None)
        if name in names and sent is not None:
            error.param = sent
            error.message = re.sub(rf"\b{name}\b", sent, error.message)


def path_of(loc: Sequence[int | str], body: Any, *, missing: bool = False) -> Path:
    """Where `loc` leads in `body`; its last step too if that is what is missing.

    pydantic puts the names of branches and validators into it. They lead nowhere.
    """
    path: list[str] = []
    for step in loc:
        if _leads_on(body, step):
            body = body[step]
            path.append(str(step))
    return (*path, str(loc[-1])) if missing and loc else tuple(path)


def _leads_on(value: Any, step: int | str) -> bool:
    if isinstance(value, dict):
        return step in value
    return isinstance(value, list) and isinstance(step, int) and 0 <= step < len(value)


def _relevant(found: list[Found], depth: int, path: Path, value: Any) -> list[Found]:
    """Those below one step of their `loc`, but for branches for objects of another kind."""
    kept: list[Found] = []
    deeper: dict[int | str, list[Found]] = {}
    for each in found:
        if len(each.loc) - (each.kind == "missing") <= depth:
            kept.append(each)
        else:
            deeper.setdefault(each.loc[depth], []).append(each)
    branches: list[list[Found]] = []
    for step, below in deeper.items():
        if _leads_on(value, step):
            kept += _relevant(below, depth + 1, (*path, str(step)), value[step])
        else:
            branches.append(_relevant(below, depth + 1, path, value))
    return kept + _fitting(branches, path)


def _fitting(branches: list[list[Found]], path: Path) -> list[Found]:
    """Of the branches those for an object of its kind; if there are none, what tells the kind."""
    told = [[each for each in branch if _tells_kind(each, path)] for branch in branches]
    fitting = [branch for branch, kind in zip(branches, told, strict=True) if not kind]
    found = [each for branch in fitting or told for each in branch]
    wrong = [each for each in found if each.kind != "missing"]
    return found if fitting else wrong or found


def _tells_kind(found: Found, path: Path) -> bool:
    return found.kind in _OF_ANOTHER_KIND and found.path in {(*path, key) for key in _KINDS}


def _own_error(found: Found, param: str | None) -> RequestError | None:
    """The words of a validator that is not pydantic's own."""
    cause = found.ctx.get("error")
    if isinstance(cause, Exception):
        words = " ".join(str(cause.args[0]).split()) if cause.args else "The value is not allowed."
        param = getattr(cause, "parameter", None) or param
    elif found.kind == "too_many_keys":
        words = f"{quoted(param, 200) if param else 'The body'} {found.message}"
    else:
        return None
    return RequestError(words[:_OWN_WORDS], param=param)


def _is_of_another_kind(found: Found) -> bool:
    return found.kind == "literal_error" and not _KINDS.isdisjoint(found.path[-1:])


def _either(words: list[str]) -> str:
    more = ["..."] if len(words) > _ALLOWED else []
    *most, last = words[:_ALLOWED] + more
    return " or ".join([", ".join(most), last] if most else [last])


def _allowed(found: Found) -> str:
    limit = _LIMITS.get(found.kind)
    if limit is not None:
        return limit.format_map(found.ctx)
    return _TYPES.get(found.kind.partition("_")[0], "")


def _came(here: list[Found]) -> str:
    """A value in words: numbers and words that are one of a few as they are, the rest by type."""
    value = here[0].value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return str(value)[:40]
    if isinstance(value, str):
        words = all(each.kind in _OF_ANOTHER_KIND for each in here)
        return quoted(value, 40) if words else f"a string of {len(value)} characters"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "an object"
