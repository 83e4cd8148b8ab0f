"""`models.yaml` as a frozen typed tree.

`load` reads, checks and resolves a registry without importing vLLM or torch. All its
problems come out in one ConfigError, each with file, line and key.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    NonNegativeFloat,
    SecretStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from llmserve.errors import ConfigError, nearest
from llmserve.registry import fastchat, yaml_positions
from llmserve.registry.engine_args import (
    ENGINE_ARGS,
    REASONING_PARSERS,
    TOOL_PARSERS,
    VLLM_VERSION,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pydantic_core import ErrorDetails

Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(strict=True, gt=0)]  # strict: YAML's `yes` is no 1
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Dispatch = Literal["lottery", "shortest_queue", "prefix_affinity"]
Start = Literal["eager", "lazy", "sleeping"]

# A key of ours and the engine argument that it sets.
ENGINE_KEYS: Mapping[str, str] = {
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
# Engine arguments that the plan of the GPUs sets, and what to say instead.
_PLANNED: Mapping[str, str] = {
    "device_ids": "`devices` of the entry",
    "gpu_memory_utilization": "`gpu_memory_utilization` of the entry",
    "kv_cache_memory_bytes": "`kv_cache` of the entry",
    "worker_cls": "nothing: llmserve's own worker reports what a start took",
}
_NAME_LIMIT = 128
_KEY_LENGTH = 4096  # characters; longer header values are refused by many proxies
_SECRETS = frozenset({"api_keys", "admin_key", "hf_token"})  # never shown
# Where other programs' secrets come from; `file:` alone is one here.
_LIKE_A_SOURCE = re.compile(r"\s*(file|env|environ|environment|secret|vault)\s*:", re.IGNORECASE)
_PART = "part"  # the validation context of `defaults`
_TEMPLATES = frozenset({"chat_template"})  # left as they are: `${` may be theirs
_ENGINE_SOURCES = frozenset({"tokenizer", "hf_config_path", "generation_config"})


def _not_nothing(size: ByteSize) -> ByteSize:
    if size <= 0:
        raise ValueError("must be more than nothing")
    return size


Size = Annotated[ByteSize, AfterValidator(_not_nothing)]

_UNITS: Mapping[str, float] = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(value: object) -> object:
    """`30`, `90s`, `10m`, `1.5h` or `2d` in seconds."""
    if not isinstance(value, str):
        return value
    number, unit = value.strip()[:-1], value.strip()[-1:]
    try:
        return float(number) * _UNITS[unit] if unit in _UNITS else float(value)
    except ValueError:
        raise ValueError("must be a time, as in 30, 90s, 10m or 1.5h") from None


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False, strict=True)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ServerSpec(_Spec):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(strict=True, ge=0, le=65535)] = 8000  # 0: any free one
    api_keys: tuple[SecretStr, ...] = ()  # every route but /health needs one of them
    admin_key: SecretStr | None = None  # for /admin from anywhere; omitted: this machine only
    allowed_origins: tuple[str, ...] = ()  # CORS; empty: no browser page of another origin
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    drain_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = (
        30  # seconds that running requests get at the end
    )
    max_body: Size = ByteSize(64 * 2**20)  # largest request body
    gpu_headroom: Annotated[float, Field(ge=0, lt=1)] = 0.08  # share of each GPU left free
    host_memory: Size | None = None  # for weights of sleeping models; without GPUs: for models
    log_dir: Path = Path("~/.local/state/llmserve")  # a folder per port in it

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("TLS needs both ssl_certfile and ssl_keyfile")
        return self


class SamplingSpec(_Spec):
    """What a request that does not say gets; a request's own value wins."""

    temperature: NonNegativeFloat | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # -1 and 0: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    max_tokens: Count | None = None


class IdleSpec(_Spec):
    """What becomes of a model that nobody asks for."""

    sleep_after: Seconds | None = None  # its GPU memory is given back, its weights stay near
    stop_after: Seconds | None = None  # its engine ends

    @model_validator(mode="after")
    def _sleeps_before_it_stops(self) -> Self:
        if self.sleep_after and self.stop_after and self.stop_after <= self.sleep_after:
            raise ValueError("stop_after must be more than sleep_after")
        return self


