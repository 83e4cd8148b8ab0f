"""A server with idle engines, each with a worker: run as a process of its own.

Prints the pids of an engine and its worker once they run. `slow` engines hang while their
target is imported, before any code of theirs; only their pid is printed.
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


def start(watch: ParentWatch, *arguments: Any) -> Any:
    with watch.watching():
        process = spawn.Process(target=engine, args=arguments)
        process.start()
    return process


def serve(kind: str, watches: list[ParentWatch]) -> None:
    for watch in watches:
        if kind == "slow":
            print(start(watch, Slow()).pid, flush=True)
        else:
            start(watch)


if __name__ == "__main__":
    watches = [ParentWatch(), ParentWatch()]
    # A watch does not depend on the thread that started its processes.
    thread = Thread(target=serve, args=(sys.argv[1], watches))
    thread.start()
    thread.join()
    subprocess.Popen(["sleep", str(FOREVER_S)])  # the server's own: holds no pipe open
    time.sleep(FOREVER_S)
