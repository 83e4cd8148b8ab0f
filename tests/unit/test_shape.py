from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import shapes
from llmserve.checkpoint import shape
from llmserve.errors import ModelUnusable, ShapeUnknown
from tests.fakes import spec
from tests.unit.test_files import write_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from llmserve.checkpoint.shape import Shape


def config(
    architecture: str,
    model_type: str,
    sizes: tuple[int, int, int, int],
    **others: Any,
) -> dict[str, Any]:
    """A config.json with the keys that shapes are read from.

    `sizes` are hidden_size, num_hidden_layers, num_attention_heads and num_key_value_heads.
    """
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    common = {"intermediate_size": 14336, "vocab_size": 32000, "tie_word_embeddings": False}
    named = {"architectures": [architecture], "model_type": model_type}
    return named | common | dict(zip(names, sizes, strict=True)) | others


BF16 = {"torch_dtype": "bfloat16"}
LLAMA3_ROPE = {"factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
LLAMA = config(
    "LlamaForCausalLM", "llama", (4096, 32, 32, 8),
    max_position_embeddings=131072, rope_scaling=LLAMA3_ROPE, vocab_size=128256, **BF16,
)  # fmt: skip
AWQ = {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm", "zero_point": True}
QWEN3 = config(
    "Qwen3ForCausalLM", "qwen3", (4096, 36, 32, 8),
    head_dim=128, max_position_embeddings=40960, rope_scaling=None, sliding_window=None,
    use_sliding_window=False, **BF16,
)  # fmt: skip
MISTRAL = config(
    "MistralForCausalLM", "mistral", (4096, 32, 32, 8),
    max_position_embeddings=32768, sliding_window=None, **BF16,
)  # fmt: skip
GEMMA3 = {  # the file leaves head_dim, vocab_size and the length to transformers
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "model_type": "gemma3_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    **BF16,
}
DEEPSEEK = config(
    "DeepseekV3ForCausalLM", "deepseek_v3", (7168, 61, 128, 128),
    kv_lora_rank=512, max_position_embeddings=163840, num_nextn_predict_layers=1,
    qk_nope_head_dim=128, qk_rope_head_dim=64, quantization_config={"quant_method": "fp8"},
    rope_scaling={"factor": 40, "type": "yarn"}, **BF16,
)  # fmt: skip
LLAMA4 = config(
    "Llama4ForCausalLM", "llama4_text", (5120, 48, 40, 8),
    attention_chunk_size=8192, head_dim=128, max_position_embeddings=10485760, **BF16,
)  # fmt: skip
GPT_OSS = config(
    "GptOssForCausalLM", "gpt_oss", (2880, 24, 64, 8),
    head_dim=64, layer_types=["sliding_attention", "full_attention"] * 12, sliding_window=128,
    max_position_embeddings=131072, rope_scaling={"factor": 32.0, "rope_type": "yarn"},
    quantization_config={"quant_method": "mxfp4"},
)  # fmt: skip
QWEN_VL = config(
    "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", (3584, 28, 28, 4),
    max_position_embeddings=128000, rope_scaling={"mrope_section": [16, 24, 24], "type": "mrope"},
    sliding_window=32768, use_sliding_window=False, vision_config={"hidden_size": 1280}, **BF16,
)  # fmt: skip
PHI3 = config(
    "Phi3ForCausalLM", "phi3", (3072, 32, 32, 32),
    max_position_embeddings=131072, original_max_position_embeddings=4096,
    rope_scaling={"long_factor": [1.0], "short_factor": [1.0], "type": "longrope"},
    sliding_window=262144, **BF16,
)  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
MINILM = config(
    "BertModel", "bert", (384, 6, 12, 12),
    max_position_embeddings=512, position_embedding_type="absolute",
)  # fmt: skip
BGE_M3 = config(
    "XLMRobertaModel", "xlm-roberta", (1024, 24, 16, 16),
    max_position_embeddings=8194, position_embedding_type="absolute", torch_dtype="float32",
)  # fmt: skip
HYBRID = QWEN3 | {"architectures": ["HybridForCausalLM"], "model_type": "hybrid"}


def write(folder: Path, config: dict[str, Any], **files: Any) -> Path:
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read(folder: Path, config: dict[str, Any], **engine: Any) -> Shape:
    """The shape of a config, with one small tensor where the folder holds no weights."""
    if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        write_tensors(folder / "model.safetensors", {"model.embed_tokens.weight": ("F32", (9, 4))})
    return shape.read(spec(model=str(write(folder, config)), engine=engine))


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        (LLAMA, (32, 32, 8, 128, 131072, None, False)),
        (QWEN3, (36, 32, 8, 128, 40960, None, False)),
        (MISTRAL, (32, 32, 8, 128, 32768, None, False)),
        (GEMMA3, (48, 16, 8, 256, 131072, None, True)),
        (DEEPSEEK, (61, 128, 128, 192, 163840, 576, False)),
        (LLAMA4, (48, 40, 8, 128, 10485760, None, True)),
        (GPT_OSS, (24, 64, 8, 64, 131072, None, True)),
        (QWEN_VL, (28, 28, 4, 128, 128000, None, False)),
        (PHI3, (32, 32, 32, 96, 4096, None, True)),
        (GPT2, (12, 12, 12, 64, 1024, None, False)),
        (MINILM, (0, 12, 12, 32, 512, None, False)),
        (BGE_M3, (0, 16, 16, 64, 8194, None, False)),
    ],
    ids=lambda value: value["architectures"][0] if isinstance(value, dict) else None,
)
def test_shape_has_the_facts_of_a_token(
    tmp_path: Path, config: dict[str, Any], facts: tuple[int | bool | None, ...]
) -> None:
    found = read(tmp_path, config)
    assert (
        found.attention_layers,
        found.heads,
        found.kv_heads,
        found.head_dim,
        found.context,
        found.latent_dim,
        found.approximate,
    ) == facts


