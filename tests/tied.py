"""A server with engines that do nothing, each with a worker: run as a process of its own.

Prints the pids of an engine and its worker once they run. `slow` engines hang while their
target is imported, before any code of theirs; their pid alone is printed.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from threading import Thread
from typing import Any

from llmserve.engine.parent_watch import ParentWatch

FOREVER_S = 600.0
spawn = multiprocessing.get_context("spawn")


class Slow:
    """Unpickled only after a while, as the modules of an engine."""

    def __reduce__(self) -> tuple[Any, ...]:
        return time.sleep, (FOREVER_S,)


def engine(_: Any = None) -> None:
    worker = spawn.Process(target=sleeper)
    worker.start()
    print(multiprocessing.current_process().pid, worker.pid, flush=True)
    sum(range(10**15))  # holds the interpreter's lock for hours


def sleeper() -> None:
    time.sleep(FOREVER_S)


def start(tether: ParentWatch, *arguments: Any) -> Any:
    with tether.tying():
        process = spawn.Process(target=engine, args=arguments)
        process.start()
    return process


def serve(kind: str, tethers: list[ParentWatch]) -> None:
    for tether in tethers:
        if kind == "slow":
            print(start(tether, Slow()).pid, flush=True)
        else:
            start(tether)


if __name__ == "__main__":
    tethers = [ParentWatch(), ParentWatch()]
    # A tie does not depend on the thread that made it.
    thread = Thread(target=serve, args=(sys.argv[1], tethers))
    thread.start()
    thread.join()
    subprocess.Popen(["sleep", str(FOREVER_S)])  # of the server's own: keeps no tie open
    time.sleep(FOREVER_S)
