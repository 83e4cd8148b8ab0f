"""The process that compiles constraints for `llmserve.grammar`; run with `-m`.

It imports vLLM once and loads an engine's tokenizer once. Each constraint is compiled in
a fork with limits of its own, by vLLM's own validation and structured-output manager, as
the engine core does it. The fork ends with its check, so a crash, a leak or a loop in a
compiler costs that check alone. The process holds no thread, which makes the fork safe.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import resource
import select
import signal
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.mistral import is_mistral_tokenizer
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.request import StructuredOutputRequest

from llmserve.grammar import HEAD, KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

_MODELS = 8  # tokenizers that stay loaded
_PROBED = 16  # tokens, after which a mask is computed as in the engine's steps
_REASON = 400  # characters
_ANSWER_BYTES = 16 << 20
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Loaded:
    """A model as its engine core sees it when it compiles."""

    config: Any
    manager: StructuredOutputManager

    @classmethod
    def of(cls, pickled: bytes) -> Loaded:
        config = pickle.loads(pickled)  # noqa: S301  # the server's own
        manager = StructuredOutputManager(config)
        # In this thread: one of the manager's pool would not survive a fork.
        manager._use_async_grammar_compilation = False  # noqa: SLF001
        structured = config.structured_outputs_config
        if structured.backend == "auto":
            structured.backend = fixed_backend(manager.tokenizer)
        loaded = cls(config, manager)
        loaded.warm()  # builds the backend, which the forks then share
        return loaded

    def warm(self) -> None:
        params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
        params.structured_outputs._backend = self.config.structured_outputs_config.backend  # noqa: SLF001
        _compiled(self, params)


def fixed_backend(tokenizer: Any) -> str:
    """The backend that `auto` stands for.

    vLLM validates each request for a backend of its own but compiles all with that of the
    first one (StructuredOutputManager.grammar_init), so one request could decide for all.
    """
    tekken = is_mistral_tokenizer(tokenizer) and tokenizer.is_tekken
    return "guidance" if tekken else "xgrammar"


def main() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print is no reply
    models: OrderedDict[str, Loaded] = OrderedDict()
    requests = sys.stdin.buffer.raw  # type: ignore[attr-defined]
    while (received := _received(requests)) is not None:
        ask, config = received
        try:
            loaded = _loaded(models, ask["model"], config)
        except Exception as error:  # a tokenizer of any kind; the server refuses
            _send(replies, {"outcome": "unavailable", "reason": _words(error)})
            continue
        _send(
            replies,
            _sandboxed(
                lambda of=loaded, ask=ask: _answer(of, ask["constraint"], ask["step_s"]), ask
            ),
        )


def _loaded(models: OrderedDict[str, Loaded], key: str, config: bytes) -> Loaded:
    if key not in models:
        models[key] = Loaded.of(config)
        if len(models) > _MODELS:
            models.popitem(last=False)
    models.move_to_end(key)
    return models[key]


# --- the check, in a fork


def _answer(model: Loaded, constraint: str, step_s: float) -> dict[str, Any]:
    try:
        return _check(model, json.loads(constraint), step_s)
    except MemoryError:
        return {"outcome": "memory"}
    except _SlowStep:
        return {"outcome": "step"}
    except Exception as error:  # whatever a compiler raises refuses the request
        if "bad_alloc" in str(error):
            return {"outcome": "memory"}
        return {"outcome": "invalid", "reason": _words(error)}


def _check(model: Loaded, constraint: dict[str, Any], step_s: float) -> dict[str, Any]:
    tag = constraint.get("structural_tag")
    if tag is not None and not isinstance(tag, str):
        constraint = {**constraint, "structural_tag": json.dumps(tag)}
    structured = StructuredOutputsParams(**constraint)
    params = SamplingParams(structured_outputs=structured)
    began = time.process_time()
    params._validate_structured_outputs(  # noqa: SLF001  # as SamplingParams.verify does
        model.config.model_config,
        model.config.structured_outputs_config,
        model.manager.tokenizer,
    )
    parse_s = time.process_time() - began
    _probe(model, _compiled(model, params), step_s)
    changed = {
        kind: value
        for kind in KINDS
        if (value := getattr(structured, kind)) != constraint.get(kind)
    }
    return {
        "outcome": "compiled",
        "backend": structured._backend,  # noqa: SLF001  # as the engine core reads it
        "fields": changed,
        "parse_s": parse_s,
    }


def _compiled(model: Loaded, params: SamplingParams) -> Any:
    """As EngineCore.preprocess_add_request has it compiled."""
    wanted = StructuredOutputRequest.from_sampling_params(params)
    request = SimpleNamespace(
        request_id="check", sampling_params=params, structured_output_request=wanted
    )
    model.manager.grammar_init(request)
    pending = wanted._grammar  # noqa: SLF001  # the property waits for nothing
    return pending.result() if hasattr(pending, "result") else pending


class _SlowStep(Exception):
    """A mask of this constraint would hold the engine's steps up."""


