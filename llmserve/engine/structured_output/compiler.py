"""Compiles constraints in a sandbox before vLLM receives them.

Native compilers of a client's schema, pattern or grammar can use unbounded time or memory, or
crash. `ConstraintCompiler` owns one process (`compiler_process`) that compiles each constraint as
the engine core would, in a fork with limits. A constraint that does not compile there is refused
and never reaches a compiler in the server or the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import signal
import struct
import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import orjson

from llmserve.errors import GrammarTooComplex, InvalidGrammar, Overloaded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from llmserve.errors import RequestError

log = logging.getLogger(__name__)

# Lengths of the JSON and of the pickled engine config that follow.
HEAD = struct.Struct(">II")
# Outcomes that a busy machine can cause: they are not cached.
_NOT_CACHED = frozenset({"wall", "crash"})
_ANY = orjson.dumps({"regex": "a"})  # checked to start the worker
_COMMAND = (
    sys.executable,
    "-m",
    "llmserve.engine.structured_output.sandbox",
    "llmserve.engine.structured_output.compiler_process",
)
# The worker's environment: no GPU, one malloc arena (each reserves address space).
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_REGEX_COMPILATION_TIMEOUT_S": "0",  # the limits of a check are stricter
}


@dataclass(frozen=True)
class Limits:
    """Limits of one check, of the queue, and of the cache."""

    constraint_bytes: int = 512 * 1024
    memory_bytes: int = 512 << 20  # in addition to the loaded worker
    cpu_s: int = 5
    wall_s: float = 30.0  # for a compiler that waits without computing
    start_s: float = 180.0  # the worker's imports and a model's tokenizer
    loop_s: float = 0.05  # CPU time of a parse that vLLM repeats on the event loop
    step_s: float = 0.05  # CPU time of a mask, which the engine computes in each step
    queue: int = 16
    cached: int = 1024
    cached_bytes: int = 32 << 20


@dataclass(frozen=True)
class Model:
    """The model for which a constraint is compiled; `config` is a pickled VllmConfig."""

    key: str
    config: bytes = field(repr=False)


@dataclass(frozen=True)
class Verdict:
    """The result of a check: the constraint for the engine, or the reason of a refusal."""

    backend: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    parse_s: float = 0.0
    too_complex: bool = False
    reason: str = ""

    def refusal(self, place: str) -> RequestError | None:
        if not self.reason:
            return None
        kind = GrammarTooComplex if self.too_complex else InvalidGrammar
        return kind(f"{place}: the constraint {self.reason}", param=place)


class ConstraintCompiler:
    """Checks constraints, one at a time, and caches the verdicts."""

    def __init__(self, limits: Limits | None = None, command: Sequence[str] = _COMMAND) -> None:
        self.limits = limits or Limits()
        self._command = command
        self.remembered = _Cache(self.limits)
        self._checks: dict[bytes, asyncio.Task[Verdict]] = {}
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._stopped = False

    @property
    def pid(self) -> int | None:
        """The worker's process id; None if it does not run."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    async def check(self, model: Model, constraint: Mapping[str, Any]) -> Verdict:
        """Return the verdict on `constraint`, keyed as vLLM's StructuredOutputsParams.

        Raises Overloaded if the queue is full or the worker fails.
        """
        try:
            text = orjson.dumps(constraint)  # in the client's order, which the grammar follows
        except TypeError:
            return _too_complex(
                "is nested too deeply, or contains invalid Unicode. Use at most 250 levels."
            )
        if len(text) > self.limits.constraint_bytes:
            return _too_complex(
                f"has {len(text)} bytes of JSON; the limit is {self.limits.constraint_bytes}. "
                "Use a smaller schema or grammar."
            )
        key = hashlib.sha256(model.key.encode() + b"\0" + text).digest()
        if (known := self.remembered.find(key)) is not None:
            return known
        return await asyncio.shield(self._check_of(key, model, text))

    async def refusal_of(
        self, model: Model, place: str, constraint: Mapping[str, Any]
    ) -> RequestError | None:
        """Return the error of a refused constraint at `place` of a body; None if accepted.

        It may take little time to parse: vLLM parses some kinds again on the event loop.
        """
        verdict = await self.check(model, constraint)
        limit = self.limits.loop_s
        if not verdict.reason and verdict.parse_s > limit:
            verdict = _too_complex(
                f"takes {verdict.parse_s:.2f} s to parse; the limit is {limit:g} s. "
                "Use a smaller schema or grammar."
            )
        return verdict.refusal(place)

    def prepare(self, model: Model) -> None:
        """Start the worker, which loads the model's tokenizer, before the first request."""
        key = hashlib.sha256(model.key.encode()).digest()
        is_known = key in self._checks or self.remembered.find(key) is not None
        if not is_known and len(self._checks) < self.limits.queue:
            self._check_of(key, model, _ANY)

    def stop(self) -> None:
        """`kill`, and start no other worker; running checks end with Overloaded."""
        self._stopped = True
        self.kill()

    def kill(self) -> None:
        """End the worker and its fork at once; a later check starts another worker."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    async def close(self) -> None:
        """`kill`, and cancel the running checks."""
        for check in list(self._checks.values()):
            check.cancel()
        if self._process is not None:
            await self._ended(self._process)

    def _check_of(self, key: bytes, model: Model, text: bytes) -> asyncio.Task[Verdict]:
        """Return the check of a constraint, shared by equal ones. It outlives a disconnected client."""
        check = self._checks.get(key)
        if check is None:
            if len(self._checks) >= self.limits.queue:
                raise Overloaded(
                    f"The queue of constraint checks is full: {len(self._checks)} of "
                    f"{self.limits.queue}. Send the request again later.",
                    retry_after_s=5,
                    code="grammar_queue_full",
                )
            check = asyncio.create_task(self._checked(key, model, text))
            self._checks[key] = check
            check.add_done_callback(lambda done: self._finished(key, done))
        return check

    def _finished(self, key: bytes, check: asyncio.Task[Verdict]) -> None:
        del self._checks[key]
        if not check.cancelled():
            check.exception()  # retrieved here: all clients may have disconnected

    async def _checked(self, key: bytes, model: Model, text: bytes) -> Verdict:
        async with self._lock:
            for _ in range(2):  # a worker may be killed from outside once
                with contextlib.suppress(_WorkerGone):
                    answer = await self._ask(model, text)
                    verdict = _verdict(answer, self.limits)
                    if answer["outcome"] not in _NOT_CACHED:
                        self.remembered.keep(key, verdict)
                    return verdict
        raise Overloaded(
            "The process that checks constraints ended twice. Send the request again later.",
            retry_after_s=5,
            code="grammar_check_failed",
        )

    async def _ask(self, model: Model, text: bytes) -> dict[str, Any]:
        """Send a request to the worker. Raises _WorkerGone if it does not start, answer or live."""
        process = await self._running()
        limits = self.limits
        request = orjson.dumps(
            {"model": model.key, "memory_bytes": limits.memory_bytes, "cpu_s": limits.cpu_s}
            | {"wall_s": limits.wall_s, "step_s": limits.step_s, "constraint": text.decode()}
        )
        requests = cast("asyncio.StreamWriter", process.stdin)
        answers = cast("asyncio.StreamReader", process.stdout)
        try:
            async with asyncio.timeout(limits.start_s + limits.wall_s):
                requests.write(HEAD.pack(len(request), len(model.config)) + request + model.config)
                await requests.drain()
                length, _ = HEAD.unpack(await answers.readexactly(HEAD.size))
                answer: dict[str, Any] = orjson.loads(await answers.readexactly(length))
                return answer
        except (TimeoutError, OSError, EOFError) as error:
            log.warning("grammar worker pid=%s ended: %r", process.pid, error)
            await self._ended(process)
            raise _WorkerGone from error

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = None
            if self._stopped:
                raise _WorkerGone
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL,  # compilers print what clients send
                    env=_environment(os.environ),
                    start_new_session=True,  # Ctrl-C reaches only the server
                )
            except OSError as error:
                log.warning("grammar worker not started: %r", error)
                raise _WorkerGone from error
        return self._process

    async def _ended(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _environment(own: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the engines' OpenMP, which leaves a file for each fork."""
    loaded = own.get("LD_PRELOAD", "").split(":")
    kept = ":".join(each for each in loaded if not each.endswith("/libiomp5.so"))
    return {**own, **_ENVIRONMENT, "LD_PRELOAD": kept}


