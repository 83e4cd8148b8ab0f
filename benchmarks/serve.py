"""What servers with real engines give over HTTP, alone or one against the other.

    python -m benchmarks.serve --start ours --registry models.yaml --concurrency 4
    python -m benchmarks.serve --url http://127.0.0.1:8000 --rate 3.5 --requests 200
    python -m benchmarks.serve --ab ours stock --rounds 5 --json out.json --plot out.png

A server is a URL or is started here: `ours` is `llmserve up`, `stock` vLLM's own server
(one for each model) with the same engine arguments, `rust` that with its Rust front end. Load
is closed (`--concurrency`: so many requests in flight, a finished one replaced at once) or open
(`--rate`: Poisson arrivals). Each round begins with a warm-up that is not counted.

`--ab` interleaves rounds, A B B A A B ..., and both sides get the same requests. Both servers
run all the time, but only one is loaded at a time: the other idles. Where an idle engine takes
what the loaded one needs (GPU memory, threads that spin), `--restart` starts and ends the
server around each round. Figures are medians over rounds; a ratio is the median of the
rounds' own ratios A/B, with the least and the largest.

TTFT: to the first text; a chunk with the role alone does not count. ITL: between reads with
text. TPOT: from the first text to the last, per token after the first. E2E: to the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import secrets
import shlex
import signal
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks import plot
from benchmarks.record import circumstances
from benchmarks.servers import STARTS, Side, Starting, running
from benchmarks.traffic import ALL, SHARES, Load, drive, samples
from llmserve.errors import ConfigError
from llmserve.registry.loader import load as load_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from benchmarks.servers import Addresses
    from benchmarks.traffic import Figures, Round

ROWS = {
    "output tok/s": "output_tok_s",
    "requests/s": "requests_s",
    **{
        f"{name} p{share} ms": f"{name.lower()}_ms_p{share}"
        for name in ("TTFT", "ITL", "TPOT", "E2E")
        for share in SHARES
    },
    "output tokens": "tokens",
    "errors": "errors",
}
PANELS = {"TTFT, ms": "ttft", "TPOT, ms": "tpot", "ITL, ms": "itl"}


# --- figures


def medians(rounds: Sequence[Round], model: str) -> Figures:
    each = [found.figures(model) for found in rounds]
    return {key: _median([figures[key] for figures in each]) for key in ROWS.values()}


def ratios(a: Sequence[Round], b: Sequence[Round], model: str) -> dict[str, list[float]]:
    """A/B of each round, for every figure."""
    pairs = [(x.figures(model), y.figures(model)) for x, y in zip(a, b, strict=True)]
    return {
        key: found
        for key in ROWS.values()
        if key != "errors" and (found := [x[key] / y[key] for x, y in pairs if x[key] * y[key] > 0])
    }


def _median(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else float("nan")


# --- rounds


def measure(
    sides: Sequence[Side], load: Load, options: argparse.Namespace, starting: Starting
) -> list[list[Round]]:
    """The rounds of each side."""
    found: list[list[Round]] = [[] for _ in sides]
    run = secrets.token_hex(2)  # else a running server would know the requests of the last run
    servers: list[Callable[[], contextlib.AbstractContextManager[Addresses]]] = []
    with contextlib.ExitStack() as stack:
        for side in sides:
            start = partial(running, side, load.models, starting)
            if options.restart:
                servers.append(start)
                continue
            servers.append(partial(kept, stack.enter_context(start())))
            print_progress(f"{side.label} runs")
        for number in range(options.rounds):
            for place in sorted(range(len(sides)), reverse=number % 2 == 1):
                with servers[place]() as addresses:
                    tag = f"{run}.{'ab'[place]}{number}"
                    found[place].append(one_round(load, options.warmup, addresses, tag, number))
                print_progress(
                    f"round {number + 1}, {sides[place].label}: {in_short(found[place][-1])}"
                )
    return found


def kept(addresses: Addresses) -> contextlib.AbstractContextManager[Addresses]:
    """A server that neither starts nor ends with a round."""
    return contextlib.nullcontext(addresses)


def one_round(load: Load, warmup: int, addresses: Addresses, tag: str, number: int) -> Round:
    """Raises SystemExit if no request of the warm-up is answered."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if warmup:
            first = replace(load, requests=warmup, rate=None)
            warm = runner.run(drive(first, addresses, f"{tag}w", f"{load.seed}/{number}/warm"))
            errors = [answer.error for answer in warm.of(ALL) if answer.error]
            if len(errors) == warmup:
                raise SystemExit(f"no request is answered: {errors[0]}")
        return runner.run(drive(load, addresses, tag, f"{load.seed}/{number}"))


