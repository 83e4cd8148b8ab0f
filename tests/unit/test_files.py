from __future__ import annotations

import json
import struct
from contextlib import nullcontext
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import constants

from llmserve.checkpoint import files as checkpoint
from llmserve.checkpoint.files import Checkpoint, Folder, ModelConfig, Repository
from llmserve.errors import ModelUnusable, ShapeUnknown
from tests.fakes import spec
from tests.unit.test_hub import NOBODY, box  # noqa: F401  # a fixture

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.unit.test_hub import Hub

_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "U8": 1, "F8_E4M3": 1}

Entries = dict[str, tuple[str, tuple[int, ...]]]
SMALL: Entries = {"a.weight": ("BF16", (4, 2)), "b.weight": ("F32", (3,))}


def tensors_file(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A safetensors file of zeros."""
    ends = [0]
    for dtype, shape in tensors.values():
        ends.append(ends[-1] + prod(shape) * _BYTES[dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (name, (dtype, shape)), offsets in zip(tensors.items(), pairwise(ends), strict=True):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(ends[-1])


def write_tensors(file: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    file.write_bytes(tensors_file(tensors))


def names(files: Checkpoint) -> set[str]:
    return {tensor.name for tensor in files.tensors()}


def test_headers_of_a_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", SMALL)
    first, second = Folder(tmp_path).tensors()
    assert (first.name, first.dtype, first.shape, first.stored) == ("a.weight", "BF16", (4, 2), 16)
    assert (second.count, second.stored, second.loaded(2), second.loaded(4)) == (3, 12, 6, 12)


def test_the_files_of_the_index_count_and_no_others(tmp_path: Path) -> None:
    for part in ("model-1", "model-2", "consolidated", "stray", "adapter_model"):
        write_tensors(tmp_path / f"{part}.safetensors", {part: ("BF16", (2, 2))})
    index = {"weight_map": {"model-1": "model-1.safetensors", "model-2": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert names(Folder(tmp_path)) == {"model-1", "model-2"}


def test_the_same_weights_in_mistrals_format_count_once(tmp_path: Path) -> None:
    write_tensors(tmp_path / "consolidated.safetensors", {"c": ("BF16", (2, 2))})
    assert names(Folder(tmp_path)) == {"c"}
    write_tensors(tmp_path / "model.safetensors", {"m": ("BF16", (2, 2))})
    assert names(Folder(tmp_path)) == {"m"}


def test_one_kind_of_weights_counts(tmp_path: Path) -> None:
    for file in ("pytorch_model.bin", "optimizer.bin", "x.pt", "adapter_model.bin"):
        (tmp_path / file).write_bytes(b"w")
    assert Folder(tmp_path).weights == ("pytorch_model.bin",)
    assert Folder(tmp_path).tensors() == []
    write_tensors(tmp_path / "model.safetensors", SMALL)
    assert Folder(tmp_path).weights == ("model.safetensors",)


def test_a_part_that_is_missing(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tensors(tmp_path / "model-1.safetensors", {"a": ("BF16", (2, 2))})
    with pytest.raises(ShapeUnknown, match=r"lists model-2\.safetensors, which is missing"):
        Folder(tmp_path).tensors()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        struct.pack("<Q", 50) + b'{"a": ',
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": {}}',
    ],
)
def test_a_file_that_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(
        ShapeUnknown, match=r"model\.safetensors is not a complete safetensors file"
    ):
        Folder(tmp_path).tensors()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_tensors(tmp_path / "model.safetensors", SMALL)
    files = Folder(tmp_path)
    for file in files.sizes:
        (tmp_path / file).unlink()
    with pytest.raises(ShapeUnknown, match=r"config\.json cannot be read: No such file"):
        files.config()
    with pytest.raises(ShapeUnknown, match=r"model\.safetensors cannot be read: No such file"):
        files.tensors()


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ShapeUnknown, match="does not exist"):
        checkpoint.of(spec(model=str(tmp_path / "none")))
    with pytest.raises(ShapeUnknown, match=r"has no config\.json"):
        checkpoint.of(spec(model=str(tmp_path))).config()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ShapeUnknown, match=r"config\.json is not a JSON object"):
        Folder(tmp_path).config()


def test_keys_under_the_names_that_transformers_gives_them() -> None:
    gpt2 = ModelConfig({"model_type": "gpt2", "n_embd": 64}, "config.json")
    assert gpt2.get("hidden_size") == 64
    assert gpt2.get("num_hidden_layers") == 12  # left out: transformers' own default
    gemma = ModelConfig({"model_type": "gemma3_text", "sliding_window": None}, "config.json")
    assert gemma.get("head_dim") == 256
    assert gemma.get("sliding_window") is None  # set, to null
    assert ModelConfig({"model_type": "../gpt2"}, "config.json").get("hidden_size") is None


def test_overrides_reach_into_parts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": 1, "text_config": {"b": 2, "c": 3}}')
    config = Folder(tmp_path).config({"a": 4, "text_config": {"b": 5}})
    assert (config.get("a"), config.text.values) == (4, {"b": 5, "c": 3})


# --- the hub


@pytest.fixture
def hub(box: Hub) -> Hub:  # noqa: F811
    box.repos["org/m"] = {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors": tensors_file(SMALL),
        "original/consolidated.safetensors": b"w" * 1000,
        "pytorch_model.bin": b"w" * 1000,
    }
    return box


def cached(folder: Path) -> set[str]:
    return {path.name for path in (folder / "hub").rglob("*") if path.is_symlink()}


def test_a_model_on_the_hub_is_read_without_its_weights(hub: Hub, tmp_path: Path) -> None:
    files = checkpoint.of(spec(model="org/m", engine={"hf_token": "hf_secret"}))
    assert isinstance(files, Repository)
    assert files.config().model_type == "llama"
    assert names(files) == {"a.weight", "b.weight"}
    assert cached(tmp_path) == {"config.json"}
    # Without: what the library asks for itself, once a process.
    assert hub.tokens - {""} == {"Bearer hf_secret"}


def test_sizes_of_files_on_the_hub(hub: Hub) -> None:
    del hub.repos["org/m"]["model.safetensors"]
    files = checkpoint.of(spec(model="org/m"))
    assert files.weights == ("pytorch_model.bin",)
    assert files.sizes["pytorch_model.bin"] == 1000


def test_parts_of_weights_on_the_hub(hub: Hub) -> None:
    parts = {f"model-{n}.safetensors": tensors_file({f"t{n}": ("BF16", (2, 2))}) for n in range(12)}
    index = json.dumps({"weight_map": {file: file for file in parts}}).encode()
    hub.repos["org/m"] |= parts | {"model.safetensors.index.json": index}
    assert names(checkpoint.of(spec(model="org/m"))) == {f"t{n}" for n in range(12)}


def test_cached_model_is_read_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    entry = spec(model="org/m", engine={"download_dir": str(folder)})
    checkpoint.of(entry).config()  # config.json alone does not do
    assert isinstance(checkpoint.of(entry), Repository)
    [snapshot] = folder.glob("models--org--m/snapshots/*")
    write_tensors(snapshot / "model.safetensors", SMALL)
    hub.tokens.clear()
    files = checkpoint.of(entry)
    assert isinstance(files, Folder)
    assert names(files) == {"a.weight", "b.weight"}
    assert files.name == "org/m"
    assert hub.tokens == set()


def test_refusal_of_the_hub_is_one_line(hub: Hub) -> None:
    hub.refused["org/m"] = (403, "GatedRepo")
    message = "^org/m is gated on the hub; accept its terms and set HF_TOKEN"
    with pytest.raises(ShapeUnknown, match=message) as refused:
        checkpoint.of(spec(model="org/m"))
    assert refused.value.message.isprintable()


def test_names_and_revisions_that_are_not_there(hub: Hub) -> None:
    assert hub.repos
    with pytest.raises(ShapeUnknown, match="org/m has no revision no-such on the hub"):
        checkpoint.of(spec(model="org/m", engine={"revision": "no-such"}))
    with pytest.raises(ShapeUnknown, match=r"SmolLM2 135M is not .* not a valid name on the hub"):
        checkpoint.of(spec(model="SmolLM2 135M"))


def test_a_hub_that_cannot_be_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.repos
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    with pytest.raises(ShapeUnknown, match="could not be downloaded: the hub is not reachable"):
        checkpoint.of(spec(model="org/m"))


def test_a_broken_header_on_the_hub(hub: Hub) -> None:
    hub.repos["org/m"]["model.safetensors"] = b"w" * 2000
    with pytest.raises(ShapeUnknown, match="org/m has a broken safetensors file on the hub"):
        checkpoint.of(spec(model="org/m")).tensors()


def _safetensors(file: Path, size: int = 8, cut: int = 0) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
    whole = struct.pack("<Q", len(header)) + header.encode() + bytes(size)
    file.write_bytes(whole[: len(whole) - cut])


def test_truncated_weights_are_a_flaw(tmp_path: Path) -> None:
    _safetensors(tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").stat().st_size
    assert Folder(tmp_path).flaw() is None
    _safetensors(tmp_path / "model.safetensors", cut=3)
    flaw = f"model.safetensors is truncated: {whole - 3:,} of {whole:,} bytes; download it again"
    assert Folder(tmp_path).flaw() == flaw


INDEX = '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'


@pytest.mark.parametrize(
    ("files", "flaw"),
    [
        ({}, "has no weights: no *.safetensors, *.bin or *.pt file; download the model again, or set"),
        ({"adapter_model.safetensors": "w"}, "has no weights: "),
        ({"m.gguf": "GGUF"}, "has only GGUF files; safetensors files are needed"),
        ({"model.safetensors": "abc"},
         "model.safetensors is not a complete safetensors file (3 bytes); download it again"),
        ({"model.safetensors": ""}, "model.safetensors is empty; download it again"),
        ({"pytorch_model.bin": ""}, "pytorch_model.bin is empty; download it again"),
        ({"model-1.safetensors": "w", "model.safetensors.index.json": INDEX},
         "model.safetensors.index.json lists model-2.safetensors, which is missing; download it"),
    ],
    ids=["none", "adapter", "gguf", "broken", "empty", "empty-bin", "shard"],
)  # fmt: skip
def test_missing_weights_are_a_flaw(tmp_path: Path, files: dict[str, str], flaw: str) -> None:
    for name, content in ({"config.json": "{}"} | files).items():
        (tmp_path / name).write_text(content)
    assert (Folder(tmp_path).flaw() or "").startswith(flaw)


def test_weights_of_another_kind_are_left_to_vllm(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"abc")
    assert Folder(tmp_path).flaw() is None


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "pytorch_model.bin", "tokenizer.json", "config.json"]
)
def test_pointer_in_place_of_a_file_is_a_flaw(tmp_path: Path, file: str) -> None:
    _safetensors(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(POINTER)
    flaw = f"{file} is a Git LFS pointer; fetch the file with `git lfs pull`"
    assert Folder(tmp_path).flaw() == flaw


def test_folder_without_a_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelUnusable, match="only GGUF files; safetensors files are needed"):
        Folder(tmp_path).config()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelUnusable, match="is an adapter and not a model; list it in `loras`"):
        Folder(tmp_path).config()
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(ShapeUnknown, match=r"params\.json") as unknown:
        Folder(tmp_path).config()
    assert not isinstance(unknown.value, ModelUnusable)  # vLLM knows that layout


def test_flaw_of_a_folder_without_an_adapter(tmp_path: Path) -> None:
    assert (
        Folder(tmp_path).adapter_flaw()
        == "has no adapter_config.json; it is a folder and not an adapter"
    )
    (tmp_path / "config.json").write_text("{}")
    assert (
        Folder(tmp_path).adapter_flaw()
        == "has no adapter_config.json; it is a model and not an adapter"
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    assert str(Folder(tmp_path).adapter_flaw()).startswith("has none of adapter_model.safetensors")
    _safetensors(tmp_path / "adapter_model.safetensors", cut=1)
    assert str(Folder(tmp_path).adapter_flaw()).startswith("adapter_model.safetensors is truncated")
    _safetensors(tmp_path / "adapter_model.safetensors")
    assert Folder(tmp_path).adapter_flaw() is None


@pytest.mark.parametrize(
    ("load_format", "raises"),
    [("auto", True), ("hf", True), ("mistral", True), ("dummy", False), ("tensorizer", False)],
)
def test_flaws_count_where_the_weights_are_read(
    tmp_path: Path, load_format: str, raises: bool
) -> None:
    (tmp_path / "config.json").write_text("{}")
    entry = spec(model=str(tmp_path), engine={"load_format": load_format})
    with pytest.raises(ModelUnusable, match="no weights") if raises else nullcontext():
        checkpoint.raise_if_flawed(entry, checkpoint.of(entry))
    _safetensors(tmp_path / "model.safetensors", cut=1)
    with pytest.raises(ModelUnusable, match="truncated") if raises else nullcontext():
        checkpoint.raise_if_flawed(entry, checkpoint.of(entry))


def test_hub_repository_without_weights_is_flawed(hub: Hub) -> None:
    for file in ("model.safetensors", "pytorch_model.bin"):
        del hub.repos["org/m"][file]
    entry = spec(model="org/m")
    with pytest.raises(ModelUnusable, match="org/m: has no weights"):
        checkpoint.raise_if_flawed(entry, checkpoint.of(entry))


def test_flaw_of_an_adapter_has_its_name(tmp_path: Path) -> None:
    entry = spec(model=str(tmp_path), loras={"sql": str(tmp_path)})
    with pytest.raises(ModelUnusable, match=r"adapter sql: .* has no adapter_config\.json"):
        checkpoint.raise_if_flawed(entry, checkpoint.of(entry))
