"""A zygote without vLLM, and processes for it to fork."""

from __future__ import annotations

import atexit
import json
import os
import random
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmserve.engine.zygote import Zygote
from llmserve.engine.zygote_process import ForkServer

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

FOREVER_S = 600.0
REASON = "this zygote refuses"


def serve(requests: socket.socket, context: Callable[[], Any]) -> None:
    """Fork at once, and let forks fork through `below`."""
    before = dict(os.environ)
    os.environ["SET_BY_IMPORT"] = "1"
    sys.modules["tests.zygotes"].below = context  # type: ignore[attr-defined]
    ForkServer(requests, before, lambda: None).run()


def refuse(requests: socket.socket, _: Callable[[], Any]) -> None:
    ForkServer(requests, dict(os.environ), lambda: REASON).run()


def end(requests: socket.socket, _: Callable[[], Any]) -> None:
    """End with the first request, before an answer."""
    requests.recv(1)


def hang(_requests: socket.socket, _: Callable[[], Any]) -> None:
    time.sleep(FOREVER_S)


def end_after_fork(requests: socket.socket, _: Callable[[], Any]) -> None:
    """End between a fork and its answer."""

    class Ending(ForkServer):
        def _answer(self, request: Any) -> None:
            if not os.fork():
                self._become(request)
            os._exit(1)

    Ending(requests, dict(os.environ), lambda: None).run()


def hide_current_test() -> None:
    """Remove the variable that pytest sets to another value in each phase of a test."""
    os.environ.pop("PYTEST_CURRENT_TEST", None)


@contextmanager
def zygote(kind: Callable[..., None] = serve, **bounds: float) -> Iterator[Zygote]:
    hide_current_test()
    made = Zygote.start(kind, **bounds)
    try:
        yield made
    finally:
        made.kill()


def sleep() -> None:
    time.sleep(FOREVER_S)


def exit_with(code: int) -> None:
    sys.exit(code)


def report(path: str) -> None:
    """Write what this process has of its own."""
    facts = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "group": os.getpgrp(),
        "environment": dict(os.environ),
        "random": random.random(),
        "signals": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "threads": threading.active_count(),
        "files": sorted(each.name for each in Path("/proc/self/fd").iterdir()),
    }
    Path(path).write_text(json.dumps(facts))


def report_engine(path: str, variables: list[str]) -> None:
    """Write what of vLLM, torch and others this process has of its own."""
    import numpy as np
    import torch
    import zmq
    from vllm import envs, plugins

    facts = {
        "imported": sorted(sys.modules),
        "environment": sorted(os.environ),
        "variables": {name: getattr(envs, name) for name in variables},
        "are_variables_cached": envs._is_envs_cache_enabled(),
        "have_plugins_run": plugins.plugins_loaded,
        "torch_threads": torch.get_num_threads(),
        "product": float(torch.ones(500, 500).matmul(torch.ones(500, 500)).sum()),
        "numpy": float(np.random.random()),
        "context": zmq.Context.instance().underlying,
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "title": Path("/proc/self/comm").read_text().strip(),
    }
    Path(path).write_text(json.dumps(facts, default=str))


def report_at_exit(path: str) -> None:
    atexit.register(Path(path).write_text, "ended")


def start_worker(path: str) -> None:
    """As an engine core: start a worker, write both process ids, and wait."""
    worker = sys.modules["tests.zygotes"].below().Process(target=sleep, daemon=True)
    worker.start()
    hidden = Path(f"{path}.hidden")
    hidden.write_text(json.dumps([os.getpid(), worker.pid]))
    hidden.rename(path)
    time.sleep(FOREVER_S)
