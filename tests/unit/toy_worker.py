"""A worker for `llmserve.grammar` whose compiler does what a pattern says; no vLLM.

The sandbox around it is the real one.
"""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

from llmserve.sandbox import Server, sandboxed


def compiled(text: str) -> dict[str, Any]:
    pattern: str = json.loads(text).get("regex", "")
    match pattern.partition(" "):
        case ("spin", _, _):
            while True:
                pass
        case ("sleep", _, seconds):
            time.sleep(float(seconds))
        case ("eat", _, _):
            try:
                len(b"x" * (1 << 40))
            except MemoryError:
                return {"outcome": "memory"}
        case ("crash", _, _):
            os.kill(os.getpid(), signal.SIGSEGV)
        case ("raise", _, _):
            raise RuntimeError
        case ("flood", _, _):
            return {"outcome": "x" * (32 << 20)}
        case ("refuse", _, reason):
            return {"outcome": "invalid", "reason": reason}
        case ("long", _, length):
            fields = {"choice": None, "grammar": "g" * int(length)}
            return {"outcome": "compiled", "backend": "toy", "fields": fields, "parse_s": 0.0}
        case ("slow", _, _):
            return {"outcome": "compiled", "backend": "toy", "fields": {}, "parse_s": 9.0}
    return {"outcome": "compiled", "backend": "toy", "fields": {}, "parse_s": 0.0}


def main() -> None:
    server = Server()
    for ask, _ in server.requests():
        if '"die"' in ask["constraint"]:
            os._exit(1)
        if '"mute"' in ask["constraint"]:
            time.sleep(3600)
        server.answer(sandboxed(lambda text=ask["constraint"]: compiled(text), ask))


if __name__ == "__main__":
    main()