class ModelSpec(_Spec):
    """One entry of `models:`, `defaults:` merged in."""

    name: str
    model: str  # folder or hub name
    aliases: tuple[str, ...] = ()
    hidden: bool = False  # served, but not in GET /v1/models
    required: bool = False  # the server ends with 3 if it cannot start
    devices: tuple[int | str, ...] | None = None  # GPU ids or UUIDs; omitted: placed
    tensor_parallel_size: Count | None = None  # devices that share each layer; omitted: placed
    pipeline_parallel_size: Count = 1  # devices that share the layers out
    gpu_memory_utilization: Fraction | None = None  # share of each device, all in
    memory: Size | None = None  # the same as an amount
    kv_cache: Size | None = None  # exactly this much KV cache per device
    concurrency: Count = 1  # requests of full length that the KV cache must hold, where placed
    replicas: Annotated[int, Field(strict=True, gt=0, le=64)] = 1  # engines that share the requests
    dispatch: Dispatch = "shortest_queue"  # which of them gets a request
    weights: tuple[Weight, ...] | None = None  # of the replicas in the lottery; omitted: equal
    max_in_flight: Count = 1024  # requests that its engines have, queued and running
    max_queue: Annotated[int, Field(strict=True, ge=0)] = 1024  # more of them, which wait here
    timeout: Seconds | None = None  # that a request may take, all in
    start: Start = "eager"  # or when the first request comes, or at once and then asleep
    pinned: bool = False  # never put to sleep or stopped for another model, nor for being idle
    priority: Annotated[int, Field(strict=True)] = 0  # the lower gives way first
    idle: IdleSpec = IdleSpec()
    chat_template: str | None = None  # Jinja: a file or the text itself
    chat_template_kwargs: dict[str, Any] = {}
    tool_call_parser: str | None = None  # also lets the model choose tools itself
    reasoning_parser: str | None = None
    sampling: SamplingSpec = SamplingSpec()
    loras: dict[str, str] = {}  # further names, each the model with an adapter
    engine: dict[str, Any] = {}  # any vLLM engine argument under vLLM's own name

    needs: ClassVar[frozenset[str]] = frozenset({"name", "model"})

    @field_validator("devices")
    @classmethod
    def _devices_differ(cls, devices: tuple[int | str, ...] | None) -> tuple[int | str, ...] | None:
        if devices is not None:
            if not devices or "" in devices:
                raise ValueError("is empty; list GPU ids, or leave it out")
            # A text of digits is an id, as ${GPU} gives it.
            devices = tuple(int(d) if str(d).isdigit() else d for d in devices)
            if len(set(devices)) < len(devices):
                raise ValueError("names a GPU twice")
            if len({type(d) for d in devices}) > 1:
                raise ValueError("mixes ids and UUIDs; use one kind")
        return devices

    @field_validator("tool_call_parser")
    @classmethod
    def _tool_parser_exists(cls, name: str | None) -> str | None:
        return _one_of(name, TOOL_PARSERS)

    @field_validator("reasoning_parser")
    @classmethod
    def _reasoning_parser_exists(cls, name: str | None) -> str | None:
        return _one_of(name, REASONING_PARSERS)

    @model_validator(mode="after")
    def _somebody_may_wait(self, info: ValidationInfo) -> Self:
        if info.context != _PART and self.start != "eager" and not self.max_queue:
            raise ValueError(
                f"max_queue: 0 lets no request wait for it to come (start: {self.start})"
            )
        return self

    @model_validator(mode="after")
    def _pinned_stays(self, info: ValidationInfo) -> Self:
        if info.context != _PART and self.pinned and self.idle != IdleSpec():
            raise ValueError("is pinned, and so never idle; leave out `pinned` or `idle`")
        if info.context != _PART and self.pinned and self.start == "sleeping":
            raise ValueError("is pinned, and so cannot `start: sleeping`")
        return self

    @model_validator(mode="after")
    def _memory_is_said_once(self) -> Self:
        if self.memory is not None and self.gpu_memory_utilization is not None:
            raise ValueError("memory and gpu_memory_utilization say the same; keep one")
        return self

    @model_validator(mode="after")
    def _devices_fit_parallelism(self, info: ValidationInfo) -> Self:
        if info.context == _PART:  # defaults: a model may say the rest
            return self
        sizes = self.parallel_sizes | ({"replicas": self.replicas} if self.replicas > 1 else {})
        needed = math.prod(sizes.values())
        if self.devices is not None and len(self.devices) != needed:
            product = " x ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"lists {len(self.devices)} devices, but {product} needs {needed}")
        return self

    @model_validator(mode="after")
    def _weights_are_for_the_lottery(self, info: ValidationInfo) -> Self:
        if self.weights is None or info.context == _PART:
            return self
        if self.dispatch != "lottery":
            raise ValueError(f"weights are for `dispatch: lottery`, not for {self.dispatch}")
        if len(self.weights) != self.replicas:
            raise ValueError(f"gives {len(self.weights)} weights for {self.replicas} replicas")
        return self

    @property
    def parallel_sizes(self) -> dict[str, int]:
        """What multiplies to the number of devices, wherever it was said."""
        said = {
            "tensor_parallel_size": self.tensor_parallel_size or 1,
            "pipeline_parallel_size": self.pipeline_parallel_size,
        }
        counted = (*said, "data_parallel_size")
        return said | {name: self.engine[name] for name in counted if self.engine.get(name)}

    @property
    def hub_names(self) -> tuple[str, ...]:
        """What has to come from the hub: the model, adapters."""
        sources = (self.model, *self.loras.values())
        return tuple(source for source in sources if not Path(source).is_absolute())

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


