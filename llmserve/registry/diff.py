"""The changes between two registries and their effects on a running server. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ByteSize, SecretStr

from llmserve.registry.spec import Effect, effects

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from llmserve.registry.spec import Config, ModelSpec


_SECRET = re.compile(r"(?:^|_)(?:token|key|secret|password)$")
_HIDDEN = "***"
_LONGEST = 40  # characters of a value in a line


@dataclass(frozen=True)
class Field:
    """A changed value with its dotted name; None: omitted."""

    name: str
    effect: Effect
    old: Any
    new: Any

    def document(self) -> dict[str, Any]:
        """JSON without secrets."""
        last = self.name.rpartition(".")[2]
        return {"name": self.name, "old": _json(last, self.old), "new": _json(last, self.new)}

    def summary(self) -> str:
        """`old -> new`; empty if the shortened or hidden values are equal."""
        last = self.name.rpartition(".")[2]
        old, new = _text(_json(last, self.old)), _text(_json(last, self.new))
        return "" if old == new else f"{old} -> {new}"


@dataclass(frozen=True)
class Change:
    """A changed model; both specs have the same name."""

    old: ModelSpec
    new: ModelSpec
    fields: tuple[Field, ...]

    @property
    def effect(self) -> Effect | None:
        """The highest effect of a field; None: nothing changed."""
        return max((field.effect for field in self.fields), default=None)

    @property
    def rebuilds(self) -> bool:
        """Whether engines that continue need new request handlers."""
        return any(field.effect is Effect.REBUILT for field in self.fields)


@dataclass(frozen=True)
class Changes:
    """Every model of both registries is in exactly one of these.

    The highest effect of its fields decides, so a resized model can also have rebuilt or live
    fields. A renamed model is a removal and an addition.
    """

    added: tuple[ModelSpec, ...]
    removed: tuple[ModelSpec, ...]
    restarted: tuple[Change, ...]
    resized: tuple[Change, ...]
    rebuilt: tuple[Change, ...]
    live: tuple[Change, ...]
    unchanged: tuple[str, ...]
    server: tuple[Field, ...]  # applied by the running process
    needs_restart: tuple[str, ...]  # fields that need a new process


def changes(old: Config, new: Config) -> Changes:
    before = {spec.name: spec for spec in old.models}
    after = {spec.name: spec for spec in new.models}
    kept = [_change(before[name], after[name]) for name in after if name in before]
    by_effect = {effect: tuple(each for each in kept if each.effect is effect) for effect in Effect}
    server = list(_fields(old.server, new.server))
    return Changes(
        added=tuple(spec for name, spec in after.items() if name not in before),
        removed=tuple(spec for name, spec in before.items() if name not in after),
        restarted=by_effect[Effect.RESTARTED],
        resized=by_effect[Effect.RESIZED],
        rebuilt=by_effect[Effect.REBUILT],
        live=by_effect[Effect.LIVE],
        unchanged=tuple(each.new.name for each in kept if not each.fields),
        server=tuple(each for each in server if each.effect is Effect.LIVE),
        needs_restart=tuple(each.name for each in server if each.effect is Effect.RESTARTED),
    )


# --- fields


def _change(old: ModelSpec, new: ModelSpec) -> Change:
    keeps_devices = _keeps_devices(old, new)
    return Change(
        old,
        new,
        tuple(
            replace(each, effect=Effect.RESIZED)
            if keeps_devices and each.name == "devices"
            else each
            for each in _fields(old, new)
        ),
    )


def _keeps_devices(old: ModelSpec, new: ModelSpec) -> bool:
    """Whether the replicas of both specs have the same GPUs; `devices` lists them in order."""
    if old.devices is None or new.devices is None or old.replicas == new.replicas:
        return False
    return all(was == now for was, now in zip(old.devices, new.devices, strict=False))


def _fields(old: BaseModel, new: BaseModel) -> Iterator[Field]:
    for name, effect in effects(type(old)).items():
        for dotted, was, now in _differences(name, getattr(old, name), getattr(new, name)):
            yield Field(dotted, effect, was, now)


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, old and new value of each difference; `1`, `1.0` and `true` differ."""
    was, now = _mapping(old), _mapping(new)
    if was is None or now is None:
        if (type(old), old) != (type(new), new):
            yield name, old, new
        return
    for key in was | now:
        dotted = f"{name}.{key}"
        if key in was and key in now:
            yield from _differences(dotted, was[key], now[key])
        else:
            yield dotted, was.get(key), now.get(key)


def _mapping(value: Any) -> dict[Any, Any] | None:
    return dict(value) if isinstance(value, BaseModel | dict) else None


# --- output


def describe(changes: Changes) -> list[str]:
    """A line for each changed model and server field, for a terminal."""
    return [
        *(f"{spec.name}: removed" for spec in changes.removed),
        *(f"{each.new.name}: restarts{_listed(each.fields)}" for each in changes.restarted),
        *(f"{each.new.name}: resized{_listed(each.fields)}" for each in changes.resized),
        *(
            f"{each.new.name}: changed live{_listed(each.fields)}"
            for each in (*changes.rebuilt, *changes.live)
        ),
        *(f"{spec.name}: added" for spec in changes.added),
        *(
            f"server.{each.name}: changed live" + (f" ({each.summary()})" if each.summary() else "")
            for each in changes.server
        ),
        *(
            f"server.{name}: needs a restart of the server; not changed"
            for name in changes.needs_restart
        ),
    ]


def _listed(fields: Iterable[Field]) -> str:
    parts = [f"{each.name} {each.summary()}".strip() for each in fields]
    return f" ({', '.join(parts)})" if parts else ""


def _text(value: Any) -> str:
    if value is None:
        return "omitted"
    if isinstance(value, ByteSize):
        return value.human_readable()
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "..."


def document(changes: Changes) -> dict[str, Any]:
    """JSON without secrets."""
    return {
        "added": [spec.name for spec in changes.added],
        "removed": [spec.name for spec in changes.removed],
        "restarted": _documents(changes.restarted),
        "resized": _documents(changes.resized),
        "rebuilt": _documents(changes.rebuilt),
        "live": _documents(changes.live),
        "unchanged": list(changes.unchanged),
        "server": [each.document() for each in changes.server],
        "needs_restart": list(changes.needs_restart),
    }


def _documents(changes: Iterable[Change]) -> list[dict[str, Any]]:
    return [
        {"model": each.new.name, "fields": [field.document() for field in each.fields]}
        for each in changes
    ]


def _json(name: str, value: Any) -> Any:
    """A value for JSON, with secrets hidden."""
    if isinstance(value, SecretStr) or (value is not None and _SECRET.search(name)):
        return _HIDDEN
    if isinstance(value, dict):
        return {str(key): _json(str(key), each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_json("", each) for each in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)
