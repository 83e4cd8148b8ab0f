from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.engine.structured_output import compiler
from llmserve.engine.structured_output.compiler import (
    HEAD,
    ConstraintCompiler,
    Limits,
    Model,
    constraints_of,
)
from llmserve.errors import GrammarTooComplex, InvalidGrammar, Overloaded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TOY = (sys.executable, str(Path(__file__).with_name("toy_worker.py")))
MODEL = Model("toy", b"config")
QUICK = Limits(cpu_s=1, wall_s=60.0)


@contextlib.asynccontextmanager
async def toy(limits: Limits = QUICK) -> AsyncIterator[ConstraintCompiler]:
    grammars = ConstraintCompiler(limits, TOY)
    try:
        yield grammars
    finally:
        await grammars.close()


def regex(pattern: str) -> dict[str, Any]:
    return {"regex": pattern}


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def children_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(each) for each in children.split()]


async def until_ended(pid: int) -> None:
    while is_running(pid):
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("spin", "CPU time"),
        ("eat", "MiB"),
        ("crash", "crashes"),
        ("raise", "crashes"),
        ("flood", "to compile"),
    ],
)
async def test_check_beyond_a_limit_is_too_complex(pattern: str, words: str) -> None:
    async with toy() as grammars:
        error = (await grammars.check(MODEL, regex(pattern))).refusal("text.format.schema")
        pid = grammars.pid
        assert isinstance(error, GrammarTooComplex)
        assert words in error.message
        assert error.message.startswith("text.format.schema: ")
        assert error.param == "text.format.schema"
        # The fork ended, not the worker.
        assert (await grammars.check(MODEL, regex("a"))).backend == "toy"
        assert grammars.pid == pid


async def test_check_that_waits_ends_with_its_wall_time() -> None:
    async with toy(Limits(wall_s=0.1)) as grammars:
        error = (await grammars.check(MODEL, regex("sleep 3600"))).refusal("x")
        assert isinstance(error, GrammarTooComplex)
        assert "0.1 s" in error.message


async def test_check_ended_by_a_busy_machine_is_not_kept() -> None:
    async with toy(Limits(wall_s=0.1)) as grammars:
        await grammars.check(MODEL, regex("sleep 3600"))
        await grammars.check(MODEL, regex("crash"))
        assert len(grammars.remembered) == 0


async def test_check_refused_by_the_compiler_is_invalid() -> None:
    async with toy() as grammars:
        error = (await grammars.check(MODEL, regex("refuse why"))).refusal("x")
        assert isinstance(error, InvalidGrammar)
        assert "why" in error.message


async def test_check_beyond_its_size_starts_no_worker() -> None:
    async with toy(Limits(constraint_bytes=100)) as grammars:
        error = (await grammars.check(MODEL, regex("a" * 100))).refusal("x")
        assert isinstance(error, GrammarTooComplex)
        assert grammars.pid is None


async def test_check_of_deep_json_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    async with toy() as grammars:
        error = (await grammars.check(MODEL, {"json": deep})).refusal("x")
        assert isinstance(error, GrammarTooComplex)


async def test_check_of_a_lone_surrogate_is_refused() -> None:
    async with toy() as grammars:
        assert (await grammars.check(MODEL, regex("\ud800"))).refusal("x") is not None


@pytest.mark.parametrize("pattern", ["a", "refuse why", "eat", "spin"])
async def test_check_known_by_its_text_needs_no_worker(pattern: str) -> None:
    async with toy() as grammars:
        first = await grammars.check(MODEL, regex(pattern))
        await grammars.close()
        assert await grammars.check(MODEL, regex(pattern)) is first
        assert grammars.pid is None
        other = Model("other", b"config")
        assert await grammars.check(other, regex(pattern)) is not first


async def test_check_tells_other_orders_apart() -> None:
    schemas = [{"required": list(keys)} for keys in ("ab", "ba")]
    async with toy() as grammars:
        first, second = [await grammars.check(MODEL, {"json": each}) for each in schemas]
        assert first is not second