class Config(_Spec):
    file: Path
    server: ServerSpec = ServerSpec()
    models: tuple[ModelSpec, ...]
    lines: dict[tuple[int | str, ...], int] = {}  # of the file, by path in it

    def told(self, path: yaml_positions.Path, message: str) -> str:
        """A problem of a place in the file, as `load` tells them."""
        near = path
        while near and near not in self.lines:
            near = near[:-1]
        problem = yaml_positions.Problem(
            self.lines.get(near, 0), yaml_positions.dotted(path), message
        )
        return problem.within(_shown(self.file))


def _one_of(name: str | None, known: frozenset[str]) -> str | None:
    if name is None or name in known:
        return name
    near = nearest(name, known)
    raise ValueError(f"is unknown; {f'nearest: {near}' if near else f'one of {_listed(known)}'}")


def load(file: Path) -> Config:
    """Read a registry. Raises ConfigError with every problem of the file."""
    document = yaml_positions.read(file, verbatim=_TEMPLATES)
    config = (
        None if document.problems and document.value is None else _Reader(file, document).read()
    )
    if document.problems or config is None:
        problems = sorted(set(document.problems))
        raise ConfigError([problem.within(_shown(file)) for problem in problems])
    return config


def _shown(file: Path) -> str:
    """The file as a terminal can open it, without a long way from the root."""
    here, there = Path.cwd(), Path(os.path.realpath(file))  # which a loop of links does not stop
    return str(there.relative_to(here)) if there.is_relative_to(here) else file.name


