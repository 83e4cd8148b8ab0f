"""What no placement can mend, of single entries on described boxes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llmserve.checkpoint.shape import UnknownShape
from llmserve.gpus.device import Gpu, described
from llmserve.planning import feasibility
from tests.fakes import spec
from tests.unit.shapes import LLAMA_8B, MINI_LM


def flaws_of(gpus: str, shape: Any = LLAMA_8B, **entry: Any) -> list[tuple[str, str]]:
    """The key and the message of every flaw."""
    found = feasibility.flaws(spec(**entry), shape, described(gpus))
    assert all(problem.model == "chat" for problem in found)
    return [(problem.key, problem.message) for problem in found]


def test_an_entry_without_a_flaw_has_none() -> None:
    assert flaws_of("8xH100") == []
    assert flaws_of("8xH100", tensor_parallel_size=4, replicas=2, devices=range(8)) == []


@pytest.mark.parametrize(
    ("tp", "divides"), [(1, True), (2, True), (3, False), (8, True), (16, True), (32, True)]
)
def test_devices_share_whole_heads(tp: int, divides: bool) -> None:
    """32 heads, 8 of keys: 16 devices have half a group's keys each, twice."""
    assert feasibility.divides(tp, LLAMA_8B) is divides


def test_heads_of_keys_are_shared_or_doubled() -> None:
    odd = replace(LLAMA_8B, heads=24, kv_heads=6)
    assert [n for n in range(1, 25) if feasibility.divides(n, odd)] == [1, 2, 3, 6, 12, 24]
    assert feasibility.divides(4, replace(odd, attention_layers=0))  # an encoder keeps no keys


@pytest.mark.parametrize(
    ("gpus", "entry", "sizes"),
    [
        ("8xH100", {}, [1, 2, 4, 8]),
        ("6xH100", {}, [1, 2, 4]),
        ("8xH100", {"pipeline_parallel_size": 2}, [1, 2, 4]),
        ("8xH100", {"tensor_parallel_size": 4}, [4]),
        ("8xH100", {"engine": {"tensor_parallel_size": 2}}, [2]),
        ("8xH100", {"devices": (0,)}, [1]),
        ("64xH100", {}, [1, 2, 4, 8, 16, 32]),  # no more devices than heads
    ],
)
def test_degrees_that_may_be_tried(gpus: str, entry: dict[str, Any], sizes: list[int]) -> None:
    box = described(gpus)
    assert feasibility.tensor_parallel_sizes(spec(**entry), LLAMA_8B, box) == sizes


def test_replicas_have_the_named_gpus_in_turn() -> None:
    box = described("4xH100")
    four = spec(devices=(3, 1, 0, 2), tensor_parallel_size=2, replicas=2)
    assert feasibility.groups(four, box) == [(box[3], box[1]), (box[0], box[2])]
    assert feasibility.groups(spec(), box) == []


def test_flaws_include_missing_gpus() -> None:
    assert flaws_of("2xH100", devices=(1, 2, 5), replicas=3) == [
        (
            "devices",
            "GPU 2, 5 does not exist; this box has GPUs 0 to 1 (2 x H100 80GB HBM3)",
        )
    ]
    assert flaws_of("L4", devices=("GPU-1",)) == [
        ("devices", "GPU GPU-1 does not exist; this box has GPU 0 (1 x L4)")
    ]


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"tensor_parallel_size": 4}, "tensor_parallel_size"),
        ({"pipeline_parallel_size": 4}, "pipeline_parallel_size"),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, "tensor_parallel_size"),
    ],
)
def test_more_gpus_than_there_are(entry: dict[str, Any], key: str) -> None:
    message = "needs 4 GPUs for each replica; this box has 2 (2 x L4)"
    assert flaws_of("2xL4", **entry) == [(key, message)]


@pytest.mark.parametrize("quantization", sorted(feasibility.QUANTIZATION_NEEDS))
def test_a_format_of_weights_needs_its_gpu(quantization: str) -> None:
    needs = feasibility.QUANTIZATION_NEEDS[quantization]
    stored = replace(LLAMA_8B, quantization=quantization)
    for capability in (needs - 1, needs):
        box = (Gpu(0, "NVIDIA X", 80 * 2**30, divmod(capability, 10)),)
        found = feasibility.flaws(spec(), stored, box)
        assert bool(found) is (capability < needs)
        online = feasibility.flaws(spec(engine={"quantization": quantization}), LLAMA_8B, box)
        assert bool(online) is (capability < needs)
    assert found == []


def test_flaws_name_the_gpu_without_a_format() -> None:
    (flaw,) = feasibility.flaws(spec(), replace(LLAMA_8B, quantization="mxfp4"), described("T4"))
    assert flaw.message == (
        "mxfp4 weights need compute capability 8.0; T4 has compute capability 7.5"
    )
    assert flaw.remedy == "weights in another format, or a newer GPU"