class _WorkerGone(Exception):
    """The worker ended, or did not answer in time."""


class _Cache:
    """The last verdicts, bounded in number and in bytes."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._kept: OrderedDict[bytes, Verdict] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: bytes) -> Verdict | None:
        verdict = self._kept.get(key)
        if verdict is not None:
            self._kept.move_to_end(key)
        return verdict

    def keep(self, key: bytes, verdict: Verdict) -> None:
        self._kept[key] = verdict
        self._bytes += _size(verdict)
        while len(self._kept) > self._limits.cached or self._bytes > self._limits.cached_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(verdict: Verdict) -> int:
    texts = (value for value in verdict.fields.values() if isinstance(value, str))
    return 512 + len(verdict.reason) + 4 * sum(map(len, texts))


def _too_complex(reason: str) -> Verdict:
    return Verdict(too_complex=True, reason=reason)


def _verdict(answer: dict[str, Any], limits: Limits) -> Verdict:
    """Return the verdict of a worker's answer. Raises Overloaded if it could not check."""
    match answer["outcome"]:
        case "compiled":
            return Verdict(answer["backend"], answer["fields"], answer["parse_s"])
        case "invalid":
            return Verdict(reason=f"cannot be compiled: {answer['reason']}")
        case "unavailable":
            raise Overloaded(
                f"Constraints cannot be checked for this model: {answer['reason']}",
                retry_after_s=30,
                code="grammar_check_failed",
            )
        case outcome:
            bound = {
                "cpu": f"takes more than {limits.cpu_s} s of CPU time to compile",
                "wall": f"takes more than {limits.wall_s:g} s to compile",
                "step": f"takes more than {limits.step_s:g} s of CPU time per token",
                "memory": f"takes more than {limits.memory_bytes >> 20} MiB to compile",
            }.get(outcome, "crashes the compiler")
            return _too_complex(f"{bound}. Use smaller counts, fewer alternatives or less nesting.")


