"""A model at three times its capacity: is it still useful, and does its neighbour notice?

    python -m benchmarks.overload [--rounds 3] [--json FILE]

One server with two models, `a` and `b`, each on a fake engine core (fake_core.py) that runs
16 requests at once, one token of each every 5 ms: some 100 answers of 32 tokens a second.
Twice as many requests may be in flight, as many again may wait, and none may take longer than
`DEADLINE_S`. Each round has three phases.

alone: `b` gets Poisson arrivals at half of what its engine can.

peak: `a` alone, so many clients that each ask again as soon as they have an answer; the peak
is the goodput with as many of them as bring the most.

overload: `a` gets Poisson arrivals at three times that peak, and `b` the same requests at
the same times as when it was alone.

Goodput is whole answers within their deadline a second, by when they ended. Refused is what
got 503; what was let in and brought no whole answer in time has missed its deadline. An
answer of any kind, or none, later than `GRACE_S` after its deadline is late. Figures are
medians over rounds, with the least and the largest; a bound of 0 or of a Retry-After is
held to the worst round, others to the median.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import re
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import orjson
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from benchmarks import fronts, loads, record
from benchmarks.traffic import percentile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from benchmarks.fronts import Front

RUNNING, STEP_MS = 16, 5.0
LEAST_TOKENS, MOST_TOKENS = 24, 40  # of an answer: of one length, they would all end at once
CAPACITY = RUNNING * 1000 / STEP_MS / ((LEAST_TOKENS + MOST_TOKENS) / 2)  # answers a second
DEADLINE_S = 2.0
GRACE_S = 0.1  # for an answer to be written and read
OVER = 3.0  # times the peak
CLIENTS = (RUNNING, 2 * RUNNING, 4 * RUNNING)  # of the closed loop
PEAK_S = 2.0  # with each number of them
LINE = 2 * RUNNING
MODEL = {"max_in_flight": 2 * RUNNING, "max_queue": LINE, "timeout": DEADLINE_S}
_RAMP_S = 0.5  # until a load is what it will be
_GIVE_UP_S = 5.0  # after the deadline
_WARM_UP = 64

_TEXT = re.compile(rb'"content":\s?"(?!")')
_TOKENS = re.compile(rb'"completion_tokens":\s?(\d+)')
_RETRY_AFTER = re.compile(rb"\r\nretry-after: (\d+)\r\n", re.IGNORECASE)

Figures = dict[str, float]


class Bound(NamedTuple):
    limit: float
    least: bool = False  # or the most that is allowed
    worst: bool = False  # of the rounds, not their median


BOUNDS = {
    "a: goodput / peak": Bound(0.90, least=True),
    "a: refusals p99 ms": Bound(100),
    "a: least Retry-After s": Bound(1, least=True, worst=True),
    "a: late": Bound(0, worst=True),
    "a: neither 200, 503 nor 504": Bound(0, worst=True),
    "a: held after the end": Bound(0, worst=True),
    "b: TTFT p99 / alone": Bound(1.5),
    "b: E2E p99 / alone": Bound(1.5),
    "b: not answered": Bound(0, worst=True),
    # Beyond these it is the machine that was measured, and nothing above holds.
    "sent late p99 ms": Bound(20),
    "front end waited for its core %": Bound(10),
}


@dataclass
class Reply:
    """What came, and when. Times are `time.monotonic()`."""

    wanted: int  # tokens
    due_s: float  # when it was to be sent
    sent_s: float = 0.0
    status: int = 0  # 0: none came
    retry_after_s: int = 0  # 0: none
    first_s: float = 0.0  # text
    ended_s: float = 0.0
    tokens: int = 0  # of a whole answer

    @property
    def took_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def good(self) -> bool:
        return self.tokens == self.wanted and self.took_s <= DEADLINE_S

    @property
    def refused(self) -> bool:
        return self.status == 503

    @property
    def late(self) -> bool:
        return not self.ended_s or self.took_s > DEADLINE_S + GRACE_S


class Job(NamedTuple):
    at_s: float  # after the load's beginning
    model: str
    tokens: int


def arrivals(model: str, rate: float, seconds: float, seed: str) -> Iterator[Job]:
    chance, at_s = random.Random(seed), 0.0
    while (at_s := at_s + chance.expovariate(rate)) < seconds:
        yield Job(at_s, model, chance.randint(LEAST_TOKENS, MOST_TOKENS))


class Cpu(NamedTuple):
    """Seconds of CPU time, so far or of a load."""

    front: float
    front_waited: float  # what it would have had, had its CPU core been free
    client: float

    @classmethod
    def so_far(cls, front: Front) -> Cpu:
        return cls(front.process.cpu_s(), front.process.waited_s(), time.process_time())

    def since(self, before: Cpu) -> Cpu:
        return Cpu(*(after - then for after, then in zip(self, before, strict=True)))


@dataclass
class Played:
    """A load, and every reply to it."""

    replies: dict[str, list[Reply]]  # by model
    began_s: float
    seconds: float
    cpu: Cpu

    def goodput(self, model: str) -> float:
        """Good answers a second, once the load is what it will be and until its end."""
        since, until = self.began_s + _RAMP_S, self.began_s + self.seconds
        ends = (reply.ended_s for reply in self.replies[model] if reply.good)
        return sum(since < end <= until for end in ends) / (until - since)


class Client:
    """Sends requests, each over a connection of its own."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._numbers = count()

    async def ask(self, model: str, tokens: int, due_s: float) -> Reply:
        reply = Reply(tokens, due_s, time.monotonic())
        # A reply without an end is late, and counted as such.
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(DEADLINE_S + _GIVE_UP_S):
                await self._exchange(self._request(model, tokens), reply)
            reply.ended_s = time.monotonic()
        return reply

    def _request(self, model: str, tokens: int) -> bytes:
        text = f"Write a story about number {next(self._numbers)}."
        body = orjson.dumps(loads.body_of(text, tokens) | {"model": model})
        head = (
            f"POST {fronts.CHAT} HTTP/1.1\r\nHost: {fronts.HOST}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def _exchange(self, request: bytes, reply: Reply) -> None:
        reader, writer = await asyncio.open_connection(fronts.HOST, self._front.port)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            reply.status = int(head.split(maxsplit=2)[1])
            if found := _RETRY_AFTER.search(head):
                reply.retry_after_s = int(found[1])
            body = b""
            while part := await reader.read(1 << 16):
                body += part
                if not reply.first_s and _TEXT.search(body):
                    reply.first_s = time.monotonic()
            if (usage := _TOKENS.search(body)) and b"data: [DONE]" in body:
                reply.tokens = int(usage[1])
        finally:
            writer.transport.abort()

    async def play(self, jobs: Iterable[Job], seconds: float) -> Played:
        """An open loop: each request at its time, whatever became of those before."""
        asked: dict[str, list[asyncio.Task[Reply]]] = {}
        before, began = Cpu.so_far(self._front), time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for at_s, model, tokens in sorted(jobs):
                await asyncio.sleep(began + at_s - time.monotonic())
                asking = tasks.create_task(self.ask(model, tokens, began + at_s))
                asked.setdefault(model, []).append(asking)
            await asyncio.sleep(began + seconds - time.monotonic())
            cpu = Cpu.so_far(self._front).since(before)
        replies = {model: [task.result() for task in each] for model, each in asked.items()}
        return Played(replies, began, seconds, cpu)

    async def saturate(self, model: str, clients: int, seconds: float) -> Played:
        """A closed loop: each client asks again as soon as it has its answer, or on demand."""
        replies: list[Reply] = []
        before, began = Cpu.so_far(self._front), time.monotonic()

        async def ask_on(number: int) -> None:
            chance = random.Random(number)
            while (now := time.monotonic()) < began + seconds:
                tokens = chance.randint(LEAST_TOKENS, MOST_TOKENS)
                reply = await self.ask(model, tokens, now)
                replies.append(reply)
                if reply.refused:
                    await asyncio.sleep(reply.retry_after_s)

        await asyncio.gather(*(ask_on(number) for number in range(clients)))
        cpu = Cpu.so_far(self._front).since(before)
        return Played({model: replies}, began, seconds, cpu)

    async def held(self, model: str) -> float:
        """Requests of the model that have a slot or wait for one, as the server counts them."""
        async with httpx.AsyncClient(trust_env=False) as http:
            page = await http.get(f"http://{fronts.HOST}:{self._front.port}/metrics")
        names = {"llmserve_requests_in_flight", "llmserve_requests_queued"}
        return sum(
            sample.value
            for family in text_string_to_metric_families(page.text)
            for sample in family.samples
            if sample.name in names and sample.labels["model"] == model
        )


@dataclass(frozen=True)
class Benchmark:
    client: Client
    seconds: float  # of the open loops
    seed: int

    async def warm_up(self) -> None:
        jobs = [Job(n / CAPACITY, model, MOST_TOKENS) for n in range(_WARM_UP) for model in "ab"]
        played = await self.client.play(jobs, _WARM_UP / CAPACITY)
        if bad := sum(not reply.good for each in played.replies.values() for reply in each):
            raise RuntimeError(f"{bad} of {len(jobs)} requests failed within the capacity")

    async def round(self, number: int) -> Figures:
        quiet = list(arrivals("b", CAPACITY / 2, self.seconds, f"{self.seed}.{number}.b"))
        alone = await self.client.play(quiet, self.seconds)
        peak = max([await self._saturated(clients) for clients in CLIENTS])
        flood = arrivals("a", OVER * peak, self.seconds, f"{self.seed}.{number}.a")
        beside = await self.client.play([*quiet, *flood], self.seconds)
        found = {"a: peak 1/s": peak} | overloaded(beside, peak)
        found["a: held after the end"] = await self.client.held("a")
        return found | neighbour(alone, beside) | own(beside)

    async def _saturated(self, clients: int) -> float:
        return (await self.client.saturate("a", clients, PEAK_S)).goodput("a")


def overloaded(played: Played, peak: float) -> Figures:
    replies = played.replies["a"]
    refused = [reply for reply in replies if reply.refused]
    let_in = [reply for reply in replies if not reply.refused]
    goodput = played.goodput("a")
    refusals_ms = [reply.took_s * 1000 for reply in refused]
    retry_after_s = [reply.retry_after_s for reply in refused]
    return {
        "a: offered 1/s": len(replies) / played.seconds,
        "a: goodput 1/s": goodput,
        "a: goodput / peak": goodput / peak,
        "a: refused %": len(refused) / len(replies) * 100,
        "a: refusals p50 ms": percentile(refusals_ms, 50),
        "a: refusals p99 ms": percentile(refusals_ms, 99),
        "a: least Retry-After s": min(retry_after_s, default=math.nan),
        "a: largest Retry-After s": max(retry_after_s, default=math.nan),
        "a: let in, E2E p50 ms": percentile(_e2e_ms(let_in), 50),
        "a: let in, E2E p99 ms": percentile(_e2e_ms(let_in), 99),
        "a: let in, missed": sum(not reply.good for reply in let_in),
        "a: late": sum(reply.late for reply in replies),
        "a: neither 200, 503 nor 504": sum(r.status not in {200, 503, 504} for r in replies),
    }


def neighbour(alone: Played, beside: Played) -> Figures:
    before, after = alone.replies["b"], beside.replies["b"]
    ttft, e2e = percentile(_ttft_ms(before), 99), percentile(_e2e_ms(before), 99)
    return {
        "b: TTFT p99 ms, alone": ttft,
        "b: TTFT p99 ms": percentile(_ttft_ms(after), 99),
        "b: TTFT p99 / alone": percentile(_ttft_ms(after), 99) / ttft,
        "b: E2E p99 ms, alone": e2e,
        "b: E2E p99 ms": percentile(_e2e_ms(after), 99),
        "b: E2E p99 / alone": percentile(_e2e_ms(after), 99) / e2e,
        "b: not answered": sum(not reply.good for reply in (*before, *after)),
    }


def own(played: Played) -> Figures:
    """Whether it is the server that was measured, and not the client or the machine."""
    late_ms = [(r.sent_s - r.due_s) * 1000 for each in played.replies.values() for r in each]
    return {
        "sent late p99 ms": percentile(late_ms, 99),
        "load client's core %": played.cpu.client / played.seconds * 100,
        "front end's core %": played.cpu.front / played.seconds * 100,
        "front end waited for its core %": played.cpu.front_waited / played.seconds * 100,
    }


def _ttft_ms(replies: Iterable[Reply]) -> list[float]:
    return [(reply.first_s - reply.sent_s) * 1000 for reply in replies if reply.good]


def _e2e_ms(replies: Iterable[Reply]) -> list[float]:
    return [reply.took_s * 1000 for reply in replies if reply.good]


async def measure(front: Front, options: argparse.Namespace, console: Console) -> list[Figures]:
    for (core,) in front.cores.values():
        core.set(step_ms=STEP_MS, max_running=RUNNING)
    benchmark = Benchmark(Client(front), options.seconds, options.seed)
    await benchmark.warm_up()
    rounds: list[Figures] = []
    for number in range(options.rounds):
        rounds.append(await benchmark.round(number))
        console.print(f"round {number + 1} of {options.rounds} done")
    return rounds


def judged(name: str, rounds: list[Figures]) -> bool:
    """Whether its bound, if it has one, is kept."""
    if name not in BOUNDS:
        return True
    limit, least, worst = BOUNDS[name]
    values = [figures[name] for figures in rounds]
    of_worst = min if least else max
    value = of_worst(values) if worst else statistics.median(values)
    return value >= limit if least else value <= limit


def table(rounds: list[Figures]) -> Table:
    shown = Table(title=f"{OVER:g} times the peak: medians of {len(rounds)} rounds")
    for column in ("", "median", "least to largest", "bound"):
        shown.add_column(column, justify="right" if column else "left")
    for name in rounds[0]:
        values = [figures[name] for figures in rounds]
        spread = f"{min(values):.4g} to {max(values):.4g}"
        shown.add_row(name, f"{statistics.median(values):.4g}", spread, _verdict(name, rounds))
    return shown


def _verdict(name: str, rounds: list[Figures]) -> str:
    if name not in BOUNDS:
        return ""
    limit, least, _ = BOUNDS[name]
    kept = "kept" if judged(name, rounds) else "MISSED"
    return f"{'at least' if least else 'at most'} {limit:g}: {kept}"


def report(options: argparse.Namespace, rounds: list[Figures]) -> dict[str, Any]:
    engine = {"running": RUNNING, "step_ms": STEP_MS, "tokens": [LEAST_TOKENS, MOST_TOKENS]}
    load = {"engine": engine, "model": MODEL, "over": OVER, "seconds": options.seconds}
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    missed = [name for name in BOUNDS if not judged(name, rounds)]
    return {"load": load, "medians": medians, "missed": missed, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each open loop")
    parser.add_argument("--max-queue", type=int, default=LINE, help="of each model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    # So that what was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console, cores = Console(), fronts.Cores()
    where = record.circumstances("benchmarks.overload")  # before a core is all that there is
    model = MODEL | {"max_queue": options.max_queue}
    with (
        fronts.pinned(cores.client),
        fronts.front("ours", cores, {"a": model, "b": model}) as front,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        rounds = runner.run(measure(front, options, console))
    found = where | report(options, rounds)
    console.print(table(rounds))
    console.print_json(data=where)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if found["missed"]:
        sys.exit(f"bounds missed: {', '.join(found['missed'])}")


if __name__ == "__main__":
    main()
