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
    assert list(holds) == [Level.READY]  # or nothing: nobody sleeps
    assert list(holds[Level.READY]) == [HOST_MEMORY]
    return holds[Level.READY][HOST_MEMORY]


def problems(*specs: ModelSpec, memory: str) -> list[str]:
    try:
        of(registry(*specs, memory=memory))
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    ("said", "size"),
    [
        pytest.param({}, WEIGHTS + GIB + BESIDE, id="nothing said"),
        pytest.param({"kv_cache": "4GiB"}, WEIGHTS + 4 * GIB + BESIDE, id="a KV cache"),
        pytest.param({"memory": "30GiB"}, 30 * GIB, id="all in"),
        pytest.param({"memory": "30GiB", "kv_cache": "4GiB"}, 30 * GIB, id="all in wins"),
        pytest.param({"model": "odd"}, GIB + BESIDE, id="of unknown size"),
    ],
)
def test_an_engine_holds_its_weights_its_kv_cache_and_what_it_needs_besides(
    said: dict[str, Any], size: int
) -> None:
    assert size_of(spec(**said)) == size


def test_every_replica_holds_as_much() -> None:
    made = spec(replicas=3)
    space = of(registry(made))
    assert space.place(made, 0).holds == space.place(made, 2).holds


def test_the_budget_is_the_registry_s() -> None:
    assert of(registry(spec(), memory="24GiB")).capacity == {HOST_MEMORY: 24 * GIB}


def test_without_a_budget_nothing_is_bounded_and_no_hub_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(_: ModelSpec, *, hub: bool = True) -> Shape:
        assert not hub
        raise ShapeUnknown("it is not here")

    monkeypatch.setattr(shape, "read", read)
    space = of(registry(spec(memory="900GiB"), memory=None))
    assert space.capacity == {}


# --- what is too much


def test_what_runs_at_once_has_to_fit() -> None:
    two = [spec(name, memory="10GiB") for name in ("a", "b")]
    assert problems(*two, memory="20GiB") == []
    (told,) = problems(*two, memory="19GiB")
    assert "b" in told
    assert "needs 10.0 GiB" in told
    assert "only 9.0 GiB of 19.0 GiB of server.host_memory are free" in told
    assert told.endswith("what would fit: `start: lazy` or server.host_memory: 20GiB")


def test_all_replicas_run_at_once() -> None:
    assert problems(spec(memory="10GiB", replicas=2), memory="20GiB") == []
    (told,) = problems(spec(memory="10GiB", replicas=2), memory="19GiB")
    assert "only 19.0 GiB of 19.0 GiB" in told
    assert told.endswith("what would fit: server.host_memory: 20GiB")  # no later start would


@pytest.mark.parametrize("start", ["lazy", "sleeping"])
def test_what_does_not_run_at_once_has_to_fit_alone(start: str) -> None:
    eager = spec("a", memory="15GiB")
    assert problems(eager, spec("b", memory="20GiB", start=start), memory="20GiB") == []
    (told,) = problems(eager, spec("b", memory="21GiB", start=start), memory="20GiB")
    assert "needs 21.0 GiB" in told


def test_a_lazy_model_is_no_problem_because_those_before_it_are_too_large() -> None:
    eager = [spec(name, memory="15GiB") for name in ("a", "b")]
    (told,) = problems(*eager, spec("c", memory="5GiB", start="lazy"), memory="20GiB")
    assert "needs 15.0 GiB" in told


def test_a_pinned_model_leaves_the_others_what_it_does_not_hold() -> None:
    """A lazy one that cannot come while it stays would never come."""
    pinned = spec("a", memory="15GiB", pinned=True)
    assert problems(pinned, spec("b", memory="5GiB", start="lazy"), memory="20GiB") == []
    (told,) = problems(pinned, spec("b", memory="6GiB", start="lazy"), memory="20GiB")
    assert "needs 6.0 GiB" in told


# --- as the memory of a backend


async def test_a_start_says_the_kv_cache_and_nobody_sleeps() -> None:
    made = spec()
    space = of(registry(made))
    place = space.place(made, 0)
    assert not place.sleeps
    async with space.start(made, place) as (placed, keep):
        assert placed == spec(kv_cache="1GiB")
        keep([])
    async with space.moves(place, None):
        pass


def test_another_registry_counts_once_it_is_adopted() -> None:
    space = of(registry(spec(), memory="24GiB"))
    adopt = space.planned(
        registry(spec(memory="5GiB"), memory="30GiB"), {"chat": [space.place(spec(), 0)]}
    )
    assert space.capacity == {HOST_MEMORY: 24 * GIB}
    adopt()
    assert space.capacity == {HOST_MEMORY: 30 * GIB}
    assert space.place(spec("new"), 0).holds == {Level.READY: {HOST_MEMORY: GIB + BESIDE}}


def test_a_registry_that_does_not_fit_changes_nothing() -> None:
    space = of(registry(spec(), memory="24GiB"))
    with pytest.raises(ConfigError, match=r"needs 31\.0 GiB"):
        space.planned(registry(spec(memory="31GiB"), memory="30GiB"), {})
    assert space.capacity == {HOST_MEMORY: 24 * GIB}


# --- what a model is computed in


async def test_a_cpu_without_bfloat16_computes_in_float32_and_counts_that(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    made = spec()
    assert size_of(made, wide) == 2 * WEIGHTS + 2 * GIB + BESIDE
    space = of(registry(made, spec("odd", model="odd")), wide)
    assert space.dtypes == {"chat": "float32"}
    async with space.start(made, space.place(made, 0)) as (placed, _):
        assert placed == spec(engine={"dtype": "float32"}, kv_cache="2GiB")
    assert "model=chat dtype=float32" in caplog.messages


@pytest.mark.parametrize("engine", [{"dtype": "bfloat16"}, {"quantization": "fp8"}])
async def test_what_an_entry_says_of_it_stays(engine: dict[str, Any]) -> None:
    made = spec(engine=engine)
    space = of(registry(made), wide)
    assert space.dtypes == {"chat": "bfloat16"}
    async with space.start(made, space.place(made, 0)) as (placed, _):
        assert placed.engine == engine


async def test_a_model_that_came_from_the_hub_is_looked_at_when_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here: list[ModelSpec] = []

    def read(wanted: ModelSpec, *, hub: bool = True) -> Shape:
        if not here:
            raise ShapeUnknown("it is not here")
        return replace(LLAMA_8B, dtype=wanted.engine.get("dtype", "bfloat16"))

    monkeypatch.setattr(shape, "read", read)
    made = spec(model="org/m")
    space = of(registry(made, memory=None), wide)
    assert space.dtypes == {}
    here.append(made)
    async with space.start(made, space.place(made, 0)) as (placed, _):
        assert placed.engine == {"dtype": "float32"}


# --- what cannot run at all


def test_a_context_beyond_the_models_own_starts_nothing() -> None:
    (told,) = problems(spec(engine={"max_model_len": 4097}), memory="100GiB")
    assert told.endswith("max_model_len 4,097 exceeds the model's context of 4,096 tokens")


def test_a_kv_cache_too_small_is_told_with_one_that_would_do() -> None:
    (told,) = problems(spec(kv_cache="256MiB"), memory="100GiB")
    short = "a KV cache of 0.2 GiB is too small; 4,096 tokens need 0.5 GiB"
    assert told.endswith(f"chat.kv_cache: {short}; what would fit: kv_cache: 0.6GiB")
    (told,) = problems(spec(kv_cache="256MiB"), memory="17.3GiB")
    assert told.endswith(short)  # a larger one would not fit beside the weights
