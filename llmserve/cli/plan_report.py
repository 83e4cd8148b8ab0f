"""A memory plan as it is shown: in a terminal, as JSON, as a picture. Pure."""

from __future__ import annotations

import string
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape, quoteattr

from rich.cells import cell_len, set_cell_size
from rich.console import Group
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmserve.gpus.device import GIB, listed, short_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, ConsoleOptions, RenderableType

    from llmserve.gpus.device import Gpu
    from llmserve.planning.plan import Plan, PlannedReplica, Problem

# As far from white as from black, so that either page and either ink will do.
PALETTE = ("#2b6cb8", "#c2500c", "#1d8045", "#b83280", "#7a55c7", "#0b7d86", "#8f6708", "#cc3340")
_LETTERS = string.ascii_uppercase + string.ascii_lowercase


@dataclass(frozen=True)
class Kind:
    name: str
    glyph: str
    opacity: float = 1.0


WEIGHTS = Kind("weights", "█")
KV_CACHE = Kind("KV cache", "▓", 0.5)
OVERHEAD = Kind("overhead", "▒", 0.25)
SHARE = Kind("share", "░", 0.25)  # of a model of which nothing else is known
ASLEEP = Kind("asleep", "▂", 0.25)  # of who displaces others once it is awake
FREE = Kind("free", "·")


@dataclass(frozen=True)
class Part:
    """Of a GPU's memory, what one replica has for one purpose, or what nobody has."""

    kind: Kind
    size: int  # bytes
    replica: PlannedReplica | None = None  # None: free


@dataclass(frozen=True)
class Mark:
    """What tells a model from the others wherever it is drawn."""

    letter: str
    color: str


def marks(plan: Plan) -> dict[str, Mark]:
    """Each model's mark, by the order of the plan; letters and colours repeat."""
    models = dict.fromkeys(replica.model for replica in plan.replicas)
    return {
        model: Mark(_LETTERS[index % len(_LETTERS)], PALETTE[index % len(PALETTE)])
        for index, model in enumerate(models)
    }


def parts(plan: Plan, gpu: Gpu) -> list[Part]:
    """What lies on a GPU at the start, replica by replica, then what is free; none is empty."""
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
    """What a legend explains, besides what is free."""
    shown = {kind for replica in plan.replicas for kind, _ in _sizes(replica)}
    return [WEIGHTS, KV_CACHE, OVERHEAD, *(kind for kind in (SHARE, ASLEEP) if kind in shown)]


def cells(sizes: Sequence[int], width: int) -> list[int]:
    """`width` cells shared out by positive sizes, one at least to each while there is room.

    Without room, the smallest get none.
    """
    if len(sizes) > width:
        kept = set(sorted(range(len(sizes)), key=lambda i: -sizes[i])[:width])
        return [int(i in kept) for i in range(len(sizes))]
    exact = [size * width / sum(sizes) for size in sizes]
    counts = [max(1, int(share)) for share in exact]
    while (missing := width - sum(counts)) and counts:
        step = 1 if missing > 0 else -1
        able = [i for i, count in enumerate(counts) if count + step >= 1]
        counts[max(able, key=lambda i: step * (exact[i] - counts[i]))] += step
    return counts


def terminal(plan: Plan) -> RenderableType:
    """A bar for each GPU, a row for each replica, and the problems; from 80 columns."""
    marked = marks(plan)
    blocks: list[RenderableType] = [_bars(plan, marked), _legend(plan)]
    if plan.replicas:
        blocks += ["", _rows(plan, marked)]
    for problem in plan.problems:
        blocks += ["", *_told(problem)]
    return Group(*blocks)


class Bar:
    """A GPU's parts in as many cells as there are; a letter begins each replica."""

    def __init__(self, drawn: Sequence[Part], marked: dict[str, Mark]) -> None:
        self._parts = drawn
        self._marks = marked

    def text(self, width: int) -> Text:
        bar = Text(no_wrap=True)
        begun: PlannedReplica | None = None
        counts = cells([part.size for part in self._parts], width)
        for part, count in zip(self._parts, counts, strict=True):
            if not count or part.replica is None:
                bar.append(part.kind.glyph * count, "dim")
                continue
            mark = self._marks[part.replica.model]
            begins = part.replica is not begun
            if begins:
                bar.append_text(_letter(mark))
            # The letter stands for a cell of the part that it begins.
            bar.append(part.kind.glyph * (count - begins), mark.color)
            begun = part.replica
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
            *map(Text, _figures(replica)),
        )
    return table