@pytest.mark.parametrize(
    ("changed", "layers"),
    [
        ({"layer_types": ["linear_attention", "full_attention"] * 18}, 18),
        ({"layers_block_type": ["mamba"] * 30 + ["hybrid"] * 6}, 6),
        ({"attn_layer_indices": [3, 9]}, 2),
        ({"full_attention_interval": 4}, 9),
        ({"attn_layer_period": 8, "attn_layer_offset": 4}, 4),
        ({"attn_type_list": [0, 0, 1] * 12}, 12),
        ({"hybrid_override_pattern": "M-M*-" + "M" * 31}, 1),
        ({"linear_attn_config": {"full_attn_layers": [4, 8, 36]}}, 3),
    ],
)
def test_state_layers_have_no_kv_cache(
    tmp_path: Path, changed: dict[str, Any], layers: int
) -> None:
    found = read(tmp_path, HYBRID | changed)
    assert found.attention_layers == layers
    assert found.approximate


@pytest.mark.parametrize(
    ("changed", "encodes"),
    [
        ({}, False),
        ({"is_causal": False}, True),
        ({"architectures": ["Qwen3Model"]}, False),  # causal, and pools
        ({"architectures": ["LlamaBidirectionalModel"]}, True),
        ({"architectures": ["ModernBertModel"], "model_type": "modernbert"}, True),
        ({"architectures": ["BertLMHeadModel"], "model_type": "bert", "is_decoder": True}, False),
    ],
)
def test_encoder_has_no_kv_cache(tmp_path: Path, changed: dict[str, Any], encodes: bool) -> None:
    assert (read(tmp_path, QWEN3 | changed).attention_layers == 0) is encodes


