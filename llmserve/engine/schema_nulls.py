"""Removes nulls that OpenAI's and Anthropic's schemas do not allow from vLLM's answers.

Only fields of a response model are removed. Data below a field of a free type (a tool's input, a
JSON schema, metadata) stays unchanged.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Iterator

_SCALARS = (str, bytes, int, float, enum.Enum, type(None))
_LISTS = (list, tuple, set, frozenset, Sequence, Iterable)


class Schema:
    """The JSON keys of one or more models, with the schema below each."""

    def __init__(self, kinds: frozenset[type[BaseModel]]) -> None:
        self._kinds = kinds

    @cached_property
    def fields(self) -> dict[str, Schema | None]:
        """The keys; None for data. A key of several models is data if one of them has data there."""
        found: dict[str, list[Any]] = {}
        for kind in self._kinds:
            for name, field in kind.model_fields.items():
                for key in {name, field.alias or name, field.serialization_alias or name}:
                    found.setdefault(key, []).append(field.annotation)
        return {key: _below(annotations) for key, annotations in found.items()}


def schema_of(*kinds: type[BaseModel]) -> Schema:
    """Return the schema of an answer of one of these classes."""
    return _schema_of(frozenset(kinds))


@cache
def _schema_of(kinds: frozenset[type[BaseModel]]) -> Schema:
    return Schema(kinds)


def without_nulls(value: Any, schema: Schema | None, keep: frozenset[str]) -> Any:
    """Return `value` without the fields of `schema` that are null and not in `keep`."""
    if schema is None:
        return value
    if isinstance(value, list):
        return [without_nulls(each, schema, keep) for each in value]
    if not isinstance(value, dict):
        return value
    fields = schema.fields
    return {
        key: without_nulls(each, fields.get(key), keep)
        for key, each in value.items()
        if each is not None or key in keep or key not in fields
    }


def _below(annotations: list[Any]) -> Schema | None:
    kinds = [kind for annotation in annotations for kind in _kinds(annotation)]
    models = frozenset(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return Schema(models) if all(kind in models or _is_scalar(kind) for kind in kinds) else None


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield the types of a value; for lists, of an item."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin in (Union, types.UnionType) or origin in _LISTS:
        for each in get_args(annotation):
            if each is not Ellipsis:
                yield from _kinds(each)
    else:
        yield str if origin is Literal else annotation


def _is_scalar(kind: Any) -> bool:
    return kind is None or (isinstance(kind, type) and issubclass(kind, _SCALARS))
