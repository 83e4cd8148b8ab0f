from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from llmserve.checkpoint import shape
from llmserve.errors import ConfigError, ShapeUnknown
from llmserve.gpus.device import GIB
from llmserve.lifecycle.host_memory import HostMemory
from llmserve.lifecycle.placement import HOST_MEMORY, Level
from llmserve.registry.spec import Config, ServerSpec
from tests.fakes import spec
from tests.unit.shapes import LLAMA_8B

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmserve.checkpoint.shape import Shape
    from llmserve.registry.spec import ModelSpec

WEIGHTS = LLAMA_8B.weights  # 15.0 GiB
BESIDE = 2 * GIB


@pytest.fixture(autouse=True)
def _llamas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is one, but for those that are called `odd`."""

    def read(wanted: ModelSpec, *, hub: bool = True) -> Shape:
        del hub
        if wanted.model == "odd":
            raise ShapeUnknown("no config.json")
        dtype = wanted.engine.get("dtype", "bfloat16")
        weights = WEIGHTS * (2 if dtype == "float32" else 1)
        return replace(LLAMA_8B, context=4096, dtype=dtype, weights=weights)

    monkeypatch.setattr(shape, "read", read)


def registry(*specs: ModelSpec, memory: str | None = "100GiB") -> Config:
    server = ServerSpec.model_validate({"host_memory": memory})
    return Config(file=Path("models.yaml"), server=server, models=specs)


def native(shape: Shape) -> str:
    return shape.dtype


def wide(_: Shape) -> str:
    return "float32"


def of(config: Config, dtype_for: Callable[[Shape], str] = native) -> HostMemory:
    return HostMemory.from_config(config, dtype_for)


def size_of(made: ModelSpec, dtype_for: Callable[[Shape], str] = native) -> int:
    holds = of(registry(made), dtype_for).place(made, 0).holds
    assert list(holds) == [Level.READY]  # or nothing: no model sleeps
    assert list(holds[Level.READY]) == [HOST_MEMORY]
    return holds[Level.READY][HOST_MEMORY]


def problems(*specs: ModelSpec, memory: str) -> list[str]:
    try:
        of(registry(*specs, memory=memory))
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    ("keys", "size"),
    [
        pytest.param({}, WEIGHTS + GIB + BESIDE, id="default"),
        pytest.param({"kv_cache": "4GiB"}, WEIGHTS + 4 * GIB + BESIDE, id="a KV cache"),
        pytest.param({"memory": "30GiB"}, 30 * GIB, id="all in"),
        pytest.param({"memory": "30GiB", "kv_cache": "4GiB"}, 30 * GIB, id="all in wins"),
        pytest.param({"model": "odd"}, GIB + BESIDE, id="of unknown size"),
    ],
)
def test_size_is_weights_kv_cache_and_overhead(keys: dict[str, Any], size: int) -> None:
    assert size_of(spec(**keys)) == size


def test_replicas_have_the_same_size() -> None:
    made = spec(replicas=3)
    memory = of(registry(made))
    assert memory.place(made, 0).holds == memory.place(made, 2).holds


def test_capacity_is_the_registry_s_host_memory() -> None:
    assert of(registry(spec(), memory="24GiB")).capacity == {HOST_MEMORY: 24 * GIB}


def test_without_a_budget_nothing_is_bounded_or_requested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(_: ModelSpec, *, hub: bool = True) -> Shape:
        assert not hub
        raise ShapeUnknown("it is not here")

    monkeypatch.setattr(shape, "read", read)
    memory = of(registry(spec(memory="900GiB"), memory=None))
    assert memory.capacity == {}


# --- what is too much


def test_eager_models_must_fit_together() -> None:
    two = [spec(name, memory="10GiB") for name in ("a", "b")]
    assert problems(*two, memory="20GiB") == []
    (problem,) = problems(*two, memory="19GiB")
    assert "b" in problem
    assert "needs 10.0 GiB" in problem
    assert "only 9.0 GiB of 19.0 GiB of server.host_memory are free" in problem
    assert problem.endswith("what would fit: `start: lazy` or server.host_memory: 20GiB")


def test_replicas_must_fit_together() -> None:
    assert problems(spec(memory="10GiB", replicas=2), memory="20GiB") == []
    (problem,) = problems(spec(memory="10GiB", replicas=2), memory="19GiB")
    assert "only 19.0 GiB of 19.0 GiB" in problem
    assert problem.endswith("what would fit: server.host_memory: 20GiB")  # no later start would


@pytest.mark.parametrize("start", ["lazy", "sleeping"])
def test_model_that_is_not_eager_must_fit_alone(start: str) -> None:
    eager = spec("a", memory="15GiB")
    assert problems(eager, spec("b", memory="20GiB", start=start), memory="20GiB") == []
    (problem,) = problems(eager, spec("b", memory="21GiB", start=start), memory="20GiB")
    assert "needs 21.0 GiB" in problem


def test_lazy_model_after_too_large_ones_is_no_problem() -> None:
    eager = [spec(name, memory="15GiB") for name in ("a", "b")]
    (problem,) = problems(*eager, spec("c", memory="5GiB", start="lazy"), memory="20GiB")
    assert "needs 15.0 GiB" in problem


def test_lazy_model_must_fit_beside_pinned_ones() -> None:
    """A lazy model that cannot start beside it would never start."""
    pinned = spec("a", memory="15GiB", pinned=True)
    assert problems(pinned, spec("b", memory="5GiB", start="lazy"), memory="20GiB") == []
    (problem,) = problems(pinned, spec("b", memory="6GiB", start="lazy"), memory="20GiB")
    assert "needs 6.0 GiB" in problem


# --- as the memory of a backend


async def test_start_yields_the_kv_cache_and_no_model_sleeps() -> None:
    made = spec()
    memory = of(registry(made))
    place = memory.place(made, 0)
    assert not place.sleeps
    async with memory.start(made, place) as (placed, keep):
        assert placed == spec(kv_cache="1GiB")
        keep([])
    async with memory.moves(place, None):
        pass


def test_planned_registry_applies_when_called() -> None:
    memory = of(registry(spec(), memory="24GiB"))
    adopt = memory.planned(
        registry(spec(memory="5GiB"), memory="30GiB"), {"chat": [memory.place(spec(), 0)]}
    )
    assert memory.capacity == {HOST_MEMORY: 24 * GIB}
    adopt()
    assert memory.capacity == {HOST_MEMORY: 30 * GIB}
    assert memory.place(spec("new"), 0).holds == {Level.READY: {HOST_MEMORY: GIB + BESIDE}}


def test_a_registry_that_does_not_fit_changes_nothing() -> None:
    memory = of(registry(spec(), memory="24GiB"))
    with pytest.raises(ConfigError, match=r"needs 31\.0 GiB"):
        memory.planned(registry(spec(memory="31GiB"), memory="30GiB"), {})
    assert memory.capacity == {HOST_MEMORY: 24 * GIB}


# --- what a model is computed in


async def test_cpu_without_bfloat16_counts_float32(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    made = spec()
    assert size_of(made, wide) == 2 * WEIGHTS + 2 * GIB + BESIDE
    memory = of(registry(made, spec("odd", model="odd")), wide)
    assert memory.dtypes == {"chat": "float32"}
    async with memory.start(made, memory.place(made, 0)) as (placed, _):
        assert placed == spec(engine={"dtype": "float32"}, kv_cache="2GiB")
    assert "model=chat dtype=float32" in caplog.messages


@pytest.mark.parametrize("engine", [{"dtype": "bfloat16"}, {"quantization": "fp8"}])
async def test_explicit_dtype_or_quantization_is_kept(engine: dict[str, Any]) -> None:
    made = spec(engine=engine)
    memory = of(registry(made), wide)
    assert memory.dtypes == {"chat": "bfloat16"}
    async with memory.start(made, memory.place(made, 0)) as (placed, _):
        assert placed.engine == engine


async def test_downloaded_model_is_read_when_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here: list[ModelSpec] = []

    def read(wanted: ModelSpec, *, hub: bool = True) -> Shape:
        if not here:
            raise ShapeUnknown("it is not here")
        return replace(LLAMA_8B, dtype=wanted.engine.get("dtype", "bfloat16"))

    monkeypatch.setattr(shape, "read", read)
    made = spec(model="org/m")
    memory = of(registry(made, memory=None), wide)
    assert memory.dtypes == {}
    here.append(made)
    async with memory.start(made, memory.place(made, 0)) as (placed, _):
        assert placed.engine == {"dtype": "float32"}


# --- what cannot run at all


def test_context_beyond_the_model_s_own_is_refused() -> None:
    (problem,) = problems(spec(engine={"max_model_len": 4097}), memory="100GiB")
    assert problem.endswith("max_model_len 4,097 exceeds the model's context of 4,096 tokens")


def test_small_kv_cache_is_refused_with_a_sufficient_one() -> None:
    (problem,) = problems(spec(kv_cache="256MiB"), memory="100GiB")
    short = "a KV cache of 0.2 GiB is too small; 4,096 tokens need 0.5 GiB"
    assert problem.endswith(f"chat.kv_cache: {short}; what would fit: kv_cache: 0.6GiB")
    (problem,) = problems(spec(kv_cache="256MiB"), memory="17.3GiB")
    assert problem.endswith(short)  # a larger one would not fit beside the weights
