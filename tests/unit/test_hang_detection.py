from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.engine.hang_detection import HangDetector, cpu_s

LOOKS = st.lists(st.floats(0.01, 20), min_size=1, max_size=40)


class Engine:
    """Takes `share` of a core, from a moment on nothing."""

    def __init__(self, share: float, until_s: float = float("inf")) -> None:
        self.share = share
        self.until_s = until_s
        self.now_s = 0.0
        self.asked = 0

    def cpu_s(self) -> float:
        self.asked += 1
        return self.share * min(self.now_s, self.until_s)

    def hangs_at(self, silence: HangDetector, looks: list[float]) -> float | None:
        for step in looks:
            self.now_s += step
            if silence.is_hang(self.now_s):
                return self.now_s
        return None


def silence(engine: Engine, at_most_s: float = 1000.0) -> HangDetector:
    return HangDetector(0.0, engine.cpu_s, quiet_s=45.0, at_most_s=at_most_s, working_share=0.05)


@given(LOOKS)
def test_silence_of_an_engine_that_works_is_no_hang(looks: list[float]) -> None:
    engine = Engine(0.2)
    assert engine.hangs_at(silence(engine), looks) is None


@given(LOOKS)
def test_silence_without_work_is_a_hang_and_not_before(looks: list[float]) -> None:
    engine = Engine(0.0)
    hangs_at = engine.hangs_at(silence(engine), [*looks, *[5.0] * 20])
    assert hangs_at is not None
    assert 45 <= hangs_at <= 45 + 2 * 20


def test_silence_after_work_is_a_hang_in_two_bounds() -> None:
    for until_s in range(1, 200, 7):
        engine = Engine(1.0, until_s)
        hangs_at = engine.hangs_at(silence(engine), [1.0] * 400)
        assert hangs_at is not None
        assert until_s < hangs_at <= until_s + 2 * 45 + 2


def test_silence_that_works_for_ever_is_a_hang_at_the_bound() -> None:
    engine = Engine(1.0)
    assert engine.hangs_at(silence(engine, 600.0), [7.0] * 400) == 602.0


def test_silence_broken_begins_again() -> None:
    engine = Engine(0.0)
    quiet = silence(engine)
    for now_s in range(0, 900, 40):
        assert not quiet.is_hang(float(now_s), has_output=True)
    assert quiet.is_hang(1000.0)


def test_silence_asks_for_cpu_time_twice_a_bound() -> None:
    engine = Engine(1.0)
    engine.hangs_at(silence(engine), [0.5] * 1800)
    assert 0 < engine.asked <= 2 * 900 / 45 + 2


BUSY = (
    "import os, sys, time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
)
WAIT = "print('done', flush=True); sys.stdin.read()"


@pytest.mark.parametrize("below", [False, True], ids=["itself", "below it"])
@pytest.mark.parametrize("ended", [False, True])
def test_cpu_time_is_that_of_a_whole_tree(below: bool, ended: bool) -> None:
    code = f"{BUSY}{'' if ended and below else WAIT}"
    if below:
        code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {code!r}])\n{WAIT}"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        assert cpu_s([process.pid]) >= 0.3
        process.communicate()


def test_cpu_time_of_processes_that_are_gone_is_none() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert cpu_s([process.pid]) == 0.0
    seen = [cpu_s([os.getpid(), process.pid]) for _ in range(2)]
    assert all(before <= after for before, after in pairwise(seen))
