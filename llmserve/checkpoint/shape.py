"""The properties of a model that determine its memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmserve.checkpoint import files as checkpoint
from llmserve.errors import ModelOutOfReach, ModelUnusable, ShapeUnknown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmserve.checkpoint.files import Checkpoint, ModelConfig, Tensor
    from llmserve.errors import LLMServeError
    from llmserve.registry.spec import ModelSpec


_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_OTHER_NAMES = {"float": "float32", "half": "float16"}
_STORED = {"BF16": "bfloat16", "F16": "float16"}

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens(_per_layer)?|wte|word_embeddings|tok_embeddings|embed_in|embeddings"
    r"|lm_head|embed_out|output_layer)\.(q?weight|weight_packed)$|^output\.weight$"
)
_NOT_LINEAR = re.compile(r"embed|norm|conv|router|rotary|\bwpe\b|\bgate\.|shared_expert_gate")
_HEAD = re.compile(r"(^|\.)lm_head\.")
_MTP = re.compile(r"^(model\.)?mtp(_layers)?\.")  # predicts further tokens; loaded as a draft only
_LAYER = re.compile(r"^(?:(?:model|language_model)\.)*layers\.(\d+)\.")

_GENERATES = ("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel")
_ENCODER = re.compile(
    r"bert|clip|siglip|mpnet|electra|bidirectional|embeddinggemma|^gte|^new(model|for)|bgem3|^jinaembeddingsv5",
    re.IGNORECASE,
)
_LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
    "max_target_positions", "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
_ROPE_IN_LENGTH = {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"}
_SENTENCE_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

_INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_KV_HEADS = (
    "n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups",
)  # fmt: skip
_DEPTH = ("num_hidden_layers", "n_layer", "num_layers")
# Keys of models with different layers, or with more than attention and an MLP.
_UNUSUAL = (
    "audio_config", "block_configs", "compress_ratios", "global_head_dim",
    "hidden_size_per_layer_input",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Counts and bytes of one model, before any parallelism.

    `weights` is the size in the model's own data type; `embeddings` (input and
    output) and `linear` (matrices that online quantization shrinks) are parts of it.
    """

    architecture: str  # "LlamaForCausalLM"
    weights: int  # bytes
    embeddings: int  # bytes
    linear: int  # bytes
    layers: int
    attention_layers: int  # with keys and values; 0: an encoder
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context: int  # tokens of prompt and answer together, at most
    dtype: str  # "bfloat16", as loaded
    quantization: str | None = None  # of the stored weights: "fp8", "awq", "gptq", ...
    latent_dim: int | None = None  # MLA: values per token and layer, stored on every device
    approximate: bool = False  # sliding windows, state-space layers: KV cache is an upper bound


@dataclass(frozen=True)
class UnknownShape:
    """Why a shape is unknown."""

    why: str
    usable: bool = True  # False: no engine can load the model's files
    reachable: bool = True  # False: no local copy, and the hub does not provide it

    @classmethod
    def of(cls, error: LLMServeError) -> UnknownShape:
        return cls(
            error.message,
            usable=not isinstance(error, ModelUnusable),
            reachable=not isinstance(error, ModelOutOfReach),
        )


def read(spec: ModelSpec, *, hub: bool = True) -> Shape:
    """Return the shape of a model in a folder or on the hub, without its weights.

    It comes from the headers of safetensors files, else from the size of the weight files. Blocks:
    milliseconds for a folder; HTTP requests for a model that is not in the cache, with `hub`.

    Raises ShapeUnknown with what is missing, in one line.
    """
    files = checkpoint.of(spec, hub=hub)
    checkpoint.raise_if_flawed(spec, files)
    config = files.config(spec.engine.get("hf_overrides"))
    if config.get("is_encoder_decoder"):
        raise ShapeUnknown(f"{config.where}: the KV cache of an encoder-decoder cannot be computed")
    model = _Model(config, files.json("hf_quant_config.json"))
    tensors = [tensor for tensor in files.tensors() if model.loads(tensor)]
    dtype = _dtype(spec, model, tensors)
    attention = [kind for kind in model.layer_kinds() if kind != "state"]
    if not attention and not model.encodes:
        raise ShapeUnknown(
            f"{config.where}: the state of a model without attention cannot be computed"
        )
    return Shape(
        architecture=model.architecture,
        **_bytes_of(files, model, tensors, dtype),
        layers=model.layers,
        attention_layers=0 if model.encodes else len(attention),
        hidden_size=model.hidden_size,
        intermediate_size=model.inner,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.text.number("vocab_size"),
        context=_context(files, model),
        dtype=dtype,
        quantization=model.quantization,
        latent_dim=model.latent_dim,
        approximate=not model.encodes and model.keeps_less,
    )


