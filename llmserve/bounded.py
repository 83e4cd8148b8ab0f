"""vLLM's request classes, validated at a cost that their callers bound.

pydantic collects every mistake of a list, of each branch of a union, in one call into C.
Here a list ends at its first mistake, and a thread gives up the GIL between two items.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic_core import SchemaValidator

KEYS_LIMIT = 4096  # of an object with free keys; pydantic has no other end for its mistakes

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
        made.setdefault("max_length", KEYS_LIMIT)
    return made


def _interruptible(schema: Any) -> dict[str, Any]:
    """CPython gives up the GIL at the start of a Python function."""
    function = {"type": "no-info", "function": _unchanged}
    return {"type": "function-before", "function": function, "schema": schema}


def _unchanged(value: Any) -> Any:
    return value
