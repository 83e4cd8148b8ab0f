"""Reads `models.yaml` into a Config without vLLM, and reports all its problems in one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from llmserve.errors import ConfigError, nearest
from llmserve.registry import fastchat, tls, validation, yaml_positions
from llmserve.registry.engine_args import ENGINE_ARGS, VLLM_VERSION
from llmserve.registry.sources import Sources
from llmserve.registry.spec import (
    DEFAULTS,
    Config,
    IdleSpec,
    ModelSpec,
    SamplingSpec,
    ServerSpec,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

# Keys of a model and the engine arguments that they set.
_ENGINE_KEYS: Mapping[str, str] = {
    "model": "model",
    "aliases": "served_model_name",
    "devices": "device_ids",
    "tensor_parallel_size": "tensor_parallel_size",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "memory": "gpu_memory_utilization",
    "kv_cache": "kv_cache_memory_bytes",
    "reasoning_parser": "reasoning_parser",
    "sampling": "override_generation_config",
    "loras": "enable_lora",
}
# Engine arguments that the plan sets, and what to do instead.
_PLANNED: Mapping[str, str] = {
    "device_ids": "use `devices` of the model",
    "gpu_memory_utilization": "use `gpu_memory_utilization` of the model",
    "kv_cache_memory_bytes": "use `kv_cache` of the model",
    "worker_cls": "remove it: llmserve's own worker measures the memory of a start",
}
_NAME_LENGTH = 128
_TEMPLATES = frozenset({"chat_template"})  # `${` may belong to the template
_ENGINE_SOURCES = frozenset({"tokenizer", "hf_config_path", "generation_config"})


def load(file: Path) -> Config:
    """Read a registry. Raises ConfigError with every problem of the file."""
    document = yaml_positions.read(file, verbatim=_TEMPLATES)
    is_readable = document.value is not None or not document.problems
    config = _Reader(file, document).read() if is_readable else None
    if document.problems or config is None:
        problems = sorted(set(document.problems))
        raise ConfigError([problem.within(shown(file)) for problem in problems])
    return config


class _Reader:
    """Builds a Config and adds what is wrong to the document."""

    def __init__(self, file: Path, document: yaml_positions.Document) -> None:
        self._file = file
        self._document = document
        self._sources = Sources(file, document)

    def read(self) -> Config | None:
        top = self._mapping(self._document.value, ())
        if top is None:
            return None
        self._known(top, {"server", "defaults", "models"}, ())
        server = self._server(top.get("server", {}))
        models = self._models(top)
        if self._document.problems or server is None:
            return None
        return Config(
            file=self._file, server=server, models=tuple(models), lines=self._document.lines
        )

    # --- server

    def _server(self, raw: Any) -> ServerSpec | None:
        values = self._mapping(raw, ("server",))
        if values is None:
            return None
        values = self._known(values, ServerSpec.model_fields, ("server",))
        keys = values.get("api_keys")
        if isinstance(keys, list):
            values["api_keys"] = [
                self._sources.secret(key, ("server", "api_keys", i)) for i, key in enumerate(keys)
            ]
        for key in ("ssl_certfile", "ssl_keyfile"):
            if isinstance(values.get(key), str):
                values[key] = self._sources.file(values[key], ("server", key))
        if "admin_key" in values:
            values["admin_key"] = self._sources.secret(values["admin_key"], ("server", "admin_key"))
        if isinstance(values.get("log_dir"), str):
            values["log_dir"] = self._sources.folder(values["log_dir"], ("server", "log_dir"))
        try:
            spec = ServerSpec(**values)
        except ValidationError as error:
            validation.report(self._document, error, ("server",))
            return None
        self._check_tls(spec)
        return spec

    def _check_tls(self, spec: ServerSpec) -> None:
        is_missing = any(each.path.startswith("server.ssl_") for each in self._document.problems)
        if spec.ssl_certfile is None or spec.ssl_keyfile is None or is_missing:
            return
        for key, problem in tls.problems(spec.ssl_certfile, spec.ssl_keyfile).items():
            self._document.problem(("server", key), problem)

    # --- models

    def _models(self, top: dict[str, Any]) -> list[ModelSpec]:
        defaults = self._defaults(top.get("defaults"))
        entries = self._mapping(top.get("models"), ("models",))
        if entries == {}:
            self._document.problem(
                ("models",), "has no model; add one such as `chat: {model: FOLDER}`"
            )
        specs = [
            spec
            for name, raw in (entries or {}).items()
            if (spec := self._model(name, raw, defaults)) is not None
        ]
        self._check_names(entries or {})
        return specs

    def _defaults(self, raw: Any) -> dict[str, Any]:
        """The values that every model inherits; none if there are problems, reported only here."""
        path = ("defaults",)
        values = self._mapping(raw, path)
        if values is None:
            return {}
        before = len(self._document.problems)
        values = self._values(values, path, {"name", "model", "aliases", "loras"})
        for argument in ("model", "served_model_name"):
            if argument in values["engine"]:
                self._document.problem(
                    (*path, "engine", argument), "cannot be a default; set it in each model"
                )
        self._check_engine_keys(values, path)
        self._spec({"name": "defaults", "model": "any"} | values, path, DEFAULTS)
        return values if len(self._document.problems) == before else {}

    def _model(self, name: str, raw: Any, defaults: dict[str, Any]) -> ModelSpec | None:
        path = ("models", name)
        values = self._mapping(raw, path)
        if values is None:
            return None
        values = self._values(values, path, {"name"})
        self._check_engine_keys(values, path)
        for source in ("model", "loras"):
            if source in values:
                values[source] = self._sources.models(values[source], (*path, source))
        return self._spec({"name": name} | _merge(defaults, values), path)

    def _values(
        self, values: dict[str, Any], path: yaml_positions.Path, excluded: set[str]
    ) -> dict[str, Any]:
        """The known keys of a model or of `defaults`, with resolved sources."""
        values = self._known(values, ModelSpec.model_fields.keys() - excluded, path)
        values["engine"] = self._engine(values.get("engine"), (*path, "engine"))
        for key, part in (("sampling", SamplingSpec), ("idle", IdleSpec)):
            if isinstance(values.get(key), dict):
                values[key] = self._known(values[key], part.model_fields, (*path, key))
        if isinstance(values.get("chat_template"), str):
            values["chat_template"] = self._sources.template(
                values["chat_template"], (*path, "chat_template")
            )
        return values

    def _spec(
        self, values: dict[str, Any], path: yaml_positions.Path, context: str | None = None
    ) -> ModelSpec | None:
        try:
            return ModelSpec.model_validate(values, context=context)
        except ValidationError as error:
            validation.report(self._document, error, path)
            return None

    def _engine(self, raw: Any, path: yaml_positions.Path) -> dict[str, Any]:
        arguments = self._mapping(raw, path)
        if arguments is None:
            return {}
        arguments = self._known(arguments, ENGINE_ARGS.keys(), path)
        for name in arguments.keys() & _PLANNED:
            self._document.problem((*path, name), f"is set by the plan; {_PLANNED[name]}")
        for name, value in arguments.items():
            try:
                arguments[name] = TypeAdapter(ENGINE_ARGS[name]).validate_python(value)
            except ValidationError as error:
                validation.report(self._document, error, (*path, name))
        if "hf_token" in arguments:
            arguments["hf_token"] = self._sources.secret(arguments["hf_token"], (*path, "hf_token"))
        for name in arguments.keys() & _ENGINE_SOURCES:
            arguments[name] = self._sources.models(arguments[name], (*path, name))
        if isinstance(folder := arguments.get("download_dir"), str):
            arguments["download_dir"] = self._sources.folder(folder, (*path, "download_dir"))
        return arguments

    def _check_engine_keys(self, values: dict[str, Any], path: yaml_positions.Path) -> None:
        for key, argument in _ENGINE_KEYS.items():
            is_set = key in values or (key == "aliases" and path[0] == "models")
            if argument in values["engine"] and is_set:
                by = "name and `aliases`" if key == "aliases" else f"key `{key}`"
                self._document.problem(
                    (*path, "engine", argument), f"is set by the model's {by}; remove it"
                )

    def _check_names(self, entries: dict[str, Any]) -> None:
        """Every public name is valid and leads to one model."""
        owner: dict[str, yaml_positions.Path] = {}
        for name, path in _names(entries):
            if not 0 < len(name) <= _NAME_LENGTH or name.strip() != name or not name.isprintable():
                self._document.problem(
                    path,
                    f"invalid name; must be 1 to {_NAME_LENGTH} printable characters "
                    "without surrounding blanks",
                )
            if name in owner:
                other = yaml_positions.dotted(owner[name])
                self._document.problem(path, f"the name {name} is already used by {other}")
            owner.setdefault(name, path)

    # --- shared

    def _mapping(self, value: Any, path: yaml_positions.Path) -> dict[str, Any] | None:
        if isinstance(value, dict):
            return dict(value)
        if value is None and path:
            return {}
        got = "is empty" if value is None else f"is {validation.kind(value)}"
        self._document.problem(path, f"{got}; must be a mapping of keys to values")
        return None

    def _known(
        self, values: dict[str, Any], known: Iterable[str], path: yaml_positions.Path
    ) -> dict[str, Any]:
        """`values` without unknown keys, which become problems with the nearest known key."""
        known = set(known)
        for key in values.keys() - known:
            self._document.problem((*path, key), self._unknown(key, known, path))
        return {key: value for key, value in values.items() if key in known}

    def _unknown(self, key: str, known: set[str], path: yaml_positions.Path) -> str:
        if (successor := fastchat.successor(key)) is not None:
            return f"unknown key; {successor}"
        snake = key.replace("-", "_")
        elsewhere = {"server": ServerSpec.model_fields, "a model": ModelSpec.model_fields}
        if snake in known:
            return f"unknown key; nearest: {snake}"
        for owner, keys in elsewhere.items():
            if snake in keys and snake != "name":
                return f"unknown key; it is a key of {owner}"
        if path[-1:] != ("engine",) and path != ("server",) and snake in ENGINE_ARGS:
            return f"unknown key; it is an engine argument: write `engine: {{{snake}: ...}}`"
        near = nearest(key, known)
        if near is None and path[-1:] == ("engine",):
            return f"unknown key; no such engine argument in vLLM {VLLM_VERSION}"
        return "unknown key; " + (
            f"nearest: {near}" if near else f"known: {', '.join(sorted(known))}"
        )


def _merge(defaults: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `defaults`; mappings such as `engine` are merged key by key."""
    alternatives = {"memory": "gpu_memory_utilization", "gpu_memory_utilization": "memory"}
    replaced = {other for key, other in alternatives.items() if key in own}
    merged = {k: v for k, v in defaults.items() if k not in replaced} | own
    overridden = {_ENGINE_KEYS[key] for key in own if key in _ENGINE_KEYS}
    inherited = defaults.get("engine", {})
    defaults = defaults | {"engine": {k: v for k, v in inherited.items() if k not in overridden}}
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            merged[key] = defaults[key] | value
    return merged


def _names(entries: dict[str, Any]) -> Iterator[tuple[str, yaml_positions.Path]]:
    """Every public name with its place: models, replicas, aliases and adapters."""
    for entry, raw in entries.items():
        path = ("models", entry)
        values = raw if isinstance(raw, dict) else {}
        yield entry, path
        if isinstance(count := values.get("replicas"), int) and count > 1:
            yield from ((f"{entry}/{n}", (*path, "replicas")) for n in range(count))
        if isinstance(aliases := values.get("aliases"), list):
            named = enumerate(aliases)
            yield from ((a, (*path, "aliases", i)) for i, a in named if isinstance(a, str))
        if isinstance(loras := values.get("loras"), dict):
            yield from ((lora, (*path, "loras", lora)) for lora in loras)
