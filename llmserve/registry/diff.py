"""What a changed registry changes, and how little of what runs that touches. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ByteSize, SecretStr

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from llmserve.registry.config import Config, ModelSpec


class Effect(IntEnum):
    """What a changed field takes: the higher, the more is disturbed."""

    LIVE = 0  # ours alone: the new value counts from now on
    REBUILT = 1  # the engine goes on under new serving objects
    RESIZED = 2  # the first engines go on, others start or end
    RESTARTED = 3  # a new engine, or of the server's fields a new process


MODEL_FIELDS: Mapping[str, Effect] = {
    "model": Effect.RESTARTED,
    "aliases": Effect.REBUILT,
    "hidden": Effect.LIVE,
    "required": Effect.LIVE,
    "devices": Effect.RESTARTED,
    "tensor_parallel_size": Effect.RESTARTED,
    "pipeline_parallel_size": Effect.RESTARTED,
    "gpu_memory_utilization": Effect.RESTARTED,
    "memory": Effect.RESTARTED,
    "kv_cache": Effect.RESTARTED,
    "concurrency": Effect.RESTARTED,  # the KV cache has its size from the start
    "replicas": Effect.RESIZED,
    "dispatch": Effect.LIVE,
    "weights": Effect.LIVE,
    "max_in_flight": Effect.LIVE,
    "max_queue": Effect.LIVE,
    "timeout": Effect.LIVE,
    "start": Effect.LIVE,
    "pinned": Effect.LIVE,
    "priority": Effect.LIVE,
    "idle": Effect.LIVE,
    "chat_template": Effect.REBUILT,
    "chat_template_kwargs": Effect.REBUILT,
    "tool_call_parser": Effect.REBUILT,
    # The engine core reads it too: where a grammar begins (vllm/v1/structured_output).
    "reasoning_parser": Effect.RESTARTED,
    "sampling": Effect.REBUILT,
    "loras": Effect.RESTARTED,  # their number and rank shape the engine
    "engine": Effect.RESTARTED,
}
SERVER_FIELDS: Mapping[str, Effect] = {
    "host": Effect.RESTARTED,
    "port": Effect.RESTARTED,
    "api_keys": Effect.LIVE,
    "admin_key": Effect.LIVE,
    "allowed_origins": Effect.RESTARTED,
    "allowed_methods": Effect.RESTARTED,
    "allowed_headers": Effect.RESTARTED,
    "allow_credentials": Effect.RESTARTED,
    "ssl_certfile": Effect.RESTARTED,
    "ssl_keyfile": Effect.RESTARTED,
    "drain_timeout": Effect.LIVE,
    "max_body": Effect.LIVE,
    "gpu_headroom": Effect.RESTARTED,  # every engine that runs has its size from it
    "host_memory": Effect.LIVE,
    "log_dir": Effect.RESTARTED,
}
_SECRET = re.compile(r"(?:^|_)(?:token|key|secret|password)$")
_HIDDEN = "***"
_LONGEST = 40  # characters of a value in a line


@dataclass(frozen=True)
class Field:
    """A value that changed, by its dotted name; None: it was left out, or is."""

    name: str
    effect: Effect
    old: Any
    new: Any

    def document(self) -> dict[str, Any]:
        """Fit for JSON, without secrets."""
        last = self.name.rpartition(".")[2]
        return {"name": self.name, "old": _open(last, self.old), "new": _open(last, self.new)}

    def told(self) -> str:
        """`old -> new`; empty where a line has no room for the difference or must not show it."""
        last = self.name.rpartition(".")[2]
        old, new = _text(_open(last, self.old)), _text(_open(last, self.new))
        return "" if old == new else f"{old} -> {new}"


@dataclass(frozen=True)
class Change:
    """One model, before and after, under the same name."""

    old: ModelSpec
    new: ModelSpec
    fields: tuple[Field, ...]

    @property
    def effect(self) -> Effect | None:
        """That of the field that takes the most; None: nothing changed."""
        return max((field.effect for field in self.fields), default=None)

    @property
    def rebuilds(self) -> bool:
        """Whether engines that go on need new serving objects."""
        return any(field.effect is Effect.REBUILT for field in self.fields)


@dataclass(frozen=True)
class Changes:
    """Every model of both registries is in exactly one of these.

    A change is where its heaviest field puts it: one that is resized may hold fields that
    are rebuilt or live as well. A model under a new name is a removal and an addition.
    """

    added: tuple[ModelSpec, ...]
    removed: tuple[ModelSpec, ...]
    restarted: tuple[Change, ...]
    resized: tuple[Change, ...]
    rebuilt: tuple[Change, ...]
    live: tuple[Change, ...]
    unchanged: tuple[str, ...]
    server: tuple[Field, ...]  # what the process takes as it runs
    needs_restart: tuple[str, ...]  # fields of the server that only another process takes


def changes(old: Config, new: Config) -> Changes:
    before = {spec.name: spec for spec in old.models}
    after = {spec.name: spec for spec in new.models}
    stay = [_change(before[name], after[name]) for name in after if name in before]
    of = {effect: tuple(each for each in stay if each.effect is effect) for effect in Effect}
    server = list(_fields(old.server, new.server, SERVER_FIELDS))
    return Changes(
        added=tuple(spec for name, spec in after.items() if name not in before),
        removed=tuple(spec for name, spec in before.items() if name not in after),
        restarted=of[Effect.RESTARTED],
        resized=of[Effect.RESIZED],
        rebuilt=of[Effect.REBUILT],
        live=of[Effect.LIVE],
        unchanged=tuple(each.new.name for each in stay if not each.fields),
        server=tuple(each for each in server if each.effect is Effect.LIVE),
        needs_restart=tuple(each.name for each in server if each.effect is Effect.RESTARTED),
    )


# --- fields


def _change(old: ModelSpec, new: ModelSpec) -> Change:
    kept = _first_stay(old, new)
    return Change(
        old,
        new,
        tuple(
            replace(each, effect=Effect.RESIZED) if kept and each.name == "devices" else each
            for each in _fields(old, new, MODEL_FIELDS)
        ),
    )


def _first_stay(old: ModelSpec, new: ModelSpec) -> bool:
    """Whether the engines that both have are on the same GPUs, which are listed in their order."""
    if old.devices is None or new.devices is None or old.replicas == new.replicas:
        return False
    return all(was == now for was, now in zip(old.devices, new.devices, strict=False))


def _fields(old: BaseModel, new: BaseModel, effects: Mapping[str, Effect]) -> Iterator[Field]:
    for name, effect in effects.items():
        for dotted, was, now in _differences(name, getattr(old, name), getattr(new, name)):
            yield Field(dotted, effect, was, now)


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """What differs, by dotted name; `1`, `1.0` and `true` do."""
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


# --- told


def told(changes: Changes) -> list[str]:
    """A line for each model and field of the server that is touched, for a terminal."""
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
            f"server.{each.name}: changed live" + (f" ({each.told()})" if each.told() else "")
            for each in changes.server
        ),
        *(
            f"server.{name}: needs a restart of the server; left as it is"
            for name in changes.needs_restart
        ),
    ]


def _listed(fields: Iterable[Field]) -> str:
    parts = [f"{each.name} {each.told()}".strip() for each in fields]
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
    """Fit for JSON, without secrets."""
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


def _documents(of: Iterable[Change]) -> list[dict[str, Any]]:
    return [
        {"model": each.new.name, "fields": [field.document() for field in each.fields]}
        for each in of
    ]


def _open(name: str, value: Any) -> Any:
    """A value of this name as JSON has it, secrets hidden."""
    if isinstance(value, SecretStr) or (value is not None and _SECRET.search(name)):
        return _HIDDEN
    if isinstance(value, dict):
        return {str(key): _open(str(key), each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_open("", each) for each in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)
