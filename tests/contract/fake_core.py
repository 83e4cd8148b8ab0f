"""A stand-in for vLLM's engine core: its ZMQ and msgpack protocol, no model.

Run as `python fake_core.py INPUT OUTPUT`. Each request gets one token a step, the ids
of its own prompt over and over. A request with `seed` 13 makes the engine die at its
third token, one with `seed` 14 fails alone.

Source: vllm/v1/engine/core.py (EngineCoreProc) and core_client.py (AsyncMPClient).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import msgspec
import zmq
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreReadyResponse,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
    UtilityOutput,
)
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

if TYPE_CHECKING:
    from collections.abc import Iterator

STEP_S = 0.005
DIES, FAILS = 13, 14
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
    left: int
    seed: int | None
    done: int = 0


class FakeCore:
    def __init__(self, inputs: str, outputs: str) -> None:
        context = zmq.Context()
        self.inputs = context.socket(zmq.DEALER)
        self.inputs.setsockopt(zmq.IDENTITY, (0).to_bytes(2, "little"))
        self.inputs.connect(inputs)
        self.outputs = context.socket(zmq.PUSH)
        self.outputs.connect(outputs)
        self.inputs.send(msgspec.msgpack.encode(EngineCoreReadyResponse(**_READY)))
        self.requests: dict[str, Running] = {}
        self.aborted = 0
        self.encode = MsgpackEncoder().encode
        self.decode_request = MsgpackDecoder(EngineCoreRequest).decode
        self.decode = MsgpackDecoder().decode

    def run(self) -> None:
        while True:
            while self.inputs.poll(0 if self.requests else 1000):
                self.receive()
            if self.requests:
                self.step()
                time.sleep(STEP_S)

    def receive(self) -> None:
        kind, *frames = self.inputs.recv_multipart(copy=False)
        match EngineCoreRequestType(bytes(kind.buffer)):
            case EngineCoreRequestType.ADD:
                request = self.decode_request(frames)
                params = request.sampling_params
                self.requests[request.request_id] = Running(
                    cycle(request.prompt_token_ids), params.max_tokens, params.seed
                )
            case EngineCoreRequestType.ABORT:
                for request_id in self.decode(frames):
                    self.aborted += self.requests.pop(request_id, None) is not None
            case EngineCoreRequestType.UTILITY:
                _, call_id, method, _ = self.decode(frames)
                answers: dict[str, Any] = {
                    "get_supported_tasks": ("generate",),
                    "aborted": self.aborted,  # ours, for tests
                }
                result = UtilityOutput(call_id, result=UtilityResult(answers.get(method)))
                self.send(EngineCoreOutputs(utility_output=result))

    def step(self) -> None:
        outputs = []
        for request_id, running in list(self.requests.items()):
            running.done += 1
            if running.seed == DIES and running.done == 3:
                self.outputs.send(_DEAD)
                sys.exit(1)
            reason = FinishReason.LENGTH if running.done >= running.left else None
            if running.seed == FAILS and running.done == 3:
                reason = FinishReason.ERROR
            outputs.append(EngineCoreOutput(request_id, [next(running.ids)], finish_reason=reason))
            if reason is not None:
                del self.requests[request_id]
        self.send(EngineCoreOutputs(outputs=outputs))

    def send(self, outputs: EngineCoreOutputs) -> None:
        self.outputs.send_multipart(self.encode(outputs), copy=False)


if __name__ == "__main__":
    FakeCore(*sys.argv[1:]).run()
