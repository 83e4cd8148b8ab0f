"""What the plan takes for vLLM's own arithmetic, defaults and limits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.config import CacheConfig
from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.worker.utils import request_memory

from llmserve.engine.engine_arguments import engine_arguments
from llmserve.engine.environment import is_cpu_build
from llmserve.engine.startup_log import one_line
from llmserve.gpus.device import GIB, Gpu, described
from llmserve.planning import feasibility, memory_model
from llmserve.registry.spec import ModelSpec
from tests.contract.support import CHAT


def gpu(name: str, gib: float) -> Gpu:
    return Gpu(0, name, int(gib * GIB))


@pytest.mark.parametrize(
    "box0",
    [
        gpu("NVIDIA A100-SXM4-40GB", 40),
        gpu("NVIDIA H100 80GB HBM3", 80),
        gpu("NVIDIA A100-SXM4-80GB", 80),
        gpu("NVIDIA B200", 180),
        gpu("NVIDIA MINE", 70),
        gpu("NVIDIA MINE", 69.99),
        gpu("NVIDIA A100-SXM4-MINE", 160),
        gpu("NVIDIA MINE", 159.99),
        *described("H100,H200,B200,A100-80G,A100-40G,L40S,L4,RTX5090,T4"),
    ],
    ids=lambda each: f"{each.name}-{each.memory / GIB:.0f}",
)
def test_default_steps_are_those_of_vllm(box0: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = type(current_platform)
    monkeypatch.setattr(platform, "is_cpu", lambda _: False)
    monkeypatch.setattr(platform, "get_device_total_memory", lambda *_: box0.memory)
    monkeypatch.setattr(platform, "get_device_name", lambda *_: box0.name)
    tokens, seqs = EngineArgs.get_batch_defaults(world_size=4)
    server = UsageContext.OPENAI_API_SERVER
    assert memory_model.default_steps(box0) == (tokens[server], seqs[server])


def test_a_block_is_as_long_as_vllm_s() -> None:
    assert memory_model.BLOCK_TOKENS == CacheConfig.DEFAULT_BLOCK_SIZE == CacheConfig().block_size
    assert FlashAttentionBackend.supports_block_size(memory_model.BLOCK_TOKENS)


def test_vllm_keeps_one_block_empty() -> None:
    pool = BlockPool(10, enable_caching=False, hash_block_size=memory_model.BLOCK_TOKENS)
    assert pool.get_num_free_blocks() == 9


def test_quantization_needs_are_vllms() -> None:
    needs = {
        name: get_quantization_config(name).get_min_capability()
        for name in feasibility.QUANTIZATION_NEEDS
    }
    assert needs == feasibility.QUANTIZATION_NEEDS


def test_quantization_while_loading_is_called_what_vllm_calls_it() -> None:
    assert memory_model._ONLINE.keys() <= set(QUANTIZATION_METHODS)
    # It was a method before there were shorthands.
    assert memory_model._ONLINE.keys() - set(ONLINE_QUANT_SHORTHAND_NAMES) == {"fp8"}


def test_the_share_is_asked_of_the_free_memory_as_a_share_of_all() -> None:
    def free(gib: float) -> SimpleNamespace:
        return SimpleNamespace(total_memory=100 * GIB, free_memory=int(gib * GIB), device_="cuda:0")

    third = SimpleNamespace(gpu_memory_utilization=0.3)
    assert request_memory(free(30.1), third) == pytest.approx(30 * GIB, abs=1)
    with pytest.raises(ValueError, match="less than desired GPU memory utilization"):
        request_memory(free(29.9), third)


def test_startup_log_reads_vllms_kv_cache_error() -> None:
    check = kv_cache_utils._check_enough_kv_cache_memory
    with pytest.raises(ValueError, match="KV cache") as raised:
        check(GIB, lambda: 2 * GIB, 8192, lambda _: 4096)
    assert one_line("ValueError", str(raised.value)) == (
        "the KV cache of 1.0 GiB is too small: one request of 8,192 tokens needs 2.0 GiB; "
        "increase `kv_cache` or set engine: {max_model_len: 4096}"
    )
    with pytest.raises(ValueError, match="cache") as raised:
        check(0, lambda: GIB, 8192, lambda _: 0)
    assert one_line("ValueError", str(raised.value)).startswith("no memory for the KV cache")


@pytest.mark.skipif(not is_cpu_build(), reason="vLLM's build for CPUs sets it")
def test_blocks_of_a_kv_cache_on_a_cpu() -> None:
    spec = ModelSpec(name="chat", model=str(CHAT), engine={"max_model_len": 512})
    config = engine_arguments(spec).create_engine_config()
    assert config.cache_config.block_size == feasibility._CPU_BLOCK_TOKENS
