"""A fake engine core whose answers and failures a request scripts.

    python -m tests.contract.fake_core INPUT OUTPUT [--step-ms 5] [--task embed]

Each request gets one token per step, the ids of its own prompt over and over, until its
`max_tokens` or one of its `stop_token_ids`. Some values of `seed` change that: see below. A
request with `vllm_xargs: {"answer": [...]}` gets these ids and ends as at an end of text.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists
from vllm.v1.serial_utils import MsgpackDecoder

from benchmarks import fake_core

if TYPE_CHECKING:
    from collections.abc import Iterator

    import zmq

DIES_AT_ONCE = 12  # the engine dies instead of its first step
DIES = 13  # the engine dies at the third token, a while after the second
FAILS = 14  # the request alone fails at its third token, a while after the second
TRIPLES = 15  # three tokens a step
SILENT = 16  # no token ever
PREEMPTED = 17  # at every second token, and scheduled again
LATE_S = 0.1  # after which earlier output has been written
_DEAD = b"ENGINE_CORE_DEAD"  # vllm/v1/engine/core_client.py


@dataclass
class Running:
    ids: Iterator[int]
    prompt_tokens: int
    max_tokens: int
    stop_ids: frozenset[int]
    seed: int | None
    logprobs: int | None
    arrived_s: float
    answer_tokens: int | None = None
    done: int = 0

    def start(self) -> dict[str, Any]:
        """What only the first output of a request carries."""
        queued = EngineCoreEvent(EngineCoreEventType.QUEUED, self.arrived_s)
        scheduled = EngineCoreEvent(EngineCoreEventType.SCHEDULED, time.monotonic())
        computed = self.prompt_tokens
        stats = PrefillStats(num_prompt_tokens=computed, num_computed_tokens=computed)
        return {"events": [queued, scheduled], "prefill_stats": stats}

    def again(self) -> dict[str, Any]:
        """What an output carries of a request that has been preempted."""
        if self.seed != PREEMPTED or self.done % 2:
            return {}
        kinds = EngineCoreEventType.PREEMPTED, EngineCoreEventType.SCHEDULED
        return {"events": [EngineCoreEvent(kind, time.monotonic()) for kind in kinds]}

    def logprobs_of(self, ids: list[int]) -> LogprobsLists | None:
        """All that were wanted are the token itself."""
        if self.logprobs is None:
            return None
        wanted = np.array([[token] * (self.logprobs + 1) for token in ids])
        return LogprobsLists(wanted, np.full(wanted.shape, -0.5), np.ones(len(ids), int))

    def step(self) -> tuple[list[int], FinishReason | None, int | None]:
        """The next tokens, and how it ends with them if it does."""
        wanted = 3 if self.seed == TRIPLES else 1
        ids: list[int] = []
        for token in islice(self.ids, min(wanted, self.max_tokens - self.done)):
            ids.append(token)
            self.done += 1
            if token in self.stop_ids:
                return ids, FinishReason.STOP, token
        if self.done == self.answer_tokens:
            return ids, FinishReason.STOP, None
        if self.seed == FAILS and self.done >= 3:
            return ids, FinishReason.ERROR, None
        return ids, FinishReason.LENGTH if self.done >= self.max_tokens else None, None


class ScriptedCore(fake_core.FakeCore):
    def __init__(self, *arguments: Any) -> None:
        self._requests: dict[str, Running] = {}
        self._aborted = 0
        self._last: dict[str, Any] = {}
        self._decode_whole = MsgpackDecoder(EngineCoreRequest).decode
        super().__init__(*arguments)

    def run(self) -> None:
        while True:
            self._listen(0 if self._requests else 1.0)
            if self._requests:
                self._step_once()
                self._listen_until(time.monotonic() + self._settings.step_s)

    def _decode_add(self, frames: list[zmq.Frame]) -> Any:
        return self._decode_whole(frames)

    def _call(self, method: str) -> Any:
        """Return the result of a utility call; the others are for tests."""
        answers = {
            "aborted": self._aborted,
            "running": len(self._requests),
            "last_request": self._last,
        }
        return answers.get(method, super()._call(method))

    def _abort(self, request_id: str) -> None:
        self._aborted += self._requests.pop(request_id, None) is not None

    def _add(self, request: Any) -> None:
        params = request.sampling_params
        answer = (params.extra_args or {}).get("answer")
        structured = params.structured_outputs
        self._last = {
            "json": getattr(structured, "json", None),
            "structural_tag": getattr(structured, "structural_tag", None),
            "max_tokens": params.max_tokens,
            "seed": params.seed,
            "temperature": params.temperature,
            "stop": params.stop,
            "backend": getattr(structured, "_backend", None),
            "prompt_token_ids": list(request.prompt_token_ids),
        }
        self._requests[request.request_id] = Running(
            cycle(answer or request.prompt_token_ids),
            len(request.prompt_token_ids),
            params.max_tokens,
            frozenset(params.stop_token_ids or ()),
            params.seed,
            params.logprobs,
            time.monotonic(),
            len(answer) if answer else None,
        )

    def _step_once(self) -> None:
        outputs = []
        for request_id, running in list(self._requests.items()):
            if running.seed == SILENT:
                continue
            if running.done == 2 and running.seed in {DIES, FAILS}:
                time.sleep(LATE_S)
            if running.seed == DIES_AT_ONCE or (running.seed == DIES and running.done == 2):
                self._outputs.send(_DEAD)
                sys.exit(1)
            start = running.again() if running.done else running.start()
            ids, reason, stop = running.step()
            outputs.append(
                EngineCoreOutput(
                    request_id,
                    ids,
                    new_logprobs=running.logprobs_of(ids),
                    finish_reason=reason,
                    stop_reason=stop,
                    **start,
                )
            )
            if reason is not None:
                del self._requests[request_id]
        if outputs:
            self._send(EngineCoreOutputs(outputs=outputs))


if __name__ == "__main__":
    fake_core.main(ScriptedCore)