# --- output


def print_progress(text: str) -> None:
    """Progress; the figures themselves go to the standard output."""
    print(text, file=sys.stderr, flush=True)


def in_short(found: Round) -> str:
    figures = found.figures(ALL)
    return (
        f"{figures['output_tok_s']:.1f} tok/s, TTFT {figures['ttft_ms_p50']:.0f} ms, "
        f"TPOT {figures['tpot_ms_p50']:.2f} ms, {figures['errors']} errors"
    )


def show(sides: Sequence[Side], found: Sequence[Sequence[Round]], models: Sequence[str]) -> None:
    console = Console()
    for model in shown_models(models):
        console.print(table_of(sides, found, model))
    for side, rounds in zip(sides, found, strict=True):
        errors = [answer.error for each in rounds for answer in each.of(ALL) if answer.error]
        client = max(each.client_cpu for each in rounds)
        line = f"{side.label}: the client took {client:.1%} of a core"
        line += f"; {len(errors)} errors, the first: {errors[0]}" if errors else ""
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def table_of(sides: Sequence[Side], found: Sequence[Sequence[Round]], model: str) -> Table:
    count = len(found[0])
    table = Table(title=f"{model}, medians of {count} rounds" if count > 1 else model)
    table.add_column("")
    for side in sides:
        table.add_column(side.label, justify="right")
    if len(sides) > 1:
        table.add_column("A/B", justify="right")
        table.add_column("min to max", justify="right")
    columns = [medians(rounds, model) for rounds in found]
    compared = ratios(found[0], found[1], model) if len(sides) > 1 else {}
    for title, key in ROWS.items():
        digits = 0 if key in {"tokens", "errors"} else 2
        row = [f"{figures[key]:.{digits}f}" for figures in columns]
        if each := compared.get(key):
            row += [f"{_median(each):.3f}", f"{min(each):.3f} to {max(each):.3f}"]
        table.add_row(title, *row, end_section=key == "requests_s" or key.endswith("99"))
    return table


def shown_models(models: Sequence[str]) -> list[str]:
    return [ALL, *models] if len(models) > 1 else list(models)


def report(
    sides: Sequence[Side], found: Sequence[Sequence[Round]], options: argparse.Namespace
) -> dict[str, Any]:
    """All that was found and where, for `--json`."""
    models = shown_models(options.models)
    described = [
        {
            "label": side.label,
            "medians": {model: medians(rounds, model) for model in models},
            "rounds": [described_round(each, models) for each in rounds],
        }
        for side, rounds in zip(sides, found, strict=True)
    ]
    compared = {
        model: {
            key: {"median": _median(each), "min": min(each), "max": max(each), "rounds": each}
            for key, each in ratios(found[0], found[1], model).items()
        }
        for model in models
        if len(sides) > 1
    }
    return {
        **circumstances("benchmarks.serve"),
        "options": vars(options),
        "sides": described,
        "ratios": compared,
    }


