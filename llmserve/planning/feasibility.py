"""Checks of a model before placement: its files, its registry entry, the GPUs of a box. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llmserve.checkpoint.shape import UnknownShape
from llmserve.gpus.device import Gpu, amount, apart, find, listed, short_name
from llmserve.planning import memory_model
from llmserve.planning.plan import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmserve.checkpoint.shape import Shape
    from llmserve.gpus.device import Box
    from llmserve.registry.spec import ModelSpec

# The compute capability that a format of weights needs, x 10. Source: get_min_capability of
# vllm/model_executor/layers/quantization; a contract test compares.
QUANTIZATION_NEEDS = {
    "awq": 75,
    "auto_awq": 75,
    "awq_marlin": 75,
    "gptq": 60,
    "auto_gptq": 60,
    "gptq_marlin": 60,
    "fp8": 75,
    "fbgemm_fp8": 80,
    "modelopt": 80,
    "modelopt_fp4": 75,
    "modelopt_mxfp8": 80,
    "mxfp4": 80,
    "gpt_oss_mxfp4": 80,
    "experts_int8": 80,
    "compressed-tensors": 70,
    "torchao": 75,
    "fp_quant": 100,
}
_BFLOAT16_NEEDS = 80
_CPU = Gpu(0, "CPU", 0)
_AUTO_CONTEXT = -1  # max_model_len that vLLM computes
_CPU_BLOCK_TOKENS = 128  # of a KV cache. Source: vllm/platforms/cpu.py; a contract test compares


def of_files(spec: ModelSpec, shape: Shape | UnknownShape) -> list[Problem]:
    """Return the problems that no GPU can solve."""
    if not isinstance(shape, UnknownShape):
        return list(_of_context(spec, shape))
    return (
        [] if shape.usable else [Problem(spec.name, f"cannot be loaded: {shape.why}", key="model")]
    )


def anywhere(spec: ModelSpec, shape: Shape | UnknownShape) -> list[Problem]:
    """Return the same, and a KV cache that is too small on any number of devices."""
    found = of_files(spec, shape)
    if found or isinstance(shape, UnknownShape) or spec.kv_cache is None:
        return found
    explicit = spec.tensor_parallel_size or spec.engine.get("tensor_parallel_size")
    most = explicit or (1 if spec.devices is not None else max(1, shape.kv_heads))
    if not _short_of_kv(spec, shape, int(spec.kv_cache), most):
        return []
    fewest = explicit or 1
    return _short_of_kv(spec, shape, int(spec.kv_cache), fewest)


def on_cpu(spec: ModelSpec, shape: Shape | UnknownShape, kv_cache: int) -> list[Problem]:
    """Return the problems of a model on the CPU with `kv_cache` bytes of KV cache."""
    found = of_files(spec, shape)
    if found or isinstance(shape, UnknownShape):
        return found
    tokens = memory_model.BLOCK_TOKENS if shape.latent_dim else _CPU_BLOCK_TOKENS
    spec = spec.model_copy(update={"engine": {"block_size": tokens} | spec.engine})
    return _short_of_kv(spec, shape, kv_cache, spec.parallel_sizes["tensor_parallel_size"])


def _short_of_kv(spec: ModelSpec, shape: Shape, kv_cache: int, tp: int) -> list[Problem]:
    settings = memory_model.Settings.of(spec, shape, tp, _CPU)
    least = memory_model.kv_bytes(shape, settings, spec.concurrency)
    fits = spec.engine.get("max_model_len") == _AUTO_CONTEXT or shape.approximate
    if fits or kv_cache >= least:
        return []
    text, _ = amount(least)
    message = short_of_kv(spec, kv_cache, settings.context, least)
    return [Problem(spec.name, message, f"kv_cache: {text}", "kv_cache")]


def short_of_kv(spec: ModelSpec, kv_cache: int, context: int, least: int) -> str:
    """Return the message of a KV cache that is smaller than the `least` bytes."""
    times = f"{spec.concurrency} x " if spec.concurrency > 1 else ""
    configured, needed = apart(kv_cache, least)
    return f"a KV cache of {configured} is too small; {times}{context:,} tokens need {needed}"


def flaws(spec: ModelSpec, shape: Shape | UnknownShape, box: Box) -> list[Problem]:
    """Return every problem that no placement can solve."""
    of_shape = (
        _unknown(spec, shape) if isinstance(shape, UnknownShape) else _of_shape(spec, shape, box)
    )
    return [*_of_devices(spec, box), *of_files(spec, shape), *of_shape]


def tensor_parallel_sizes(spec: ModelSpec, shape: Shape, box: Box) -> list[int]:
    """Return the explicit degree, else the powers of two that divide the heads."""
    explicit = spec.tensor_parallel_size or spec.engine.get("tensor_parallel_size")
    if explicit or spec.devices is not None:
        return [spec.parallel_sizes["tensor_parallel_size"]]
    others = math.prod(spec.parallel_sizes.values())
    tried = (2**power for power in range(11))
    return [tp for tp in tried if tp * others <= len(box) and divides(tp, shape)] or [1]


def divides(tensor_parallel_size: int, shape: Shape) -> bool:
    """Return whether this number of devices can share the model's heads.

    Source: vllm/config/model.py, verify_with_parallel_config.
    """
    heads, kv_heads = shape.heads, shape.kv_heads
    fits = kv_heads % tensor_parallel_size == 0 or tensor_parallel_size % kv_heads == 0
    return heads % tensor_parallel_size == 0 and (fits or not shape.attention_layers)


def groups(spec: ModelSpec, box: Box) -> list[tuple[Gpu, ...]]:
    """Return the explicit GPUs of each replica, as far as the box has them."""
    found = [find(box, device) for device in spec.devices or ()]
    size = math.prod(spec.parallel_sizes.values())
    there = [gpu for gpu in found if gpu is not None]
    return [tuple(there[at : at + size]) for at in range(0, len(there), size)]


def _of_devices(spec: ModelSpec, box: Box) -> Iterator[Problem]:
    needed = math.prod(spec.parallel_sizes.values())
    if needed > len(box):
        message = f"needs {needed} GPUs for each replica; this box has {len(box)} ({listed(box)})"
        yield Problem(spec.name, message, key=_parallel_key(spec))
        return
    missing = [device for device in spec.devices or () if find(box, device) is None]
    if missing:
        unknown = ", ".join(str(device) for device in missing)
        there = f"GPUs 0 to {len(box) - 1}" if len(box) > 1 else "GPU 0"
        message = f"GPU {unknown} does not exist; this box has {there} ({listed(box)})"
        yield Problem(spec.name, message, key="devices")
        return
    for group in groups(spec, box):
        kinds = {gpu.kind for gpu in group}
        if len(kinds) > 1:
            names = ", ".join(f"GPU {gpu.index} is {short_name(gpu.name)}" for gpu in group)
            message = f"the GPUs of a replica must be of one kind; {names}"
            yield Problem(spec.name, message, key="devices")


def _parallel_key(spec: ModelSpec) -> str:
    many = spec.pipeline_parallel_size > 1 and not spec.tensor_parallel_size
    return "pipeline_parallel_size" if many else "tensor_parallel_size"


def _of_shape(spec: ModelSpec, shape: Shape, box: Box) -> Iterator[Problem]:
    tp = spec.parallel_sizes["tensor_parallel_size"]
    if not divides(tp, shape):
        possible = [n for n in range(1, len(box) + 1) if divides(n, shape)]
        heads = f"{shape.heads} attention heads ({shape.kv_heads} key-value heads)"
        message = f"{tp} GPUs cannot share {heads}"
        remedy = "tensor_parallel_size: " + " or ".join(str(n) for n in possible)
        yield Problem(spec.name, message, remedy, "tensor_parallel_size")
    yield from _of_kinds(spec, shape, box)


def _of_context(spec: ModelSpec, shape: Shape) -> Iterator[Problem]:
    asked = spec.engine.get("max_model_len")
    if asked and asked > shape.context and not spec.engine.get("hf_overrides"):
        message = f"max_model_len {asked:,} exceeds the model's context of {shape.context:,} tokens"
        yield Problem(spec.name, message, key="engine")


def _of_kinds(spec: ModelSpec, shape: Shape, box: Box) -> Iterator[Problem]:
    """Return the formats that the GPUs of a model cannot compute."""
    chosen = [gpu for group in groups(spec, box) for gpu in group]
    capable = [gpu for gpu in chosen or box if gpu.capability is not None]
    if not capable:
        return
    weak = (min if chosen else max)(capable, key=lambda gpu: gpu.capability or (0, 0))
    major, minor = weak.capability or (0, 0)
    has = f"{short_name(weak.name)} has compute capability {major}.{minor}"
    quantization = spec.engine.get("quantization") or shape.quantization
    needs = QUANTIZATION_NEEDS.get(quantization or "", 0)
    if needs > major * 10 + minor:
        message = (
            f"{quantization} weights need compute capability {needs // 10}.{needs % 10}; {has}"
        )
        yield Problem(spec.name, message, "weights in another format, or a newer GPU", "engine")
    if spec.engine.get("dtype") == "bfloat16" and major * 10 + minor < _BFLOAT16_NEEDS:
        message = f"bfloat16 needs compute capability 8.0; {has}"
        yield Problem(spec.name, message, "dtype: float16", "engine")


def _unknown(spec: ModelSpec, shape: UnknownShape) -> Iterator[Problem]:
    """Return the problem of a model of unknown size without explicit devices and memory."""
    explicit = spec.devices is not None and (spec.memory or spec.gpu_memory_utilization)
    if shape.usable and not explicit:
        message = f"cannot be placed, its size is unknown: {shape.why}"
        # An explicit size does not help if the hub does not provide the model.
        remedy = "`devices` and `memory` of the model" if shape.reachable else None
        yield Problem(spec.name, message, remedy, "model")
