"""A model's files in a folder or on the hub: config.json and the headers of its tensors."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
import struct
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from huggingface_hub import errors

from llmserve.checkpoint.hub_errors import translated
from llmserve.errors import ModelOutOfReach, ModelUnusable, ShapeUnknown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from llmserve.registry.spec import ModelSpec

_HUB_TIMEOUT_S = 10
_HUB_THREADS = 8
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})  # loaded in the model's dtype
_KINDS = (".safetensors", ".bin", ".pt")  # in vLLM's order of preference
_ADAPTER = "adapter_config.json"
_POINTER = b"version https://git-lfs"
_POINTER_BYTES = 1024  # the largest size of a pointer
_INDEX = "model.safetensors.index.json"
_NO_WEIGHTS = ("adapter_", "optimizer", "scaler", "scheduler", "training_args")
_CONFIGS = frozenset({"config.json", "params.json"})  # the second is Mistral's own layout
# vLLM's load formats that read the weight files of the folder itself.
_READS_FILES = frozenset(
    {"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral"}
)
_TEXT = ("thinker_config", "text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str  # of safetensors: "BF16"
    shape: tuple[int, ...]
    stored: int  # bytes

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def loaded(self, float_bytes: int) -> int:
        """Return the bytes in an engine whose model dtype takes `float_bytes`.

        Packed integers, 8-bit floats and their scales keep their size.
        """
        cast = self.dtype in _FLOATS and "scale" not in self.name
        return self.count * float_bytes if cast else self.stored


class ModelConfig:
    """config.json, with transformers' defaults for missing keys."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where  # for messages
        self.model_type = str(values.get("model_type") or "")

    def get(self, *keys: str) -> Any:
        """Return the value of the first of `keys` that is not null."""
        values = (self._value(key) for key in keys)
        return next((value for value in values if value is not None), None)

    def number(self, *keys: str) -> int:
        """Return the first integer of `keys`. Raises ShapeUnknown without one."""
        value = self.get(*keys)
        if not isinstance(value, int):
            raise ShapeUnknown(f"{self.where} has no number {keys[0]}")
        return value

    def _value(self, key: str) -> Any:
        defaults, aliases = _class_defaults(self.model_type)
        for name in (key, aliases.get(key)):
            if name in self.values:
                return self.values[name]
        return defaults.get(key, defaults.get(aliases.get(key, key)))

    def part(self, key: str) -> ModelConfig | None:
        value = self.values.get(key)
        return ModelConfig(value, f"{self.where}: {key}") if isinstance(value, dict) else None

    @property
    def text(self) -> ModelConfig:
        """Return the language model's part of a multimodal model, else the whole."""
        parts = (self.part(key) for key in _TEXT)
        return next((part.text for part in parts if part), self)


