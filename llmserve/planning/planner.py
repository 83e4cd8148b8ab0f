"""The plan of a registry on a box: sizes, places and suggestions. Pure."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from llmserve.checkpoint.shape import UnknownShape
from llmserve.gpus.device import gib, listed
from llmserve.planning import feasibility, memory_model, suggestions
from llmserve.planning.measurements import fingerprint
from llmserve.planning.packing import Demand, Option
from llmserve.planning.placement import place
from llmserve.planning.plan import Plan, PlannedReplica, Problem
from llmserve.planning.size import ReplicaFootprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from llmserve.checkpoint.shape import Shape
    from llmserve.gpus.device import Box, Gpu
    from llmserve.planning.placement import Misfit, Placed
    from llmserve.registry.spec import ModelSpec


class ModelDemand:
    """A model as demands on GPU memory."""

    def __init__(
        self, spec: ModelSpec, shape: Shape | None, sizes: Sequence[ReplicaFootprint], box: Box
    ):
        self.spec = spec
        self._shape = shape
        self._box = box
        self._groups = feasibility.groups(spec, box)
        kv = spec.kv_cache
        enough = [
            size
            for size in sizes
            if not self._exceeds(size, self._widest) and (kv is None or kv >= size.least)
        ]
        self.sizes = {self._option(size): size for size in enough or sizes}

    @property
    def names(self) -> list[str]:
        """Return the names of its replicas."""
        many = self.spec.replicas > 1
        return [
            f"{self.spec.name}/{n}" if many else self.spec.name for n in range(self.spec.replicas)
        ]

    @property
    def least(self) -> ReplicaFootprint | None:
        """Return the size on the fewest GPUs; None if its shape is unknown."""
        return next(iter(self.sizes.values()), None)

    @property
    def _on_demand(self) -> bool:
        return self.spec.start != "eager"

    def _option(self, size: ReplicaFootprint | None) -> Option:
        parallel = self.spec.parallel_sizes
        if size is not None:
            parallel = parallel | {"tensor_parallel_size": size.settings.tensor_parallel_size}
        besides, least = (size.besides, size.least) if size else (0, 0)
        kv = int(self.spec.kv_cache) if self.spec.kv_cache and (least or not size) else least
        asleep = size.overhead if size else 0
        exact = size is not None and self.spec.kv_cache is not None
        budget = 0 if exact else int(self.spec.memory or 0)
        share = 0.0 if exact else self.spec.gpu_memory_utilization or 0.0
        return Option(math.prod(parallel.values()), max(besides + kv, budget), share, asleep)

    @property
    def _widest(self) -> Gpu:
        """Return the GPU that bounds its budget: its smallest explicit one, or the largest."""
        own = [gpu for group in self._groups for gpu in group]
        return min(own, key=_memory) if own else max(self._box, key=_memory)

    def _budget(self, gpu: Gpu) -> int | None:
        """Return the explicit bytes on a GPU; None without `memory` and a share."""
        if self.spec.memory is not None:
            return int(self.spec.memory)
        share = self.spec.gpu_memory_utilization
        return None if share is None else int(share * gpu.memory)

    def _exceeds(self, size: ReplicaFootprint, gpu: Gpu) -> bool:
        """Return whether a size exceeds the budget; an explicit KV cache overrides that."""
        budget = None if self.spec.kv_cache is not None else self._budget(gpu)
        return budget is not None and size.needs > budget

    def too_small(self) -> Problem | None:
        """Return the problem of a KV cache or budget that is too small for one request."""
        size = min(self.sizes.values(), key=lambda size: size.needs, default=None)
        if size is None:
            return None
        kv = self.spec.kv_cache
        if kv is not None and kv < size.least:
            context = size.settings.context
            short = feasibility.short_of_kv(self.spec, kv, context, size.least)
            return self._problem(short, "kv_cache")
        return self._short(size, self._widest)

    def short_on(self, placed: Placed) -> Problem | None:
        """Return the problem of a share that is too small on the GPUs of its place."""
        size = self.sizes.get(placed.option)
        return None if size is None else self._short(size, self._smallest(placed))

    def _short(self, size: ReplicaFootprint, gpu: Gpu) -> Problem | None:
        if not self._exceeds(size, gpu):
            return None
        key = "memory" if self.spec.memory is not None else "gpu_memory_utilization"
        return self._problem(
            f"{gib(self._budget(gpu) or 0)} of {gib(gpu.memory)} is too small; each GPU needs "
            f"{size.describe(self.spec.concurrency)}",
            key,
        )

    def _smallest(self, placed: Placed) -> Gpu:
        return min((self._box[index] for index in placed.devices), key=_memory)

    def no_room(self, misfit: Misfit, headroom: float) -> Problem:
        """Return the problem of a replica without a place: its need, and what is free."""
        size = self.least
        option = misfit.demand.options[0]
        most = max(option.on(gpu) for gpu in self._box)
        if size and most <= size.needs:
            needs = f"needs {size.describe(self.spec.concurrency)}"
        else:
            needs = f"is configured for {gib(most)}"
        each = f" on each of {option.devices} GPUs" if option.devices > 1 else ""
        free = ", ".join(f"GPU {index} {gib(size)}" for index, size in self._free(misfit))
        explicit = self.spec.devices is not None
        but = "" if explicit else f" without the {headroom:.0%} of server.gpu_headroom"
        but += ", with the other models asleep" if misfit.demand.on_demand else ""
        message = f"{needs}{each}; free on {listed(self._box)}{but}: {free}"
        return self._problem(message, "devices" if explicit else "")

    def _free(self, misfit: Misfit) -> list[tuple[int, int]]:
        """Return the free bytes of its explicit GPUs, or of the four GPUs with most room."""
        free = dict(enumerate(misfit.free))
        if misfit.demand.devices is not None:
            return [(index, free[index]) for index in misfit.demand.devices]
        return sorted(free.items(), key=lambda each: -each[1])[:4]

    def demands(self) -> Iterator[Demand]:
        options = tuple(self.sizes) or (self._option(None),)
        least = self.least
        explicit = self.spec.kv_cache or self.spec.memory or self.spec.gpu_memory_utilization
        grows = least.least if least and not explicit else 0
        # The memory of a sleeping model of unknown size is also unknown.
        stays = self.spec.pinned or least is None
        for number, name in enumerate(self.names):
            group = self._groups[number] if self._groups else None
            yield Demand(
                name,
                options,
                None if group is None else tuple(gpu.index for gpu in group),
                grows,
                least.most - least.least if least and grows else None,
                pinned=stays,
                on_demand=self._on_demand and not stays,
            )

    def replica(self, number: int, placed: Placed) -> PlannedReplica:
        smallest = self._smallest(placed)
        unknown = PlannedReplica(
            model=self.spec.name,
            number=number,
            of=self.spec.replicas,
            devices=placed.devices,
            tensor_parallel_size=self.spec.parallel_sizes["tensor_parallel_size"],
            pipeline_parallel_size=self.spec.pipeline_parallel_size,
            weights=0,
            overhead=self._budget(smallest) or 0,
            kv=0,
            tokens=0,
            context=0,
            measured=False,
            known=False,
            on_demand=self._on_demand,
            pinned=self.spec.pinned,
            displaces=placed.displaces,
        )
        size = self.sizes.get(placed.option)
        if size is None or self._shape is None:
            return unknown
        kv = self._kv(size, smallest, placed.extra)
        return replace(
            unknown,
            tensor_parallel_size=size.settings.tensor_parallel_size,
            pipeline_parallel_size=size.settings.pipeline_parallel_size,
            weights=size.weights,
            overhead=size.overhead,
            kv=kv,
            tokens=memory_model.kv_tokens(self._shape, size.settings, kv),
            context=size.settings.context,
            measured=size.measured,
            approximate=self._shape.approximate,
            fingerprint=size.fingerprint,
            known=True,
        )

    def _kv(self, size: ReplicaFootprint, gpu: Gpu, extra: int) -> int:
        """Return the bytes of KV cache on each device: explicit, or the rest of the budget."""
        if not size.least:
            return 0
        if self.spec.kv_cache is not None:
            return int(self.spec.kv_cache)
        budget = self._budget(gpu)
        return size.least + extra if budget is None else budget - size.besides

    def _problem(self, message: str, key: str) -> Problem:
        return Problem(self.spec.name, message, key=key)


class Planner:
    """Plans models from their shapes.

    `overhead_of` returns the measured overhead of a fingerprint.
    """

    def __init__(
        self,
        box: Box,
        headroom: float,
        shapes: Mapping[str, Shape | UnknownShape],
        overhead_of: Callable[[str], int | None] = lambda _: None,
    ) -> None:
        self._box = box
        self._headroom = headroom
        self._shapes = shapes
        self._overhead_of = overhead_of
        self._overheads: dict[str, int | None] = {}

    def plan(self, specs: Sequence[ModelSpec]) -> Plan:
        """Return the places of all replicas that fit, and a problem for each other model."""
        plan = self._layout(specs)
        return replace(
            plan, problems=tuple(self._with_remedy(p, specs, plan) for p in plan.problems)
        )

    def _layout(self, specs: Sequence[ModelSpec], *, finish: bool = True) -> Plan:
        problems: list[Problem] = []
        fitting: list[ModelDemand] = []
        for spec in specs:
            found = feasibility.flaws(spec, self._shapes[spec.name], self._box)
            each = None if found else self._demand_of(spec)
            if each is not None and (small := each.too_small()) is not None:
                found = [small]
            problems += found
            if each is not None and not found:
                fitting.append(each)
        demands = [demand for each in fitting for demand in each.demands()]
        placement = place(demands, self._box, self._headroom, finish=finish)
        misfits = {misfit.demand.name: misfit for misfit in placement.left}
        replicas: list[PlannedReplica] = []
        for each in fitting:
            left = [misfits[name] for name in each.names if name in misfits]
            if left:
                problems.append(each.no_room(left[0], self._headroom))
                continue
            placed = [placement.placed[name] for name in each.names]
            short = [problem for one in placed if (problem := each.short_on(one)) is not None]
            if short:
                problems.append(short[0])
                continue
            replicas += [each.replica(number, one) for number, one in enumerate(placed)]
        sleeping = tuple(_with_sleep(replicas, specs))
        return Plan(self._box, self._headroom, sleeping, tuple(problems))

    def _demand_of(self, spec: ModelSpec) -> ModelDemand:
        shape = self._shapes[spec.name]
        if isinstance(shape, UnknownShape):
            return ModelDemand(spec, None, (), self._box)
        degrees = feasibility.tensor_parallel_sizes(spec, shape, self._box)
        sizes = [self._size(spec, shape, degree) for degree in degrees]
        return ModelDemand(spec, shape, sizes, self._box)

    def _size(self, spec: ModelSpec, shape: Shape, tensor_parallel_size: int) -> ReplicaFootprint:
        first = self._box[0]
        settings = memory_model.Settings.of(spec, shape, tensor_parallel_size, first)
        chosen = [gpu for group in feasibility.groups(spec, self._box) for gpu in group]
        mark = fingerprint(spec, shape, settings, (chosen or [first])[0])
        if mark not in self._overheads:
            self._overheads[mark] = self._overhead_of(mark)
        known = self._overheads[mark]
        return ReplicaFootprint(
            settings=settings,
            weights=memory_model.weights_bytes(shape, settings),
            overhead=memory_model.overhead_bytes(shape, settings) if known is None else known,
            least=memory_model.kv_bytes(shape, settings, spec.concurrency),
            most=memory_model.kv_bytes(shape, settings, max(settings.seqs, spec.concurrency)),
            fingerprint=mark,
            measured=known is not None,
        )

    def _with_remedy(self, problem: Problem, specs: Sequence[ModelSpec], plan: Plan) -> Problem:
        shape = self._shapes[problem.model]
        if problem.remedy is not None or isinstance(shape, UnknownShape):
            return problem
        spec = next(spec for spec in specs if spec.name == problem.model)
        failed = {each.model for each in plan.problems} - {spec.name}
        for suggestion in suggestions.suggest(
            spec, shape, self._demand_of(spec).least, plan, specs
        ):
            changed = suggestion.applied(specs)
            tried = self._layout(changed, finish=False)
            if not {each.model for each in tried.problems} <= failed:
                continue
            if words := suggestion.describe(self._layout(changed)):
                return replace(problem, remedy=words)
        return problem


def _with_sleep(
    replicas: Sequence[PlannedReplica], specs: Sequence[ModelSpec]
) -> Iterator[PlannedReplica]:
    """Return the replicas with `sleeps`, and the host memory that sleep takes."""
    idle = {spec.name for spec in specs if spec.idle.sleep_after is not None}
    shared = {index for one in replicas if one.on_demand and not one.stays for index in one.devices}
    for one in replicas:
        uses_sleep = one.on_demand or one.model in idle or not shared.isdisjoint(one.devices)
        sleeps = uses_sleep and not one.stays
        yield replace(one, sleeps=sleeps, host=one.weights * len(one.devices) * sleeps)


def _memory(gpu: Gpu) -> int:
    return gpu.memory
