"""A model's files, in a folder or on the hub: its config.json and which tensors it holds.

Of weights only the headers are read.
"""

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
_HEADER_LIMIT = 100_000_000  # bytes; the format's own
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes; what is loaded in the model's dtype
_KINDS = (".safetensors", ".bin", ".pt")  # in vLLM's order of preference
_ADAPTER = "adapter_config.json"
_POINTER = b"version https://git-lfs"
_POINTER_BYTES = 1024  # at most, of a pointer
_INDEX = "model.safetensors.index.json"
_NO_WEIGHTS = ("adapter_", "optimizer", "scaler", "scheduler", "training_args")
_TEXT = ("thinker_config", "text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str  # as safetensors calls it: "BF16"
    shape: tuple[int, ...]
    stored: int  # bytes

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def loaded(self, float_bytes: int) -> int:
        """Bytes in an engine whose model dtype takes `float_bytes`.

        Packed integers and 8-bit floats stay as they are, and so do the scales beside them.
        """
        cast = self.dtype in _FLOATS and "scale" not in self.name
        return self.count * float_bytes if cast else self.stored


class ModelConfig:
    """config.json, with what transformers fills in for the keys that it leaves out."""

    def __init__(self, said: dict[str, Any], where: str) -> None:
        self.said = said
        self.where = where  # for messages
        self.model_type = str(said.get("model_type") or "")

    def get(self, *keys: str) -> Any:
        """The first of `keys` that has a value; null in the file is none."""
        values = (self._value(key) for key in keys)
        return next((value for value in values if value is not None), None)

    def number(self, *keys: str) -> int:
        """Raises ShapeUnknown without one."""
        value = self.get(*keys)
        if not isinstance(value, int):
            raise ShapeUnknown(f"{self.where} does not say {keys[0]}")
        return value

    def _value(self, key: str) -> Any:
        defaults, aliases = _filled_in(self.model_type)
        for name in (key, aliases.get(key)):
            if name in self.said:
                return self.said[name]
        return defaults.get(key, defaults.get(aliases.get(key, key)))

    def part(self, key: str) -> ModelConfig | None:
        value = self.said.get(key)
        return ModelConfig(value, f"{self.where}: {key}") if isinstance(value, dict) else None

    @property
    def text(self) -> ModelConfig:
        """The language model's part of a multimodal model, else the whole."""
        parts = (self.part(key) for key in _TEXT)
        return next((part.text for part in parts if part), self)


class Checkpoint(ABC):
    def __init__(self, name: str, sizes: Mapping[str, int]) -> None:
        self.name = name
        self.sizes = sizes  # of the files at the top, bytes

    @abstractmethod
    def content(self, file: str) -> bytes: ...

    @abstractmethod
    def headers(self, files: Sequence[str]) -> list[Tensor]: ...

    def json(self, file: str) -> dict[str, Any]:
        """A JSON file; empty if there is none. Raises ModelUnusable if it is none."""
        if file not in self.sizes:
            return {}
        try:
            value = json.loads(self.content(file))
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ModelUnusable(f"{self.name}: {file} is no JSON object")
        return value

    def config(self, overrides: Any = None) -> ModelConfig:
        """Raises ModelUnusable if there is none."""
        if "config.json" not in self.sizes:
            if "params.json" in self.sizes:  # Mistral's own layout, which vLLM knows
                raise ShapeUnknown(f"{self.name} has params.json and no config.json")
            raise ModelUnusable(f"{self.name} {self._is_instead()}")
        said = self.json("config.json")
        return ModelConfig(
            _merged(said, overrides if isinstance(overrides, dict) else {}),
            f"{self.name}: config.json",
        )

    def _is_instead(self) -> str:
        """What a folder without config.json is."""
        if _ADAPTER in self.sizes:
            return "is an adapter, no model: list it in `loras` of the model that it adapts"
        if any(file.endswith(".gguf") for file in self.sizes):
            return "has no config.json, and GGUF files only; safetensors files are needed"
        return "has no config.json"

    def flaw(self) -> str | None:
        """What of its files is missing, cut short or a stand-in; not known of the hub's."""
        return None

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """The files that vLLM loads: one kind, no second copy, no adapter, no training state."""
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
        """Files of weights that the index names and that are not there."""
        return [file for file in self.weights if file not in self.sizes]

    def tensors(self) -> list[Tensor]:
        """Every tensor of the safetensors files; none where there are no such files."""
        if not self.weights or not self.weights[0].endswith(".safetensors"):
            return []
        if self.missing:
            raise ModelUnusable(f"{self.name}: {_INDEX} names {self.missing[0]}, which is missing")
        return self.headers(self.weights)


class Folder(Checkpoint):
    def __init__(self, path: Path, name: str | None = None) -> None:
        if not path.is_dir():
            raise ModelUnusable(f"there is no folder {path}")
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
            raise ModelUnusable(f"{self.name}: {file} is no whole safetensors file") from None

    def _read_header(self, file: str) -> tuple[int, dict[str, Any]]:
        """Where its data begins, and what it says of each tensor."""
        with _readable(f"{self.name}: {file}"), (self.path / file).open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length) if length < _HEADER_LIMIT else b"")
        header.pop("__metadata__", None)
        return 8 + length, header

    def flaw(self) -> str | None:
        return next(filter(None, self._flaws(self.weights, _INDEX)), None)

    def adapter_flaw(self) -> str | None:
        """The same of a folder that is to be an adapter."""
        weights = [f"adapter_model{kind}" for kind in _KINDS]
        there = [file for file in weights if file in self.sizes]
        if _ADAPTER not in self.sizes:
            what = "a model" if "config.json" in self.sizes else "a folder"
            return f"has no {_ADAPTER}: it is {what}, no adapter"
        if not there:
            return f"has none of {', '.join(weights)}"
        return next(filter(None, self._flaws(there[:1], "")), None)

    def lacks(self) -> str | None:
        """What a download that broke off has not brought, of a model or an adapter."""
        if _ADAPTER in self.sizes and "config.json" not in self.sizes:
            return self.adapter_flaw()
        if not {"config.json", "params.json"} & self.sizes.keys():
            return "config.json is missing"
        return self.flaw() if self.weights else "the weights are missing"

    def _flaws(self, weights: Sequence[str], index: str) -> Iterator[str | None]:
        yield from (self._stand_in(file) for file in self.sizes)
        missing = [file for file in weights if file not in self.sizes]
        if missing:
            yield f"{index} names {missing[0]}, which is missing"
        elif weights and weights[0].endswith(".safetensors"):
            yield from (self._flaw_of(file) for file in weights)

    def _stand_in(self, file: str) -> str | None:
        if self.sizes[file] > _POINTER_BYTES or not self.content(file).startswith(_POINTER):
            return None
        return f"{file} is a Git LFS pointer in place of the file; fetch it with `git lfs pull`"

    def _flaw_of(self, file: str) -> str | None:
        there = self.sizes[file]
        try:
            begin, header = self._read_header(file)
            size = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (struct.error, ValueError, TypeError, AttributeError, KeyError, LookupError):
            return f"{file} is no whole safetensors file ({there:,} bytes)"
        return None if there >= size else f"{file} is cut short: {there:,} of {size:,} bytes"


