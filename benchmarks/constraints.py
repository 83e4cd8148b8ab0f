"""What the check of a constraint costs: `python -m benchmarks.constraints FOLDER`.

FOLDER holds the model whose tokenizer is used; no engine runs. Printed are the first check,
which starts the worker, and for some constraints the first and the second check of each.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from multiprocessing.reduction import ForkingPickler
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs

from llmserve.engine.structured_output.compiler import ConstraintCompiler, Model

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name"],
}
_WIDE = {"type": "object", "properties": {f"k{n}": {"type": "string"} for n in range(200)}}
_CONSTRAINTS: dict[str, dict[str, Any]] = {
    "schema of 3 properties": {"json": _PERSON},
    "schema of 200 properties": {"json": _WIDE},
    "nested counts": {"regex": "((a{1,999}){1,999}){1,999}"},
    "choice of 2": {"choice": ["yes", "no"]},
    "10,000 names": {"json": {"enum": [f"value{n}" for n in range(10_000)]}},
}


async def main(folder: str) -> None:
    config = AsyncEngineArgs(model=folder, enforce_eager=True).create_engine_config()
    key = hashlib.sha256(folder.encode()).hexdigest()
    model = Model(key, bytes(ForkingPickler.dumps(config)))
    grammars = ConstraintCompiler()
    print(f"start of the worker: {await _timed(grammars, model, {'regex': 'a'}):.1f} s")
    for name, constraint in _CONSTRAINTS.items():
        first, second = [await _timed(grammars, model, constraint) for _ in range(2)]
        outcome = (await grammars.check(model, constraint)).reason or "compiled"
        print(f"{name}: {first * 1e3:.0f} ms, {second * 1e6:.0f} µs; {outcome[:60]}")
    await grammars.close()


async def _timed(grammars: ConstraintCompiler, model: Model, constraint: dict[str, Any]) -> float:
    began = time.perf_counter()
    await grammars.check(model, constraint)
    return time.perf_counter() - began


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
