"""vLLM's request classes, validated at a cost that their callers bound.

pydantic collects every mistake of a list, of each branch of a union, in one call into C.
Here a list ends at its first mistake, and a thread gives up the GIL between two items. What
pydantic would validate as vLLM iterates over it is a list, validated at once.

A null in a field that may be left out, and does not take a null, is as if it were left out.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from pydantic_core import PydanticCustomError, SchemaValidator

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS_LIMIT = 4096  # of an object with free keys: pydantic collects a mistake for each

_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1  # as in JSON here; a text may spell more
_OBJECTS = frozenset({"typed-dict", "model-fields", "dataclass-args"})
_LISTS = frozenset({"list", "set", "frozenset"})
# What of a schema is a value or a class, and no further schema.
_VALUES = frozenset({"metadata", "default", "expected", "serialization", "cls", "config"})


def shape_of(adapter: TypeAdapter[Any]) -> SchemaValidator:
    """The types of a body alone, without vLLM's validators: some read it before that."""
    return SchemaValidator(_bounded(_bare(adapter.core_schema)), _use_prebuilt=False)


def _bare(schema: Any) -> Any:
    if isinstance(schema, list | tuple):
        return type(schema)(map(_bare, schema))
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if kind == "function-plain":
        return {"type": "any"}
    inner = {key: each if key in _VALUES else _bare(each) for key, each in schema.items()}
    if isinstance(kind, str) and kind.startswith("function-"):
        return inner["schema"] | ({"ref": schema["ref"]} if "ref" in schema else {})
    return inner


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
    if kind == "generator":
        made["type"] = "list"
    elif kind == "int":
        made = {"ge": _INT_MIN, "le": _INT_MAX} | made
    if made["type"] in _LISTS:
        items = made.get("items_schema", {"type": "any"})
        made |= {"fail_fast": True, "items_schema": _interruptible(items)}
    elif kind == "dict":
        return _before(_few_keys, made)
    elif kind in _OBJECTS and (names := _left_out_as_null(schema["fields"])):
        return _before(partial(_without_nulls, names), made)
    return made


def _left_out_as_null(fields: Any) -> frozenset[str]:
    """The keys of fields that may be left out, but may not be null."""
    if not isinstance(fields, dict):  # those of a dataclass: none of a request's has such
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
    inner = schema.get("schema")  # of a default, a validator
    return kind not in {"model", "dataclass"} and isinstance(inner, dict) and _takes_null(inner)


def _without_nulls(names: frozenset[str], value: Any) -> Any:
    if isinstance(value, dict) and any(value.get(name, "") is None for name in names):
        return {key: each for key, each in value.items() if each is not None or key not in names}
    return value


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