@pytest.mark.parametrize(
    ("changed", "head_dim"),
    [
        ({"head_dim": None}, 128),
        ({"head_dim": 256, "global_head_dim": 512}, 512),  # the largest, for all
        ({"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "kv_lora_rank": None}, 96),
        ({"qk_nope_head_dim": 0, "kv_lora_rank": None}, 128),
    ],
)
def test_head_dim(tmp_path: Path, changed: dict[str, Any], head_dim: int) -> None:
    assert read(tmp_path, QWEN3 | changed).head_dim == head_dim


def test_layers_that_share_the_keys_of_others(tmp_path: Path) -> None:
    changed = {"layer_types": ["full_attention"] * 36, "num_kv_shared_layers": 10}
    assert read(tmp_path, QWEN3 | changed).attention_layers == 26


def test_the_indexer_of_sparse_attention_counts(tmp_path: Path) -> None:
    found = read(tmp_path, DEEPSEEK | {"index_head_dim": 128})
    assert (found.latent_dim, found.approximate) == (576 + 128, True)


def test_one_key_for_all_heads(tmp_path: Path) -> None:
    assert read(tmp_path, QWEN3 | {"multi_query": True}).kv_heads == 1


@pytest.mark.parametrize(
    ("config", "engine", "dtype"),
    [
        (LLAMA, {}, "bfloat16"),
        (LLAMA | {"torch_dtype": "float32"}, {}, "bfloat16"),
        (LLAMA | {"torch_dtype": "float16"}, {"dtype": "auto"}, "float16"),
        (LLAMA | {"torch_dtype": None, "dtype": "float16"}, {}, "float16"),
        (LLAMA, {"dtype": "float32"}, "float32"),
        (LLAMA, {"dtype": "half"}, "float16"),
        (LLAMA | {"torch_dtype": "float32"}, {"runner": "pooling"}, "float16"),
        (BGE_M3, {}, "float16"),
        (MINILM, {}, "float16"),
    ],
)
def test_the_dtype_that_weights_are_loaded_as(
    tmp_path: Path, config: dict[str, Any], engine: dict[str, Any], dtype: str
) -> None:
    found = read(tmp_path, config, **engine)
    assert found.dtype == dtype
    half = read(tmp_path, config, dtype="bfloat16").weights
    assert found.weights == half * (2 if dtype == "float32" else 1)


@pytest.mark.parametrize(
    ("changed", "context"),
    [
        ({"rope_scaling": {"factor": 4.0, "type": "linear"}}, 4 * 40960),
        ({"rope_scaling": {"factor": 4.0, "rope_type": "yarn"}}, 40960),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2}}}, 81920),
        ({"model_max_length": 50000}, 50000),
        ({"max_sequence_length": 1000}, 1000),
        ({"max_position_embeddings": None}, 2048),
    ],
)
def test_context(tmp_path: Path, changed: dict[str, Any], context: int) -> None:
    assert read(tmp_path, {**QWEN3, "model_type": "other", **changed}).context == context


def test_the_context_of_a_sentence_encoder(tmp_path: Path) -> None:
    write(tmp_path, MINILM, tokenizer_config={"model_max_length": 500})
    assert read(tmp_path, MINILM).context == 500
    write(tmp_path, MINILM, sentence_bert_config={"max_seq_length": 256})
    assert read(tmp_path, MINILM).context == 256


@pytest.mark.parametrize(
    ("changed", "method"),
    [
        ({}, None),
        ({"quantization_config": AWQ}, "awq"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": -1}}, "gptq"),
        (
            {
                "compression_config": {
                    "quant_method": "compressed_tensors",
                    "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
                    "ignore": ["lm_head", "re:.*layers.0.*"],
                }
            },
            "compressed-tensors",
        ),
        ({"quantization_config": {"quantization": {"quant_algo": "NVFP4"}}}, "modelopt_fp4"),
    ],
)
def test_the_quantization_of_the_stored_weights(
    tmp_path: Path, changed: dict[str, Any], method: str | None
) -> None:
    assert read(tmp_path, LLAMA | changed).quantization == method


def test_quantization_in_a_file_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, hf_quant_config={"quantization": {"quant_algo": "FP8"}})
    assert read(tmp_path, LLAMA).quantization == "modelopt"


def test_overrides_of_the_registry_hold(tmp_path: Path) -> None:
    overrides = {"text_config": {"num_hidden_layers": 2}}
    found = read(tmp_path, GEMMA3, hf_overrides=overrides)
    assert (found.layers, found.kv_heads) == (2, 8)


TINY = config(
    "LlamaForCausalLM", "llama", (8, 1, 2, 2),
    intermediate_size=16, tie_word_embeddings=True, vocab_size=100, **BF16,
)  # fmt: skip
TENSORS = {
    "model.embed_tokens.weight": ("BF16", (100, 8)),
    "lm_head.weight": ("BF16", (100, 8)),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", (8, 8)),
    "model.layers.0.mlp.experts.down_proj": ("F32", (4, 8, 16)),
    "model.layers.0.mlp.gate.weight": ("BF16", (4, 8)),
    "model.norm.weight": ("F32", (8,)),
}


