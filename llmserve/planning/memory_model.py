"""The GPU memory of an engine, by arithmetic. Pure.

Weights and KV cache are as exact as the model's `Shape`. The overhead is an estimate until a start
is measured (`llmserve.planning.measurements`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmserve.gpus.device import GIB

if TYPE_CHECKING:
    from llmserve.checkpoint.shape import Shape
    from llmserve.gpus.device import Gpu
    from llmserve.registry.spec import ModelSpec

BLOCK_TOKENS = 16  # of a KV cache, unless `block_size` is set
_MIB = 2**20
_CONTEXT = 0.95 * GIB  # CUDA context, kernels, workspaces; H100s with vLLM 0.32 measured
_COMMUNICATION = 0.9 * GIB  # NCCL and all-reduce buffers of a group
_GRAPHS_PER_LAYER = 14 * _MIB
_SAMPLER_BYTES = 12  # a logit: as float32, and twice while it is sorted
_DTYPE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
# Bits of a matrix's weight after vLLM's quantization at load time. Formats for experts only are
# planned as they are stored.
_ONLINE = {
    "fp8": 8,
    "fp8_per_tensor": 8,
    "fp8_per_block": 8,
    "fp8_per_channel": 8,
    "mxfp8": 8.25,
}


@dataclass(frozen=True)
class Settings:
    """The engine settings that determine memory."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    context: int  # max_model_len, tokens
    batched_tokens: int  # of a step, at most
    seqs: int  # of a step, at most
    kv_value_bytes: int  # of one key or value
    block_tokens: int
    eager: bool  # no CUDA graphs
    quantization: str | None  # of weights that are stored unquantized

    @classmethod
    def of(cls, spec: ModelSpec, shape: Shape, tensor_parallel_size: int, box0: Gpu) -> Settings:
        """Return the settings; vLLM derives defaults from `box0`, the first visible GPU."""
        engine = spec.engine
        context = _context(engine.get("max_model_len"), shape)
        tokens, seqs = default_steps(box0)
        return cls(
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=spec.parallel_sizes["pipeline_parallel_size"],
            context=context,
            batched_tokens=engine.get("max_num_batched_tokens")
            or max(tokens, _single_step_tokens(shape, context)),
            seqs=engine.get("max_num_seqs") or seqs,
            kv_value_bytes=_kv_value_bytes(engine, shape),
            block_tokens=engine.get("block_size") or BLOCK_TOKENS,
            eager=bool(engine.get("enforce_eager")),
            quantization=None if shape.quantization else engine.get("quantization"),
        )


def default_steps(box0: Gpu) -> tuple[int, int]:
    """Return vLLM's max_num_batched_tokens and max_num_seqs for a server on a GPU.

    Source: vllm/engine/arg_utils.py, get_batch_defaults.
    """
    if box0.memory >= 160 * GIB:
        return 16384, 1024
    if box0.memory >= 70 * GIB and "a100" not in box0.name.lower():
        return 8192, 1024
    return 2048, 256


def weights_bytes(shape: Shape, settings: Settings) -> int:
    """Return the bytes of weights on each device.

    Tensor parallelism cuts every matrix, also embeddings. Pipeline parallelism distributes the
    layers; its first and last stage have an embedding each.
    """
    tp, pp = settings.tensor_parallel_size, settings.pipeline_parallel_size
    bits = _ONLINE.get(settings.quantization or "")
    linear = shape.linear if bits is None else shape.linear * bits / (8 * dtype_bytes(shape.dtype))
    layers = shape.weights - shape.embeddings - shape.linear + linear
    share = math.ceil(shape.layers / pp) / shape.layers if shape.layers else 1.0
    return math.ceil((layers * share + shape.embeddings) / tp)


def kv_bytes_per_token(shape: Shape, settings: Settings) -> int:
    """Return the bytes of KV cache per token on each device.

    2 (key, value) x layers x kv_heads x head_dim x bytes (Kwon et al. 2023,
    arXiv:2309.06180), with the heads and layers of one device; a head is not cut.
    Latent attention (MLA) keeps one vector a layer on every device (arXiv:2405.04434).
    0 for an encoder.
    """
    tp, pp = settings.tensor_parallel_size, settings.pipeline_parallel_size
    layers = math.ceil(shape.attention_layers / pp)
    if shape.latent_dim is not None:
        return layers * shape.latent_dim * settings.kv_value_bytes
    heads = max(1, math.ceil(shape.kv_heads / tp))
    return 2 * layers * heads * shape.head_dim * settings.kv_value_bytes


def kv_bytes(shape: Shape, settings: Settings, requests: int) -> int:
    """Return the bytes on each device for a number of requests of full length, in blocks.

    vLLM keeps one more block, which is empty.
    """
    blocks = requests * math.ceil(settings.context / settings.block_tokens) + 1
    return blocks * settings.block_tokens * kv_bytes_per_token(shape, settings)


def kv_tokens(shape: Shape, settings: Settings, size: int) -> int:
    """Return the tokens that `size` bytes of KV cache on each device hold; 0 for an encoder."""
    block = settings.block_tokens * kv_bytes_per_token(shape, settings)
    return size // block * settings.block_tokens if block else 0


def overhead_bytes(shape: Shape, settings: Settings) -> int:
    """Return an estimate of the overhead on each device in bytes."""
    tp, pp = settings.tensor_parallel_size, settings.pipeline_parallel_size
    wide = 4 * shape.hidden_size + 3 * shape.intermediate_size / tp
    activations = settings.batched_tokens * wide * dtype_bytes(shape.dtype)
    logits = 0
    if shape.attention_layers:  # a decoder
        logits = settings.seqs * shape.vocab_size * _SAMPLER_BYTES
    graphs = 0 if settings.eager else _GRAPHS_PER_LAYER * math.ceil(shape.layers / pp)
    communication = _COMMUNICATION if tp * pp > 1 else 0
    return int(_CONTEXT + communication + graphs + max(activations, logits))


def dtype_bytes(dtype: str) -> int:
    return _DTYPE_BYTES.get(dtype.removeprefix("torch."), 2)


def _context(asked: Any, shape: Shape) -> int:
    """Return the context in tokens; vLLM's `auto` (-1) counts as the model's own."""
    return int(asked) if asked and int(asked) > 0 else shape.context


def _single_step_tokens(shape: Shape, context: int) -> int:
    """Return the tokens of a step: an encoder reads a text in one."""
    return 0 if shape.attention_layers else context


def _kv_value_bytes(engine: dict[str, Any], shape: Shape) -> int:
    asked = str(engine.get("kv_cache_dtype") or "auto")
    if asked.startswith("fp8"):
        return 1
    return dtype_bytes(shape.dtype if asked == "auto" else asked)
