"""vLLM's own load client, `vllm-rs bench serve`, as an independent client."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Load:
    """A closed loop of streamed chats: random prompts of one length, answers of one length."""

    model: str
    tokenizer: str  # folder
    in_flight: int
    requests: int
    input_tokens: int
    output_tokens: int


def run(binary: str, url: str, load: Load, seed: int, folder: Path) -> dict[str, Any]:
    """What the client found, by its names; what it says goes to `folder`.

    Raises CalledProcessError if it fails.
    """
    result = folder / "round.json"
    line = [binary, "bench", "serve", "--backend", "openai-chat"]
    line += ["--endpoint", "/v1/chat/completions", "--base-url", url, "--model", load.model]
    line += ["--tokenizer", load.tokenizer, "--dataset-name", "random", "--ignore-eos"]
    line += ["--random-input-len", str(load.input_tokens)]
    line += ["--random-output-len", str(load.output_tokens)]
    line += ["--num-prompts", str(load.requests), "--max-concurrency", str(load.in_flight)]
    line += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99"]
    line += ["--seed", str(seed), "--disable-tqdm"]
    line += ["--save-result", "--result-dir", str(folder), "--result-filename", result.name]
    with (folder / "client.log").open("a") as log:
        subprocess.run(line, stdout=log, stderr=log, check=True)
    found: dict[str, Any] = orjson.loads(result.read_bytes())
    return found
