"""Changes of the registry that may make a model fit, the cheapest for its users first. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmserve.gpus.device import amount
from llmserve.planning import feasibility

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from llmserve.checkpoint.shape import Shape
    from llmserve.gpus.device import Box
    from llmserve.planning.plan import Plan
    from llmserve.planning.size import ReplicaFootprint
    from llmserve.registry.spec import ModelSpec

_SHORTEST = 2048  # tokens; the shortest useful context
_FP8_NEEDS = feasibility.QUANTIZATION_NEEDS["fp8"]


@dataclass(frozen=True)
class Suggestion:
    """A changed entry of the registry; without `instead`, the model is removed."""

    model: str
    words: str  # empty: the plan shows the change
    instead: ModelSpec | None
    before: ModelSpec | None = None

    def applied(self, specs: Sequence[ModelSpec]) -> list[ModelSpec]:
        changed = [self.instead if spec.name == self.model else spec for spec in specs]
        return [spec for spec in changed if spec is not None]

    def describe(self, plan: Plan) -> str:
        """Return the change as text of the registry; empty if nothing changes."""
        return self.words or (self._placed(plan, self.before) if self.before else "")

    @staticmethod
    def _placed(plan: Plan, before: ModelSpec) -> str:
        mine = [replica for replica in plan.replicas if replica.model == before.name]
        devices = [device for replica in mine for device in replica.devices]
        words = []
        if mine[0].tensor_parallel_size != before.parallel_sizes["tensor_parallel_size"]:
            words.append(f"tensor_parallel_size: {mine[0].tensor_parallel_size}")
        if before.devices is not None and tuple(devices) != before.devices:
            words.append(f"devices: {devices}")
        return ", ".join(words)


def suggest(
    spec: ModelSpec,
    shape: Shape,
    size: ReplicaFootprint | None,
    plan: Plan,
    specs: Sequence[ModelSpec],
) -> Iterator[Suggestion]:
    """Return what to try, in order. The planner finds out which of them fits."""
    if spec.devices is not None:
        elsewhere = spec.parallel_sizes["tensor_parallel_size"]
        yield _changed(spec, "", devices=None, tensor_parallel_size=elsewhere)
    if size is not None:
        yield from _budgets(spec, plan.box, size, plan.headroom)
    if spec.concurrency > 1:
        yield _changed(spec, "concurrency: 1", concurrency=1)
    if spec.devices is not None or spec.tensor_parallel_size is not None:
        yield _changed(spec, "", devices=None, tensor_parallel_size=None)
    yield from _smaller(spec, shape, plan.box)
    others = sorted({r.model for r in plan.replicas}, key=lambda name: _taken(plan, name))
    yield from _on_demand(spec, others, plan, specs)
    for other in others:
        yield Suggestion(other, f"removing {other}", None)


def _budgets(
    spec: ModelSpec, box: Box, size: ReplicaFootprint, headroom: float
) -> Iterator[Suggestion]:
    """Return the largest budget that the headroom allows, and the least that suffices."""
    if spec.kv_cache is not None and size.least:
        text, needed = amount(size.least)
        yield _changed(spec, f"kv_cache: {text}", kv_cache=needed)
    elif spec.memory is not None:
        text, needed = amount(size.needs)
        yield _changed(spec, f"memory: {text}", memory=needed)
    elif spec.gpu_memory_utilization is not None:
        gpus = [gpu for group in feasibility.groups(spec, box) for gpu in group] or box
        most = math.floor(100 * (1 - headroom) + 1e-6) / 100
        least = math.ceil(100 * size.needs / min(gpu.memory for gpu in gpus)) / 100
        for share in (most, least):
            if share < spec.gpu_memory_utilization or (share == least and share <= 1):
                words = f"gpu_memory_utilization: {share:g}"
                yield _changed(spec, words, gpu_memory_utilization=share)


def _smaller(spec: ModelSpec, shape: Shape, box: Box) -> Iterator[Suggestion]:
    """Return a shorter context, 8-bit weights, and both."""
    asked = max(0, spec.engine.get("max_model_len") or 0) or shape.context
    longest = min(asked, shape.context)
    shorter: list[dict[str, Any]] = []
    if asked > longest:
        shorter.append({"max_model_len": longest})
    if shape.attention_layers:
        halves = (longest >> n for n in range(1, 12) if longest >> n >= _SHORTEST)
        shorter += [{"max_model_len": context} for context in halves]
    eight_bit: list[dict[str, Any]] = (
        [{"quantization": "fp8"}] if _may_be_fp8(spec, shape, box) else []
    )
    both = [fp8 | short for fp8 in eight_bit for short in shorter]
    for change in (*shorter, *eight_bit, *both):
        words = ", ".join(f"{key}: {value}" for key, value in change.items())
        yield _changed(spec, f"engine: {{{words}}}", engine=spec.engine | change)


def _on_demand(
    spec: ModelSpec, others: Iterable[str], plan: Plan, specs: Iterable[ModelSpec]
) -> Iterator[Suggestion]:
    """Return that the model, or another one, sleeps until its first request."""
    if spec.start != "eager":
        return
    if not spec.pinned:
        yield _changed(spec, "start: sleeping", start="sleeping")
    stay = {replica.model for replica in plan.replicas if replica.stays or replica.on_demand}
    entries = {each.name: each for each in specs}
    for other in others:
        if other not in stay:
            yield _changed(entries[other], f"start: sleeping for {other}", start="sleeping")


def _may_be_fp8(spec: ModelSpec, shape: Shape, box: Box) -> bool:
    weak = any(_capability(gpu.capability) < _FP8_NEEDS for gpu in box if gpu.capability)
    return not (weak or shape.quantization or spec.engine.get("quantization"))


def _capability(pair: tuple[int, int]) -> int:
    return pair[0] * 10 + pair[1]


def _taken(plan: Plan, model: str) -> tuple[int, str]:
    return sum(r.bytes * len(r.devices) for r in plan.replicas if r.model == model), model


def _changed(spec: ModelSpec, words: str, **changed: Any) -> Suggestion:
    return Suggestion(spec.name, words, spec.model_copy(update=changed), spec)
