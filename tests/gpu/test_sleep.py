"""An engine goes down and up all levels: it says the same after each, and gives memory back.

`pytest -m gpu -s tests/gpu/test_sleep.py`, where llmserve and vLLM for CUDA are installed.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.sleep import generated, lines_of_sleep, used
from llmserve.engine import environment
from llmserve.errors import EngineError
from llmserve.gpus.device import gib
from llmserve.lifecycle.placement import Level
from llmserve.registry.spec import ModelSpec
from tests.gpu import MARKS
from tests.integration.conftest import CHAT

if TYPE_CHECKING:
    from llmserve.engine.engine import Engine

pytestmark = MARKS

KV = 4 << 30
SLACK = 256 << 20  # what reading weights and the driver may leave behind
WALKS = (  # down, and then up again
    (Level.KV_RELEASED,),
    (Level.HOST,),
    (Level.HOST,),
    (Level.HOST, Level.DISK),
    (Level.DISK,),
    (Level.KV_RELEASED, Level.HOST),  # with no copy: DISK dropped it
    (Level.KV_RELEASED, Level.DISK),
)


@dataclass
class Seen:
    weights: int  # bytes of the files
    before: int = 0  # bytes used on the GPU when nothing was started
    report: dict[str, Any] = field(default_factory=dict)
    at: list[tuple[Level, int]] = field(default_factory=list)  # bytes used, step by step
    said: list[list[list[int]]] = field(default_factory=list)  # tokens, each time awake
    answered: list[bool] = field(default_factory=list)  # when asked asleep
    refused: str = ""  # what a wake without room said

    def used(self, level: Level) -> list[int]:
        return [each for at, each in self.at if at is level]


def made(folder: Path) -> Path:
    """A Llama of 1 GB with random weights, which are in its files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    chat = json.loads((Path(CHAT) / "config.json").read_text(encoding="utf-8"))
    config = LlamaConfig(
        vocab_size=chat["vocab_size"],
        bos_token_id=chat["bos_token_id"],
        eos_token_id=chat["eos_token_id"],
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    shutil.copytree(CHAT, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    from llmserve.engine.launcher import Launcher

    folder = tmp_path_factory.mktemp("sleep")
    environment.prepare(1, folder)
    model = made(folder / "model")
    found = Seen(sum(file.stat().st_size for file in model.glob("*.safetensors")))
    spec = ModelSpec(
        name="chat",
        model=str(model),
        devices=(0,),
        kv_cache=KV,
        gpu_memory_utilization=0.1,
        engine={"max_model_len": 2048},
    )
    launcher = Launcher(folder)

    async def walk() -> None:
        found.before = used()
        began = time.monotonic()
        engine = await asyncio.to_thread(launcher.start, spec, sleeps=True)
        print(f"\nstarted in {time.monotonic() - began:.1f} s")
        try:
            await up_and_down(engine, found)
            await without_room(engine, found)
        finally:
            await asyncio.to_thread(engine.stop)

    try:
        asyncio.run(walk())
    finally:
        print(*lines_of_sleep(launcher.log_of(spec, 0)), sep="\n")
    return found


async def up_and_down(engine: Engine, found: Seen) -> None:
    (found.report,) = await engine.start_reports()
    print(found.report)
    found.said.append(await tokens(engine))
    note(found, Level.READY, 0.0)
    began = time.monotonic()
    await engine.prepare_sleep()
    print(f"prepared in {time.monotonic() - began:.3f} s")
    for levels in WALKS:
        for level in levels:
            began = time.monotonic()
            await engine.sleep(level)
            note(found, level, time.monotonic() - began)
            found.answered.append(await engine.responds(5.0))
        began = time.monotonic()
        await engine.wake()
        note(found, Level.READY, time.monotonic() - began)
        found.said.append(await tokens(engine))


async def without_room(engine: Engine, found: Seen) -> None:
    """Another takes all that the sleeper left; then it goes."""
    import torch

    await engine.sleep(Level.HOST)
    free, _ = torch.cuda.mem_get_info(0)
    taken = torch.empty(free - (3 << 30), dtype=torch.uint8, device="cuda:0")
    try:
        await engine.wake()
    except EngineError as error:
        found.refused = error.message
    print(f"refused: {found.refused}")
    del taken
    torch.cuda.empty_cache()
    await engine.wake()
    found.said.append(await tokens(engine))


def note(found: Seen, level: Level, took: float) -> None:
    found.at.append((level, used()))
    print(f"{level.name:12} {took:7.3f} s  {gib(found.at[-1][1] - found.before)}", flush=True)


async def tokens(engine: Engine) -> list[list[int]]:
    """The most probable ones after eight prompts, one after another."""
    chance = random.Random(0)
    answers: list[list[int]] = []
    for size in range(40, 440, 50):
        ids = [chance.randrange(1000, 40_000) for _ in range(size)]
        answers.append([])
        async for output in generated(engine, ids, temperature=0, max_tokens=24):
            answers[-1] += output.outputs[0].token_ids
    return answers


def test_it_says_the_same_after_every_sleep(seen: Seen) -> None:
    first, *others = seen.said
    assert len(others) == len(WALKS) + 1
    assert all(len(answer) == 24 for answer in first)
    assert len({tuple(answer) for answer in first}) == len(first)  # it does depend on the prompt
    assert others == [first] * len(others)


def test_memory_comes_back_as_promised(seen: Seen) -> None:
    ready = seen.used(Level.READY)[0]
    assert all(ready - used >= 0.97 * KV for used in seen.used(Level.KV_RELEASED))
    for level in (Level.HOST, Level.DISK):
        assert all(ready - used >= 0.97 * (KV + seen.weights) for used in seen.used(level))


def test_awake_it_takes_no_more_than_before(seen: Seen) -> None:
    first, *later = seen.used(Level.READY)
    assert len(later) == len(WALKS)
    assert all(used - first <= SLACK for used in later)


def test_it_answers_asleep(seen: Seen) -> None:
    assert seen.answered
    assert all(seen.answered)


def test_without_room_it_says_so_and_sleeps_on(seen: Seen) -> None:
    assert "free GPU memory and wake it again" in seen.refused


def test_what_torch_has_reserved_is_part_of_what_it_took(seen: Seen) -> None:
    reserved = seen.report["bytes"]["reserved"]
    assert 0.97 * (KV + seen.weights) <= reserved <= seen.used(Level.READY)[0] - seen.before
