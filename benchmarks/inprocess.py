"""What the engines of a registry give without HTTP: `AsyncLLM.generate` in one process.

    python -m benchmarks.inprocess models.yaml [--in-flight 256] [--rounds 8]

Every model gets so many requests in flight, all models at once, with prompts of random
token ids; the tokens a second of each and their sum are printed. It is the ceiling of a
server on the same engines.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from llmserve.engine import environment
from llmserve.registry import loader

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("registry", type=Path)
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8, help="requests of each one in flight")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--input-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=128)
    options = parser.parse_args()
    specs = loader.load(options.registry).models
    with tempfile.TemporaryDirectory() as logs:
        environment.prepare(len(specs), Path(logs))
        uvloop.run(measure(options, specs, Path(logs)))


async def measure(options: argparse.Namespace, specs: Any, logs: Path) -> None:
    from llmserve.engine.launcher import Launcher  # noqa: PLC0415  # after `prepare`

    launcher = Launcher(logs)
    engines = await asyncio.gather(*(asyncio.to_thread(launcher.start, spec) for spec in specs))
    try:
        await asyncio.gather(*(load(engine.client, options, 1) for engine in engines))
        for _ in range(options.repeats):
            loads = (load(engine.client, options, options.rounds) for engine in engines)
            rates = await asyncio.gather(*loads)
            each = ", ".join(f"{s.name} {r:.0f}" for s, r in zip(specs, rates, strict=True))
            print(f"sum {sum(rates):.0f} tok/s: {each}", flush=True)
    finally:
        await asyncio.gather(*(asyncio.to_thread(engine.stop) for engine in engines))


async def load(client: AsyncLLM, options: argparse.Namespace, rounds: int) -> float:
    """Output tokens a second over `rounds` requests of each one in flight."""
    chance = random.Random()  # prompts that no engine has kept
    began = time.monotonic()
    one_after_another = [several(client, options, rounds, chance) for _ in range(options.in_flight)]
    tokens = sum(await asyncio.gather(*one_after_another))
    return tokens / (time.monotonic() - began)


async def several(
    client: AsyncLLM, options: argparse.Namespace, rounds: int, chance: random.Random
) -> int:
    from vllm import SamplingParams  # noqa: PLC0415
    from vllm.inputs.engine import tokens_input  # noqa: PLC0415
    from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

    tokens = 0
    for _ in range(rounds):
        ids = [chance.randrange(1000, 40_000) for _ in range(options.input_tokens)]
        params = SamplingParams(
            max_tokens=options.output_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        request_id = f"{chance.random()}"
        async for output in client.generate(tokens_input(ids), params, request_id):
            tokens += len(output.outputs[0].token_ids)
    return tokens


if __name__ == "__main__":
    main()