# --- constraints of a body


def constraints_of(body: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each explicit constraint of a body: its place, and the constraint in vLLM's terms.

    Constraints that vLLM derives from `tools` are not included; `CheckedLLM` checks them.
    """
    yield from _structured_outputs(body.get("structured_outputs"))
    yield from _response_format("response_format", body.get("response_format"))
    for owner in ("text", "output_config"):
        holder = body.get(owner)
        if isinstance(holder, dict):
            yield from _response_format(f"{owner}.format", holder.get("format"))


KINDS = ("json", "regex", "choice", "grammar", "structural_tag")


def _structured_outputs(given: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(given, dict):
        for kind in KINDS:
            if given.get(kind) is not None:
                yield f"structured_outputs.{kind}", {kind: given[kind]}


def _response_format(place: str, given: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the constraint of a `response_format`, or of another API's format with a schema."""
    if not isinstance(given, dict):
        return
    if given.get("type") == "structural_tag":
        yield place, {"structural_tag": given}
        return
    nested = given.get("json_schema")
    if isinstance(nested, dict) and isinstance(nested.get("schema"), dict):
        yield f"{place}.json_schema.schema", {"json": nested["schema"]}
    elif isinstance(given.get("schema"), dict):
        yield f"{place}.schema", {"json": given["schema"]}
