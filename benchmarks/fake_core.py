"""A fast stand-in for vLLM's engine core: its ZMQ and msgpack protocol, no model.

    python -m benchmarks.fake_core INPUT OUTPUT [--step-ms 15] [--core 1]

Each request gets one token per step, with the statistics of a real core. An answer ends at
`max_tokens`, or earlier at the request's `seed`. So its length can differ from the limit that
the front end reads. Subclasses change single parts: `ahead_core` plans steps ahead, `bodies`
answers at once, and `tests/contract/fake_core.py` scripts failures.

A line of JSON on stdin sets fields of `Settings`. The core answers with a line: the `Report`
since the previous line. It ends at the end of stdin.

Source: vllm/v1/engine/core.py (EngineCoreProc), core_client.py (AsyncMPClient).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import orjson
import zmq
from tokenizers import Tokenizer
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreReadyResponse,
    EngineCoreRequestType,
    FinishReason,
    UtilityOutput,
)
from vllm.v1.metrics.stats import PrefillStats, PrefixCacheStats, SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult
from vllm.version import __version__ as vllm_version

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct"
MAX_MODEL_LEN, MAX_NUM_SEQS = 2048, 1024
_KV_TOKENS = 1 << 20  # what the cache would hold, for its usage in the statistics
_GATE_S = 10.0  # a gate opens after this long, however many have arrived
_CONTROL = 1 << 16

TEXT = """\
The harbour town had been asleep for most of the winter, and when the first ships came
back in March nobody was quite ready for them. Ropes had to be found, prices had to be
agreed on again, and the old crane at the end of the pier needed three days of work
before it would lift anything heavier than a barrel of salt. Still, people were glad.
A woman who sold bread near the customs house said that she could tell the season by
the number of loaves that were gone before eight in the morning. In January it was ten,
in February perhaps twelve; now it was forty, and she had asked her sister to help.
Most of the sailors wanted news first and bread second. They had been away since the
autumn, and letters reached them slowly or not at all. So they stood in small groups
along the wall, listened, laughed, asked the same questions again, and forgot the cold.
Later in the day the wind turned to the west and brought rain, which made the streets
shine and drove everyone indoors, where the fires were lit and long stories were told.
"""

_READY = EngineCoreReadyResponse(
    max_model_len=MAX_MODEL_LEN,
    num_gpu_blocks=_KV_TOKENS // 16,
    block_size=16,
    dp_stats_address=None,
    dtype="bfloat16",
    vllm_version=vllm_version,
    world_size=1,
    data_parallel_size=1,
    tensor_parallel_size=1,
    pipeline_parallel_size=1,
    decode_context_parallel_size=1,
    data_parallel_rank=0,
    max_num_seqs=MAX_NUM_SEQS,
    max_num_batched_tokens=8192,
    instance_id="fake",
    supports_lora=False,
    max_loras=0,
)


class _Params(msgspec.Struct):
    """The fields of `SamplingParams` that the core reads."""

    max_tokens: int | None = 16
    seed: int | None = None


class _Request(msgspec.Struct, array_like=True):
    """The beginning of an `EngineCoreRequest`; all of it costs twice as much to decode."""

    request_id: str
    prompt_token_ids: list[int]
    mm_features: msgspec.Raw
    sampling_params: _Params


class Stream:
    """A request; its output is one object, changed from step to step."""

    __slots__ = ("ids", "last_step", "output", "prompt_tokens", "queued_s", "text")

    def __init__(self, request_id: str, text: Iterator[int], prompt_tokens: int) -> None:
        self.ids = [0]
        self.output = EngineCoreOutput(request_id, self.ids)
        self.text = text
        self.prompt_tokens = prompt_tokens
        self.queued_s = time.monotonic()
        self.last_step = 0

    def describe_start(self, scheduled_s: float) -> None:
        """Add the fields that only the first output of a request has."""
        self.output.events = [
            EngineCoreEvent(EngineCoreEventType.QUEUED, self.queued_s),
            EngineCoreEvent(EngineCoreEventType.SCHEDULED, scheduled_s),
        ]
        self.output.prefill_stats = PrefillStats(
            num_prompt_tokens=self.prompt_tokens, num_computed_tokens=self.prompt_tokens
        )


@dataclass(frozen=True)
class Settings:
    step_ms: float = 15.0
    gate: int = 1  # requests that start in one step: a load is measured without its set-up
    max_running: int = sys.maxsize  # others wait until one has ended
    prefill_us: float = 0.0  # step time of a prompt token in the first step of its request
    prefix_tokens: int = 0  # tokens that distinguish prompts in the report; 0: no prefixes

    @property
    def step_s(self) -> float:
        return self.step_ms / 1000


@dataclass
class Report:
    """What was done since the last settings. Times are `time.monotonic()`."""

    tokens: int = 0
    steps: int = 0
    first_s: float = 0.0  # when the step of the first token began
    final_s: float = 0.0  # when the last token that ended a request was sent
    aborted: int = 0
    running_s: float = 0.0  # of all requests together, in steps
    prefixes: dict[str, list[float]] = field(default_factory=dict)  # when prompts of each arrived
    arrived_s: list[float] = field(default_factory=list)  # when requests arrived; AheadCore only
    ended_s: list[float] = field(default_factory=list)  # when ends were sent; AheadCore only


class FakeCore:
    def __init__(
        self,
        inputs: str,
        outputs: str,
        settings: Settings,
        tokens: list[int],
        tasks: tuple[str, ...] = ("generate",),
        control: int | None = None,
    ) -> None:
        self._tasks = tasks
        self._control = sys.stdin.fileno() if control is None else control
        context = zmq.Context()
        self._inputs = context.socket(zmq.DEALER)
        self._inputs.setsockopt(zmq.IDENTITY, (0).to_bytes(2, "little"))
        self._outputs = context.socket(zmq.PUSH)
        for socket in (self._inputs, self._outputs):
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
        self._inputs.connect(inputs)
        self._outputs.connect(outputs)
        self._poller = zmq.Poller()
        self._poller.register(self._inputs, zmq.POLLIN)
        self._poller.register(self._control, zmq.POLLIN)
        self._encode = MsgpackEncoder().encode
        self._decode_request = msgspec.msgpack.Decoder(_Request).decode
        self._decode = MsgpackDecoder().decode
        # Long enough for any answer from any offset of the text's first round.
        self._period = len(tokens)
        self._text = tokens * (MAX_MODEL_LEN // len(tokens) + 2)
        self._count = 0
        self._settings = settings
        self._step = 0
        self._prefill_s = 0.0  # of what starts in the next step
        self._waiting: dict[str, Stream] = {}
        self._running: dict[str, Stream] = {}
        self._ends: dict[int, list[Stream]] = {}  # which requests end with a step
        self._outs: list[EngineCoreOutput] = []  # of what runs
        self._settled = True  # whether `_outs` is right, and says nothing of starts
        self._report = Report()
        self._inputs.send(msgspec.msgpack.encode(_READY))

    def run(self) -> None:
        """A step takes what waits at its beginning, and sends at its end."""
        while True:
            while not self._running:
                self._listen(1.0 if not self._waiting else self._settings.step_s)
                self._schedule()
            began = time.monotonic()
            tick = began + self._step_s
            self._report.first_s = self._report.first_s or began
            while self._running:
                self._listen_until(tick)
                now = time.monotonic()
                self._report.running_s += len(self._running) * (now - began)
                began = now
                self._send_step()
                self._schedule()
                tick = max(tick + self._step_s, time.monotonic())

    @property
    def _step_s(self) -> float:
        """How long the next step takes."""
        return self._settings.step_s + self._prefill_s

    # --- what comes in

    def _listen_until(self, tick: float) -> None:
        self._listen(0)
        while (left := tick - time.monotonic()) > 0:
            if left < 0.001:  # finer than poll can wait
                time.sleep(left)
            else:
                self._listen(left)

    def _listen(self, timeout_s: float) -> None:
        for socket, _ in self._poller.poll(int(timeout_s * 1000)):
            if socket is not self._inputs:
                self._obey()
                continue
            while self._inputs.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                self._receive()

    def _receive(self) -> None:
        kind, *frames = self._inputs.recv_multipart(copy=False)
        match EngineCoreRequestType(bytes(kind.buffer)):
            case EngineCoreRequestType.ADD:
                self._add(self._decode_add(frames))
            case EngineCoreRequestType.ABORT:
                for request_id in self._decode(frames):
                    self._abort(request_id)
            case EngineCoreRequestType.UTILITY:
                _, call_id, method, _ = self._decode(frames)
                result = UtilityOutput(call_id, result=UtilityResult(self._call(method)))
                self._send(EngineCoreOutputs(utility_output=result))

    def _decode_add(self, frames: list[zmq.Frame]) -> _Request:
        request: _Request = self._decode_request(frames[0].buffer)
        return request

    def _call(self, method: str) -> Any:
        return self._tasks if method == "get_supported_tasks" else None

    def _add(self, request: _Request) -> None:
        params = request.sampling_params
        length = min(params.max_tokens or MAX_MODEL_LEN, params.seed or MAX_MODEL_LEN)
        offset = self._count * 37 % self._period
        self._count += 1
        text = self._text[offset : offset + length]
        stream = Stream(request.request_id, iter(text), len(request.prompt_token_ids))
        stream.last_step = length  # counted from its start, which `_schedule` adds
        self._waiting[request.request_id] = stream
        if count := self._settings.prefix_tokens:
            prefix = hash(tuple(request.prompt_token_ids[:count]))
            self._report.prefixes.setdefault(f"{prefix:x}", []).append(stream.queued_s)

    def _abort(self, request_id: str) -> None:
        stream = self._running.pop(request_id, None) or self._waiting.pop(request_id, None)
        if stream is not None:
            self._report.aborted += 1
            self._settled = False

    def _obey(self) -> None:
        lines = os.read(self._control, _CONTROL)
        if not lines:
            sys.exit()
        for line in lines.splitlines():
            changes: dict[str, Any] = orjson.loads(line)
            print(orjson.dumps(asdict(self._report)).decode(), flush=True)
            self._report = Report()
            self._settings = replace(self._settings, **changes)

    # --- what goes out

    def _schedule(self) -> None:
        """Start what waits and has room, unless the gate is closed."""
        self._prefill_s = 0.0
        free = self._settings.max_running - len(self._running)
        if not self._waiting or free <= 0:
            return
        now = time.monotonic()
        if len(self._waiting) < self._settings.gate:
            oldest = next(iter(self._waiting.values()))
            if now - oldest.queued_s < _GATE_S:
                return
        starting = [self._waiting.pop(each) for each in list(islice(self._waiting, free))]
        self._prefill_s = self._prefill_of(starting)
        self._start(starting, now)

    def _prefill_of(self, starting: list[Stream]) -> float:
        """By how many seconds they make a step longer."""
        return sum(each.prompt_tokens for each in starting) * self._settings.prefill_us / 1e6

    def _start(self, starting: list[Stream], now: float) -> None:
        for stream in starting:
            stream.describe_start(now)
            stream.last_step += self._step
            self._running[stream.output.request_id] = stream
            self._ends.setdefault(stream.last_step, []).append(stream)
        self._settled = self._settled and not starting

    def _send_step(self) -> None:
        self._step += 1
        if not self._settled:
            self._outs = [stream.output for stream in self._running.values()]
        if not self._outs:  # all aborted
            return
        ending = self._ends.pop(self._step, ())
        for stream in ending:
            stream.output.finish_reason = FinishReason.LENGTH
        for stream in self._running.values():
            stream.ids[0] = next(stream.text)
        self._send(EngineCoreOutputs(outputs=self._outs, scheduler_stats=self._stats()))
        self._report.steps += 1
        self._report.tokens += len(self._outs)
        self._settle(ending)

    def _settle(self, ending: list[Stream] | tuple[()]) -> None:
        if not self._settled:
            for output in self._outs:
                output.events = output.prefill_stats = None
            self._settled = True
        if ending:
            self._report.final_s = time.monotonic()
            for stream in ending:
                self._running.pop(stream.output.request_id, None)
            self._settled = False

    def _stats(self) -> SchedulerStats:
        started = () if self._settled else [s for s in self._running.values() if s.output.events]
        return SchedulerStats(
            num_running_reqs=len(self._running),
            num_waiting_reqs=len(self._waiting),
            step_counter=self._step,
            kv_cache_usage=min(1.0, len(self._running) * 256 / _KV_TOKENS),
            prefix_cache_stats=PrefixCacheStats(
                requests=len(started), queries=sum(s.prompt_tokens for s in started)
            ),
        )

    def _send(self, outputs: EngineCoreOutputs) -> None:
        self._outputs.send_multipart(self._encode(outputs), copy=False)


def main(kind: type[FakeCore] = FakeCore) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", metavar="INPUT", help="address of the front end's ROUTER")
    parser.add_argument("outputs", metavar="OUTPUT", help="address of the front end's PULL")
    parser.add_argument("--step-ms", type=float, default=Settings.step_ms)
    parser.add_argument("--core", type=int, help="run on this CPU core")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the tokenizer")
    parser.add_argument("--task", default="generate", help="what the model supports")
    options = parser.parse_args()
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    tokens = tokenizer.encode(TEXT.replace("\n", " "), add_special_tokens=False).ids
    settings = Settings(options.step_ms)
    kind(options.inputs, options.outputs, settings, tokens, (options.task,)).run()


if __name__ == "__main__":
    main()
