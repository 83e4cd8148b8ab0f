"""The events of a streamed answer as bytes, cut from vLLM's response models.

vLLM builds and serializes a model per token. Here a model is built per kind of request, with
markers in place of the text, the id and the counts.

Source: `chat_completion_stream_generator` and `completion_stream_generator` in
vllm/entrypoints/openai/{chat_completion,completion}/serving.py.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import orjson
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.completion.protocol import (
    CompletionResponseStreamChoice,
    CompletionStreamResponse,
)
from vllm.entrypoints.serve.engine.protocol import UsageInfo

from llmserve.api import sse

if TYPE_CHECKING:
    from collections.abc import Callable


_ID = "\N{OBJECT REPLACEMENT CHARACTER}id"
_TEXT = "\N{OBJECT REPLACEMENT CHARACTER}text"
_CREATED = 8_888_888_888_888_888
_COUNTS = (7_777_777_777_777_771, 7_777_777_777_777_772, 7_777_777_777_777_773)
_ENDS = 64  # cached last events

Lead = tuple[bytes, bytes]  # the id and the time of an answer


class ChunkModels(ABC):
    """Chunks of vLLM with markers: the role of a chat, text, and the usage if requested.

    `parsed`: by a parser that passes text through, and makes no chunk without text.
    """

    response: type[Any]
    kind: str  # its `object`
    bare_end: bool  # the event with the reason of the end has no text

    def __init__(
        self, model: str, fingerprint: str | None, *, include_usage: bool, parsed: bool = False
    ) -> None:
        self.parsed = parsed
        self.include_usage = include_usage
        self._model = model
        self._fingerprint = fingerprint

    def first(self) -> bytes:
        """Return the event before all text; empty without one."""
        return b""

    def chunk(self, text: str, finish: str | None = None, stop: int | str | None = None) -> bytes:
        chunk = self._response([self._choice(text, finish, stop)])
        if finish is not None and not self.include_usage and self._fingerprint is not None:
            chunk.system_fingerprint = self._fingerprint
        return _frame(chunk.model_dump_json(exclude_unset=True))

    def usage(self, usage: UsageInfo) -> bytes:
        chunk = self._response([])
        chunk.usage, chunk.system_fingerprint = usage, self._fingerprint
        return _frame(chunk.model_dump_json(exclude_none=True))

    def _response(self, choices: list[Any]) -> Any:
        return self.response(
            id=_ID, object=self.kind, created=_CREATED, model=self._model, choices=choices
        )

    @abstractmethod
    def _choice(self, text: str, finish: str | None, stop: int | str | None) -> Any: ...


class ChatModels(ChunkModels):
    response = ChatCompletionStreamResponse
    kind = "chat.completion.chunk"
    bare_end = True  # required_keys.split_end

    def __init__(self, model: str, role: str, fingerprint: str | None, **more: bool) -> None:
        super().__init__(model, fingerprint, **more)
        self._role = role

    def first(self) -> bytes:
        choice = ChatCompletionResponseStreamChoice(
            index=0,
            delta=DeltaMessage(role=self._role, content=""),
            logprobs=None,
            finish_reason=None,
        )
        chunk = self._response([choice])
        chunk.prompt_token_ids = chunk.prompt_text = None
        return _frame(chunk.model_dump_json(exclude_unset=True))

    def _choice(self, text: str, finish: str | None, stop: int | str | None) -> Any:
        choice = ChatCompletionResponseStreamChoice(
            index=0,
            delta=DeltaMessage() if finish is not None else DeltaMessage(content=text),
            logprobs=None,
            finish_reason=finish,
            token_ids=None,
        )
        if finish is not None:
            choice.stop_reason = stop
        return choice


class CompletionModels(ChunkModels):
    response = CompletionStreamResponse
    kind = "text_completion"
    bare_end = False

    def _choice(self, text: str, finish: str | None, stop: int | str | None) -> Any:
        return CompletionResponseStreamChoice(
            index=0,
            text=text,
            logprobs=None,
            finish_reason=finish,
            stop_reason=stop,
            prompt_token_ids=None,
            token_ids=None,
        )


class ChunkTemplate:
    """The events of all answers to one kind of request. `prune` removes nulls from an event."""

    def __init__(self, models: ChunkModels, prune: Callable[[bytes], bytes]) -> None:
        self._models = models
        self._prune = prune
        self.parsed = models.parsed
        first = models.first()
        self._first = _cut(prune(first)) if first else ()
        head, found, self.tail = prune(models.chunk(_TEXT)).partition(orjson.dumps(_TEXT))
        assert found  # noqa: S101  # a chunk contains its text
        self._head = _cut(head)
        self.bare_end = models.bare_end
        self._ends: dict[tuple[str, int | str | None], tuple[bytes, ...]] = {}
        self._usage = self._usage_parts() if models.include_usage else ()

    def answer(self, answer_id: str) -> Answer:
        return Answer(self, answer_id, int(time.time()))

    def first(self, lead: Lead) -> bytes:
        return _fill(self._first, lead)

    def head(self, lead: Lead) -> bytes:
        """Return a middle event up to its text."""
        return _fill(self._head, lead)

    def end(self, lead: Lead, text: str, finish: str, stop: int | str | None) -> bytes:
        """Return the event with the reason of the end, after the last text or with it."""
        parts = self._ends.get((finish, stop))
        if parts is None:
            parts = self._end(finish, stop)
            if len(self._ends) < _ENDS:
                self._ends[finish, stop] = parts
        return _fill(parts[:3], lead) + (b"" if self.bare_end else orjson.dumps(text)) + parts[3]

    def _end(self, finish: str, stop: int | str | None) -> tuple[bytes, ...]:
        frame = self._prune(self._models.chunk(_TEXT, finish, stop))
        head, _, tail = frame.partition(orjson.dumps(_TEXT))  # all is head if it has no text
        return (*_cut(head), tail)

    def usage(self, lead: Lead, prompt_tokens: int, tokens: int) -> bytes:
        """Return the event with the token counts; empty if not requested."""
        if not self._usage:
            return b""
        *ahead, after = self._usage
        counts = (prompt_tokens, tokens, prompt_tokens + tokens)
        for marker, count in zip(_COUNTS, counts, strict=True):
            after = after.replace(b"%d" % marker, b"%d" % count, 1)
        return _fill((*ahead, after), lead)

    def _usage_parts(self) -> tuple[bytes, ...]:
        prompt, completion, total = _COUNTS
        usage = UsageInfo(prompt_tokens=prompt, completion_tokens=completion, total_tokens=total)
        return _cut(self._prune(self._models.usage(usage)))


class Answer:
    """The events of one answer: a `token_stream.StreamFrames`."""

    def __init__(self, template: ChunkTemplate, answer_id: str, created: int) -> None:
        self._template = template
        self._lead = (orjson.dumps(answer_id), b'"created":%d' % created)
        self._head = template.head(self._lead)
        self._tail = template.tail
        self.first = template.first(self._lead)

    def middle(self, text: str) -> bytes:
        if not text and self._template.parsed:
            return b""
        return self._head + orjson.dumps(text) + self._tail

    def last(
        self, text: str, finish: str, stop: int | str | None, prompt_tokens: int, tokens: int
    ) -> bytes:
        end = self._template.end(self._lead, text, finish, stop)
        if text and self._template.bare_end:
            end = self.middle(text) + end
        return end + self._template.usage(self._lead, prompt_tokens, tokens) + sse.DONE


def _frame(json: str) -> bytes:
    return f"data: {json}\n\n".encode()


def _cut(frame: bytes) -> tuple[bytes, ...]:
    """Split at the id and the time, which precede all text of a model or a user."""
    before, _, rest = frame.partition(orjson.dumps(_ID))
    between, found, after = rest.partition(b'"created":%d' % _CREATED)
    assert found  # noqa: S101  # both are in every chunk
    return before, between, after


def _fill(parts: tuple[bytes, ...], lead: Lead) -> bytes:
    if not parts:
        return b""
    before, between, after = parts
    return b"".join((before, lead[0], between, lead[1], after))
