"""Two engines that do not fit on a GPU together take turns, from the first swap on.

    python -m benchmarks.shapes models/SmolLM2-135M-Instruct /tmp/models
    python -m benchmarks.sleep /tmp/models/llama-8b /tmp/models/llama-8b [--kv 36GiB] [--times 5]

Of each swap: seconds until one sleeps, until the other is awake, until its first token.
Then what the engines' logs say of the parts. Also how long a running stream stalls while
its engine copies its weights to the host, ahead of the first sleep.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop
from pydantic import ByteSize, TypeAdapter

from benchmarks import record
from llmserve.engine import environment
from llmserve.gpus import nvml
from llmserve.gpus.device import gib
from llmserve.lifecycle.placement import Level
from llmserve.registry.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmserve.engine.engine import Engine
    from llmserve.engine.launcher import Launcher

_ALONE_S = 3.0  # of a stream, to compare with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs=2)
    parser.add_argument("--kv", type=TypeAdapter(ByteSize).validate_python, default="36GiB")
    parser.add_argument("--share", type=float, default=0.6, help="of the GPU, free at a start")
    parser.add_argument("--times", type=int, default=5, help="swaps each way")
    parser.add_argument("--input-tokens", type=int, default=128)
    options = parser.parse_args()
    print(record.circumstances("benchmarks.sleep"), flush=True)
    with tempfile.TemporaryDirectory() as logs:
        environment.prepare(2, Path(logs))
        uvloop.run(measure(options, Path(logs)))


async def measure(options: argparse.Namespace, logs: Path) -> None:
    from llmserve.engine.launcher import Launcher  # noqa: PLC0415  # after `prepare`

    launcher = Launcher(logs)
    specs = [
        ModelSpec(
            name=name,
            model=str(folder),
            devices=(0,),
            kv_cache=options.kv,
            gpu_memory_utilization=options.share,
            engine={"load_format": "dummy", "max_model_len": 8192},
        )
        for name, folder in zip("ab", options.models, strict=True)
    ]
    engines: list[Engine] = []
    try:
        for spec in specs:
            engines.append(await ready_to_sleep(launcher, spec, options.input_tokens))
            if spec is not specs[-1]:
                await down(spec.name, engines[-1])
        await swaps(engines, options)
    finally:
        await asyncio.gather(*(asyncio.to_thread(engine.stop) for engine in engines))
        for spec in specs:
            print(f"--- log of {spec.name}", *lines_of_sleep(launcher.log_of(spec, 0)), sep="\n")


async def ready_to_sleep(launcher: Launcher, spec: ModelSpec, input_tokens: int) -> Engine:
    before = used()
    began = time.monotonic()
    engine = await asyncio.to_thread(launcher.start, spec, sleeps=True)
    await first_token(engine, input_tokens)
    print(
        f"{spec.name}: started in {time.monotonic() - began:.1f} s, holds {gib(used() - before)}",
        flush=True,
    )
    print(f"{spec.name}: {await engine.start_reports()}", flush=True)
    end = time.monotonic() + _ALONE_S
    alone = await longest_gap(engine, lambda: time.monotonic() > end)
    began = time.monotonic()
    preparing = asyncio.create_task(engine.prepare_sleep())
    beside = await longest_gap(engine, preparing.done)
    await preparing
    print(
        f"{spec.name}: prepared in {time.monotonic() - began:.2f} s; longest gap between two "
        f"tokens {beside * 1e3:.0f} ms meanwhile, {alone * 1e3:.0f} ms before",
        flush=True,
    )
    return engine


async def down(name: str, engine: Engine) -> None:
    began = time.monotonic()
    await engine.sleep(Level.HOST)
    print(f"{name}: slept in {time.monotonic() - began:.3f} s, {gib(used())} used", flush=True)


async def swaps(engines: Sequence[Engine], options: argparse.Namespace) -> None:
    asleep, awake = engines
    names = {id(engine): name for engine, name in zip(engines, "ab", strict=True)}
    print("swap      sleep   wake  first    sum  again  (seconds; `again`: first token, awake)")
    for number in range(1, 2 * options.times + 1):
        began = time.monotonic()
        await awake.sleep(Level.HOST)
        slept = time.monotonic()
        await asleep.wake()
        woke = time.monotonic()
        first = await first_token(asleep, options.input_tokens)
        awake, asleep = asleep, awake
        again = await first_token(awake, options.input_tokens)
        parts = (slept - began, woke - slept, first, woke - began + first, again)
        way = f"{names[id(asleep)]}->{names[id(awake)]}"
        print(
            f"{number:2} {way} ",
            "".join(f"{part:7.3f}" for part in parts),
            f" {gib(used())} used",
            flush=True,
        )


def used() -> int:
    return nvml.used_bytes(nvml.visible()[0])


async def first_token(engine: Engine, input_tokens: int) -> float:
    """Seconds until the first token of a prompt that was never seen."""
    began = time.monotonic()
    took = 0.0
    async for _ in generated(engine, random_ids(input_tokens), max_tokens=4):
        took = took or time.monotonic() - began
    return took


async def longest_gap(engine: Engine, done: Callable[[], bool]) -> float:
    """Seconds, between two tokens of a stream that runs until then."""
    gaps: list[float] = []
    while not done():
        last = None
        async with aclosing(generated(engine, random_ids(128), max_tokens=4096)) as stream:
            async for _ in stream:
                now = time.monotonic()
                gaps.append(now - (last or now))
                last = now
                if done():
                    break
    return max(gaps, default=0.0)


def generated(engine: Engine, ids: list[int], **sampling: Any) -> Any:
    """What vLLM generates, token by token, whatever the tokens."""
    from vllm import SamplingParams  # noqa: PLC0415
    from vllm.inputs.engine import tokens_input  # noqa: PLC0415
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    delta = {"ignore_eos": True, "output_kind": RequestOutputKind.DELTA}
    params = SamplingParams(**(delta | sampling))
    return engine.client.generate(tokens_input(ids), params, f"{random.random()}")


def random_ids(count: int) -> list[int]:
    return [random.randrange(1000, 40_000) for _ in range(count)]


def lines_of_sleep(log: Path) -> list[str]:
    """Seconds of the parts, as llmserve.engine.worker.host_offload writes them; and errors."""
    shown = ("host_offload.py", "fall asleep", "wake up tags", "Reloading", "ERROR")
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return [line for line in lines if any(sign in line for sign in shown)]


if __name__ == "__main__":
    main()