class Repository(Checkpoint):
    """A model on the hub; config files come into the cache, weights stay there."""

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
    """A model's files: the folder, the hub's cache, or the hub.

    Blocks. `download_dir`, `revision` and `hf_token` of `engine:` hold as in vLLM. Raises
    ModelUnusable, or ModelOutOfReach; without `hub` that is not asked.
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
    """Raises ModelUnusable for files, adapters' too, that no engine could load. Blocks."""
    if spec.engine.get("load_format", "auto") in ("auto", "safetensors") and (flaw := files.flaw()):
        raise ModelUnusable(f"{files.name}: {flaw}")
    for name, source in spec.loras.items():
        if Path(source).is_absolute() and (flaw := Folder(Path(source)).adapter_flaw()):
            raise ModelUnusable(f"adapter {name}: {source}: {flaw}")


def cached(repo: str, revision: str | None, cache_dir: str | None) -> Folder | None:
    """What the hub's cache has of a repository, be it whole or not."""
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


def _merged(said: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`hf_overrides` as vLLM applies them: parts are merged, all else is replaced."""
    merged = dict(said)
    for key, value in overrides.items():
        old: Any = merged.get(key)
        parts = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merged(old, value) if parts else value
    return merged


@cache
def _filled_in(model_type: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Defaults of a model type's keys, and the file's names of keys that have another one.

    From the source of transformers' config classes, since importing them takes seconds;
    nothing where transformers or the model type is missing.
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
    """What the body of a class assigns, where it is a literal."""
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
