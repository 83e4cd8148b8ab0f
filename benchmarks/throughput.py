"""Output tokens a second of a running server at some numbers of requests in flight.

python benchmarks/throughput.py URL MODEL [--tokens 64] [--in-flight 1 4 16]
"""

from __future__ import annotations

import argparse
import asyncio
import time

import httpx


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()

    async def ask(client: httpx.AsyncClient, n: int) -> int:
        body = {
            "model": options.model,
            "prompt": f"Once {n} upon",
            "max_tokens": options.tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        reply = await client.post("/v1/completions", json=body)
        tokens: int = reply.raise_for_status().json()["usage"]["completion_tokens"]
        return tokens

    async with httpx.AsyncClient(base_url=options.url, timeout=600) as client:
        await ask(client, 0)
        for count in options.in_flight:
            began = time.monotonic()
            tokens = sum(await asyncio.gather(*(ask(client, n) for n in range(count))))
            print(f"{count:4} in flight: {tokens / (time.monotonic() - began):8.1f} tokens/s")


if __name__ == "__main__":
    asyncio.run(main())
