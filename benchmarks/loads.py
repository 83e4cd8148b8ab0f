"""The loads of the front-end benchmark: each takes a front end and gives its figures."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from benchmarks.client import Answer
    from benchmarks.fronts import Front

Figures = dict[str, float]

LAG_LIMIT_S = 0.005  # a front end that ends later than this behind its engine is overloaded
_HOPELESS_S = 0.2  # after two runs with such a lag, faster steps say nothing more
_END_STEPS = 64  # over which the answers of a saturated front end come to their ends
_REST_S = 0.2  # between loads: what a front end has to do after an answer
_RUN_S = 300.0  # the longest that any load takes
_SENTENCE = 12  # words
_WORDS = """\
the a one this that every some our their his her small large old new quiet bright heavy
narrow early late green warm cold empty busy town river house garden street market window
letter friend teacher driver farmer child winter morning evening story question answer road
bridge table paper number engine ship train field tree stone song picture found saw made took
gave kept left brought showed told asked carried opened closed followed painted near behind
under over before after without along with from into and but while because slowly quickly
often never again together almost perhaps today outside
"""


@dataclass(frozen=True)
class Sizes:
    """How much of each load."""

    cpu: tuple[tuple[int, int], ...] = ((16, 200), (64, 200), (256, 200), (512, 100))
    step_ms: float = 15.0
    saturated_streams: int = 256
    saturated_step_ms: tuple[float, ...] = (15, 8, 4, 2, 1.5, 1, 0.75, 0.6, 0.5, 0.4)
    saturated_s: float = 2.5
    longest: int = 1900  # tokens of an answer: what the models' context holds
    burst: int = 512
    burst_tokens: int = 8
    burst_step_ms: float = 5.0
    sentences: int = 18  # of a prompt: about 256 tokens with the chat template
    single_tokens: int = 400
    flood: int = 256
    flood_tokens: int = 100


QUICK = Sizes(
    cpu=((64, 60), (256, 60)),
    saturated_step_ms=(15, 4, 1),
    saturated_s=1.0,
    single_tokens=120,
)


@dataclass(frozen=True)
class Run:
    """Requests sent at once, all answered."""

    answers: Sequence[Answer]
    core: dict[str, Any]  # the fake core's report
    front_s: float  # CPU time of the front end
    waited_s: float  # what it waited for its CPU core
    core_s: float  # of the fake core
    client_s: float
    wall_s: float

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)

    @property
    def events(self) -> int:
        return sum(answer.events for answer in self.answers)

    @property
    def done_s(self) -> float:
        return max(answer.done_s for answer in self.answers)

    @property
    def lag_s(self) -> float:
        """From the core's sending of the last token to the client's reading of [DONE]."""
        return self.done_s - float(self.core["final_s"])

    @property
    def gaps_s(self) -> list[float]:
        return [gap for answer in self.answers for gap in answer.gaps_s]

    def figures(self) -> Figures:
        return {
            "streams": len(self.answers),
            "tokens": self.tokens,
            "events": self.events,
            "steps": self.core["steps"],
            "lag_s": self.lag_s,
            "front_s": self.front_s,
            "waited_s": self.waited_s,
            "core_s": self.core_s,
            "client_s": self.client_s,
            "wall_s": self.wall_s,
        }


class _Times(NamedTuple):
    """CPU time so far."""

    front_s: float
    waited_s: float
    core_s: float
    client_s: float


@dataclass
class Load:
    """All loads on one front end. `runs` tells of each run for those who want to know more."""

    front: Front
    sizes: Sizes
    seed: int
    runs: list[dict[str, Any]] = field(default_factory=list)

    async def warm_up(self) -> None:
        """Every path once, with as many connections as will follow."""
        self.front.core.set(step_ms=5)
        for count, tokens in ((64, 50), (self.sizes.burst, 4), (self.sizes.burst, 4)):
            await self._run("warm-up", self._prompts(count), [tokens] * count)

    def parts(self, names: Sequence[str]) -> Iterator[Callable[[], Awaitable[Figures]]]:
        """The loads of these names, in parts that can be run one at a time."""
        for name in names:
            if name == "cpu":
                yield from (partial(self.cpu, *size) for size in self.sizes.cpu)
            else:
                yield getattr(self, name)

    async def cpu(self, count: int, tokens: int) -> Figures:
        """CPU time of a token, with and without its share of the request's set-up."""
        self.front.core.set(step_ms=self.sizes.step_ms)
        one = await self._run("cpu set-up", _stories(count), [1] * count)
        run = await self._run("cpu", _stories(count), [tokens] * count)
        net = (run.front_s - one.front_s) / (run.tokens - one.tokens)
        return {
            f"cpu {count} us/token": run.front_s / run.tokens * 1e6,
            f"cpu {count} net us/token": net * 1e6,
        }

    async def saturation(self) -> Figures:
        """The highest rate at which the front end keeps up with its engine.

        The core holds the requests until all have arrived and then starts them in one step:
        no set-up is in the figures. A rate is tokens over the time from the beginning of
        that step: offered, until the core has sent the last token; delivered, until the
        last client has read [DONE]. Answers end over the last steps, a few in each: were
        it all in one, the lag would be the cost of an end.
        """
        count, hopeless = self.sizes.saturated_streams, 0
        best: Figures = {}
        for step_ms in self.sizes.saturated_step_ms:
            self.front.core.set(step_ms=step_ms, gate=count)
            tokens = min(self.sizes.longest, int(self.sizes.saturated_s / step_ms * 1000))
            ends = min(_END_STEPS, tokens // 4)
            lengths = [tokens - n % ends for n in range(count)]
            run = await self._run(f"saturation {step_ms:g} ms", _stories(count), lengths)
            rate = self._rates(run)
            if not best or _better(rate, best):
                best = rate
            hopeless += rate["saturation lag ms"] > _HOPELESS_S * 1000
            if hopeless == 2:
                break
        self.front.core.set(gate=1)
        return best

    def _rates(self, run: Run) -> Figures:
        began = float(run.core["first_s"])
        figures = {
            "saturation k tok/s": run.tokens / (run.done_s - began) / 1000,
            "saturation offered k tok/s": run.tokens / (run.core["final_s"] - began) / 1000,
            "saturation lag ms": run.lag_s * 1000,
            "saturation tokens/event": run.tokens / run.events,
            "saturation gap p99 ms": percentile(run.gaps_s, 99) * 1000,
            "saturation front core %": run.front_s / run.wall_s * 100,
            "saturation load core %": (run.client_s + run.core_s) / run.wall_s * 100,
        }
        self.runs[-1] |= figures
        return figures

    async def burst(self) -> Figures:
        """Many requests at once, each with a prompt of its own."""
        self.front.core.set(step_ms=self.sizes.burst_step_ms)
        count, tokens = self.sizes.burst, self.sizes.burst_tokens
        run = await self._run("burst", self._prompts(count), [tokens] * count)
        ttft = [answer.ttft_s for answer in run.answers]
        return {
            "burst ttft p50 ms": percentile(ttft, 50) * 1000,
            "burst ttft p99 ms": percentile(ttft, 99) * 1000,
            "burst ms/request": run.front_s / len(run.answers) * 1000,
        }

    async def fairness(self) -> Figures:
        """One stream of the first model, alone and while the second one is flooded."""
        for (core,) in self.front.cores.values():
            core.set(step_ms=self.sizes.step_ms)
        quiet, busy = self.front.cores
        alone = await self._single(quiet)
        flood = [asyncio.create_task(self._ask_for_ever(busy)) for _ in range(self.sizes.flood)]
        try:
            await asyncio.sleep(1)
            beside = await self._single(quiet)
            failed = [task for task in flood if task.done()]
        finally:
            for task in flood:
                task.cancel()
            await asyncio.gather(*flood, return_exceptions=True)
        for task in failed:
            task.result()
        return {
            "fairness alone p50 ms": percentile(alone.gaps_s, 50) * 1000,
            "fairness alone p99 ms": percentile(alone.gaps_s, 99) * 1000,
            "fairness flooded p50 ms": percentile(beside.gaps_s, 50) * 1000,
            "fairness flooded p99 ms": percentile(beside.gaps_s, 99) * 1000,
            "fairness p99 ratio": percentile(beside.gaps_s, 99) / percentile(alone.gaps_s, 99),
        }

    async def _single(self, model: str) -> Answer:
        body = body_of("Write a story about a lighthouse.", self.sizes.single_tokens)
        return whole(await self.front.ask(body | {"model": model}), self.sizes.single_tokens)

    async def _ask_for_ever(self, model: str) -> None:
        tokens = self.sizes.flood_tokens
        while True:
            answer = await self.front.ask(body_of("Write a story.", tokens) | {"model": model})
            whole(answer, tokens)

    async def _run(self, name: str, prompts: list[str], tokens: list[int]) -> Run:
        """One request for each prompt, all at once, each with its number of tokens."""
        await asyncio.sleep(_REST_S)
        bodies = list(map(body_of, prompts, tokens))
        self.front.core.set()  # begin a new report
        before, began = self._times(), time.monotonic()
        async with asyncio.timeout(_RUN_S):
            answers = await asyncio.gather(*(self.front.ask(body) for body in bodies))
        wall_s = time.monotonic() - began
        self.front.process.check()
        load = self._times()
        await asyncio.sleep(_REST_S)
        after = self._times()
        run = Run(
            answers=list(map(whole, answers, tokens)),
            core=self.front.core.set(),
            front_s=after.front_s - before.front_s,
            waited_s=after.waited_s - before.waited_s,
            core_s=load.core_s - before.core_s,
            client_s=load.client_s - before.client_s,
            wall_s=wall_s,
        )
        self.runs.append({"run": name, **run.figures()})
        return run

    def _times(self) -> _Times:
        front, core = self.front.process, self.front.core.process
        return _Times(front.cpu_s(), front.waited_s(), core.cpu_s(), time.process_time())

    def disturbed(self) -> Figures:
        """How much of the time the front end's threads waited for their CPU core.

        For each other a little; much more means that others run there and no figure holds.
        """
        waited, wall = (sum(run[key] for run in self.runs) for key in ("waited_s", "wall_s"))
        return {"waited for its core %": waited / wall * 100} if wall else {}

    def _prompts(self, count: int) -> list[str]:
        """Prompts that none before was like: sentences of ordinary words by chance."""
        self.seed += 1
        chance = random.Random(self.seed)
        words = _WORDS.split()

        def sentence() -> str:
            return " ".join(chance.choices(words, k=_SENTENCE)).capitalize() + "."

        return [" ".join(sentence() for _ in range(self.sizes.sentences)) for _ in range(count)]


def _better(rate: Figures, best: Figures) -> bool:
    """Of two rates the one kept up with, else the higher one."""
    limit = LAG_LIMIT_S * 1000
    kept, was_kept = rate["saturation lag ms"] < limit, best["saturation lag ms"] < limit
    if kept != was_kept:
        return kept
    return rate["saturation k tok/s"] > best["saturation k tok/s"]


def _stories(count: int) -> list[str]:
    return [f"Write a story about number {n}." for n in range(count)]


def body_of(prompt: str, tokens: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def whole(answer: Answer, tokens: int) -> Answer:
    """The answer if it is all that was asked for. Raises RuntimeError."""
    if answer.error:
        raise RuntimeError(f"a request failed: {answer.error}")
    if answer.tokens != tokens or not answer.reads_s:
        raise RuntimeError(f"an answer has {answer.tokens} tokens instead of {tokens}")
    return answer


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(len(ordered) * percent / 100))]
