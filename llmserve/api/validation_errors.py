"""The error message for the mistakes that pydantic finds in a body. Pure.

pydantic reports the mistakes of all branches of a union. Branches for another kind of object,
by its `type` or `role`, do not count. The message names the deepest path of the rest, and all
values that are allowed there.
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

_KINDS = frozenset({"type", "role"})  # keys that determine the kind of an object
_OF_ANOTHER_KIND = frozenset({"literal_error", "enum", "union_tag_invalid", "missing"})
_DEEPEST = 32  # steps of a path in a message
_ALLOWED = 16  # alternatives in a message
_VLLM_LIMIT = 500  # characters of a message of vLLM's

# The required type, by the first word of pydantic's error type.
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
# The required value where the type is right; the names are pydantic's.
_LIMITS = {
    "greater_than": "greater than {gt}",
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
# Of a tagged union: the tag is unknown or missing.
_TAGS = {"union_tag_invalid": "union_tag_invalid", "union_tag_not_found": "missing"}

Path = tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """One of pydantic's errors, and its path in the body."""

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
    """Return the error for the worst mistake: path, value, allowed values. Quotes no text."""
    found = _relevant([Found.of(each, body) for each in details], 0, (), body)
    worst = max(found, key=lambda each: (len(each.path), _is_of_another_kind(each)))
    path = worst.path
    here = [each for each in found if each.path == path]
    param = ".".join(path[:_DEEPEST]) or None
    name = quoted(param, 200) if param else "The body"
    if here[0].kind == "missing":
        return RequestError(f"{name} is required.", param=param, code="missing_required_parameter")
    for each in here:
        if (own := _validator_error(each, param)) is not None:
            return own
    allowed = list(dict.fromkeys(filter(None, map(_allowed, here))))
    if not allowed or (param is None and here[0].value is not body):
        return RequestError(f"{name} has a value that is not allowed.", param=param)
    return RequestError(f"{name} must be {_either(allowed)}; it is {_came(here)}.", param=param)


def field_mistakes(details: Iterable[ErrorDetails]) -> list[tuple[str, str]]:
    """Return the name of each invalid field of a flat object, and what is wrong with it."""
    found = []
    for detail in details:
        each = Found.of(detail, {})
        name, allowed = str(each.loc[0]), _allowed(each)
        if each.kind == "extra_forbidden":
            problem = "is not a known key"
        elif each.kind == "missing":
            problem = "is required"
        else:
            value = "null" if each.value is None else quoted(str(each.value), 40)
            problem = f"must be {allowed}; it is {value}" if allowed else "has an invalid value"
        found.append((name, f"{quoted(name)} {problem}"))
    return found


# Names of one field in different requests; a body has one of them.
_SYNONYMS = (
    ("max_tokens", "max_completion_tokens", "max_output_tokens"),
    ("input_tokens", "input_text", "messages", "input", "prompt", "documents", "query"),
    ("stop", "stop_sequences"),
)


def name_as_sent(error: LLMServeError, body: dict[str, Any]) -> None:
    """Change the field name of an error to the name in the body."""
    name = error.param
    if name is None or name in body:
        return
    for names in _SYNONYMS:
        sent = next((each for each in names if each in body), None)
        if name in names and sent is not None:
            error.param = sent
            error.message = re.sub(rf"\b{name}\b", sent, error.message)


def path_of(loc: Sequence[int | str], body: Any, *, missing: bool = False) -> Path:
    """Return the steps of `loc` that exist in `body`, and the last step if it is `missing`.

    The others are pydantic's names of branches and validators.
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
    """Return the mistakes below a step of their `loc`, without branches for other kinds."""
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
    """Return the mistakes of the branches for the object's kind, else those of the kind."""
    kinds = [[each for each in branch if _is_kind_error(each, path)] for branch in branches]
    fitting = [branch for branch, kind in zip(branches, kinds, strict=True) if not kind]
    found = [each for branch in fitting or kinds for each in branch]
    wrong = [each for each in found if each.kind != "missing"]
    return found if fitting else wrong or found


def _is_kind_error(found: Found, path: Path) -> bool:
    return found.kind in _OF_ANOTHER_KIND and found.path in {(*path, key) for key in _KINDS}


def _validator_error(found: Found, param: str | None) -> RequestError | None:
    """Return the message of a validator of vLLM's; None for one of pydantic's."""
    cause = found.ctx.get("error")
    if isinstance(cause, Exception):
        words = " ".join(str(cause.args[0]).split()) if cause.args else "The value is not allowed."
        param = getattr(cause, "parameter", None) or param
    elif found.kind == "too_many_keys":
        words = f"{quoted(param, 200) if param else 'The body'} {found.message}"
    else:
        return None
    return RequestError(words[:_VLLM_LIMIT], param=param)


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
    """Describe a value: a number, or a word of few, as it is; anything else by its type."""
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
