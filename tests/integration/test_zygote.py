"""Engines that are forked from the zygote, and what follows from its end."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.integration.conftest import EMBED, START_S, Server, until, write_registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("zygote")
    with Server(write_registry(folder, models={"embed": {"model": EMBED}})) as server:
        yield server.ready()


def zygote_of(server: Server) -> psutil.Process:
    (found,) = (each for each in server.family() if each.name().startswith("llmserve::zyg"))
    return found


def log_of(server: Server) -> str:
    (file,) = server.registry.parent.glob("logs/*/server.log")
    return file.read_text()


def embedding(server: Server) -> list[float]:
    reply = server.post("/v1/embeddings", model="embed", input="x")
    assert reply.status_code == 200, reply.text
    values: list[float] = reply.json()["data"][0]["embedding"]
    return values


def next_engine(server: Server, before: psutil.Process) -> psutil.Process:
    """Kill an engine core, and return the next one when it is ready."""
    workers = [each for each in psutil.process_iter() if is_in_group(each, before.pid)]
    before.kill()
    until(lambda: not any(each.is_running() for each in workers))
    until(lambda: not is_ready(server))
    until(lambda: is_ready(server), START_S)
    (after,) = server.engines()
    assert after.pid != before.pid
    return after


def is_ready(server: Server) -> bool:
    return server.metric("llmserve_model_state", model="embed", state="ready") == 1


def is_in_group(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group
    except ProcessLookupError:
        return False


def test_engine_is_forked_and_forked_again_after_its_death(alone: Server) -> None:
    before = embedding(alone)
    zygote = zygote_of(alone)
    (engine,) = alone.engines()
    assert engine.ppid() == zygote.pid
    assert next_engine(alone, engine).ppid() == zygote.pid
    assert embedding(alone) == pytest.approx(before, abs=1e-3)
    assert "spawned" not in log_of(alone)


def test_killed_zygote_leaves_its_engine_and_the_next_is_spawned(alone: Server) -> None:
    zygote = zygote_of(alone)
    (engine,) = alone.engines()
    zygote.kill()
    until(lambda: zygote.status() == psutil.STATUS_ZOMBIE)
    embedding(alone)
    assert next_engine(alone, engine).ppid() == alone.process.pid
    embedding(alone)
    assert "EngineCore is spawned instead of forked: the zygote has ended" in log_of(alone)


def test_killed_server_leaves_no_fork(tmp_path: Path) -> None:
    with Server(write_registry(tmp_path, models={"embed": {"model": EMBED}})) as server:
        family = server.ready().family()
        assert {each.ppid() for each in server.engines()} == {zygote_of(server).pid}
        server.send(signal.SIGKILL)
        assert server.process.wait(60) == -signal.SIGKILL
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
