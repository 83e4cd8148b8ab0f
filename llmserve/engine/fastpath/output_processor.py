"""Passes an engine's output directly to streams.

vLLM's output loop creates a `RequestOutput` per token and puts it into a queue that wakes a task
(vllm/v1/engine/output_processor.py). `StreamingOutputProcessor` keeps that loop for first tokens,
ends, stop strings, preemptions, errors and other kinds of requests. The text of any other token is
appended to its stream, with statistics once per step. Requests that only answer at the end skip
vLLM's loop as well.
"""

from __future__ import annotations

import random
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm.exceptions import GenerationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput, RequestState

from llmserve.engine.fastpath import guards
from llmserve.engine.fastpath.detokenizer import TableDetokenizer, exclude_prompt, text_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.stats import IterationStats

    from llmserve.api.token_stream import TokenStream
    from llmserve.engine.fastpath.detokenizer import Table
    from llmserve.errors import LLMServeError

# The source and stream of the request that is being added to the engine.
_adding: ContextVar[tuple[EngineStreamSource, TokenStream] | None] = ContextVar(
    "adding", default=None
)


@dataclass(frozen=True)
class GenerateCall:
    """The arguments of a call of `AsyncLLM.generate`."""

    prompt: Any
    params: Any
    request_id: str
    more: dict[str, Any]

    async def add_to(self, client: AsyncLLM) -> None:
        await client.add_request(self.request_id, self.prompt, self.params, **self.more)


@dataclass(frozen=True)
class PreparedRequest:
    """A request as vLLM creates it from a call (vllm/v1/engine/input_processor.py)."""

    request: EngineCoreRequest
    request_id: str

    async def add_to(self, client: AsyncLLM) -> None:
        """The last steps of `AsyncLLM.add_request`; its first ones would prepare the request again."""
        if client.errored:
            raise EngineDeadError
        request = self.request
        request.external_req_id = request.request_id
        request.request_id = f"{request.request_id}-{random.getrandbits(32):08x}"
        client._run_output_handler()  # noqa: SLF001  # as add_request does
        await client._add_request(request, None, None, 0, None)  # noqa: SLF001  # as add_request does


class EngineStreamSource:
    """A request whose answer goes to a stream: a `token_stream.StreamSource`.

    `translate` maps vLLM's exceptions to errors of ours.
    """

    def __init__(
        self,
        client: AsyncLLM,
        call: GenerateCall | PreparedRequest,
        translate: Callable[[Exception], LLMServeError],
    ) -> None:
        self._client = client
        self._call = call
        self._translate = translate
        # Not vLLM's state, which has these: each request would be a reference cycle.
        self._added: tuple[str, int] | None = None  # id in the engine, tokens of the prompt

    async def begin(self, stream: TokenStream) -> None:
        token = _adding.set((self, stream))
        try:
            await self._call.add_to(self._client)
        except Exception as error:
            raise self._translate(error) from error
        finally:
            _adding.reset(token)

    def is_for(self, request: EngineCoreRequest) -> bool:
        """Whether `request` is this one: tasks that vLLM starts meanwhile inherit the context."""
        return self._added is None and request.external_req_id == self._call.request_id

    def attach(self, state: StreamedRequestState, stream: TokenStream) -> None:
        self._added = (state.request_id, state.prompt_len)
        state.stream = stream
        state.source = self
        # vLLM puts an engine's failure into this queue; tokens do not pass through it.
        state.queue = SimpleNamespace(put=lambda error: stream.failed(self.failure(error)))

    def failure(self, error: Exception) -> LLMServeError:
        return self._translate(error)

    async def abort(self) -> None:
        if self._added is not None:
            await self._client.abort(self._added[0], internal=True)

    @property
    def prompt_tokens(self) -> int:
        return self._added[1] if self._added is not None else 0


class StreamedRequestState(RequestState):
    """A request whose text goes to a stream."""

    stream: TokenStream
    source: EngineStreamSource

    def plain_stream(self) -> TokenStream:
        """Return the stream with all that a token needs: one object stays in the CPU's caches."""
        detokenizer, stream = self.detokenizer, self.stream
        assert detokenizer is not None  # noqa: S101  # streamed requests have text
        stream.decode = detokenizer.decode_next
        stream.table, stream.partial = (), False
        if isinstance(detokenizer, TableDetokenizer):
            stream.table, stream.partial = detokenizer.table, detokenizer.partial
        return stream

    def update_stats(self) -> None:
        """Record what the stream received since vLLM's loop last handled the request."""
        if self.stats is not None:
            self.stats.num_generation_tokens = self.stream.tokens
            self.stats.last_token_ts = self.stream.last_s

    def make_request_output(
        self,
        new_token_ids: list[int],
        pooling_output: Any,
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
        *_: Any,
        **__: Any,
    ) -> None:
        """Pass a step's text on; vLLM calls this after statistics, detokenizer and stop strings."""
        since_s = self.stats.last_token_ts if self.stats is not None else 0.0
        if finish_reason is FinishReason.ERROR:
            self.stream.failed(self.source.failure(GenerationError("Internal server error")))
            return
        assert self.detokenizer is not None  # noqa: S101  # streamed requests have text
        text = self.detokenizer.get_next_output_text(finish_reason is not None, True)
        if finish_reason is not None:
            self.stream.finished(str(finish_reason), stop_reason, since_s)
        if text or new_token_ids:
            self.stream.pieces.append(text)
            self.stream.took(len(new_token_ids), since_s)


class FinalOnlyRequestState(RequestState):
    """A request without an answer before its end, and without stop strings."""


