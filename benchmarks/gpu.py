"""Front ends side by side on one GPU, under vLLM's own load client.

    python -m benchmarks.gpu REGISTRY OUT --sides ours rust --rounds 6

Each side is a server of its own with an engine for the registry's one model: `ours`, `stock`,
`rust` (vLLM's Rust front end) or `url:URL`. All run all the time and one is loaded at a time, so
the registry leaves memory for all of them (`gpu_memory_utilization: 0.4` for two). Rounds are
in turn, A B B A, and the sides get the same prompts in a round. No round repeats the prompts
of another: an engine keeps what it has seen, and a round that finds its prompts there says
nothing. Figures are medians over rounds; a ratio is the median of the rounds' own ratios.

TTFT is to the first content, by the client. `engine ms` is what of its mean the engine itself
took, queue and prefill, by the server's own metrics.

Needs `vllm` and `vllm-rs` of vLLM 0.32 in PATH.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks import record, vllmbench
from benchmarks.servers import STARTS, Side, Starting, running
from llmserve.registry.loader import load as load_registry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from llmserve.registry.spec import ModelSpec

Figures = dict[str, float]

# By what the client calls it.
ROWS = {
    "output tok/s": "output_throughput",
    "TTFT p50 ms": "median_ttft_ms",
    "TTFT p99 ms": "p99_ttft_ms",
    "TTFT mean ms": "mean_ttft_ms",
    "engine ms": "engine_ms",
    "TPOT p50 ms": "median_tpot_ms",
    "ITL p99 ms": "p99_itl_ms",
    "E2E p50 ms": "median_e2el_ms",
    "failed": "failed",
}
_OF_ENGINE = re.compile(
    r"^vllm:request_(?:queue|prefill)_time_seconds_(sum|count)\{.*\} (\S+)$", re.MULTILINE
)
_REQUESTS, _LEAST = 8, 256  # requests for each that is in flight, and in all
_ENTERED_S = 1.5  # until a server's figures are on its page


def measure(
    options: argparse.Namespace, spec: ModelSpec, urls: Mapping[str, str]
) -> Iterator[tuple[int, str, Figures]]:
    """Each round: requests in flight, side, figures."""
    for number in range(options.rounds):
        for count in options.in_flight:
            seed = options.seed + number * 10_000 + count
            labels = list(urls)[:: -1 if number % 2 else 1]
            for label in labels:
                figures = one_round(options, spec, urls[label], count, seed)
                line = "  ".join(f"{name} {figures[key]:.4g}" for name, key in ROWS.items())
                print(f"round {number + 1}  {count} in flight  {label}: {line}", flush=True)
                yield count, label, figures


def one_round(
    options: argparse.Namespace, spec: ModelSpec, url: str, count: int, seed: int
) -> Figures:
    """One run of the client. Raises CalledProcessError if it fails."""
    requests = max(count * _REQUESTS, _LEAST)
    load = vllmbench.Load(spec.name, spec.model, count, requests, options.input, options.output)
    before_s, before = engine_s(url)
    measured = vllmbench.run("vllm-rs", url, load, seed, options.out)
    time.sleep(_ENTERED_S)
    after_s, after = engine_s(url)
    measured["engine_ms"] = (after_s - before_s) / max(1, after - before) * 1000
    return {key: float(measured[key]) for key in ROWS.values()}


def engine_s(url: str) -> tuple[float, float]:
    """What requests have spent in the engine up to their first tokens, and how many there were."""
    page = httpx.get(f"{url}/metrics", trust_env=False).raise_for_status().text
    values = {"sum": 0.0, "count": 0.0}
    for kind, value in _OF_ENGINE.findall(page):
        values[kind] += float(value)
    return values["sum"], values["count"] / 2  # of queue and prefill


def table(count: int, rounds: Mapping[str, Sequence[Figures]]) -> Table:
    """Medians, and the first side's ratios to the others with the least and the largest."""
    first, *others = rounds
    shown = Table(title=f"{count} in flight, medians of {len(rounds[first])} rounds")
    shown.add_column("")
    for heading in [*rounds, *(f"{first}/{other}" for other in others)]:
        shown.add_column(heading, justify="right")
    for name, key in ROWS.items():
        row = [f"{_median(key, rounds[side]):.4g}" for side in rounds]
        row += [_ratio(key, rounds[first], rounds[other]) for other in others]
        shown.add_row(name, *row)
    return shown


def _median(key: str, rounds: Sequence[Figures]) -> float:
    return statistics.median(each[key] for each in rounds) if rounds else float("nan")


def _ratio(key: str, ours: Iterable[Figures], theirs: Iterable[Figures]) -> str:
    pairs = zip(ours, theirs, strict=False)  # the last round may have been broken off
    found = [a[key] / b[key] for a, b in pairs if a[key] * b[key]]
    if not found:
        return ""
    return f"{statistics.median(found):.3f} ({min(found):.2f} to {max(found):.2f})"


def main() -> None:
    options = _options()
    (spec,) = load_registry(options.registry).models
    options.out.mkdir(parents=True, exist_ok=True)
    starting = Starting([spec], ["--disable-uvicorn-access-log"], options.wait)
    found: dict[int, dict[str, list[Figures]]] = {}
    # Ctrl-C ends the measuring, and the results so far are printed.
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        urls: dict[str, str] = {}
        for side in options.sides:
            addresses = stack.enter_context(running(side, [spec.name], starting))
            urls[side.label] = "http://{}:{}".format(*addresses[spec.name])
            print(f"{side.label} runs", flush=True)
        for count, label, figures in measure(options, spec, urls):
            rounds = found.setdefault(count, {label: [] for label in urls})
            rounds[label].append(figures)
            record.save(options.out / "gpu.json", "benchmarks.gpu", found)
    console = Console(width=140)
    for count, rounds in found.items():
        console.print(table(count, rounds))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("registry", type=Path, help="of one model")
    parser.add_argument("out", type=Path, help="a folder for what was found")
    parser.add_argument("--sides", nargs="+", type=Side.parse, required=True, help=f"{STARTS}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--in-flight", nargs="+", type=int, default=[16, 256, 512])
    parser.add_argument("--input", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000_000))
    parser.add_argument("--wait", type=float, default=300, help="seconds for a start")
    return parser.parse_args()


if __name__ == "__main__":
    main()
