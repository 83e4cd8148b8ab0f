"""Models of a running server that do not fit together, asked in turn: seconds to the first token.

    llmserve up two.yaml
    python -m benchmarks.swap http://127.0.0.1:8000 a b [--times 5] [--pause 2]

Each swap is asked for once the model before has answered and `--pause` seconds have passed.
The request after it, with the model awake, is what a swap is compared with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import httpx

from benchmarks import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--times", type=int, default=5, help="rounds over all models")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds before each swap")
    options = parser.parse_args()
    print(record.circumstances("benchmarks.swap"), flush=True)
    swaps: list[float] = []
    with httpx.Client(base_url=options.url, timeout=600) as client:
        first_token(client, options.models[-1])
        for number in range(options.times):
            for model in options.models:
                time.sleep(options.pause)
                swap, again = first_token(client, model), first_token(client, model)
                swaps.append(swap)
                print(
                    f"{number} {model}: first token {swap:.3f} s, again {again:.3f} s", flush=True
                )
    print(
        f"first {swaps[0]:.3f} s, median {statistics.median(swaps):.3f} s, max {max(swaps):.3f} s"
    )


def first_token(client: httpx.Client, model: str) -> float:
    body = {"model": model, "prompt": f"{time.time()} Once upon a time", "max_tokens": 4}
    began = time.monotonic()
    found = None
    more = {"stream": True, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json=body | more) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if found is None and line.startswith("data: {") and json.loads(line[6:])["choices"]:
                found = time.monotonic() - began
    if found is None:
        raise SystemExit(f"{model} gave no token")
    return found


if __name__ == "__main__":
    main()