class Checkpoint(ABC):
    """The files of a model at one place."""

    def __init__(self, name: str, sizes: Mapping[str, int]) -> None:
        self.name = name
        self.sizes = sizes  # of the files at the top, bytes

    @abstractmethod
    def content(self, file: str) -> bytes: ...

    @abstractmethod
    def headers(self, files: Sequence[str]) -> list[Tensor]: ...

    def json(self, file: str) -> dict[str, Any]:
        """Return a JSON file, {} without one. Raises ModelUnusable for anything but an object."""
        if file not in self.sizes:
            return {}
        try:
            value = json.loads(self.content(file))
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ModelUnusable(f"{self.name}: {file} is not a JSON object")
        return value

    def config(self, overrides: Any = None) -> ModelConfig:
        """Return config.json. Raises ModelUnusable or ShapeUnknown without one."""
        if "config.json" not in self.sizes:
            if "params.json" in self.sizes:  # Mistral's own layout, which vLLM supports
                raise ShapeUnknown(f"{self.name} has params.json and no config.json")
            raise ModelUnusable(f"{self.name} {self._without_config()}")
        values = _merged(self.json("config.json"), overrides if isinstance(overrides, dict) else {})
        return ModelConfig(values, f"{self.name}: config.json")

    def _without_config(self) -> str:
        """Return why a folder has no config.json."""
        if _ADAPTER in self.sizes:
            return "is an adapter and not a model; list it in `loras` of its base model"
        if any(file.endswith(".gguf") for file in self.sizes):
            return "has no config.json and only GGUF files; safetensors files are needed"
        return "has no config.json"

    def flaw(self) -> str | None:
        """Return why the weights cannot be loaded, as far as the names of the files show it."""
        if self.missing:
            return f"{_INDEX} lists {self.missing[0]}, which is missing; download it"
        if self.weights or not _CONFIGS & self.sizes.keys():
            return None
        if any(file.endswith(".gguf") for file in self.sizes):
            return "has only GGUF files; safetensors files are needed"
        return (
            "has no weights: no *.safetensors, *.bin or *.pt file; download the model again, "
            "or set `engine: {load_format: dummy}` for random weights"
        )

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """Return the weight files that vLLM loads: one kind, without copies and adapters."""
        for kind in _KINDS:
            files = sorted(
                file
                for file in self.sizes
                if file.endswith(kind) and not file.startswith(_NO_WEIGHTS)
            )
            if files:
                return self._indexed(files) if kind == ".safetensors" else tuple(files)
        return ()

    def _indexed(self, files: list[str]) -> tuple[str, ...]:
        index = self.json(_INDEX).get("weight_map")
        if isinstance(index, dict):
            return tuple(sorted(set(index.values())))
        # Mistral's own format of the same weights.
        others = [file for file in files if not file.startswith("consolidated")]
        return tuple(others or files)

    @property
    def missing(self) -> list[str]:
        """Return the missing weight files of the index."""
        return [file for file in self.weights if file not in self.sizes]

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the safetensors files; [] without such files."""
        if not self.weights or not self.weights[0].endswith(".safetensors"):
            return []
        if self.missing:
            raise ShapeUnknown(f"{self.name}: {_INDEX} lists {self.missing[0]}, which is missing")
        return self.headers(self.weights)


class Folder(Checkpoint):
    """A model or adapter in a folder of this machine."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        if not path.is_dir():
            raise ModelUnusable(f"folder {path} does not exist")
        name = name or str(path)
        with _readable(name):
            sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
        super().__init__(name, sizes)
        self.path = path

    def content(self, file: str) -> bytes:
        with _readable(f"{self.name}: {file}"):
            return (self.path / file).read_bytes()

    def headers(self, files: Sequence[str]) -> list[Tensor]:
        return [tensor for file in files for tensor in self._header(file)]

    def _header(self, file: str) -> Iterable[Tensor]:
        try:
            _, header = self._read_header(file)
            return [_tensor(name, **entry) for name, entry in header.items()]
        except (struct.error, ValueError, TypeError, AttributeError):
            raise ModelUnusable(f"{self.name}: {file} is not a complete safetensors file") from None

    def _read_header(self, file: str) -> tuple[int, dict[str, Any]]:
        """Return the offset of the data and the entries of all tensors."""
        with _readable(f"{self.name}: {file}"), (self.path / file).open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length) if length < _HEADER_LIMIT else b"")
        header.pop("__metadata__", None)
        return 8 + length, header

    def flaw(self) -> str | None:
        """Return which file is missing, truncated or a pointer; None if all are whole."""
        return self._pointer_flaw() or super().flaw() or self._content_flaw(self.weights)

    def adapter_flaw(self) -> str | None:
        """Return what is wrong with the folder as an adapter; None if nothing is."""
        weights = [f"adapter_model{kind}" for kind in _KINDS]
        there = [file for file in weights if file in self.sizes]
        if _ADAPTER not in self.sizes:
            what = "a model" if "config.json" in self.sizes else "a folder"
            return f"has no {_ADAPTER}; it is {what} and not an adapter"
        if not there:
            return f"has none of {', '.join(weights)}"
        return self._pointer_flaw() or self._content_flaw(there[:1])

    def lacks(self) -> str | None:
        """Return what an incomplete download of a model or an adapter lacks; None: nothing."""
        if _ADAPTER in self.sizes and "config.json" not in self.sizes:
            return self.adapter_flaw()
        return self.flaw() if _CONFIGS & self.sizes.keys() else "config.json is missing"

    def _pointer_flaw(self) -> str | None:
        for file, size in self.sizes.items():
            if size <= _POINTER_BYTES and self.content(file).startswith(_POINTER):
                return f"{file} is a Git LFS pointer; fetch the file with `git lfs pull`"
        return None

    def _content_flaw(self, weights: Sequence[str]) -> str | None:
        flaw = next(filter(None, map(self._flaw_of, weights)), None)
        return flaw and f"{flaw}; download it again"

    def _flaw_of(self, file: str) -> str | None:
        there = self.sizes[file]
        if not there:
            return f"{file} is empty"
        if not file.endswith(".safetensors"):
            return None
        try:
            begin, header = self._read_header(file)
            size = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (struct.error, ValueError, TypeError, AttributeError, KeyError, LookupError):
            return f"{file} is not a complete safetensors file ({there:,} bytes)"
        return None if there >= size else f"{file} is truncated: {there:,} of {size:,} bytes"


