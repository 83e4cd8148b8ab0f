"""How long models take to start, each alone and all together.

    python benchmarks/startup.py [models.yaml] [--rounds 3]

Runs `llmserve up` on the whole registry and on each of its models by itself, in turn,
and prints the seconds until all are ready, and their ratio: together over the sum of
each alone. Rounds are interleaved, since machines drift; figures are medians.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ALL = "all together"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("registry", type=Path, nargs="?", default=Path("models.yaml"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    content = yaml.safe_load(options.registry.read_text())
    choices = {name: [name] for name in content["models"]} | {ALL: list(content["models"])}
    seconds: dict[str, list[float]] = {choice: [] for choice in choices}
    for _ in range(options.rounds):
        for choice, names in choices.items():
            seconds[choice].append(start_seconds(options.registry, content, names))
            print(f"{choice}: {seconds[choice][-1]:.1f} s", flush=True)
    medians = {choice: statistics.median(each) for choice, each in seconds.items()}
    for choice, median in medians.items():
        print(f"{choice:20} median {median:6.1f} s of {len(seconds[choice])}")
    alone = sum(median for choice, median in medians.items() if choice != ALL)
    print(f"together / sum of each alone: {medians[ALL] / alone:.2f}")


def start_seconds(registry: Path, content: dict[str, Any], names: list[str]) -> float:
    """From the command to `Serving`, for some models of a registry."""
    chosen = content | {
        "server": {"port": 0},
        "models": {name: content["models"][name] for name in names},
    }
    # Beside the registry, so that relative folders hold.
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=registry.resolve().parent) as file:
        yaml.safe_dump(chosen, file)
        file.flush()
        began = time.monotonic()
        server = subprocess.Popen(
            [sys.executable, "-m", "llmserve", "up", file.name], stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        try:
            for line in server.stdout:
                if line.startswith("Serving") and "failed" not in line:
                    return time.monotonic() - began
            raise SystemExit(f"{', '.join(names)} did not start")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


if __name__ == "__main__":
    main()