class _Model:
    """The values of config.json, with one name for keys of many names."""

    def __init__(self, config: ModelConfig, hf_quant_config: dict[str, Any]) -> None:
        self.config = config
        self.text = config.text
        self.quantized: dict[str, Any] = (
            config.get("quantization_config", "compression_config")
            or self.text.get("quantization_config", "compression_config")
            or hf_quant_config
        )

    @property
    def architecture(self) -> str:
        named = self.config.get("architectures") or self.text.get("architectures")
        return str(named[0]) if named else self.config.model_type

    @cached_property
    def layers(self) -> int:
        return self.text.number(*_DEPTH)

    @property
    def hidden_size(self) -> int:
        return self.text.number("hidden_size", "n_embd", "d_model")

    @property
    def inner(self) -> int:
        """Return the width of the MLP."""
        return self.text.get(*_INNER) or 4 * self.hidden_size

    @property
    def heads(self) -> int:
        if set(self.layer_kinds()) == {"state"}:
            return 0
        return self.text.number("num_attention_heads", "n_head", "n_heads")

    @property
    def kv_heads(self) -> int:
        if self.text.get("multi_query") and not self.text.get("new_decoder_architecture"):
            return 1
        return self.text.get(*_KV_HEADS) or self.heads

    @property
    def head_dim(self) -> int:
        if nope := self.text.get("qk_nope_head_dim"):
            return int(nope + self.text.number("qk_rope_head_dim"))
        explicit = self.text.get("head_dim", "hidden_size_per_head", "attention_head_dim")
        dim = explicit or (self.hidden_size // self.heads if self.heads else 0)
        return max(dim, self.text.get("global_head_dim") or 0)

    @property
    def latent_dim(self) -> int | None:
        rank = self.text.get("kv_lora_rank")
        if not rank or self.text.model_type == "minicpm3":  # vLLM runs it without MLA
            return None
        indexer = self.text.get("index_head_dim") or 0  # of DeepSeek V3.2
        return int(rank + self.text.number("qk_rope_head_dim") + indexer)

    @cached_property
    def tied(self) -> bool:
        """Return whether the output embedding is the input embedding."""
        for part in (self.text, self.config):
            if "tie_word_embeddings" in part.values:
                return bool(part.values["tie_word_embeddings"])
        return bool(self.text.get("tie_word_embeddings"))

    @property
    def encodes(self) -> bool:
        """Return whether each token attends to all others, so there is no KV cache."""
        text = self.text
        if text.get("is_causal") is False or text.get("use_bidirectional_attention") is True:
            return True
        if self.architecture.endswith(_GENERATES) or text.get("is_decoder"):
            return False
        return bool(_ENCODER.search(self.architecture) or _ENCODER.search(text.model_type))

    @property
    def quantization(self) -> str | None:
        """Return the format of quantized weights.

        Source: vllm/transformers_utils/model_arch_config_convertor.py.
        """
        method = self.quantized.get("quant_method")
        inner = self.quantized.get("quantization")
        if not method and isinstance(inner, dict):  # ModelOpt's own file
            fp4 = "FP4" in str(inner.get("quant_algo")).upper()
            method = "modelopt_fp4" if fp4 else "modelopt"
        return (
            str(method).lower().replace("compressed_tensors", "compressed-tensors")
            if method
            else None
        )

    def layer_kinds(self) -> list[str]:
        """Return for each layer "full" or "window" keys and values, or "state"."""
        depth, text = self.layers, self.text
        if listed := text.get("layer_types", "layers_block_type"):
            return [_kind(name) for name in listed][
                : depth - (text.get("num_kv_shared_layers") or 0)
            ]
        if pattern := text.get("hybrid_override_pattern"):  # Nemotron-H
            return ["full" if letter == "*" else "state" for letter in pattern]
        if (attention := self._attention_indices()) is not None:
            return ["full" if layer in attention else "state" for layer in range(depth)]
        if "mamba" in text.model_type or "rwkv" in text.model_type:
            return ["state"] * depth
        window = text.get("use_sliding_window") is not False and text.get("sliding_window")
        return ["window" if window or text.get("attention_chunk_size") else "full"] * depth

    def _attention_indices(self) -> Sequence[int] | None:
        """Return the attention layers of a model that also has state layers."""
        text, depth = self.text, range(self.layers)
        if listed := text.get("attn_layer_indices"):  # Bamba
            return list(listed)
        if every := text.get("full_attention_interval"):  # Qwen3-Next
            return depth[every - 1 :: every]
        if every := text.get("attn_layer_period"):  # Jamba
            return depth[text.get("attn_layer_offset") or 0 :: every]
        if listed := text.get("attn_type_list"):  # MiniMax
            return [layer for layer in depth if listed[layer] == 1]
        if linear := text.get("linear_attn_config"):  # Kimi, counted from 1
            return [layer - 1 for layer in linear["full_attn_layers"]]
        return None

    @property
    def keeps_less(self) -> bool:
        """Return whether the KV cache is smaller than full attention in all layers needs."""
        return (
            set(self.layer_kinds()) != {"full"}
            or any(self.text.get(key) for key in ("index_head_dim", *_UNUSUAL))
            or any(key.startswith("mamba_") for key in self.text.values)
        )

    def loads(self, tensor: Tensor) -> bool:
        """Return whether an engine loads a stored tensor."""
        if "thinker_config" in self.config.values and not tensor.name.startswith("thinker."):
            return False  # the speech parts of an omni model
        if _MTP.search(tensor.name) or (self.tied and _HEAD.search(tensor.name)):
            return False
        layer = _LAYER.search(tensor.name) if self._predicts_further else None
        return layer is None or int(layer[1]) < self.layers

    @cached_property
    def _predicts_further(self) -> bool:
        """Return whether layers that predict further tokens follow the others."""
        return bool(self.text.get("num_nextn_predict_layers"))


def _kind(name: str) -> str:
    if name == "hybrid" or ("attention" in name and "linear" not in name):
        return "window" if "sliding" in name or "chunked" in name else "full"
    return "state"


def _bytes_of(files: Checkpoint, model: _Model, stored: list[Tensor], dtype: str) -> dict[str, int]:
    """Return `weights`, `embeddings` and `linear` of a Shape."""
    width = _BYTES[dtype]
    if not files.weights:
        raise ShapeUnknown(f"{files.name} has no weights; its safetensors files are needed")
    if not stored:  # .bin, .pt: no headers
        size = sum(files.sizes[file] for file in files.weights)
        weights = size * width // _BYTES.get(_config_dtype(model) or "float32", 4)
        embeddings = model.text.number("vocab_size") * model.hidden_size * width
        embeddings *= 1 if model.tied or model.encodes else 2
        return {"weights": weights, "embeddings": embeddings, "linear": weights - embeddings}
    sizes = dict.fromkeys(("weights", "embeddings", "linear"), 0)
    for tensor in stored:
        size = tensor.loaded(width)
        sizes["weights"] += size
        if _EMBEDDING.search(tensor.name):
            sizes["embeddings"] += size
        elif len(tensor.shape) > 1 and not _NOT_LINEAR.search(tensor.name):
            sizes["linear"] += size
    return sizes


def _dtype(spec: ModelSpec, model: _Model, tensors: list[Tensor]) -> str:
    """Return the data type of loaded floating point weights.

    Source: vllm/config/model.py, _get_and_verify_dtype, for a GPU that supports bfloat16.
    """
    asked = str(spec.engine.get("dtype") or "auto").removeprefix("torch.")
    asked = _OTHER_NAMES.get(asked, asked)
    if asked in _BYTES:
        return asked
    floats = {tensor.dtype for tensor in tensors if tensor.dtype in ("F32", "F16", "BF16")}
    stored = _config_dtype(model) or (_STORED.get(floats.pop()) if len(floats) == 1 else None)
    if stored in ("bfloat16", "float16"):
        return stored
    runner, convert = spec.engine.get("runner"), spec.engine.get("convert")
    pools = runner == "pooling" or convert in ("embed", "classify")
    return "float16" if pools or not model.architecture.endswith(_GENERATES) else "bfloat16"


def _config_dtype(model: _Model) -> str | None:
    parts = (model.config, model.text, model.config.part("vision_config"))
    values = (part.get("dtype", "torch_dtype") for part in parts if part)
    dtype = next(filter(None, values), None)
    return str(dtype).removeprefix("torch.") if dtype else None


def _context(files: Checkpoint, model: _Model) -> int:
    """Return vLLM's default max_model_len.

    Source: vllm/config/model.py, _get_and_verify_max_len.
    """
    text = model.text
    lengths = [value for key in _LENGTHS if (value := text.get(key)) is not None]
    length = text.get("model_max_length") or min(lengths, default=None)
    if (
        not model.architecture.endswith(_GENERATES)
        and text.get("position_embedding_type") == "absolute"
    ):
        tokenizer = files.json("tokenizer_config.json").get("model_max_length")
        length = min((value for value in (length, tokenizer) if value), default=None)
    length = (length or 2048) * _rope_factor(text)
    for file in _SENTENCE_FILES:
        if longest := files.json(file).get("max_seq_length"):
            return int(longest)
    if any(rope.get("rope_type", rope.get("type")) in ("su", "longrope") for rope in _ropes(text)):
        length = text.get("original_max_position_embeddings") or length
    return int(length)


def _ropes(text: ModelConfig) -> list[dict[str, Any]]:
    """Return the rope parameters, of each kind of layer if they differ."""
    values = text.get("rope_scaling") or text.get("rope_parameters") or {}
    nested = [value for value in values.values() if isinstance(value, dict)]
    return nested or [values]


def _rope_factor(text: ModelConfig) -> float:
    if "gemma3" in text.model_type:  # its length is the scaled one
        return 1.0
    factors = [
        rope.get("factor") or 1.0
        for rope in _ropes(text)
        if rope.get("rope_type", rope.get("type")) not in _ROPE_IN_LENGTH
    ]
    return float(factors[-1]) if factors else 1.0
