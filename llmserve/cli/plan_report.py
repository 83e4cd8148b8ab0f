"""A memory plan as terminal output, JSON and SVG. Pure."""

from __future__ import annotations

import io
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmserve.gpus.device import GIB, listed, short_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import ConsoleOptions, RenderableType

    from llmserve.gpus.device import Gpu
    from llmserve.planning.plan import Plan, PlannedReplica, Problem

# Readable on white and on black.
PALETTE = ("#2b6cb8", "#c2500c", "#1d8045", "#b83280", "#7a55c7", "#0b7d86", "#8f6708", "#cc3340")
_LETTERS = string.ascii_uppercase + string.ascii_lowercase
_SVG_COLUMNS = 100


@dataclass(frozen=True)
class Kind:
    name: str
    glyph: str


WEIGHTS = Kind("weights", "█")
KV_CACHE = Kind("KV cache", "▓")
OVERHEAD = Kind("overhead", "▒")
SHARE = Kind("share", "░")  # of a model of unknown size
ASLEEP = Kind("asleep", "▂")  # of a replica that displaces others when it is awake
FREE = Kind("free", "·")


@dataclass(frozen=True)
class Part:
    """The memory of a GPU that one replica uses for one purpose, or that is free."""

    kind: Kind
    size: int  # bytes
    replica: PlannedReplica | None = None  # None: free


@dataclass(frozen=True)
class Mark:
    """The letter and the colour of a model in bars and tables."""

    letter: str
    color: str


def marks(plan: Plan) -> dict[str, Mark]:
    """The mark of each model, in the order of the plan; letters and colours repeat."""
    models = dict.fromkeys(replica.model for replica in plan.replicas)
    return {
        model: Mark(_LETTERS[index % len(_LETTERS)], PALETTE[index % len(PALETTE)])
        for index, model in enumerate(models)
    }


def parts(plan: Plan, gpu: Gpu) -> list[Part]:
    """The memory of a GPU at the start: each replica's parts, then the free part; none is empty."""
    sizes = [
        Part(kind, size, replica)
        for replica in plan.on(gpu.index)
        for kind, size in _sizes(replica)
    ]
    sizes.append(Part(FREE, gpu.memory - plan.used(gpu.index)))
    return [part for part in sizes if part.size > 0]


def _sizes(replica: PlannedReplica) -> list[tuple[Kind, int]]:
    if replica.displaces:
        return [(ASLEEP, replica.resident)]
    if not replica.known:
        return [(SHARE, replica.bytes)]
    return [(WEIGHTS, replica.weights), (KV_CACHE, replica.kv), (OVERHEAD, replica.overhead)]


def _kinds(plan: Plan) -> list[Kind]:
    """The kinds that the legend explains, without the free part."""
    shown = {kind for replica in plan.replicas for kind, _ in _sizes(replica)}
    return [WEIGHTS, KV_CACHE, OVERHEAD, *(kind for kind in (SHARE, ASLEEP) if kind in shown)]


def cells(sizes: Sequence[int], width: int) -> list[int]:
    """Divide `width` cells in proportion to positive sizes, with at least one cell each.

    If there are more sizes than cells, the smallest get none.
    """
    if len(sizes) > width:
        kept = set(sorted(range(len(sizes)), key=lambda i: -sizes[i])[:width])
        return [int(i in kept) for i in range(len(sizes))]
    exact = [size * width / sum(sizes) for size in sizes]
    counts = [max(1, int(share)) for share in exact]
    while (missing := width - sum(counts)) and counts:
        step = 1 if missing > 0 else -1
        candidates = [i for i, count in enumerate(counts) if count + step >= 1]
        counts[max(candidates, key=lambda i: step * (exact[i] - counts[i]))] += step
    return counts


def terminal(plan: Plan) -> RenderableType:
    """A bar for each GPU, a row for each replica, and the problems; at least 80 columns wide."""
    marked = marks(plan)
    blocks: list[RenderableType] = [_bars(plan, marked), _legend(plan)]
    if plan.replicas:
        blocks += ["", _rows(plan, marked)]
    for problem in plan.problems:
        blocks += ["", *_problem(problem)]
    return Group(*blocks)