class _Reader:
    """Turns a document into a Config and notes what is wrong in the document."""

    def __init__(self, file: Path, document: yaml_positions.Document) -> None:
        self.file = file
        self.folder = Path(os.path.realpath(file)).parent
        self.document = document

    def read(self) -> Config | None:
        top = self._mapping(self.document.value, ())
        if top is None:
            return None
        self._known(top, {"server", "defaults", "models"}, ())
        server = self._server(top.get("server", {}))
        models = self._models(top)
        if self.document.problems or server is None:
            return None
        return Config(
            file=self.file, server=server, models=tuple(models), lines=self.document.lines
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
                self._secret(key, ("server", "api_keys", i)) for i, key in enumerate(keys)
            ]
        for key in ("ssl_certfile", "ssl_keyfile"):
            if isinstance(values.get(key), str):
                values[key] = self._file(values[key], ("server", key))
        if "admin_key" in values:
            values["admin_key"] = self._secret(values["admin_key"], ("server", "admin_key"))
        if isinstance(values.get("log_dir"), str):
            log_dir = self._path(values["log_dir"], ("server", "log_dir"))
            values["log_dir"] = log_dir or Path(values["log_dir"])
        try:
            return ServerSpec(**values)
        except ValidationError as error:
            self._note(error, ("server",))
            return None

    def _secret(self, value: Any, path: yaml_positions.Path) -> Any:
        """A secret as it stands, or the first line of the file that `file:PATH` names.

        Without blanks around it, which a header cannot carry, and a byte order mark before it.
        """
        if not isinstance(value, str):
            return value
        secret = value
        if value.startswith("file:"):
            source = self._path(value.removeprefix("file:").strip(), path)
            if source is None:
                return value
            try:
                secret = _first_line(source)
            except (OSError, ValueError) as error:
                self.document.problem(path, f"{source} cannot be read: {_reason(error)}")
                return value
        elif _LIKE_A_SOURCE.match(value):
            self.document.problem(
                path, "begins like a reference and is none; write file:PATH or ${NAME}"
            )
        secret = secret.removeprefix("\ufeff").strip()
        if any(p.path == yaml_positions.dotted(path) for p in self.document.problems):
            return secret
        if not secret:
            self.document.problem(path, "is empty; a key must be a non-empty string")
        elif not secret.isprintable() or len(secret) > _KEY_LENGTH:
            self.document.problem(
                path,
                f"is no key: it must be one line of at most {_KEY_LENGTH} printable characters, "
                "as an Authorization header carries it",
            )
        return secret

    def _file(self, value: str, path: yaml_positions.Path) -> Path:
        file = self._path(value, path)
        if file is not None and not _holds(file.is_file):
            self.document.problem(path, f"there is no file {file}")
        return file or Path(value)

    def _path(self, value: str, path: yaml_positions.Path) -> Path | None:
        """From the registry's folder on, with `~` for a home; None, and a problem, without one."""
        try:
            return self.folder / Path(value).expanduser()
        except RuntimeError:
            home = value.partition("/")[0]
            self.document.problem(path, f"{home} leads to no home here; write the whole path")
            return None

    # --- models

    def _models(self, top: dict[str, Any]) -> list[ModelSpec]:
        defaults = self._defaults(top.get("defaults"))
        entries = self._mapping(top.get("models"), ("models",))
        if entries == {}:
            self.document.problem(
                ("models",), "lists no model; add one, as in `chat: {model: FOLDER}`"
            )
        specs = [
            spec
            for name, raw in (entries or {}).items()
            if (spec := self._model(name, raw, defaults)) is not None
        ]
        self._names_differ(entries or {})
        return specs

    def _defaults(self, raw: Any) -> dict[str, Any]:
        """What every model inherits; nothing if it is wrong, which is then told once, here."""
        path = ("defaults",)
        values = self._mapping(raw, path)
        if values is None:
            return {}
        before = len(self.document.problems)
        values = self._values(values, path, {"name", "model", "aliases", "loras"})
        for argument in ("model", "served_model_name"):
            if argument in values["engine"]:
                self.document.problem((*path, "engine", argument), "is said by each model itself")
        self._said_once(values, path)
        self._spec({"name": "defaults", "model": "any"} | values, path, _PART)
        return values if len(self.document.problems) == before else {}

    def _model(self, name: str, raw: Any, defaults: dict[str, Any]) -> ModelSpec | None:
        path = ("models", name)
        values = self._mapping(raw, path)
        if values is None:
            return None
        values = self._values(values, path, {"name"})
        self._said_once(values, path)
        for source in ("model", "loras"):
            if source in values:
                values[source] = self._sources(values[source], (*path, source))
        return self._spec({"name": name} | _merge(defaults, values), path)

    def _values(
        self, values: dict[str, Any], path: yaml_positions.Path, barred: set[str]
    ) -> dict[str, Any]:
        """The known keys of a model or of `defaults`, what can be resolved resolved."""
        values = self._known(values, ModelSpec.model_fields.keys() - barred, path)
        values["engine"] = self._engine(values.get("engine"), (*path, "engine"))
        for key, part in (("sampling", SamplingSpec), ("idle", IdleSpec)):
            if isinstance(values.get(key), dict):
                values[key] = self._known(values[key], part.model_fields, (*path, key))
        if isinstance(values.get("chat_template"), str):
            values["chat_template"] = self._template(
                values["chat_template"], (*path, "chat_template")
            )
        return values

    def _spec(
        self, values: dict[str, Any], path: yaml_positions.Path, context: str | None = None
    ) -> ModelSpec | None:
        try:
            return ModelSpec.model_validate(values, context=context)
        except ValidationError as error:
            self._note(error, path)
            return None

    def _engine(self, raw: Any, path: yaml_positions.Path) -> dict[str, Any]:
        arguments = self._mapping(raw, path)
        if arguments is None:
            return {}
        arguments = self._known(arguments, ENGINE_ARGS.keys(), path)
        for name in arguments.keys() & _PLANNED:
            self.document.problem((*path, name), f"is set by the plan; say {_PLANNED[name]}")
        for name, value in arguments.items():
            try:
                arguments[name] = TypeAdapter(ENGINE_ARGS[name]).validate_python(value)
            except ValidationError as error:
                self._note(error, (*path, name))
        if "hf_token" in arguments:
            arguments["hf_token"] = self._secret(arguments["hf_token"], (*path, "hf_token"))
        for name in arguments.keys() & _ENGINE_SOURCES:
            arguments[name] = self._sources(arguments[name], (*path, name))
        if isinstance(folder := arguments.get("download_dir"), str):
            arguments["download_dir"] = str(self._path(folder, (*path, "download_dir")) or folder)
        return arguments

    def _said_once(self, values: dict[str, Any], path: yaml_positions.Path) -> None:
        for key, argument in ENGINE_KEYS.items():
            named = key in values or (key == "aliases" and path[0] == "models")
            if argument in values["engine"] and named:
                said = "the entry's key and `aliases`" if key == "aliases" else f"`{key}`"
                self.document.problem(
                    (*path, "engine", argument), f"is said twice; {said} of the entry sets it"
                )

    def _sources(self, value: Any, path: yaml_positions.Path) -> Any:
        if isinstance(value, dict):
            return {name: self._sources(each, (*path, name)) for name, each in value.items()}
        return self._source(value, path) if isinstance(value, str) else value

    def _source(self, value: str, path: yaml_positions.Path) -> str:
        """A folder as an absolute path, a hub name as it stands.

        As for vLLM, what is a folder here is that folder; else a name that begins
        like a path must be one.
        """
        if not value.strip():
            self.document.problem(path, "is empty; give a folder or a hub name")
            return value
        folder = self._path(value, path)
        if folder is None:
            return value
        if _holds(folder.is_dir):
            return str(folder.resolve())
        if _holds(folder.exists):
            self.document.problem(path, _no_folder(folder, path))
        elif value.startswith((".", "/", "~")) or value.count("/") > 1:
            self.document.problem(path, f"there is no folder {folder}")
        return value

    def _template(self, value: str, path: yaml_positions.Path) -> str:
        """The template's text: the value itself if it is Jinja, else that file's content."""
        if "{" in value or "\n" in value:
            return value
        file = self._file(value, path)
        try:
            return file.read_text(encoding="utf-8") if _holds(file.is_file) else value
        except (OSError, ValueError) as error:
            self.document.problem(path, f"{file} cannot be read: {_reason(error)}")
            return value

    def _names_differ(self, entries: dict[str, Any]) -> None:
        """Every public name leads to one model."""
        owner: dict[str, yaml_positions.Path] = {}
        for entry, raw in entries.items():
            values = raw if isinstance(raw, dict) else {}
            aliases = values.get("aliases") if isinstance(values.get("aliases"), list) else []
            loras = values.get("loras") if isinstance(values.get("loras"), dict) else {}
            named: list[tuple[Any, yaml_positions.Path]] = [(entry, ("models", entry))]
            if isinstance(count := values.get("replicas"), int) and count > 1:
                named += [(f"{entry}/{n}", ("models", entry, "replicas")) for n in range(count)]
            named += [(a, ("models", entry, "aliases", i)) for i, a in enumerate(aliases or [])]
            named += [(lora, ("models", entry, "loras", lora)) for lora in loras or {}]
            for name, path in named:
                if not isinstance(name, str):
                    continue
                if (
                    not 0 < len(name) <= _NAME_LIMIT
                    or name.strip() != name
                    or not name.isprintable()
                ):
                    self.document.problem(
                        path,
                        f"a model's name must be printable, without blanks around it, "
                        f"of at most {_NAME_LIMIT} characters",
                    )
                if name in owner:
                    other = yaml_positions.dotted(owner[name])
                    self.document.problem(path, f"the name {name} is taken by {other}")
                owner.setdefault(name, path)

    # --- shared

    def _mapping(self, value: Any, path: yaml_positions.Path) -> dict[str, Any] | None:
        if isinstance(value, dict):
            return dict(value)
        if value is None and path:
            return {}
        what = "is empty" if value is None else f"is a {_kind(value)}"
        self.document.problem(path, f"{what}; it must be a mapping of keys to values")
        return None

    def _known(
        self, values: dict[str, Any], known: Iterable[str], path: yaml_positions.Path
    ) -> dict[str, Any]:
        """`values` without the unknown keys, each noted with what it could be."""
        known = set(known)
        for key in values.keys() - known:
            self.document.problem((*path, key), self._unknown(key, known, path))
        return {key: value for key, value in values.items() if key in known}

    def _unknown(self, key: str, known: set[str], path: yaml_positions.Path) -> str:
        if (told := fastchat.successor(key)) is not None:
            return f"unknown key; {told}"
        snake = key.replace("-", "_")
        elsewhere = {"server": ServerSpec.model_fields, "a model": ModelSpec.model_fields}
        if snake in known:
            return f"unknown key; nearest: {snake}"
        for place, keys in elsewhere.items():
            if snake in keys and snake != "name":
                return f"unknown key; it is a key of {place}"
        if path[-1:] != ("engine",) and path != ("server",) and snake in ENGINE_ARGS:
            return f"unknown key; it is an engine argument: write `engine: {{{snake}: ...}}`"
        near = nearest(key, known)
        if near is None and path[-1:] == ("engine",):
            return f"unknown key; no such engine argument in vLLM {VLLM_VERSION}"
        return "unknown key; " + (f"nearest: {near}" if near else f"known: {_listed(known)}")

    def _note(self, error: ValidationError, path: yaml_positions.Path) -> None:
        """pydantic's findings as problems, one for each place in the file."""
        findings: dict[yaml_positions.Path, list[str]] = {}
        for detail in error.errors(include_url=False):
            place = self._place(detail, path)
            findings.setdefault(place, []).append(self._told(detail, place))
        for place, messages in findings.items():
            self.document.problem(place, " or ".join(dict.fromkeys(messages)))

    def _told(self, detail: ErrorDetails, place: yaml_positions.Path) -> str:
        written = self.document.written.get(place)
        if detail["type"] != "string_type" or not written:
            return _plain(detail, place)
        shown = "it" if _SECRETS & set(place) else written
        return f"must be text, and {shown} is a {_kind(detail['input'])} in YAML; put it in quotes"

    def _place(self, detail: ErrorDetails, path: yaml_positions.Path) -> yaml_positions.Path:
        """Where in the file: `loc` without union branches."""
        steps = [step for step in detail["loc"] if isinstance(step, int) or step.isidentifier()]
        here = (*path, *steps)
        if detail["type"] == "missing":
            return here
        while len(here) > len(path) and here not in self.document.lines:
            here = here[:-1]
        return here


