"""Validators for vLLM's request classes, with bounded cost.

pydantic collects each mistake of a list, for each branch of a union, in one call into C. Here a
list ends at its first mistake, and a thread releases the GIL between two items. A generator, which
pydantic validates while vLLM iterates over it, is a list here and validated at once.

A null in an optional field that does not accept null counts as absent.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from pydantic_core import PydanticCustomError, SchemaValidator

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS_LIMIT = 4096  # of an object with free keys: pydantic can report a mistake for each

_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1  # as orjson; a number in a string can be larger
_OBJECTS = frozenset({"typed-dict", "model-fields", "dataclass-args"})
_LISTS = frozenset({"list", "set", "frozenset"})
# Keys of a schema that hold values or classes instead of schemas.
_VALUES = frozenset({"metadata", "default", "expected", "serialization", "cls", "config"})


def bounded(kind: Any) -> TypeAdapter[Any]:
    """Return a TypeAdapter for `kind`; a valid value has the same result as without bounds."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    adapter.validator = _validator(_rebuilt(adapter.core_schema, _with_bounds))
    return adapter


def shape_of(adapter: TypeAdapter[Any]) -> SchemaValidator:
    """Return a validator of types alone: some of vLLM's validators fail on wrong types."""
    types_only = _rebuilt(adapter.core_schema, _without_function)
    return _validator(_rebuilt(types_only, _with_bounds))


def _validator(schema: Any) -> SchemaValidator:
    # With prebuilt validators pydantic would use existing ones for parts of this schema.
    return SchemaValidator(schema, _use_prebuilt=False)


def _rebuilt(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Return a core schema with `change` applied to each schema in it, inner ones first."""
    if isinstance(schema, list | tuple):
        return type(schema)(_rebuilt(each, change) for each in schema)
    if not isinstance(schema, dict):
        return schema
    if not isinstance(schema.get("type"), str):  # the schemas of fields, by their names
        return {name: _rebuilt(each, change) for name, each in schema.items()}
    return change(
        {key: each if key in _VALUES else _rebuilt(each, change) for key, each in schema.items()}
    )


def _without_function(schema: dict[str, Any]) -> dict[str, Any]:
    kind: str = schema["type"]
    if kind == "function-plain":
        return {"type": "any"}
    if kind.startswith("function-"):
        inner: dict[str, Any] = schema["schema"]
        return inner | ({"ref": schema["ref"]} if "ref" in schema else {})
    return schema


def _with_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    kind = schema["type"]
    if kind == "generator":
        schema["type"] = "list"
    elif kind == "int":
        schema = {"ge": _INT_MIN, "le": _INT_MAX} | schema
    if schema["type"] in _LISTS:
        items = schema.get("items_schema", {"type": "any"})
        schema |= {"fail_fast": True, "items_schema": _before(_unchanged, items)}
    elif kind == "dict":
        return _before(_few_keys, schema)
    elif kind in _OBJECTS and (names := _optional_not_null(schema["fields"])):
        return _before(partial(_without_nulls, names), schema)
    return schema


def _optional_not_null(fields: Any) -> frozenset[str]:
    """Return the keys of fields that are optional and do not accept null."""
    if not isinstance(fields, dict):  # of a dataclass: none in a request has such fields
        return frozenset()
    return frozenset(
        _key_of(name, field)
        for name, field in fields.items()
        if not _is_required(field) and not _takes_null(field["schema"])
    )


def _key_of(name: str, field: dict[str, Any]) -> str:
    alias = field.get("validation_alias")
    return alias if isinstance(alias, str) else name


def _is_required(field: dict[str, Any]) -> bool:
    if field["type"] == "typed-dict-field":
        return bool(field.get("required", True))
    return bool(field["schema"]["type"] != "default")


def _takes_null(schema: dict[str, Any]) -> bool:
    kind = schema["type"]
    if kind in {"nullable", "any", "none"}:
        return True
    if kind == "literal":
        return None in schema["expected"]
    if kind == "union":
        choices = (each[0] if isinstance(each, tuple) else each for each in schema["choices"])
        return any(map(_takes_null, choices))
    inner = schema.get("schema")  # of a default or a validator
    return kind not in {"model", "dataclass"} and isinstance(inner, dict) and _takes_null(inner)


def _without_nulls(names: frozenset[str], value: Any) -> Any:
    if isinstance(value, dict) and any(value.get(name, "") is None for name in names):
        return {key: each for key, each in value.items() if each is not None or key not in names}
    return value


def _before(function: Callable[[Any], Any], schema: Any) -> dict[str, Any]:
    """Return a schema that applies `function` before `schema`, with the reference of `schema`."""
    inner = dict(schema)
    outer = {"ref": inner.pop("ref")} if "ref" in inner else {}
    called = {"type": "no-info", "function": function}
    return {"type": "function-before", "function": called, "schema": inner, **outer}


def _unchanged(value: Any) -> Any:
    """Release the GIL between items: CPython does so at the start of a Python function."""
    return value


def _few_keys(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > KEYS_LIMIT:
        raise PydanticCustomError(
            "too_many_keys",
            "has {count} keys; the limit is {limit}. Send fewer keys.",
            {"count": len(value), "limit": KEYS_LIMIT},
        )
    return value