def _probe(model: Loaded, grammar: Any, step_s: float) -> None:
    """Compute masks as the engine's steps do.

    Raises _SlowStep, or ValueError if no text is possible.
    """
    words = (model.config.model_config.get_vocab_size() + 31) // 32
    mask = torch.full((1, words), -1, dtype=torch.int32)
    for position in range(_PROBED):
        if grammar.is_terminated():
            return
        began = time.process_time()
        grammar.fill_bitmask(mask, 0)
        if time.process_time() - began > step_s:
            raise _SlowStep
        allowed = mask[0].nonzero()
        if not len(allowed):
            if position:
                return
            raise ValueError("no text satisfies it")
        word = int(allowed[0])
        bits = int(mask[0, word]) & 0xFFFFFFFF
        if not grammar.accept_tokens("check", [word * 32 + (bits & -bits).bit_length() - 1]):
            return


# --- the sandbox


def _sandboxed(check: Callable[[], dict[str, Any]], ask: dict[str, Any]) -> dict[str, Any]:
    """The answer of `check`, made in a fork within the limits of `ask`."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_limited(ask)
        with os.fdopen(writing, "wb") as out:
            out.write(json.dumps(check()).encode())
        os._exit(0)
    os.close(writing)
    try:
        text, in_time = _read_until(reading, time.monotonic() + ask["wall_s"])
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if not in_time:
        return {"outcome": "wall"}
    ended = os.waitstatus_to_exitcode(status)
    if ended == -signal.SIGXCPU:
        return {"outcome": "cpu"}
    try:
        answer: dict[str, Any] = json.loads(text)
    except ValueError:
        return {"outcome": "crash"}
    return answer


def _be_limited(ask: dict[str, Any]) -> None:
    """For this process: the limits, and an end with its parent."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.close(0)
    size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    space = size * resource.getpagesize() + ask["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CPU, (ask["cpu_s"], ask["cpu_s"] + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read_until(pipe: int, deadline_s: float) -> tuple[bytes, bool]:
    """What a fork writes, and whether it ended in time. Ends the process with the server."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    poll.register(0, 0)  # the server's end: only a hang-up is reported
    parts: list[bytes] = []
    while (left_s := deadline_s - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(left_s * 1000):
            if descriptor == 0:
                os._exit(0)
            part = os.read(pipe, 1 << 16)
            parts.append(part)
            if not part:
                return b"".join(parts), True
            if sum(map(len, parts)) > _ANSWER_BYTES:
                return b"", True
    return b"", False


# --- frames


def _received(requests: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next request and the config of its engine; None when the server has ended."""
    head = _exactly(requests, HEAD.size)
    if head is None:
        return None
    lengths = HEAD.unpack(head)
    ask, config = (_exactly(requests, length) for length in lengths)
    return None if ask is None or config is None else (json.loads(ask), config)


def _exactly(requests: BinaryIO, length: int) -> bytes | None:
    parts = []
    while length:
        part = requests.read(length)
        if not part:
            return None
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _send(replies: BinaryIO, answer: dict[str, Any]) -> None:
    text = json.dumps(answer).encode()
    replies.write(HEAD.pack(len(text), 0) + text)
    replies.flush()


def _words(error: BaseException) -> str:
    """An exception and its cause in one bounded line."""
    texts = [str(each) for each in (error, error.__cause__) if each is not None]
    return " ".join(": ".join(dict.fromkeys(texts)).split())[:_REASON] or type(error).__name__


if __name__ == "__main__":
    main()