async def test_cache_is_bounded_in_number_and_in_bytes() -> None:
    async with toy(Limits(cached=4, cached_bytes=20_000)) as grammars:
        for length in range(10):
            await grammars.check(MODEL, regex(f"long {length}"))
        assert len(grammars.remembered) == 4
        for length in range(1000, 1010):
            await grammars.check(MODEL, regex(f"long {length}"))
        assert len(grammars.remembered) == 4
        await grammars.check(MODEL, regex("long 16000"))
        assert len(grammars.remembered) == 0


async def test_queue_full_refuses_with_503() -> None:
    async with toy(Limits(queue=2, wall_s=3600)) as grammars:
        waiting = [
            asyncio.ensure_future(grammars.check(MODEL, regex(f"sleep 360{n}"))) for n in range(2)
        ]
        same = asyncio.ensure_future(grammars.check(MODEL, regex("sleep 3600")))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await grammars.check(MODEL, regex("a"))
        assert refused.value.status == 503
        assert not same.done()  # one more that waits for the same check takes no place
        await grammars.close()
        results = await asyncio.gather(*waiting, same, return_exceptions=True)
        assert all(isinstance(each, Overloaded | asyncio.CancelledError) for each in results)


async def test_check_goes_on_without_its_client() -> None:
    async with toy() as grammars:
        leaving = asyncio.ensure_future(grammars.check(MODEL, regex("sleep 0.2")))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert (await grammars.check(MODEL, regex("sleep 0.2"))).backend == "toy"


async def test_worker_killed_in_mid_check_is_replaced() -> None:
    async with toy() as grammars:
        await grammars.check(MODEL, regex("a"))
        first = grammars.pid
        assert first is not None
        check = asyncio.ensure_future(grammars.check(MODEL, regex("sleep 0.5")))
        await asyncio.sleep(0.05)
        os.kill(first, signal.SIGKILL)
        assert (await check).backend == "toy"
        assert grammars.pid not in {None, first}


async def test_worker_that_keeps_dying_refuses_with_503() -> None:
    async with toy() as grammars:
        with pytest.raises(Overloaded):
            await grammars.check(MODEL, regex("die"))
        assert (await grammars.check(MODEL, regex("a"))).backend == "toy"
        with pytest.raises(Overloaded):  # not remembered: it was no verdict
            await grammars.check(MODEL, regex("die"))


async def test_worker_that_cannot_start_refuses_with_503() -> None:
    for command in ((sys.executable, "-c", "raise SystemExit(1)"), ("/nowhere/python",)):
        grammars = ConstraintCompiler(QUICK, command)
        with pytest.raises(Overloaded):
            await grammars.check(MODEL, regex("a"))


async def test_worker_that_answers_nothing_is_replaced() -> None:
    async with toy(Limits(start_s=0.3, wall_s=0.1)) as grammars:
        with pytest.raises(Overloaded):
            await grammars.check(MODEL, regex("mute"))
        assert grammars.pid is None


async def test_prepare_starts_the_worker_once() -> None:
    async with toy() as grammars:
        for _ in range(2):
            grammars.prepare(MODEL)
        await asyncio.gather(*grammars._checks.values())
        worker = grammars.pid
        assert worker is not None
        grammars.kill()
        await until_ended(worker)
        grammars.prepare(MODEL)
        assert not grammars._checks


async def test_prepare_takes_no_place_in_a_full_queue() -> None:
    async with toy(Limits(queue=1, wall_s=3600)) as grammars:
        waiting = asyncio.ensure_future(grammars.check(MODEL, regex("sleep 3600")))
        await asyncio.sleep(0)
        grammars.prepare(Model("other", b"config"))
        assert len(grammars._checks) == 1
        await grammars.close()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_stop_ends_the_check_under_way_and_starts_no_worker() -> None:
    async with toy(Limits(wall_s=3600)) as grammars:
        check = asyncio.ensure_future(grammars.check(MODEL, regex("sleep 3600")))
        while grammars.pid is None:
            await asyncio.sleep(0.01)
        grammars.stop()
        with pytest.raises(Overloaded):
            await check
        assert grammars.pid is None
        with pytest.raises(Overloaded):
            await grammars.check(MODEL, regex("a"))


