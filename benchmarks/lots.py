"""Requests that end together: how soon the next ones are in the engine.

    python -m benchmarks.lots VLLM_RS [--fronts ours rust] [--step-ms 4 5 6] [--rounds 3]

A closed loop of answers of one length falls into lots: as many requests as one step prefills
start together, end together, and their clients' next requests arrive together. An engine that
plans a step while one runs (ahead_core.py) has such a lot in its next plan but one if all of
it is back within one decode step; else it meets the next lot there, and TTFT is a prefill
step longer. So the time from the end of one request in the engine to the arrival of the next
decides. That is `back`, of which a part is the client's.

The front end runs on one CPU core, the engine core and the client, `vllm-rs bench serve` from
the binary VLLM_RS, on another. All front ends run all the time and are loaded in turn, with
the same prompts in a round. Figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from benchmarks import fronts, record, vllmbench
from benchmarks.frontend import FRONTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Figures = dict[str, float]

_PREFILL_US = 3.6  # a prompt token, as measured with a 1B shape on an H100
_REQUESTS = 6  # requests for each that is in flight
_BACK = {"2 %": 0.02, "half": 0.5, "90 %": 0.9}  # of the requests


def one_round(
    options: argparse.Namespace, front: fronts.Front, step_ms: float, seed: int, folder: Path
) -> Figures:
    count: int = options.in_flight
    load = vllmbench.Load(front.model, str(fronts.MODEL), count, count * _REQUESTS, 256, 128)
    front.core.set(step_ms=step_ms, prefill_us=_PREFILL_US)
    url = f"http://{fronts.HOST}:{front.port}"
    with fronts.pinned(options.cores.client):
        measured = vllmbench.run(str(options.vllm_rs), url, load, seed, folder)
    report = front.core.set()
    figures = {
        "TTFT p50 ms": float(measured["median_ttft_ms"]),
        "TTFT mean ms": float(measured["mean_ttft_ms"]),
        "TPOT p50 ms": float(measured["median_tpot_ms"]),
        "failed": float(measured["failed"]),
    }
    back = sorted(backs_ms(report["ended_s"], report["arrived_s"], count))
    return figures | {
        f"back ms, {name}": back[int(share * len(back))] for name, share in _BACK.items()
    }


def backs_ms(
    ended_s: Sequence[float], arrived_s: Sequence[float], in_flight: int
) -> Iterator[float]:
    """From each end to the request that replaces it, in a closed loop.

    The first and the last lots of a run are no lots of a loop, and are left out.
    """
    pairs = list(zip(ended_s, arrived_s[in_flight:], strict=False))
    for ended, arrived in pairs[in_flight:]:
        yield (arrived - ended) * 1000


def measure(options: argparse.Namespace, folder: Path) -> Iterator[tuple[float, str, Figures]]:
    """Each round: ms of a step, front end, figures."""
    with ExitStack() as stack:
        running: dict[str, fronts.Front] = {}
        for kind in options.fronts:
            binary = options.vllm_rs if kind == "rust" else None
            started = fronts.front(kind, options.cores, {"chat": {}}, binary, "ahead_core")
            running[kind] = stack.enter_context(started)
        for number in range(options.rounds):
            for step_ms in options.step_ms:
                seed = random.randrange(1_000_000_000)
                for kind in list(running)[:: -1 if number % 2 else 1]:
                    figures = one_round(options, running[kind], step_ms, seed, folder)
                    report = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
                    print(
                        f"round {number + 1}  steps of {step_ms:g} ms  {kind}: {report}", flush=True
                    )
                    yield step_ms, kind, figures


def table(step_ms: float, rounds: Mapping[str, Sequence[Figures]]) -> Table:
    shown = Table(title=f"steps of {step_ms:g} ms, medians of rounds")
    shown.add_column("")
    for kind in rounds:
        shown.add_column(kind, justify="right")
    for name in next(iter(rounds.values()))[0]:
        medians = [statistics.median(each[name] for each in found) for found in rounds.values()]
        shown.add_row(name, *(f"{median:.3g}" for median in medians))
    return shown


def main() -> None:
    options = _options()
    found: dict[float, dict[str, list[Figures]]] = {}
    with tempfile.TemporaryDirectory(prefix="llmserve-lots-") as folder:
        for step_ms, kind, figures in measure(options, Path(folder)):
            found.setdefault(step_ms, {}).setdefault(kind, []).append(figures)
    console = Console(width=100)
    for step_ms, rounds in found.items():
        console.print(table(step_ms, rounds))
    if options.json is not None:
        record.save(options.json, "benchmarks.lots", found)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("vllm_rs", type=Path, help="vLLM's Rust binary, which is the client too")
    parser.add_argument("--fronts", nargs="+", choices=FRONTS, default=["ours", "rust"])
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--step-ms", nargs="+", type=float, default=[4, 5, 6])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    options.cores = fronts.Cores()
    return options


if __name__ == "__main__":
    main()