def _told(problem: Problem) -> list[RenderableType]:
    what = Text.assemble((problem.model, "bold red"), ": ", problem.message)
    if problem.key == "model" and not problem.remedy:  # of its files: not for want of room
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
    """As in "0,1" and in "0-7,9"; two in a row are no range."""
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


def _figures(replica: PlannedReplica) -> tuple[str, str, str, str, str]:
    """Weights, KV cache, overhead, tokens, context."""
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

    headroom_fraction: share of each GPU that is left free
    gpus: in the order of the box
        index, name, uuid (null: described, not seen), memory_bytes,
        used_bytes (at the start), free_bytes (memory_bytes - used_bytes, headroom included),
        replicas (their names)
    replicas: in the order of the plan; bytes are those on each of its GPUs
        name ("chat", or "chat/1"), model, number, replicas (of this model), gpus (indices),
        tensor_parallel_size, pipeline_parallel_size, total_bytes (awake),
        resident_bytes (at the start; asleep if displaces), on_demand, pinned,
        displaces (true: others on its GPUs sleep while it is awake), sleeps (true: it may be
        put to sleep), host_bytes (of host memory for its weights asleep, of all its GPUs),
        and, null where nothing is known of the model but its share of memory (total_bytes):
        weights_bytes, kv_cache_bytes, overhead_bytes (together total_bytes; asleep, it holds
        overhead_bytes),
        overhead_measured (false: an estimate),
        kv_cache_tokens (on all its GPUs together; 0: an encoder),
        kv_cache_tokens_at_least (true: a lower bound),
        max_model_len, full_length_requests (that fit at a time; null: an encoder)
    problems: models that do not fit
        model, message, remedy (null: none was found)
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
    figures = {
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
        **(figures if replica.known else dict.fromkeys(figures)),
    }


# Pixels of the picture.
_CARD, _MARGIN, _LEFT, _RIGHT = 960, 24, 176, 84
_ROW, _NAMES, _BAR = 66, 18, 28
_LINE, _SWATCH = 24, 14
_SIZE = 13  # of letters
_INK, _FAINT, _RED, _PAPER, _EMPTY = "#1b2430", "#5b6675", "#b3261e", "#ffffff", "#e6eaef"


def svg(plan: Plan) -> str:
    """A picture of the GPUs, all to one scale; it stands alone, on a background of its own."""
    return _Picture(plan).text()


