"""Requests for a server's models, sent at a pace, and what came back."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.client import Answer, ask

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from benchmarks.servers import Addresses

ALL = "all"  # the sum of several models
SHARES = (50, 90, 99)  # percentiles

Figures = dict[str, float]


@dataclass(frozen=True)
class Load:
    """What is sent."""

    models: Sequence[str]
    requests: int
    concurrency: int
    rate: float | None  # arrivals a second; None: closed loop
    input_tokens: int
    output_tokens: int
    endpoint: str
    seed: int
    timeout_s: float


@dataclass
class Round:
    """What came back."""

    answers: list[tuple[str, Answer]] = field(default_factory=list)  # with the model
    wall_s: float = 0.0
    client_cpu: float = 0.0  # share of a core that the load client itself took

    def of(self, model: str) -> list[Answer]:
        return [answer for name, answer in self.answers if model in {name, ALL}]

    def figures(self, model: str) -> Figures:
        answers = self.of(model)
        tokens = sum(answer.tokens for answer in answers if not answer.error)
        errors = sum(bool(answer.error) for answer in answers)
        found: Figures = {
            "output_tok_s": tokens / self.wall_s,
            "requests_s": (len(answers) - errors) / self.wall_s,
            "tokens": tokens,
            "errors": errors,
        }
        for name, values in samples(answers).items():
            for share in SHARES:
                found[f"{name}_ms_p{share}"] = percentile(values, share)
        return found


def samples(answers: Iterable[Answer]) -> dict[str, list[float]]:
    """Milliseconds of all the answers that are whole."""
    good = [answer for answer in answers if not answer.error]
    seconds = {
        "ttft": [answer.ttft_s for answer in good],
        "itl": [gap for answer in good for gap in answer.gaps_s],
        "tpot": [answer.tpot_s for answer in good],
        "e2e": [answer.done_s - answer.sent_s for answer in good],
    }
    return {name: [value * 1e3 for value in values] for name, values in seconds.items()}


def percentile(values: Sequence[float], share: float) -> float:
    if not values:
        return float("nan")
    ordered, place = sorted(values), (len(values) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


WORDS = {
    "noun": "river garden teacher window market engine letter winter doctor forest kitchen bridge",
    "adjective": "old quiet bright narrow heavy gentle early modern simple distant warm green",
    "verb": "follows carries watches finds builds leaves paints opens crosses remembers",
    "place": "near behind above under inside beside beyond against",
}
NOUNS, ADJECTIVES, VERBS, PLACES = (words.split() for words in WORDS.values())


def prompt(tag: str, tokens: int, rng: random.Random) -> str:
    """English of about so many tokens: its words are one each. The tag makes it new to caches."""
    words = ["Letter", f"{tag}."]
    count = 2 + len(tag)
    while count < tokens:
        first, second, third = rng.sample(NOUNS, 3)
        old, new = rng.sample(ADJECTIVES, 2)
        words += ["The", old, first, rng.choice(VERBS), "the", new, second]
        words += [rng.choice(PLACES), "the", f"{third}."]
        count += 11
    return " ".join(words)


def bodies(load: Load, tag: str, seed: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Models in turn, each with a request."""
    for number in range(load.requests):
        model = load.models[number % len(load.models)]
        text = prompt(f"{tag}.{number}", load.input_tokens, random.Random(f"{seed}/{number}"))
        chat = {"messages": [{"role": "user", "content": text}]}
        yield (
            model,
            {
                "model": model,
                **(chat if load.endpoint == "chat" else {"prompt": text}),
                "max_tokens": load.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )


async def drive(load: Load, addresses: Addresses, tag: str, seed: str) -> Round:
    path = "/v1/chat/completions" if load.endpoint == "chat" else "/v1/completions"
    jobs = list(bodies(load, tag, seed))
    found = Round()

    async def send(model: str, body: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(load.timeout_s):
                answer = await ask(*addresses[model], path, body)
        except TimeoutError:
            answer = Answer(error=f"no end within {load.timeout_s:g} s")
        if not answer.error and not (answer.reads_s and answer.tokens):
            answer.error = "the stream had no text"
        found.answers.append((model, answer))

    began, cpu = time.monotonic(), time.process_time()
    if load.rate is None:
        waiting = iter(jobs)

        async def send_on() -> None:
            for job in waiting:
                await send(*job)

        await asyncio.gather(*(send_on() for _ in range(load.concurrency)))
    else:
        arrivals, at = random.Random(seed), began
        async with asyncio.TaskGroup() as tasks:
            for job in jobs:
                at += arrivals.expovariate(load.rate)
                await asyncio.sleep(at - time.monotonic())
                tasks.create_task(send(*job))
    found.wall_s = time.monotonic() - began
    found.client_cpu = (time.process_time() - cpu) / found.wall_s
    return found