def described_round(found: Round, models: Sequence[str]) -> dict[str, Any]:
    first = min((answer.sent_s for _, answer in found.answers if answer.sent_s), default=0.0)
    return {
        "wall_s": found.wall_s,
        "client_cpu": found.client_cpu,
        "figures": {model: found.figures(model) for model in models},
        "requests": [
            {
                "model": model,
                "error": answer.error,
                "tokens": answer.tokens,
                "sent_s": round(answer.sent_s - first, 5),
                "reads_s": [round(at - answer.sent_s, 5) for at in answer.reads_s],
                "done_s": round(answer.done_s - answer.sent_s, 5),
            }
            for model, answer in found.answers
        ],
    }


def draw(sides: Sequence[Side], found: Sequence[Sequence[Round]], file: Path) -> None:
    every = {
        side.label: samples(answer for each in rounds for answer in each.of(ALL))
        for side, rounds in zip(sides, found, strict=True)
    }
    panels = {
        title: {label: values[name] for label, values in every.items()}
        for title, name in PANELS.items()
    }
    plot.draw(panels, file)


# --- the command


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    server = parser.add_mutually_exclusive_group(required=True)
    server.add_argument("--url", help="a running server")
    server.add_argument("--start", choices=STARTS, help="a server to start")
    server.add_argument(
        "--ab", nargs=2, metavar=("A", "B"), help="two of: ours, stock, start:NAME, url:URL"
    )
    parser.add_argument("--registry", type=Path, default=Path("models.yaml"))
    parser.add_argument("--models", default="chat", help="names, with commas: a,b")
    parser.add_argument("--stock-args", default="", help="more arguments for vLLM's server")
    parser.add_argument("--start-timeout", type=float, default=900, metavar="S")
    parser.add_argument("--rounds", type=int, help="default: 5 with --ab, else 1")
    parser.add_argument("--restart", action="store_true", help="a new server for each round")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--concurrency", type=int, default=4, help="closed loop: requests in flight")
    pace.add_argument("--rate", type=float, help="open loop: requests a second")
    parser.add_argument("--requests", type=int, default=64, help="a round")
    parser.add_argument(
        "--warmup", type=int, help="requests before each round; default: --concurrency"
    )
    parser.add_argument("--input-tokens", type=int, default=256, help="about so many")
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--endpoint", choices=("chat", "completions"), default="chat")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a request")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, for programs")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="the distributions")
    return parser


def sides_of(options: argparse.Namespace) -> list[Side]:
    if options.ab:
        return [Side.parse(text, letter) for text, letter in zip(options.ab, "AB", strict=True)]
    return [Side.parse(f"url:{options.url}" if options.url else options.start)]


def starting_of(options: argparse.Namespace, sides: Sequence[Side]) -> Starting:
    """Reads the registry if a server is to be started. Raises SystemExit if it does not do."""
    specs = []
    if any(side.start for side in sides):
        try:
            known = {spec.name: spec for spec in load_registry(options.registry).models}
        except ConfigError as error:
            raise SystemExit(error.message) from None
        if missing := [name for name in options.models if name not in known]:
            raise SystemExit(f"{options.registry} has no {', '.join(missing)}: --models")
        specs = [known[name] for name in options.models]
    return Starting(specs, shlex.split(options.stock_args), options.start_timeout)


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    options.models = options.models.split(",")
    options.rounds = options.rounds or (5 if options.ab else 1)
    options.warmup = options.concurrency if options.warmup is None else options.warmup
    try:
        sides = sides_of(options)
    except ValueError as error:
        parser.error(str(error))
    if options.plot:
        plot.need_matplotlib()
    load = Load(
        options.models,
        options.requests,
        options.concurrency,
        options.rate,
        options.input_tokens,
        options.output_tokens,
        options.endpoint,
        options.seed,
        options.timeout,
    )
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the servers
    found = measure(sides, load, options, starting_of(options, sides))
    show(sides, found, options.models)
    if options.json:
        content = report(sides, found, options)
        options.json.write_bytes(orjson.dumps(content, default=str, option=orjson.OPT_INDENT_2))
    if options.plot:
        draw(sides, found, options.plot)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