class _Picture:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._marks = marks(plan)
        longest = max((max(gpu.memory, plan.used(gpu.index)) for gpu in plan.box), default=1)
        self._scale = (_CARD - 2 * _MARGIN - _LEFT - _RIGHT) / longest  # pixels a byte

    def text(self) -> str:
        top = 82 if self._plan.problems else 58
        end = top + _ROW * len(self._plan.box)
        rows = [
            line
            for row, gpu in enumerate(self._plan.box)
            for line in self._gpu(gpu, top + row * _ROW + _NAMES)
        ]
        legend, height = self._legend(end)
        title = f"Memory plan: {listed(self._plan.box)}"
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_CARD} {height:g}"'
            f' role="group" aria-label={quoteattr(title)}'
            f' font-family="system-ui, sans-serif" font-size="{_SIZE}">'
        )
        card = _rect(0, 0, _CARD, height, f'fill="{_PAPER}" rx="10"')
        lines = [head, f"<title>{escape(title)}</title>", card, *self._heading(), *rows, *legend]
        return "\n".join([*lines, "</svg>\n"])

    def _heading(self) -> Iterator[str]:
        width = _CARD - 2 * _MARGIN
        name = _cut(listed(self._plan.box), width, 16)
        yield _label(_MARGIN, 36, name, f'fill="{_INK}" font-size="16" font-weight="600"')
        if self._plan.problems:
            models = ", ".join(problem.model for problem in self._plan.problems)
            yield _label(_MARGIN, 60, _cut(f"does not fit: {models}", width), f'fill="{_RED}"')

    def _gpu(self, gpu: Gpu, y: float) -> Iterator[str]:
        """Its name, its bar under the names of what is in it, what is used."""
        used = self._plan.used(gpu.index)
        left, right = _MARGIN + _LEFT, _MARGIN + _LEFT + max(gpu.memory, used) * self._scale
        yield _label(_MARGIN, y + 12, _cut(f"{gpu.index} {short_name(gpu.name)}", _LEFT - 12))
        yield _label(_MARGIN, y + 27, f"{_gib(gpu.memory)} GiB", f'fill="{_FAINT}"')
        yield from self._names(gpu, left, right, y - 5)
        drawn = parts(self._plan, gpu)
        starts = accumulate((part.size for part in drawn), initial=0)
        for part, start in zip(drawn, starts, strict=False):
            yield from self._part(gpu, part, left + start * self._scale, y)
        over = _RED if used > gpu.memory else _FAINT
        yield _label(right + 10, y + 12, f"{_gib(used)} GiB")
        yield _label(right + 10, y + 27, f"{used / gpu.memory:.0%}", f'fill="{over}"')

    def _names(self, gpu: Gpu, left: float, right: float, y: float) -> Iterator[str]:
        """Each replica's name, or its letter alone, up to where the next one begins."""
        replicas = self._plan.on(gpu.index)
        ends = accumulate(replica.resident * self._scale for replica in replicas)
        starts = [left, *(left + end for end in ends)]
        starts[-1] = right  # nobody begins in what is free
        for replica, start, end in zip(replicas, starts, starts[1:], strict=False):
            mark = self._marks[replica.model]
            names = (f"{mark.letter} {replica.name}", mark.letter)
            more = f'fill="{mark.color}" font-weight="600"'
            yield from _fitting(start, y, end - start, names, more)

    def _part(self, gpu: Gpu, part: Part, x: float, y: float) -> Iterator[str]:
        whose, color, awake = "", _EMPTY, ""
        size = f"{_gib(part.size)} GiB"
        if part.replica:
            whose, color = f"{part.replica.name}: ", self._marks[part.replica.model].color
            estimate = part.kind in {OVERHEAD, ASLEEP} and not part.replica.measured
            size = f"~{size}" if estimate else size
            awake = f", awake {_gib(part.replica.bytes)} GiB" if part.kind is ASLEEP else ""
        width = part.size * self._scale
        texts = (f"{part.kind.name} {size}", size, size.removesuffix(" GiB"))
        ink = _PAPER if part.kind is WEIGHTS else _INK
        title = escape(f"GPU {gpu.index}: {whose}{part.kind.name} {size}{awake}")
        yield f'<g role="img"><title>{title}</title>'
        yield _rect(x, y, width, _BAR, _fill(color, part.kind))
        yield from _fitting(x + 5, y + 18, width - 10, texts, f'fill="{ink}"')
        yield "</g>"

    def _legend(self, top: float) -> tuple[list[str], float]:
        """The kinds in a line, then the models, and where the card ends."""
        kinds = [(_fill(_INK, kind), kind.name) for kind in _kinds(self._plan)]
        kinds.append((_fill(_EMPTY, FREE), _free(self._plan)))
        on_demand = {one.model for one in self._plan.replicas if one.on_demand}
        models = [
            (
                _fill(mark.color, WEIGHTS),
                f"{mark.letter} {model}{' (on demand)' if model in on_demand else ''}",
            )
            for model, mark in self._marks.items()
        ]
        drawn: list[str] = []
        y = top - _LINE + 6.0
        for keys in (kinds, models):
            x = float(_CARD)
            for fill, name in keys:
                text = _cut(name, _CARD - 2 * _MARGIN - 20)
                width = 20 + _width(text)
                if x + width > _CARD - _MARGIN:
                    x, y = _MARGIN, y + _LINE
                drawn += [_rect(x, y, _SWATCH, _SWATCH, fill), _label(x + 20, y + 12, text)]
                x += width + 18
        return drawn, y + _SWATCH + _MARGIN


def _fill(color: str, kind: Kind) -> str:
    return f'fill="{color}" fill-opacity="{kind.opacity}"'


def _rect(x: float, y: float, width: float, height: float, more: str) -> str:
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" {more}/>'


def _label(x: float, y: float, text: str, more: str = f'fill="{_INK}"') -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}" {more}>{escape(text)}</text>'


def _fitting(x: float, y: float, width: float, texts: Sequence[str], more: str) -> Iterator[str]:
    """The first of some texts that fits, if one does."""
    for text in texts:
        if _width(text) <= width:
            yield _label(x, y, text, more)
            return


def _width(text: str, size: float = _SIZE) -> float:
    """Pixels that a text takes at most in usual fonts."""
    return cell_len(text) * size * 0.6


def _cut(text: str, width: float, size: float = _SIZE) -> str:
    """A text, or as much of its beginning as fits and an ellipsis."""
    if _width(text, size) <= width:
        return text
    return set_cell_size(text, int(width / (size * 0.6)) - 1).rstrip() + "…"