def test_bytes_from_the_headers(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", TENSORS)
    found = read(tmp_path, TINY)  # float32 is loaded in the model's dtype, the tied head is not
    assert found.embeddings == 2 * 800
    assert found.linear == 2 * (64 + 512)
    assert found.weights == found.embeddings + found.linear + 2 * (32 + 8)
    assert read(tmp_path, TINY | {"tie_word_embeddings": False}).embeddings == 2 * 1600
    assert read(tmp_path, TINY, dtype="float32").weights == 2 * found.weights


def test_packed_weights_stay_as_they_are(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.qweight": ("I32", (8, 2)),
        "model.layers.0.mlp.up_proj.weight": ("F8_E4M3", (8, 8)),
        "model.layers.0.mlp.up_proj.weight_scale_inv": ("F32", (1, 1)),
    }
    write_tensors(tmp_path / "model.safetensors", tensors)
    assert read(tmp_path, TINY, dtype="float32").weights == 64 + 64 + 4
    assert read(tmp_path, TINY).weights == 64 + 64 + 4


def test_layers_that_only_predict_further_tokens_are_not_loaded(tmp_path: Path) -> None:
    more = {
        "model.layers.1.mlp.up_proj.weight": ("BF16", (8, 8)),
        "mtp.fc.weight": ("BF16", (8, 16)),
    }
    config = TINY | {"num_nextn_predict_layers": 1}
    write_tensors(tmp_path / "model.safetensors", TENSORS)
    found = read(tmp_path, config).weights
    write_tensors(tmp_path / "model.safetensors", TENSORS | more)
    assert read(tmp_path, config).weights == found


def test_the_speaking_parts_of_an_omni_model_are_not_loaded(tmp_path: Path) -> None:
    tensors = {f"thinker.{name}": entry for name, entry in TENSORS.items()}
    write_tensors(tmp_path / "model.safetensors", TENSORS)
    alone = read(tmp_path, TINY)
    write_tensors(tmp_path / "model.safetensors", tensors | {"talker.x.weight": ("BF16", (9, 9))})
    config = {"architectures": ["OmniModel"], "thinker_config": {"text_config": TINY}}
    found = read(tmp_path, config)
    assert (found.weights, found.embeddings, found.linear) == (
        alone.weights,
        alone.embeddings,
        alone.linear,
    )


def test_other_weights_by_the_size_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"w" * 40_000)
    (tmp_path / "training_args.bin").write_bytes(b"w" * 9_000)
    found = read(tmp_path, TINY | {"torch_dtype": "float32"})
    assert (found.weights, found.embeddings, found.linear) == (20_000, 1600, 18_400)
    assert read(tmp_path, TINY).weights == 40_000


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({k: v for k, v in QWEN3.items() if k != "vocab_size"}, "has no number vocab_size"),
        (QWEN3 | {"is_encoder_decoder": True}, "the KV cache of an encoder-decoder"),
        (QWEN3 | {"num_hidden_layers": "many"}, "has no number num_hidden_layers"),
    ],
)
def test_missing_value_is_named(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeUnknown, match=message) as refused:
        read(tmp_path, config | {"model_type": "other"})
    assert str(tmp_path) in refused.value.message
    assert refused.value.message.isprintable()


def test_size_of_a_folder_without_weights_is_unknown(tmp_path: Path) -> None:
    folder = str(write(tmp_path, QWEN3))
    with pytest.raises(ModelUnusable, match="has no weights: "):
        shape.read(spec(model=folder))
    for message in ("its safetensors files are needed", "lists model-1.safetensors"):
        with pytest.raises(ShapeUnknown, match=message) as unknown:
            shape.read(spec(model=folder, engine={"load_format": "dummy"}))
        assert not isinstance(unknown.value, ModelUnusable)
        index = {"weight_map": {"a": "model-1.safetensors"}}
        write(tmp_path, QWEN3, **{"model.safetensors.index": index})
        write_tensors(tmp_path / "model-2.safetensors", TENSORS)


def test_made_up_weights_of_a_benchmark_have_their_size(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write(source, LLAMA | {"tie_word_embeddings": True})
    made = shapes.make("llama-1b", source, tmp_path / "1b")
    found = shape.read(spec(model=str(made), engine={"load_format": "dummy"}))
    assert found.weights == 2 * 1_235_814_400  # parameters of Llama 3.2 1B
    assert found.embeddings == 2 * 128256 * 2048


def test_a_model_of_states_alone_is_not_taken_for_an_encoder(tmp_path: Path) -> None:
    config = {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "num_hidden_layers": 24,
        "hidden_size": 768,
        "vocab_size": 50280,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tensors(tmp_path / "model.safetensors", {"backbone.embeddings.weight": ("BF16", (8, 8))})
    with pytest.raises(ShapeUnknown, match="the state of a model without attention"):
        shape.read(spec(model=str(tmp_path)))