def test_flaws_of_mixed_box_follow_its_best_gpu() -> None:
    eight = replace(LLAMA_8B, quantization="mxfp4")
    assert flaws_of("T4,L4", eight) == []
    assert [key for key, _ in flaws_of("T4,L4", eight, devices=(0,))] == ["engine"]
    assert flaws_of("T4,L4", eight, devices=(1,)) == []


def test_of_an_unknown_gpu_nothing_is_claimed() -> None:
    assert flaws_of("MINE-80G", replace(LLAMA_8B, quantization="fp_quant")) == []
    assert flaws_of("MINE-80G", engine={"dtype": "bfloat16"}) == []


def test_flaws_include_too_long_context_without_overrides() -> None:
    assert flaws_of("H100", engine={"max_model_len": 8192}) == []
    assert flaws_of("H100", engine={"max_model_len": 8193}) == [
        ("engine", "max_model_len 8,193 exceeds the model's context of 8,192 tokens")
    ]
    stretched = {"max_model_len": 16384, "hf_overrides": {"rope_scaling": {}}}
    assert flaws_of("H100", engine=stretched) == []
    assert flaws_of("H100", engine={"max_model_len": -1}) == []  # vLLM's `auto`


@pytest.mark.parametrize(
    ("entry", "placed"),
    [
        ({}, False),
        ({"devices": (0,)}, False),
        ({"memory": "20GiB"}, False),
        ({"devices": (0,), "memory": "20GiB"}, True),
        ({"devices": (0,), "gpu_memory_utilization": 0.2}, True),
    ],
)
def test_flaws_of_unknown_shape_need_devices_and_memory(
    entry: dict[str, Any], placed: bool
) -> None:
    message = "cannot be placed, its size is unknown: it is odd"
    assert flaws_of("H100", UnknownShape("it is odd"), **entry) == (
        [] if placed else [("model", message)]
    )


EXPLICIT: dict[str, Any] = {"devices": (0,), "memory": "20GiB"}


def test_flaws_of_unreachable_hub_have_no_remedy() -> None:
    away = UnknownShape("the hub is away", reachable=False)
    (flaw,) = feasibility.flaws(spec(), away, described("H100"))
    assert flaw.message == "cannot be placed, its size is unknown: the hub is away"
    assert flaw.remedy is None
    assert flaws_of("H100", away, **EXPLICIT) == []  # it may be there again when the model starts


def test_flaws_include_unusable_files_despite_explicit_size() -> None:
    broken = UnknownShape("m: model.safetensors is truncated", usable=False)
    for entry in ({}, EXPLICIT):
        (flaw,) = feasibility.flaws(spec(**entry), broken, described("H100"))
        assert flaw.message == f"cannot be loaded: {broken.why}"
        assert (flaw.remedy, flaw.key) == (None, "model")


@pytest.mark.parametrize(
    ("entry", "short"),
    [
        ({"kv_cache": "1GiB"}, False),  # on eight devices each has an eighth
        ({"kv_cache": "100MiB"}, True),
        ({"kv_cache": "1GiB", "tensor_parallel_size": 1}, True),
        ({"kv_cache": "1GiB", "devices": (0,)}, True),
        ({"kv_cache": "1GiB", "devices": (0,), "engine": {"max_model_len": -1}}, False),
        ({"kv_cache": "1GiB", "devices": (0,), "engine": {"max_model_len": 4096}}, False),
        ({}, False),
    ],
)
def test_anywhere_finds_too_small_kv_cache(entry: dict[str, Any], short: bool) -> None:
    found = feasibility.anywhere(spec(**entry), LLAMA_8B)
    assert [problem.key for problem in found] == ["kv_cache"] * short
    assert all(problem.remedy == "kv_cache: 1.1GiB" for problem in found)  # on one device
    if entry.get("devices") and short:
        assert found[0].message == (
            "a KV cache of 1.000 GiB is too small; 8,192 tokens need 1.002 GiB"
        )
        assert found[0].remedy == "kv_cache: 1.1GiB"


def test_on_a_cpu_blocks_of_a_kv_cache_are_larger() -> None:
    entry = spec(engine={"max_model_len": 16})
    per_token = 131_072  # bytes
    assert feasibility.on_cpu(entry, LLAMA_8B, 256 * per_token) == []  # one block, and vLLM's own
    (short,) = feasibility.on_cpu(entry, LLAMA_8B, 256 * per_token - 1)
    assert short.key == "kv_cache"
    sixteen = spec(engine={"max_model_len": 16, "block_size": 16})
    assert feasibility.on_cpu(sixteen, LLAMA_8B, 32 * per_token) == []


def test_all_flaws_come_at_once() -> None:
    keys = [key for key, _ in flaws_of("T4", tensor_parallel_size=3, engine={"dtype": "bfloat16"})]
    assert keys == ["tensor_parallel_size", "tensor_parallel_size", "engine"]


def test_an_encoder_is_shared_out_by_its_heads() -> None:
    assert feasibility.divides(4, MINI_LM)
    assert not feasibility.divides(8, MINI_LM)