class Bar:
    """A GPU's parts as a bar of the available width; each replica begins with its letter."""

    def __init__(self, shown: Sequence[Part], marked: dict[str, Mark]) -> None:
        self._parts = shown
        self._marks = marked

    def text(self, width: int) -> Text:
        bar = Text(no_wrap=True)
        previous: PlannedReplica | None = None
        counts = cells([part.size for part in self._parts], width)
        for part, count in zip(self._parts, counts, strict=True):
            if not count or part.replica is None:
                bar.append(part.kind.glyph * count, "dim")
                continue
            mark = self._marks[part.replica.model]
            begins = part.replica is not previous
            if begins:
                bar.append_text(_letter(mark))
            # The letter replaces the first cell of its part.
            bar.append(part.kind.glyph * (count - begins), mark.color)
            previous = part.replica
        return bar

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield self.text(options.max_width)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)


def _letter(mark: Mark) -> Text:
    return Text(mark.letter, f"bold #ffffff on {mark.color}")


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))


def _bars(plan: Plan, marked: dict[str, Mark]) -> Table:
    table = _table()
    table.expand = True
    table.add_column("GPU", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, max_width=20, overflow="ellipsis")
    table.add_column("MEMORY", justify="right", no_wrap=True)
    table.add_column("", ratio=1)
    table.add_column("USED", justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for gpu in plan.box:
        used = plan.used(gpu.index)
        table.add_row(
            Text(str(gpu.index)),
            Text(short_name(gpu.name)),
            Text(f"{_gib(gpu.memory)} GiB"),
            Bar(parts(plan, gpu), marked),
            Text(f"{_gib(used)} GiB"),
            Text(f"{used / gpu.memory:.0%}", "bold red" if used > gpu.memory else ""),
        )
    return table


def _legend(plan: Plan) -> Text:
    shown = [f"{kind.glyph} {kind.name}" for kind in _kinds(plan)]
    shown.append(f"{FREE.glyph} {_free(plan)}")
    if any(replica.known and not replica.measured for replica in plan.replicas):
        shown.append("~ estimate")
    return Text("  ".join(shown), "dim")


def _free(plan: Plan) -> str:
    return f"free ({plan.headroom * 100:.3g}% headroom)" if plan.headroom else "free"


def _rows(plan: Plan, marked: dict[str, Mark]) -> Table:
    pipelines = any(replica.pipeline_parallel_size > 1 for replica in plan.replicas)
    table = _table()
    table.add_column("")
    table.add_column("MODEL", overflow="fold")
    table.add_column("GPUS", no_wrap=True)
    table.add_column("TP x PP" if pipelines else "TP", justify="right", no_wrap=True)
    for heading in ("WEIGHTS", "KV CACHE", "OVERHEAD"):
        table.add_column(f"{heading}\nGiB/GPU", justify="right", no_wrap=True)
    table.add_column("TOKENS", justify="right", no_wrap=True)
    table.add_column("CONTEXT\nx REQUESTS", justify="right", no_wrap=True)
    for replica in plan.replicas:
        table.add_row(
            _letter(marked[replica.model]),
            Text.assemble(replica.name, ("\non demand" if replica.on_demand else "", "dim")),
            Text(_ranges(replica.devices)),
            Text(_parallel(replica)),
            *map(Text, _columns(replica)),
        )
    return table


def _problem(problem: Problem) -> list[RenderableType]:
    what = Text.assemble((problem.model, "bold red"), ": ", problem.message)
    if problem.key == "model" and not problem.remedy:  # its files are broken
        return [what]
    remedy = Text.assemble(
        ("what would fit: ", "dim"),
        (problem.remedy, "bold") if problem.remedy else "no change was found",
    )
    return [what, Padding(remedy, (0, 0, 0, 2), expand=False)]


def _gib(size: int) -> str:
    if 0 < size < GIB / 20:
        return "<0.1"
    return f"{size / GIB:.1f}"


def _ranges(devices: Sequence[int]) -> str:
    """GPU numbers such as "0,1" and "0-7,9"; a range has at least three."""
    runs: list[list[int]] = []
    for device in devices:
        if runs and device == runs[-1][-1] + 1:
            runs[-1].append(device)
        else:
            runs.append([device])
    return ",".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs
    )


def _parallel(replica: PlannedReplica) -> str:
    pipeline = replica.pipeline_parallel_size
    return f"{replica.tensor_parallel_size}" + (f" x {pipeline}" if pipeline > 1 else "")