class Repository(Checkpoint):
    """A model on the hub. Config files are downloaded to the cache; weights are not."""

    def __init__(self, repo: str, engine: Mapping[str, Any]) -> None:
        self.api = huggingface_hub.HfApi(token=engine.get("hf_token"))
        self.revision = engine.get("revision")
        self.folder = engine.get("download_dir")
        with translated(repo, self.revision, ModelOutOfReach):
            info = self.api.model_info(
                repo, revision=self.revision, files_metadata=True, timeout=_HUB_TIMEOUT_S
            )
        super().__init__(
            repo, {f.rfilename: f.size or 0 for f in info.siblings or () if "/" not in f.rfilename}
        )

    def content(self, file: str) -> bytes:
        with translated(self.name, self.revision, ModelOutOfReach):
            path = self.api.hf_hub_download(
                self.name, file, revision=self.revision, cache_dir=self.folder
            )
        return Path(path).read_bytes()

    def headers(self, files: Sequence[str]) -> list[Tensor]:
        with (
            translated(self.name, self.revision, ModelOutOfReach),
            ThreadPoolExecutor(_HUB_THREADS) as threads,
        ):
            return [tensor for part in threads.map(self._header, files) for tensor in part]

    def _header(self, file: str) -> list[Tensor]:
        header = self.api.parse_safetensors_file_metadata(self.name, file, revision=self.revision)
        return [
            _tensor(name, info.dtype, info.shape, info.data_offsets)
            for name, info in header.tensors.items()
        ]


def of(spec: ModelSpec, *, hub: bool = True) -> Checkpoint:
    """Return a model's files: the folder, the hub's cache, or (with `hub`) the hub.

    Blocks. `download_dir`, `revision` and `hf_token` of `engine:` apply as in vLLM. Raises
    ModelUnusable or ModelOutOfReach.
    """
    if Path(spec.model).is_absolute():
        return Folder(Path(spec.model))
    engine = spec.engine
    there = cached(spec.model, engine.get("revision"), engine.get("download_dir"))
    if there and there.weights and not there.missing:
        return there
    if not hub:
        raise ModelOutOfReach(f"{spec.model} is not in the cache")
    return Repository(spec.model, spec.engine)


def raise_if_flawed(spec: ModelSpec, files: Checkpoint) -> None:
    """Raise ModelUnusable for files of the model or its adapters that cannot be loaded. Blocks."""
    reads_files = spec.engine.get("load_format", "auto") in _READS_FILES
    if reads_files and (flaw := files.flaw()):
        raise ModelUnusable(f"{files.name}: {flaw}")
    for name, source in spec.loras.items():
        if Path(source).is_absolute() and (flaw := Folder(Path(source)).adapter_flaw()):
            raise ModelUnusable(f"adapter {name}: {source}: {flaw}")


def cached(repo: str, revision: str | None, cache_dir: str | None) -> Folder | None:
    """Return the folder of a repository in the hub's cache, complete or not."""
    try:
        path = huggingface_hub.snapshot_download(
            repo, revision=revision, cache_dir=cache_dir, local_files_only=True
        )
    except errors.IncompleteSnapshotError as error:  # also without files that vLLM does not read
        path = error.snapshot_path
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None
    return Folder(Path(path), repo)


def _tensor(
    name: str, dtype: str, shape: Sequence[int], data_offsets: tuple[int, int], **_: Any
) -> Tensor:
    start, end = data_offsets
    return Tensor(name, dtype, tuple(shape), end - start)


@contextmanager
def _readable(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelUnusable(f"{what} cannot be read: {error.strerror}") from None


def _merged(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Apply `hf_overrides` as vLLM does: nested objects are merged, others replaced."""
    merged = dict(values)
    for key, value in overrides.items():
        old: Any = merged.get(key)
        parts = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merged(old, value) if parts else value
    return merged


@cache
def _class_defaults(model_type: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the defaults of a model type's keys and the aliases of keys.

    They are read from the source of transformers' config classes, because an import takes seconds.
    Both are empty without transformers or for an unknown model type.
    """
    spec = importlib.util.find_spec("transformers")  # finds without importing
    if not spec or not spec.origin or not re.fullmatch(r"[\w-]+", model_type):
        return {}, {}
    words = re.split(r"[_-]", model_type)
    for end in range(len(words), 0, -1):  # siglip_vision_model is in siglip/
        folder = Path(spec.origin).parent / "models" / "_".join(words[:end])
        for file in sorted(folder.glob("configuration_*.py")):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    values = _class_values(node)
                    if values.get("model_type") == model_type:
                        return values, values.get("attribute_map", {})
    return {}, {}


def _class_values(node: ast.ClassDef) -> dict[str, Any]:
    """Return the literal values that the body of a class assigns."""
    values = {}
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
        elif isinstance(statement, ast.AnnAssign):
            target = statement.target
        else:
            continue
        if isinstance(target, ast.Name) and isinstance(
            statement.value, ast.Constant | ast.Dict | ast.List | ast.Tuple
        ):
            try:
                values[target.id] = ast.literal_eval(statement.value)
            except ValueError:  # names something else
                continue
    return values
