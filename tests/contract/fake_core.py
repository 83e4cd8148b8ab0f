"""A stand-in for vLLM's engine core: its ZMQ and msgpack protocol, no model.

Run as `python fake_core.py INPUT OUTPUT [STEP_S [TASK]]`. Each request gets one token a step,
the ids of its own prompt over and over, until its `max_tokens` or one of its
`stop_token_ids`. Some values of `seed` ask for more: see below. A request with
`vllm_xargs: {"answer": [...]}` gets these ids instead, and ends as at an end of text.

Source: vllm/v1/engine/core.py (EngineCoreProc) and core_client.py (AsyncMPClient).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import zmq
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreReadyResponse,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
    UtilityOutput,
)
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

if TYPE_CHECKING:
    from collections.abc import Iterator

STEP_S = 0.005
DIES_AT_ONCE = 12  # the engine dies instead of its first step
DIES = 13  # the engine dies at the third token, a while after the second
FAILS = 14  # the request alone fails at its third token, a while after the second
TRIPLES = 15  # three tokens a step
SILENT = 16  # no token ever
PREEMPTED = 17  # at every second token, and scheduled again
LATE_S = 0.1  # so that what came before has been written
_DEAD = b"ENGINE_CORE_DEAD"  # vllm/v1/engine/core_client.py

_READY = {
    "max_model_len": 2048,
    "num_gpu_blocks": 1000,
    "block_size": 16,
    "dp_stats_address": None,
    "dtype": "bfloat16",
    "vllm_version": "0.32.0",
    "world_size": 1,
    "data_parallel_size": 1,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "data_parallel_rank": 0,
    "max_num_seqs": 1024,
    "max_num_batched_tokens": 8192,
    "instance_id": "fake",
    "supports_lora": False,
    "max_loras": 0,
}


@dataclass
class Running:
    ids: Iterator[int]
    prompt_tokens: int
    max_tokens: int
    stop_ids: frozenset[int]
    seed: int | None
    logprobs: int | None
    came_s: float
    answer_tokens: int | None = None
    done: int = 0

    def start(self) -> dict[str, Any]:
        """What only the first output of a request carries."""
        queued = EngineCoreEvent(EngineCoreEventType.QUEUED, self.came_s)
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


class FakeCore:
    def __init__(
        self, inputs: str, outputs: str, step_s: str = str(STEP_S), task: str = "generate"
    ) -> None:
        self.step_s, self.task = float(step_s), task
        context = zmq.Context()
        self.inputs = context.socket(zmq.DEALER)
        self.inputs.setsockopt(zmq.IDENTITY, (0).to_bytes(2, "little"))
        self.inputs.connect(inputs)
        self.outputs = context.socket(zmq.PUSH)
        self.outputs.connect(outputs)
        self.inputs.send(msgspec.msgpack.encode(EngineCoreReadyResponse(**_READY)))
        self.requests: dict[str, Running] = {}
        self.aborted = 0
        self.last: dict[str, Any] = {}
        self.encode = MsgpackEncoder().encode
        self.decode_request = MsgpackDecoder(EngineCoreRequest).decode
        self.decode = MsgpackDecoder().decode

    def run(self) -> None:
        while True:
            while self.inputs.poll(0 if self.requests else 1000):
                self.receive()
            if self.requests:
                self.step()
                time.sleep(self.step_s)

    def receive(self) -> None:
        kind, *frames = self.inputs.recv_multipart(copy=False)
        match EngineCoreRequestType(bytes(kind.buffer)):
            case EngineCoreRequestType.ADD:
                request = self.decode_request(frames)
                self.add(request)
            case EngineCoreRequestType.ABORT:
                for request_id in self.decode(frames):
                    self.aborted += self.requests.pop(request_id, None) is not None
            case EngineCoreRequestType.UTILITY:
                _, call_id, method, _ = self.decode(frames)
                answers: dict[str, Any] = {
                    "get_supported_tasks": (self.task,),
                    "aborted": self.aborted,  # the rest is ours, for tests
                    "running": len(self.requests),
                    "last_request": self.last,
                }
                result = UtilityOutput(call_id, result=UtilityResult(answers.get(method)))
                self.send(EngineCoreOutputs(utility_output=result))

    def add(self, request: EngineCoreRequest) -> None:
        params = request.sampling_params
        answer = (params.extra_args or {}).get("answer")
        structured = params.structured_outputs
        self.last = {
            "json": getattr(structured, "json", None),
            "structural_tag": getattr(structured, "structural_tag", None),
            "max_tokens": params.max_tokens,
            "seed": params.seed,
            "temperature": params.temperature,
            "stop": params.stop,
            "backend": getattr(structured, "_backend", None),
            "prompt_token_ids": list(request.prompt_token_ids),
        }
        self.requests[request.request_id] = Running(
            cycle(answer or request.prompt_token_ids),
            len(request.prompt_token_ids),
            params.max_tokens,
            frozenset(params.stop_token_ids or ()),
            params.seed,
            params.logprobs,
            time.monotonic(),
            len(answer) if answer else None,
        )

    def step(self) -> None:
        outputs = []
        for request_id, running in list(self.requests.items()):
            if running.seed == SILENT:
                continue
            if running.done == 2 and running.seed in {DIES, FAILS}:
                time.sleep(LATE_S)
            if running.seed == DIES_AT_ONCE or (running.seed == DIES and running.done == 2):
                self.outputs.send(_DEAD)
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
                del self.requests[request_id]
        if outputs:
            self.send(EngineCoreOutputs(outputs=outputs))

    def send(self, outputs: EngineCoreOutputs) -> None:
        self.outputs.send_multipart(self.encode(outputs), copy=False)


if __name__ == "__main__":
    FakeCore(*sys.argv[1:]).run()