def _columns(replica: PlannedReplica) -> tuple[str, str, str, str, str]:
    """The columns weights, KV cache, overhead, tokens and context of a row."""
    if not replica.known:
        return "?", "?", f"{SHARE.glyph} {_gib(replica.bytes)}", "?", "?"
    weights = _gib(replica.weights)
    overhead = ("" if replica.measured else "~") + _gib(replica.overhead)
    context = f"{replica.context:,}"
    if not replica.tokens:
        return weights, _gib(replica.kv) if replica.kv else "-", overhead, "-", context
    tokens = ("≥" if replica.approximate else "") + f"{replica.tokens:,}"
    requests = f"{replica.tokens / replica.context:.1f}"
    return weights, _gib(replica.kv), overhead, tokens, f"{context} x {requests}"


def document(plan: Plan) -> dict[str, Any]:
    """The plan for programs; bytes are integers.

    headroom_fraction: share of each GPU that stays free
    gpus: in the order of the box
        index, name, uuid (null: of a described box), memory_bytes,
        used_bytes (at the start), free_bytes (memory_bytes - used_bytes, with the headroom),
        replicas (names)
    replicas: in the order of the plan; bytes are those on each of its GPUs
        name ("chat", or "chat/1"), model, number, replicas (of this model), gpus (indices),
        tensor_parallel_size, pipeline_parallel_size, total_bytes (awake),
        resident_bytes (at the start; asleep if displaces), on_demand, pinned,
        displaces (true: other replicas on its GPUs sleep while it is awake),
        sleeps (true: it can sleep), host_bytes (host memory for its weights, for all its GPUs),
        and, null for a model of unknown size, which has a share of memory (total_bytes):
        weights_bytes, kv_cache_bytes, overhead_bytes (the sum is total_bytes; a sleeping
        replica holds overhead_bytes),
        overhead_measured (false: an estimate),
        kv_cache_tokens (on all its GPUs together; 0: an encoder),
        kv_cache_tokens_at_least (true: a lower bound),
        max_model_len, full_length_requests (that fit at a time; null: an encoder)
    problems: models that do not fit
        model, message, remedy (null: no change was found)
    """
    return {
        "headroom_fraction": plan.headroom,
        "gpus": [
            {
                "index": gpu.index,
                "name": gpu.name,
                "uuid": gpu.uuid,
                "memory_bytes": gpu.memory,
                "used_bytes": plan.used(gpu.index),
                "free_bytes": gpu.memory - plan.used(gpu.index),
                "replicas": [replica.name for replica in plan.on(gpu.index)],
            }
            for gpu in plan.box
        ],
        "replicas": [_replica(replica) for replica in plan.replicas],
        "problems": [
            {"model": problem.model, "message": problem.message, "remedy": problem.remedy}
            for problem in plan.problems
        ],
    }


def _replica(replica: PlannedReplica) -> dict[str, Any]:
    requests = round(replica.tokens / replica.context, 1) if replica.tokens else None
    sizes = {
        "weights_bytes": replica.weights,
        "kv_cache_bytes": replica.kv,
        "overhead_bytes": replica.overhead,
        "overhead_measured": replica.measured,
        "kv_cache_tokens": replica.tokens,
        "kv_cache_tokens_at_least": replica.approximate,
        "max_model_len": replica.context,
        "full_length_requests": requests,
    }
    return {
        "name": replica.name,
        "model": replica.model,
        "number": replica.number,
        "replicas": replica.of,
        "gpus": list(replica.devices),
        "tensor_parallel_size": replica.tensor_parallel_size,
        "pipeline_parallel_size": replica.pipeline_parallel_size,
        "total_bytes": replica.bytes,
        "resident_bytes": replica.resident,
        "on_demand": replica.on_demand,
        "pinned": replica.pinned,
        "displaces": replica.displaces,
        "sleeps": replica.sleeps,
        "host_bytes": replica.host,
        **(sizes if replica.known else dict.fromkeys(sizes)),
    }


def svg(plan: Plan) -> str:
    """`terminal` as a picture."""
    console = Console(file=io.StringIO(), record=True, width=_SVG_COLUMNS, color_system="truecolor")
    console.print(terminal(plan))
    return console.export_svg(title=f"Memory plan: {listed(plan.box)}")
