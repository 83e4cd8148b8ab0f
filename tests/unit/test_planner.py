"""Plans of described boxes: who lies where, what fits, what would."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.checkpoint.shape import UnknownShape
from llmserve.gpus.device import GIB, described
from llmserve.planning.placement import capacity
from llmserve.planning.planner import Planner
from llmserve.registry.spec import ModelSpec
from tests.unit.effort import calls
from tests.unit.shapes import LLAMA_8B, LLAMA_70B, MINI_LM

if TYPE_CHECKING:
    from llmserve.checkpoint.shape import Shape
    from llmserve.planning.plan import Plan, Problem

SHAPES = {"8b": LLAMA_8B, "70b": LLAMA_70B, "bert": MINI_LM}


def planned(
    gpus: str, models: dict[str, dict[str, Any]], overheads: dict[str, int] | None = None
) -> Plan:
    """The plan of entries whose `model` is one of SHAPES, or anything else: not known."""
    specs = [ModelSpec.model_validate({"name": name} | entry) for name, entry in models.items()]
    shapes: dict[str, Shape | UnknownShape] = {
        spec.name: SHAPES.get(spec.model, UnknownShape("it is an odd one")) for spec in specs
    }
    return Planner(described(gpus), 0.08, shapes, (overheads or {}).get).plan(specs)


def problem(gpus: str, **entry: Any) -> Problem:
    """The one problem of a model that is alone in the registry."""
    (found,) = planned(gpus, {"m": {"model": "8b"} | entry}).problems
    return found


def balance(plan: Plan) -> float:
    uses = [plan.used(gpu.index) / gpu.memory for gpu in plan.box]
    return max(uses) / min(uses)


# --- what fits


def test_one_model_gets_a_gpu_up_to_the_headroom() -> None:
    plan = planned("H100", {"chat": {"model": "8b"}})
    (replica,) = plan.replicas
    assert not plan.problems
    assert replica.devices == (0,)
    assert plan.used(0) == pytest.approx(0.92 * plan.box[0].memory, rel=1e-3)
    assert replica.tokens > 6 * replica.context
    assert not replica.measured


def test_two_models_share_what_is_left_by_what_a_request_takes() -> None:
    plan = planned("H100", {"a": {"model": "8b"}, "b": {"model": "8b", "concurrency": 3}})
    a, b = plan.replicas
    assert b.kv == pytest.approx(3 * a.kv, rel=0.01)
    assert plan.used(0) == pytest.approx(0.92 * plan.box[0].memory, rel=1e-3)


def test_a_share_is_that_of_the_gpu_with_everything_in_it() -> None:
    plan = planned(
        "H100",
        {
            "a": {"model": "8b", "devices": [0], "gpu_memory_utilization": 0.3},
            "b": {"model": "8b", "devices": [0], "gpu_memory_utilization": 0.5},
        },
    )
    a, b = plan.replicas
    total = plan.box[0].memory
    assert a.bytes == pytest.approx(0.3 * total, abs=2)
    assert b.bytes == pytest.approx(0.5 * total, abs=2)
    assert b.kv - a.kv == pytest.approx(0.2 * total, abs=2)


def test_an_amount_is_all_in_and_a_kv_cache_is_exact() -> None:
    plan = planned(
        "2xH100",
        {"a": {"model": "8b", "memory": "30GiB"}, "b": {"model": "8b", "kv_cache": "12GiB"}},
    )
    a, b = plan.replicas
    assert a.bytes == 30 * GIB
    assert b.kv == 12 * GIB
    assert a.devices != b.devices


def test_a_model_too_large_for_one_gpu_gets_as_few_as_hold_it() -> None:
    plan = planned("8xH100", {"large": {"model": "70b"}, "small": {"model": "8b"}})
    large, small = plan.replicas
    assert large.tensor_parallel_size == len(large.devices) == 2
    assert small.tensor_parallel_size == 1
    assert not set(large.devices) & set(small.devices)


def test_replicas_go_to_gpus_of_their_own() -> None:
    plan = planned("4xH100", {"m": {"model": "8b", "replicas": 4}})
    assert [replica.devices for replica in plan.replicas] == [(0,), (1,), (2,), (3,)]
    assert [replica.name for replica in plan.replicas] == ["m/0", "m/1", "m/2", "m/3"]


def test_named_devices_are_the_replicas_in_turn() -> None:
    entry = {"model": "8b", "replicas": 2, "tensor_parallel_size": 2, "devices": [3, 1, 0, 2]}
    plan = planned("4xH100", {"m": entry})
    assert [replica.devices for replica in plan.replicas] == [(3, 1), (0, 2)]


def test_five_models_on_two_gpus_are_balanced() -> None:
    models = {f"m{n}": {"model": "8b", "memory": f"{14 + 3 * n}GiB"} for n in range(2, 6)}
    plan = planned("2xH100", models | {"bert": {"model": "bert"}})
    assert not plan.problems
    assert balance(plan) <= 1.10


def test_what_was_measured_is_planned_with() -> None:
    first = planned("H100", {"m": {"model": "8b", "memory": "40GiB"}}).replicas[0]
    again = planned(
        "H100", {"m": {"model": "8b", "memory": "40GiB"}}, {first.fingerprint: 3 * GIB}
    ).replicas[0]
    assert again.measured
    assert again.overhead == 3 * GIB
    assert again.bytes == first.bytes == 40 * GIB


def test_plan_fingerprint_ignores_the_kv_cache_size() -> None:
    def mark(**entry: Any) -> str:
        return planned("H100", {"m": {"model": "8b"} | entry}).replicas[0].fingerprint

    assert mark() == mark(memory="40GiB") == mark(kv_cache="20GiB", aliases=["x"])
    others = {
        mark(engine={"max_num_seqs": 7}),
        mark(engine={"enforce_eager": True}),
        mark(engine={"max_model_len": 4096}),
        mark(engine={"quantization": "fp8"}),
    }
    assert len(others | {mark()}) == 5


def test_plan_spec_of_a_replica_is_explicit() -> None:
    plan = planned("2xH100", {"m": {"model": "8b", "gpu_memory_utilization": 0.5, "replicas": 2}})
    spec = ModelSpec(name="m", model="8b", gpu_memory_utilization=0.5, replicas=2)
    explicit = plan.spec_of(spec, plan.replicas[1])
    assert explicit.devices == (1,)
    assert explicit.kv_cache == plan.replicas[1].kv
    assert explicit.memory is None
    # vLLM compares this with the free memory: no more than what surely is taken.
    assert explicit.gpu_memory_utilization is not None
    assert explicit.gpu_memory_utilization <= plan.replicas[1].bytes / plan.box[1].memory


def test_a_model_of_which_nothing_is_known_gets_its_share_alone() -> None:
    entry = {"model": "odd", "devices": [0], "gpu_memory_utilization": 0.4}
    plan = planned("H100", {"odd": entry, "m": {"model": "8b"}})
    odd, m = plan.replicas
    assert not plan.problems
    assert (odd.known, odd.bytes) == (False, int(0.4 * plan.box[0].memory))
    assert m.bytes == pytest.approx(0.52 * plan.box[0].memory, rel=1e-3)
    explicit = plan.spec_of(ModelSpec.model_validate({"name": "odd"} | entry), plan.replicas[0])
    assert explicit.kv_cache is None  # vLLM measures
    assert explicit.gpu_memory_utilization == pytest.approx(0.4)


# --- what does not, and what would


@pytest.mark.parametrize(
    ("gpus", "entry", "message", "remedy", "key"),
    [
        (
            "4xH100",
            {"devices": [5]},
            "GPU 5 does not exist; this box has GPUs 0 to 3",
            "devices: [0]",
            "devices",
        ),
        (
            "4xH100",
            {"tensor_parallel_size": 8},
            "needs 8 GPUs for each replica; this box has 4 (4 x H100 80GB HBM3)",
            "tensor_parallel_size: 1",
            "tensor_parallel_size",
        ),
        (
            "4xH100",
            {"tensor_parallel_size": 3},
            "3 GPUs cannot share 32 attention heads",
            "tensor_parallel_size: 1 or 2 or 4",
            "tensor_parallel_size",
        ),
        (
            "H100,L40S",
            {"devices": [0, 1], "tensor_parallel_size": 2},
            "the GPUs of a replica must be of one kind; GPU 0 is H100 80GB HBM3, GPU 1 is L40S",
            "tensor_parallel_size: 1, devices: [0]",
            "devices",
        ),
        (
            "H100",
            {"devices": [0], "gpu_memory_utilization": 0.1},
            "8.0 GiB of 79.6 GiB is too small; each GPU needs",
            "gpu_memory_utilization: 0.24",
            "gpu_memory_utilization",
        ),
        (
            "H100",
            {"memory": "16GiB"},
            "16.0 GiB of 79.6 GiB is too small; each GPU needs",
            "memory: 18.9GiB",
            "memory",
        ),
        (
            "H100",
            {"kv_cache": "512MiB"},
            "a KV cache of 0.5 GiB is too small; 8,192 tokens need 1.0 GiB",
            "kv_cache: 1.1GiB",
            "kv_cache",
        ),
        (
            "2xH100",
            {"model": "70b", "tensor_parallel_size": 1},
            "needs 1",
            "tensor_parallel_size: 2",
            "",
        ),
        (
            "L4",
            {"concurrency": 40},
            "KV cache of 40 x 8,192 tokens 40.0 GiB",
            "concurrency: 1",
            "",
        ),
        (
            "T4",
            {"engine": {"dtype": "bfloat16"}, "devices": [0]},
            "bfloat16 needs compute capability 8.0; T4 has compute capability 7.5",
            "dtype: float16",
            "engine",
        ),
        (
            "H100",
            {"engine": {"max_model_len": 100_000}},
            "max_model_len 100,000 exceeds the model's context of 8,192 tokens",
            "engine: {max_model_len: 8192}",
            "engine",
        ),
        (
            "L4",
            {"engine": {"max_model_len": 100_000}, "kv_cache": "600MiB"},
            "max_model_len 100,000 exceeds the model's context of 8,192 tokens",
            "engine: {max_model_len: 4096}",  # a whole context has no room
            "engine",
        ),
        ("RTX4090", {"model": "70b"}, "needs 1", None, ""),
        (
            "H100",
            {"model": "elsewhere"},
            "its size is unknown: it is an odd one",
            "`devices` and `memory` of the model",
            "model",
        ),
    ],
)
def test_plan_problem_has_message_remedy_and_key(
    gpus: str, entry: dict[str, Any], message: str, remedy: str | None, key: str
) -> None:
    found = problem(gpus, **entry)
    assert message in found.message
    assert found.remedy == remedy
    assert found.key == key


def test_a_remedy_fits_once_it_is_taken() -> None:
    found = problem("RTX3090", engine={"max_model_len": 8192}, concurrency=1, kv_cache="8GiB")
    assert found.remedy == "kv_cache: 1.1GiB"
    assert not planned("RTX3090", {"m": {"model": "8b", "kv_cache": "1.1GiB"}}).problems


def test_plan_with_too_large_shares_reports_free_memory() -> None:
    plan = planned(
        "H100",
        {
            "a": {"model": "8b", "devices": [0], "gpu_memory_utilization": 0.6},
            "b": {"model": "8b", "devices": [0], "gpu_memory_utilization": 0.6},
        },
    )
    (found,) = plan.problems
    assert found.model == "b"
    assert "is configured for 47.8 GiB; free on 1 x H100 80GB HBM3: GPU 0 31.9 GiB" in found.message
    assert found.remedy == "gpu_memory_utilization: 0.24"
    assert [replica.model for replica in plan.replicas] == ["a"]


def test_eight_bit_weights_are_offered_where_nothing_milder_fits() -> None:
    found = problem("A10-18G", engine={"max_model_len": 2048})
    assert found.remedy == "engine: {quantization: fp8}"


def test_removing_another_model_comes_last() -> None:
    entry = {"model": "8b", "memory": "20GiB", "pinned": True}
    (found,) = planned("RTX4090", {"a": entry, "b": entry}).problems
    assert found.remedy == "removing a"
    late = {"model": "8b", "memory": "20GiB", "start": "lazy"}
    (found,) = planned("RTX4090", {"a": entry, "b": late}).problems
    assert found.remedy == "removing a"
    assert "server.gpu_headroom, with the other models asleep: GPU 0 2.1 GiB" in found.message


def test_plan_suggests_sleep_before_removal() -> None:
    entry = {"model": "8b", "memory": "30GiB"}
    models: dict[str, dict[str, Any]] = {"a": entry, "b": entry, "c": entry | {"memory": "20GiB"}}
    (found,) = planned("H100", models).problems
    assert (found.model, found.remedy) == ("c", "start: sleeping")
    models["c"]["pinned"] = True
    (found,) = planned("H100", models).problems
    assert (found.model, found.remedy) == ("c", "start: sleeping for a")
    models["a"] = models["a"] | {"start": "sleeping"}
    assert not planned("H100", models).problems


def test_twelve_models_on_eight_gpus_take_no_time() -> None:
    models: dict[str, dict[str, Any]] = {
        "large": {"model": "70b"},
        "pair": {"model": "8b", "replicas": 2},
        **{f"m{n}": {"model": "8b", "concurrency": n} for n in range(1, 6)},
        **{f"e{n}": {"model": "bert"} for n in range(4)},
        "huge": {"model": "70b", "tensor_parallel_size": 1, "replicas": 9},
    }
    plan, effort = calls(lambda: planned("8xH100", models))
    assert effort < 1_200_000
    assert [found.model for found in plan.problems] == ["huge"]
    assert len(plan.replicas) == 12
    for gpu in plan.box:
        assert plan.used(gpu.index) <= gpu.memory


def test_a_share_of_a_small_gpu_is_never_less_than_nothing() -> None:
    plan = planned("L4", {"m": {"model": "8b", "gpu_memory_utilization": 0.5}})
    assert not plan.replicas
    assert plan.problems[0].key == "gpu_memory_utilization"
    mixed = planned("H100,2xL4", {"m": {"model": "8b", "gpu_memory_utilization": 0.25}})
    assert all(replica.kv > 0 and replica.tokens > replica.context for replica in mixed.replicas)
    assert mixed.replicas or mixed.problems


def test_plan_suggests_devices_in_registry_syntax() -> None:
    found = problem("2xL40S", model="70b", devices=[0], engine={"quantization": "fp8"})
    assert found.remedy == "tensor_parallel_size: 2, devices: [0, 1]"


def test_plan_of_unknown_size_with_kv_cache_uses_memory_key() -> None:
    entry = {"model": "odd", "devices": [0], "memory": "20GiB", "kv_cache": "8GiB"}
    plan = planned("H100", {"odd": entry})
    assert plan.used(0) == 20 * GIB
    explicit = plan.spec_of(ModelSpec.model_validate({"name": "odd"} | entry), plan.replicas[0])
    assert explicit.kv_cache == 8 * GIB
    assert explicit.gpu_memory_utilization == pytest.approx(20 / 79.65, rel=1e-2)


def test_planning_is_deterministic() -> None:
    models: dict[str, dict[str, Any]] = {
        f"m{n}": {"model": "8b", "concurrency": 1 + n % 3} for n in range(9)
    }
    assert planned("4xH100", models) == planned("4xH100", models)


def test_pipeline_stages_take_a_gpu_each() -> None:
    plan = planned("4xL4", {"m": {"model": "8b", "pipeline_parallel_size": 4}})
    (replica,) = plan.replicas
    assert len(replica.devices) == 4
    assert replica.weights < LLAMA_8B.weights / 2


def test_plan_checks_known_quantizations_only() -> None:
    SHAPES["awq"] = replace(LLAMA_8B, quantization="awq", weights=5_700_000_000)
    found = planned("V100-32G", {"m": {"model": "awq"}}).problems
    assert "awq weights need compute capability 7.5; V100-SXM2-32GB has" in found[0].message
    assert not planned("T4", {"m": {"model": "awq", "engine": {"max_model_len": 4096}}}).problems
    assert math.isclose(
        planned("MINE-80G", {"m": {"model": "awq"}}).used(0), 0.92 * 80 * GIB, rel_tol=0.01
    )


def test_plan_with_explicit_kv_cache_fits_one_request() -> None:
    SHAPES["long"] = replace(LLAMA_8B, context=131_072)
    (replica,) = planned("4xH100", {"m": {"model": "long", "kv_cache": "5GiB"}}).replicas
    assert replica.tokens >= replica.context
    assert replica.tensor_parallel_size == 4


def test_a_share_above_the_headroom_is_offered_all_below_it() -> None:
    found = problem("H100", gpu_memory_utilization=0.95)
    assert (
        "is configured for 75.7 GiB; free on 1 x H100 80GB HBM3 without the 8% of server.gpu_headroom"
        in found.message
    )
    assert found.remedy == "gpu_memory_utilization: 0.92"


# --- on demand

LATE: dict[str, Any] = {"model": "8b", "start": "lazy"}


def test_on_demand_beside_others_all_stay_together() -> None:
    plan = planned("H100", {"chat": {"model": "8b"}, "late": LATE})
    chat, late = plan.replicas
    assert (late.on_demand, late.displaces, late.resident) == (True, False, late.bytes)
    assert late.kv == pytest.approx(chat.kv, abs=2)
    assert plan.used(0) == pytest.approx(0.92 * plan.box[0].memory, rel=1e-3)


def test_plan_on_demand_displaces_where_not_all_fit() -> None:
    models = {"chat": {"model": "8b"}, "late": LATE, "last": {"model": "8b", "start": "sleeping"}}
    plan = planned("A6000", models)  # 44.2 GiB; each needs 18.8
    chat, late, last = plan.replicas
    assert not plan.problems
    assert (chat.displaces, late.displaces, last.displaces) == (False, False, True)
    most = capacity(plan.box[0], plan.headroom)
    assert last.bytes == most - chat.asleep - late.asleep
    assert last.resident == last.asleep == last.overhead
    assert plan.used(0) == chat.bytes + late.bytes + last.asleep
    assert plan.used(0) == pytest.approx(most, abs=2)
    assert plan.peak(0) == pytest.approx(most, abs=2)
    assert plan.spec_of(ModelSpec.model_validate({"name": "last"} | LATE), last).kv_cache == last.kv


def test_plan_of_pinned_model_limits_its_neighbour() -> None:
    plan = planned("RTX4090,A6000", {"chat": {"model": "8b", "devices": [1], "pinned": True}})
    alone = plan.replicas[0]
    models = {"chat": {"model": "8b", "devices": [1], "pinned": True}, "late": LATE, "last": LATE}
    chat, late, last = planned("RTX4090,A6000", models).replicas
    assert (chat.pinned, chat.sleeps, chat.displaces) == (True, False, False)
    assert late.devices == (0,)
    assert last.devices == (1,)
    assert chat.kv == last.kv < alone.kv


def test_plan_pinned_on_demand_reserves_its_memory() -> None:
    models = {"chat": {"model": "8b"}, "late": LATE | {"pinned": True}}
    plan = planned("RTX4090", models)
    (found,) = plan.problems
    assert found.model == "late"
    chat, late = planned("H100", models).replicas
    assert (late.on_demand, late.pinned, late.displaces, late.sleeps) == (True, True, False, False)
    assert not chat.sleeps  # nobody takes its place


def test_plan_marks_replicas_that_may_sleep() -> None:
    models: dict[str, dict[str, Any]] = {
        "beside": {"model": "8b", "devices": [0]},
        "late": LATE | {"devices": [0]},
        "pinned": {"model": "bert", "devices": [0], "pinned": True},
        "idle": {"model": "8b", "devices": [1], "idle": {"sleep_after": "10m"}},
        "busy": {"model": "8b", "devices": [1]},
        "odd": {"model": "odd", "devices": [0], "memory": "10GiB", "start": "lazy"},
        "wide": LATE | {"devices": [2, 3], "tensor_parallel_size": 2},
    }
    plan = planned("4xH100", models)
    sleepers = {r.model: r.host for r in plan.replicas if r.sleeps}
    assert list(sleepers) == ["beside", "late", "idle", "wide"]
    assert sleepers["late"] == plan.replica("late", 0).weights
    assert sleepers["wide"] == 2 * plan.replica("wide", 0).weights
    assert all(r.host == 0 for r in plan.replicas if not r.sleeps)


def test_of_unknown_size_on_demand_keeps_its_place() -> None:
    odd = {"model": "odd", "devices": [0], "memory": "10GiB", "start": "lazy"}
    plan = planned("RTX4090", {"chat": {"model": "8b"}, "odd": odd})
    assert [found.model for found in plan.problems] == ["chat"]
    (replica,) = plan.replicas
    assert (replica.on_demand, replica.displaces, replica.resident) == (True, False, 10 * GIB)


def test_plan_on_demand_without_room_is_a_problem() -> None:
    (found,) = planned("RTX4090", {"a": {"model": "8b"}, "b": LATE | {"memory": "25GiB"}}).problems
    assert found.message == (
        "is configured for 25.0 GiB; free on 1 x RTX 4090 without the 8% of "
        "server.gpu_headroom, with the other models asleep: GPU 0 20.3 GiB"
    )
    assert found.remedy == "memory: 17.8GiB"


@st.composite
def registries(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    starts: list[dict[str, Any]] = [
        {},
        {"pinned": True},
        {"start": "lazy"},
        {"start": "sleeping"},
        {"start": "lazy", "pinned": True},
        {"idle": {"sleep_after": 60}},
    ]
    sizes: list[dict[str, Any]] = [
        {},
        {"kv_cache": "4GiB"},
        {"memory": "21GiB"},
        {"gpu_memory_utilization": 0.5},
        {"concurrency": 3},
        {"replicas": 2},
    ]
    return {
        f"m{n}": {"model": draw(st.sampled_from(["8b", "8b", "70b", "bert"]))}
        | draw(st.sampled_from(starts))
        | draw(st.sampled_from(sizes))
        for n in range(draw(st.integers(1, 6)))
    }


@settings(max_examples=60, deadline=None)
@given(registries(), st.sampled_from(["H100", "2xA6000", "4xH100", "2xRTX4090,2xH100"]))
def test_plan_any_replica_fits_beside_sleeping_others(
    models: dict[str, dict[str, Any]], gpus: str
) -> None:
    plan = planned(gpus, models)
    for gpu in plan.box:
        on = plan.on(gpu.index)
        most = capacity(gpu, plan.headroom)
        assert plan.used(gpu.index) == sum(
            r.asleep if r.on_demand and r.displaces else r.bytes for r in on
        )
        for one in on:
            others = sum(r.bytes if r.pinned else r.asleep for r in on if r is not one)
            assert one.bytes + others <= plan.peak(gpu.index) <= most
            assert not one.displaces or all(r.sleeps or r.pinned for r in on)
    assert planned(gpus, models) == plan
