"""The arithmetic of an engine's memory, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from llmserve.gpus.device import GIB, described
from llmserve.planning import memory_model
from llmserve.planning.memory_model import Settings
from llmserve.registry.spec import ModelSpec
from tests.unit.shapes import LLAMA_8B, MINI_LM

if TYPE_CHECKING:
    from llmserve.checkpoint.shape import Shape

(H100,) = described("H100")


def settings(shape: Shape = LLAMA_8B, tp: int = 1, gpu: str = "H100", **engine: object) -> Settings:
    pp = engine.pop("pipeline_parallel_size", 1)
    spec = ModelSpec(name="m", model="m", pipeline_parallel_size=pp, engine=engine)
    return Settings.of(spec, shape, tp, described(gpu)[0])


def test_the_kv_cache_of_llama_8b_takes_128_kib_a_token() -> None:
    assert memory_model.kv_bytes_per_token(LLAMA_8B, settings()) == 2 * 32 * 8 * 128 * 2 == 131_072


@pytest.mark.parametrize(("tp", "share"), [(1, 1.0), (2, 0.5), (4, 0.25), (8, 0.125), (16, 0.125)])
def test_tensor_parallelism_shares_heads_and_cuts_none(tp: int, share: float) -> None:
    assert memory_model.kv_bytes_per_token(LLAMA_8B, settings(tp=tp)) == 131_072 * share


def test_pipeline_parallelism_shares_layers() -> None:
    halves = settings(pipeline_parallel_size=2)
    assert memory_model.kv_bytes_per_token(LLAMA_8B, halves) == 65_536
    thirds = settings(pipeline_parallel_size=3)
    assert memory_model.kv_bytes_per_token(LLAMA_8B, thirds) == 11 * 4096


def test_fp8_keys_and_values_take_half() -> None:
    eight = settings(kv_cache_dtype="fp8")
    assert memory_model.kv_bytes_per_token(LLAMA_8B, eight) == 65_536


def test_latent_attention_keeps_one_vector_on_every_device() -> None:
    latent = replace(LLAMA_8B, latent_dim=576, attention_layers=61)
    assert memory_model.kv_bytes_per_token(latent, settings(tp=8)) == 61 * 576 * 2


def test_tokens_and_bytes_agree() -> None:
    of = settings(max_model_len=8192)
    size = memory_model.kv_bytes(LLAMA_8B, of, requests=3)
    assert size == (3 * 8192 + 16) * 131_072
    assert memory_model.kv_tokens(LLAMA_8B, of, size) == 3 * 8192 + 16
    assert memory_model.kv_tokens(LLAMA_8B, of, size - 1) == 3 * 8192


def test_an_encoder_keeps_none() -> None:
    of = settings(MINI_LM)
    assert memory_model.kv_bytes(MINI_LM, of, 1) == memory_model.kv_tokens(MINI_LM, of, GIB) == 0


def test_weights_of_a_device() -> None:
    whole = memory_model.weights_bytes(LLAMA_8B, settings())
    assert whole == LLAMA_8B.weights
    assert memory_model.weights_bytes(LLAMA_8B, settings(tp=4)) == pytest.approx(
        whole / 4, rel=1e-6
    )
    halves = memory_model.weights_bytes(LLAMA_8B, settings(pipeline_parallel_size=2))
    assert halves == pytest.approx((whole - LLAMA_8B.embeddings) / 2 + LLAMA_8B.embeddings)


def test_online_quantization_halves_the_matrices_alone() -> None:
    eight = memory_model.weights_bytes(LLAMA_8B, settings(quantization="fp8"))
    assert eight == LLAMA_8B.weights - LLAMA_8B.linear // 2
    stored = replace(LLAMA_8B, quantization="fp8")
    of = settings(stored, quantization="fp8")
    assert memory_model.weights_bytes(stored, of) == LLAMA_8B.weights  # has been halved on disk


@pytest.mark.parametrize(
    ("gpu", "steps"),
    [("B200", (16384, 1024)), ("H100", (8192, 1024)), ("A100", (2048, 256)), ("L4", (2048, 256))],
)
def test_vllms_defaults_follow_the_gpu(gpu: str, steps: tuple[int, int]) -> None:
    of = settings(gpu=gpu)
    assert (of.batched_tokens, of.seqs) == steps


def test_the_entry_wins_over_defaults() -> None:
    of = settings(max_num_batched_tokens=512, max_num_seqs=8, max_model_len=1024, block_size=32)
    assert (of.batched_tokens, of.seqs, of.context, of.block_tokens) == (512, 8, 1024, 32)
    assert settings(max_model_len=-1).context == LLAMA_8B.context  # vLLM's `auto`


def test_the_allowance_grows_with_what_it_stands_for() -> None:
    usual = memory_model.overhead_bytes(LLAMA_8B, settings())
    assert GIB < usual < 4 * GIB
    assert memory_model.overhead_bytes(LLAMA_8B, settings(enforce_eager=True)) < usual
    assert memory_model.overhead_bytes(LLAMA_8B, settings(tp=2)) > usual - GIB // 2
    wide = settings(max_num_batched_tokens=65536)
    assert memory_model.overhead_bytes(LLAMA_8B, wide) > usual
    assert memory_model.overhead_bytes(MINI_LM, settings(MINI_LM)) < 1.5 * GIB