def _merge(defaults: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `defaults`; mappings (engine, sampling, ...) are merged key by key."""
    alternatives = {"memory": "gpu_memory_utilization", "gpu_memory_utilization": "memory"}
    replaced = {other for key, other in alternatives.items() if key in own}
    merged = {k: v for k, v in defaults.items() if k not in replaced} | own
    overruled = {ENGINE_KEYS[key] for key in own if key in ENGINE_KEYS}
    inherited = defaults.get("engine", {})
    defaults = defaults | {"engine": {k: v for k, v in inherited.items() if k not in overruled}}
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            merged[key] = defaults[key] | value
    return merged


def _plain(detail: ErrorDetails, place: yaml_positions.Path) -> str:
    """One finding of pydantic in words, with what came."""
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "value_error":
        return message
    came = detail["input"]
    shown = f" (came: {came!r})" if isinstance(came, str | int | float | bool) else ""
    fit = len(shown) < 100 and not _SECRETS & set(place)
    message = message.replace("valid tuple", "list")  # YAML has no other
    return message[:1].lower() + message[1:] + (shown if fit else "")


def _kind(value: object) -> str:
    kinds: dict[type, str] = {
        list: "list",
        str: "text",
        int: "number",
        float: "number",
        bool: "boolean",
        type(None): "null",
    }
    return kinds.get(type(value), "value")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _holds(question: Callable[[], bool]) -> bool:
    """Of a path; False too where it is too long or may not be read."""
    try:
        return question()
    except OSError:
        return False


def _first_line(file: Path) -> str:
    """Or as much of it as is too long for a key. Raises OSError, UnicodeDecodeError."""
    if file.exists() and not (file.is_file() or file.is_dir()):  # a pipe would be waited for
        raise OSError("it is no regular file")
    with file.open(encoding="utf-8") as lines:
        return lines.readline(_KEY_LENGTH + 80)


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    return getattr(error, "strerror", None) or str(error)


_FORMATS = {
    ".gguf": "a GGUF file",
    ".safetensors": "a file of weights",
    ".bin": "a file of weights",
}


def _no_folder(file: Path, path: yaml_positions.Path) -> str:
    """Of a file where a folder is needed: what it is, and what is allowed."""
    what = _FORMATS.get(file.suffix.lower(), "a file")
    wanted = (
        "an adapter is a folder with adapter_config.json and its weights"
        if "loras" in path
        else "a model is a folder with config.json and safetensors files"
    )
    return f"{file} is {what}; {wanted}, or a hub name"