async def test_kill_leaves_no_process() -> None:
    async with toy(Limits(wall_s=3600)) as grammars:
        await grammars.check(MODEL, regex("a"))
        worker = grammars.pid
        assert worker is not None
        check = asyncio.ensure_future(grammars.check(MODEL, regex("sleep 3600")))
        while not (forks := children_of(worker)):
            await asyncio.sleep(0.01)
        check.cancel()
        await grammars.close()
        for pid in (worker, *forks):
            await until_ended(pid)


@pytest.mark.parametrize("pattern", ["a", "sleep 3600"])
def test_worker_ends_with_a_server_that_was_killed(pattern: str) -> None:
    """Its standard input closes, also while a check is under way."""
    worker = subprocess.Popen(TOY, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdin is not None
    limits = '{"memory_bytes": 1000000000, "cpu_s": 5, "wall_s": 3600, "constraint": "{%s}"}'
    ask = (limits % f'\\"regex\\": \\"{pattern}\\"').encode()
    worker.stdin.write(HEAD.pack(len(ask), 0) + ask)
    worker.stdin.close()
    assert worker.wait(30) == 0
    assert worker.stdout is not None
    worker.stdout.close()


async def test_worker_is_in_a_session_of_its_own() -> None:
    async with toy() as grammars:
        await grammars.check(MODEL, regex("a"))
        assert grammars.pid is not None
        assert os.getsid(grammars.pid) != os.getsid(0)


async def test_refusal_names_a_parse_that_is_too_slow() -> None:
    async with toy() as grammars:
        error = await grammars.refusal_of(MODEL, "response_format", regex("slow"))
        assert isinstance(error, GrammarTooComplex)
        assert "9.00 s" in error.message


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({}, []),
        ({"response_format": {"type": "json_object"}}, []),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            [("response_format.json_schema.schema", {"json": SCHEMA})],
        ),
        (
            {"response_format": {"type": "structural_tag", "format": {}}},
            [("response_format", {"structural_tag": {"type": "structural_tag", "format": {}}})],
        ),
        ({"structured_outputs": {"regex": "a"}}, [("structured_outputs.regex", {"regex": "a"})]),
        (
            {"text": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            [("text.format.schema", {"json": SCHEMA})],
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            [("output_config.format.schema", {"json": SCHEMA})],
        ),
    ],
)
def test_constraints_of_body_have_their_place(body: dict[str, Any], found: list[Any]) -> None:
    assert list(constraints_of(body)) == found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "format", "schema", "json_schema", "regex", "json"]),
            inner | st.just("structural_tag"),
            max_size=4,
        )
    ),
    max_leaves=12,
)
PLACES = ("structured_outputs", "response_format", "text", "output_config")


@given(st.dictionaries(st.sampled_from(PLACES), JSON))
def test_constraints_of_any_body_are_of_one_kind_each(body: dict[str, Any]) -> None:
    for place, constraint in constraints_of(body):
        assert place.split(".")[0] in body
        assert len(constraint) == 1


def test_worker_that_imports_ends_with_its_server(tmp_path: Path) -> None:
    """Killed, so that it can end nobody."""
    began = tmp_path / "began"
    (tmp_path / "slow.py").write_text(
        f"import pathlib, time; pathlib.Path({str(began)!r}).touch(); time.sleep(600)"
    )
    code = (
        "import subprocess, sys, time\n"
        "line = [sys.executable, '-m', 'llmserve.engine.structured_output.sandbox', 'slow']\n"
        "print(subprocess.Popen(line, stdin=subprocess.PIPE, start_new_session=True).pid, flush=True)\n"
        "time.sleep(600)"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    env = os.environ | {"PYTHONPATH": path}
    line = [sys.executable, "-c", code]
    with subprocess.Popen(line, env=env, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        worker = psutil.Process(int(server.stdout.readline()))
        while not began.exists():
            assert worker.is_running()
            time.sleep(0.01)
        server.kill()
        assert not psutil.wait_procs([worker], timeout=60)[1]


def test_worker_has_not_the_openmp_of_the_engines() -> None:
    own = {"LD_PRELOAD": "/opt/libother.so:/venv/lib/libiomp5.so", "HOME": "/root"}
    made = compiler._environment(own)
    assert (made["LD_PRELOAD"], made["HOME"]) == ("/opt/libother.so", "/root")
    assert compiler._environment({})["LD_PRELOAD"] == ""