class StreamingOutputProcessor(OutputProcessor):
    """vLLM's output processor, which skips its loop for plain tokens."""

    plain: dict[str, TokenStream]  # by request: past the first token, without stop strings
    table: Table | None

    @classmethod
    def take_over(cls, client: AsyncLLM) -> None:
        """Become the output processor of a client without requests so far.

        The client keeps vLLM's own if an engine's output has unknown fields.
        """
        if not guards.knows(EngineCoreOutput):
            return
        outputs: Any = client.output_processor
        outputs.__class__ = cls
        outputs.plain = {}
        outputs.table = text_table(outputs.tokenizer, str(client.model_config.served_model_name))

    def add_request(
        self, request: EngineCoreRequest, prompt: str | None, *rest: Any, **more: Any
    ) -> None:
        super().add_request(request, prompt, *rest, **more)
        state: Any = self.request_states.get(request.request_id)
        if state is None or type(state) is not RequestState:
            return  # more input for an existing request
        if self.table is not None:
            TableDetokenizer.take_over(state.detokenizer, self.table)
        else:
            exclude_prompt(state.detokenizer, request.prompt_token_ids)
        adding = _adding.get()
        if adding is not None and adding[0].is_for(request):
            state.__class__ = StreamedRequestState
            source, stream = adding
            source.attach(state, stream)
        elif _is_final_only(state):
            state.__class__ = FinalOnlyRequestState

    def abort_requests(self, request_ids: Iterable[str], internal: bool) -> list[str]:
        aborted: list[str] = super().abort_requests(request_ids, internal)
        for request_id in aborted:
            self.plain.pop(request_id, None)
        return aborted

    def process_outputs(
        self,
        engine_core_outputs: list[EngineCoreOutput],
        engine_core_timestamp: float | None = None,
        iteration_stats: IterationStats | None = None,
        **more: Any,
    ) -> OutputProcessorOutput:
        """Handle one engine step. `engine_core_timestamp` is the engine's `time.monotonic()`."""
        others: list[EngineCoreOutput] = []
        plain = self.plain
        now: float = engine_core_timestamp or 0.0
        tokens = same = 0
        before = 0.0  # time of the last token of most requests of this step
        for output in engine_core_outputs:
            stream = plain.get(output.request_id)
            if stream is None or output.finish_reason is not None or output.events is not None:
                others.append(output)
                continue
            ids = output.new_token_ids
            if not ids:
                continue
            # One id at a time: `DecodeStream` holds back all of a list that ends inside a
            # character. The lookup is that of `TableDetokenizer.decode_next`, without the call.
            table = stream.table
            for token in ids:
                text = table[token] if not stream.partial and token < len(table) else None
                if text is None:
                    text = stream.decode(token)
                    stream.partial = not text
                stream.pieces.append(text)
            tokens += len(ids)
            if stream.last_s == before:
                same += 1
            else:
                note_gap(iteration_stats, now - before, same)
                same, before = 1, stream.last_s
            stream.took(len(ids), now)
        if iteration_stats is not None:
            iteration_stats.num_generation_tokens += tokens
            note_gap(iteration_stats, now - before, same)
        if not others:
            return OutputProcessorOutput([], [])
        return self._process_others(others, engine_core_timestamp, iteration_stats, **more)

    def _process_others(
        self,
        outputs: list[EngineCoreOutput],
        timestamp: float | None,
        stats: IterationStats | None,
        **more: Any,
    ) -> OutputProcessorOutput:
        """Run vLLM's loop, after recording what streams received without it."""
        remaining = []
        for output in outputs:
            state: Any = self.request_states.get(output.request_id)
            if type(state) is StreamedRequestState and not state.is_prefilling:
                state.update_stats()
            if (
                type(state) is FinalOnlyRequestState
                and not any(more.values())
                and _only_tokens(state, output)
            ):
                self._update_stats_from_output(state, output, timestamp, stats)
                state.detokenizer.update(output.new_token_ids, False)
            else:
                remaining.append(output)
            if output.finish_reason is not None:
                self.plain.pop(output.request_id, None)
        done = super().process_outputs(remaining, timestamp, stats, **more)
        for output in remaining:
            state = self.request_states.get(output.request_id)
            if type(state) is StreamedRequestState and _has_no_stop_strings(state):
                self.plain[output.request_id] = state.plain_stream()
        return done


def _only_tokens(state: RequestState, output: EngineCoreOutput) -> bool:
    return (
        output.finish_reason is None
        and output.events is None
        and output.routed_experts is None
        and output.new_sampling_mask is None
        and not state.is_prefilling
    )


def _is_final_only(state: RequestState) -> bool:
    """Whether the request has one answer at its end, of tokens alone."""
    return (
        _has_no_stop_strings(state)
        and state.output_kind is RequestOutputKind.FINAL_ONLY
        and state.parent_req is None
        and not state.streaming_input
        and state.logprobs_processor is not None
        and state.logprobs_processor.num_logprobs is None
        and state.logprobs_processor.num_prompt_logprobs is None
    )


def _has_no_stop_strings(state: RequestState) -> bool:
    """Whether text is decoded token by token, without a search for stop strings."""
    detokenizer = state.detokenizer
    return isinstance(detokenizer, FastIncrementalDetokenizer) and not detokenizer.stop


def note_gap(stats: IterationStats | None, gap_s: float, count: int) -> None:
    """Record the inter-token latency of `count` requests; a step's streams share one."""
    if stats is not None and count:
        gaps: list[tuple[float, int]] = stats.__dict__.setdefault("gaps", [])
        gaps.append((gap_s, count))
