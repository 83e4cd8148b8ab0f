"""What the dispatch policies give: TTFT under a skewed load, and prompts that begin alike.

    python -m benchmarks.replicas [--rounds 3] [--seconds 60] [--json FILE]

One server with a model for each policy, each of two replicas, each replica on a fake engine
core of its own (fake_core.py) that runs 16 requests at once, so that queues build. The
policies get the same requests at the same times, one policy after the other, in another
order each round; every round has requests of its own, and the lottery draws anew. Figures
are medians over rounds, with the least and the largest.

skewed: Poisson arrivals, nine of ten short, one in ten with a long prompt or a long answer
(`KINDS`). Every request says with `max_tokens` how long its answer gets.

alike: 64 system prompts of 2,000 characters, each asked ten times, in random order, all
answers of one length. A repeat is at home where the prompt was first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import resource
import signal
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from benchmarks import fronts, loads, record
from benchmarks.traffic import prompt

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.client import Answer
    from benchmarks.fronts import Front

REPLICAS = 2
POLICIES = ("lottery", "shortest_queue", "prefix_affinity")
RUNNING = 16  # at once, in a replica
ENGINE = {"step_ms": 10, "max_running": RUNNING, "prefill_us": 50}
RATE = 23.5  # arrivals a second, of both loads: some 0.75 and 0.65 of what the replicas can
PROMPTS, ASKS, CHARACTERS = 64, 10, 2000
QUESTION_TOKENS, ANSWER_TOKENS = 24, 64
_PREFIX_TOKENS = 128  # of a system prompt: enough to tell it from the others
_READY_S = 120.0
_REST_S = 120.0  # after the last arrival, the longest that answers take
_WARM_UP = 64

Figures = dict[str, float]
Cases = dict[str, list[Figures]]  # of each round


@dataclass(frozen=True)
class Kind:
    """Requests whose sizes are log-uniform between two bounds, in tokens."""

    share: float
    prompt: tuple[int, int]
    answer: tuple[int, int]


KINDS = (
    Kind(0.90, prompt=(24, 192), answer=(16, 128)),
    Kind(0.05, prompt=(800, 1600), answer=(16, 128)),
    Kind(0.05, prompt=(24, 192), answer=(400, 1800)),
)


class Arrival(NamedTuple):
    at_s: float  # after the load's beginning
    body: dict[str, Any]  # its seed is the length of its answer


def skewed(seconds: float, seed: int) -> list[Arrival]:
    chance, at_s = random.Random(seed), 0.0
    arrivals: list[Arrival] = []
    while (at_s := at_s + chance.expovariate(RATE)) < seconds:
        (kind,) = chance.choices(KINDS, [kind.share for kind in KINDS])
        text = prompt(f"{seed}.{len(arrivals)}", _log_uniform(kind.prompt, chance), chance)
        arrivals.append(Arrival(at_s, _body(text, _log_uniform(kind.answer, chance))))
    return arrivals


def alike(seed: int) -> list[Arrival]:
    chance, at_s = random.Random(seed), 0.0
    systems = [prompt(f"{seed}.{n}", CHARACTERS, chance)[:CHARACTERS] for n in range(PROMPTS)]
    asked = systems * ASKS
    chance.shuffle(asked)
    arrivals: list[Arrival] = []
    for number, system in enumerate(asked):
        at_s += chance.expovariate(RATE)
        body = _body(prompt(f"{number}", QUESTION_TOKENS, chance), ANSWER_TOKENS)
        body["messages"].insert(0, {"role": "system", "content": system})
        arrivals.append(Arrival(at_s, body))
    return arrivals


def _log_uniform(bounds: tuple[int, int], chance: random.Random) -> int:
    least, most = bounds
    return round(least * math.pow(most / least, chance.random()))


def _body(text: str, tokens: int) -> dict[str, Any]:
    return loads.body_of(text, tokens) | {"seed": tokens}


@dataclass(frozen=True)
class Played:
    """Requests that were sent as they arrive, all answered."""

    answers: list[Answer]
    late_s: list[float]  # what was sent later than it arrived
    running_s: list[float]  # of each replica, up to the last arrival
    prefixes: list[dict[str, list[float]]]  # of each replica: when prompts of each came
    wall_s: float  # up to the last arrival
    front_s: float  # CPU time of the front end in that time

    def figures(self) -> Figures:
        ttft = [answer.ttft_s for answer in self.answers]
        return {
            "requests": len(self.answers),
            "utilisation": sum(self.running_s) / (REPLICAS * RUNNING * self.wall_s),
            "TTFT p50 ms": loads.percentile(ttft, 50) * 1000,
            "TTFT p99 ms": loads.percentile(ttft, 99) * 1000,
            "sent late p99 ms": loads.percentile(self.late_s, 99) * 1000,
            "front end's core %": self.front_s / self.wall_s * 100,
        }


async def play(front: Front, policy: str, arrivals: list[Arrival]) -> Played:
    cores = front.cores[policy]
    for core in cores:
        core.set()  # begin a new report
    began, front_s = time.monotonic(), front.process.cpu_s()
    async with asyncio.timeout(arrivals[-1].at_s + _REST_S), asyncio.TaskGroup() as tasks:
        asked = []
        for at_s, body in arrivals:
            await asyncio.sleep(began + at_s - time.monotonic())
            asked.append(tasks.create_task(_ask(front, body | {"model": policy})))
        wall_s, front_s = time.monotonic() - began, front.process.cpu_s() - front_s
        # A core answers between steps; what streams meanwhile is not to wait for that.
        before = [await asyncio.to_thread(core.set) for core in cores]
    after = [core.set() for core in cores]
    answers = [task.result() for task in asked]
    return Played(
        answers,
        [answer.sent_s - began - at for answer, (at, _) in zip(answers, arrivals, strict=True)],
        [report["running_s"] for report in before],
        [_joined(reports) for reports in zip(before, after, strict=True)],
        wall_s,
        front_s,
    )


async def _ask(front: Front, body: dict[str, Any]) -> Answer:
    return loads.whole(await front.ask(body), body["seed"])


def _joined(reports: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    joined: defaultdict[str, list[float]] = defaultdict(list)
    for report in reports:
        for prefix, times in report["prefixes"].items():
            joined[prefix] += times
    return joined


def repeats(replicas: list[dict[str, list[float]]]) -> Figures:
    """Where repeats of prompts went. Raises RuntimeError unless the cores saw all of them."""
    found = {prefix for replica in replicas for prefix in replica}
    seen = [[replica[prefix] for replica in replicas if prefix in replica] for prefix in found]
    asks = sum(len(times) for each in seen for times in each)
    if (len(found), asks) != (PROMPTS, PROMPTS * ASKS):
        raise RuntimeError(f"{len(found)} prompts came {asks} times: not {PROMPTS}, {ASKS} each")
    count = asks - len(found)
    return {
        "repeats at home %": sum(len(min(each)) - 1 for each in seen) / count * 100,
        "repeats where seen before %": sum(len(t) - 1 for e in seen for t in e) / count * 100,
        "prompts on both replicas": sum(len(each) > 1 for each in seen),
    }


@dataclass
class Benchmark:
    front: Front
    seconds: float
    seed: int

    async def warm_up(self) -> None:
        await self._until_ready()
        for policy, cores in self.front.cores.items():
            for core in cores:
                core.set(**ENGINE)
            body = _body("Write a story.", 16) | {"model": policy}
            await asyncio.gather(*(_ask(self.front, body) for _ in range(_WARM_UP)))

    async def _until_ready(self) -> None:
        """A model answers as soon as one of its replicas does."""
        states: list[str] = []
        async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(_READY_S):
            while states.count("ready") < REPLICAS * len(POLICIES):
                await asyncio.sleep(0.25)
                page = await client.get(f"http://{fronts.HOST}:{self.front.port}/metrics")
                states = [
                    sample.labels["state"]
                    for family in text_string_to_metric_families(page.text)
                    for sample in family.samples
                    if sample.name == "llmserve_model_state" and sample.value
                ]
                if "failed" in states:
                    raise RuntimeError("a replica did not start")

    async def round(self, number: int) -> dict[str, Figures]:
        """The figures of each case."""
        figures: dict[str, Figures] = {}
        seed = self.seed + number
        turn = number % len(POLICIES)
        for policy in POLICIES[turn:] + POLICIES[:turn]:
            figures[f"skewed {policy}"] = await self._skewed(policy, seed)
            figures[f"alike {policy}"] = await self._alike(policy, seed)
        for case, found in figures.items():
            lottery = figures[f"{case.split()[0]} lottery"]
            found["TTFT p99 / lottery's"] = found["TTFT p99 ms"] / lottery["TTFT p99 ms"]
        return figures

    async def _skewed(self, policy: str, seed: int) -> Figures:
        return (await play(self.front, policy, skewed(self.seconds, seed))).figures()

    async def _alike(self, policy: str, seed: int) -> Figures:
        cores = self.front.cores[policy]
        for core in cores:
            core.set(prefix_tokens=_PREFIX_TOKENS)
        played = await play(self.front, policy, alike(seed))
        for core in cores:
            core.set(prefix_tokens=0)
        return played.figures() | repeats(played.prefixes)


async def measure(
    front: Front, options: argparse.Namespace, where: dict[str, Any], console: Console
) -> Cases:
    benchmark = Benchmark(front, options.seconds, options.seed)
    await benchmark.warm_up()
    cases: Cases = {}
    for number in range(options.rounds):
        for case, figures in (await benchmark.round(number)).items():
            cases.setdefault(case, []).append(figures)
        console.print(f"round {number + 1} of {options.rounds} done")
        if options.json:  # after each, so an interrupted run has results
            options.json.write_text(json.dumps(where | report(options, cases), indent=1) + "\n")
    return cases


def medians(cases: Cases) -> dict[str, Figures]:
    return {
        case: {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        for case, rounds in cases.items()
    }


def tables(cases: Cases) -> Iterable[Table]:
    for load in ("skewed", "alike"):
        names = sorted((case for case in cases if case.startswith(load)), key=_place)
        shown = Table(title=f"{load}: medians of {len(cases[names[0]])} rounds, least to largest")
        shown.add_column("")
        for case in names:
            shown.add_column(case.removeprefix(f"{load} "), justify="right")
        for figure in cases[names[0]][0]:
            shown.add_row(figure, *(_shown([r[figure] for r in cases[case]]) for case in names))
        yield shown


def _place(case: str) -> tuple[int, str]:
    return POLICIES.index(case.split()[1].rstrip(",")), case


def _shown(values: list[float]) -> str:
    median, least, largest = statistics.median(values), min(values), max(values)
    spread = f"\n{least:.4g} to {largest:.4g}" if least < largest else ""
    return f"{median:.4g}{spread}"


def report(options: argparse.Namespace, cases: Cases) -> dict[str, Any]:
    load = {"rate": RATE, "seconds": options.seconds, "seed": options.seed}
    return {
        "load": load | {"engine": ENGINE, "kinds": [asdict(kind) for kind in KINDS]},
        "medians": medians(cases),
        "rounds": cases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals, skewed load")
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    # So that what was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    console, cores = Console(), fronts.Cores()
    where = record.circumstances("benchmarks.replicas")  # before a core is all that there is
    models = {policy: {"replicas": REPLICAS, "dispatch": policy} for policy in POLICIES}
    with (
        fronts.pinned(cores.client),
        fronts.front("ours", cores, models) as front,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        cases = runner.run(measure(front, options, where, console))
    for table in tables(cases):
        console.print(table)


if __name__ == "__main__":
    main()
