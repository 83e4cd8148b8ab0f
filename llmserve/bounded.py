"""vLLM's request classes, validated at a cost that their callers bound.

pydantic collects every mistake of a list, of each branch of a union, in one call into C.
Here a list ends at its first mistake, and a thread gives up the GIL between two items.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from pydantic_core import PydanticCustomError, SchemaValidator

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS_LIMIT = 4096  # of an object with free keys: pydantic collects a mistake for each

_LISTS = frozenset({"list", "set", "frozenset"})
# What of a schema is a value or a class, and no further schema.
_VALUES = frozenset({"metadata", "default", "expected", "serialization", "cls", "config"})


def bounded(kind: Any) -> TypeAdapter[Any]:
    """A TypeAdapter for `kind`; values that are valid come out as from any other."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    # Validators that pydantic has built before would stand for parts of this schema.
    adapter.validator = SchemaValidator(_bounded(adapter.core_schema), _use_prebuilt=False)
    return adapter


def _bounded(schema: Any) -> Any:
    if isinstance(schema, list | tuple):
        return type(schema)(_bounded(each) for each in schema)
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if not isinstance(kind, str):  # the schemas of fields, by their names
        return {name: _bounded(each) for name, each in schema.items()}
    made = {key: each if key in _VALUES else _bounded(each) for key, each in schema.items()}
    if kind in _LISTS:
        items = made.get("items_schema", {"type": "any"})
        made |= {"fail_fast": True, "items_schema": _interruptible(items)}
    elif kind == "dict":
        return _before(_few_keys, made)
    return made


def _interruptible(schema: Any) -> dict[str, Any]:
    """CPython gives up the GIL at the start of a Python function."""
    return _before(_unchanged, schema)


def _before(function: Callable[[Any], Any], schema: Any) -> dict[str, Any]:
    """`schema` for what `function` returns; the whole has its reference."""
    inner = dict(schema)
    outer = {"ref": inner.pop("ref")} if "ref" in inner else {}
    called = {"type": "no-info", "function": function}
    return {"type": "function-before", "function": called, "schema": inner, **outer}


def _unchanged(value: Any) -> Any:
    return value


def _few_keys(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > KEYS_LIMIT:
        raise PydanticCustomError(
            "too_many_keys",
            "has {came} keys; the limit is {limit}. Send fewer keys.",
            {"came": len(value), "limit": KEYS_LIMIT},
        )
    return value
