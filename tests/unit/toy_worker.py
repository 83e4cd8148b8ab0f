"""A worker for `llmserve.engine.structured_output.compiler` whose compiler does what a pattern says; no vLLM.

The sandbox around it is the real one.
"""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from llmserve.engine.structured_output.sandbox import SandboxServer, sandboxed

if TYPE_CHECKING:
    from collections.abc import Callable


def compiled(text: str) -> dict[str, Any]:
    command, _, argument = json.loads(text).get("regex", "").partition(" ")
    return _COMMANDS.get(command, _fine)(argument)


def _fine(_: str = "", **more: Any) -> dict[str, Any]:
    return {"outcome": "compiled", "backend": "toy", "fields": {}, "parse_s": 0.0} | more


def _spin(_: str) -> dict[str, Any]:
    while True:
        pass


def _sleep(seconds: str) -> dict[str, Any]:
    time.sleep(float(seconds))
    return _fine()


def _eat(_: str) -> dict[str, Any]:
    try:
        return _fine(parse_s=len(bytearray(1 << 40)))
    except MemoryError:
        return {"outcome": "memory"}


def _crash(_: str) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return _fine()


def _raise(_: str) -> dict[str, Any]:
    raise RuntimeError


_COMMANDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "spin": _spin,
    "sleep": _sleep,
    "eat": _eat,
    "crash": _crash,
    "raise": _raise,
    "flood": lambda _: {"outcome": "x" * (32 << 20)},
    "refuse": lambda reason: {"outcome": "invalid", "reason": reason},
    "long": lambda length: _fine(fields={"choice": None, "grammar": "g" * int(length)}),
    "slow": lambda _: _fine(parse_s=9.0),
}


def main() -> None:
    server = SandboxServer()
    for ask, _ in server.requests():
        if '"die"' in ask["constraint"]:
            os._exit(1)
        if '"mute"' in ask["constraint"]:
            time.sleep(3600)
        server.answer(sandboxed(partial(compiled, ask["constraint"]), ask))


if __name__ == "__main__":
    main()
