"""An engine's output, straight into streams.

vLLM's output loop makes a `RequestOutput` per token and puts it into a queue that wakes
a task (vllm/v1/engine/output_processor.py). `StreamingOutputProcessor` keeps that loop for all that has
meaning beyond a token (the first one, the end, stop strings, preemptions, errors, other
kinds of requests) and takes the rest short: text to its stream, statistics once per step.
Requests that only answer at the end go short as well.
"""

from __future__ import annotations

import random
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.exceptions import GenerationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput, RequestState

from llmserve.engine.fastpath import guards
from llmserve.engine.fastpath.detokenizer import TableDetokenizer, start_clean, text_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.stats import IterationStats

    from llmserve.api.token_stream import TokenStream
    from llmserve.engine.fastpath.detokenizer import Table
    from llmserve.errors import LLMServeError

# The request that is being given to the engine, and the stream it is for.
_beginning: ContextVar[tuple[EngineStreamSource, TokenStream] | None] = ContextVar(
    "beginning", default=None
)


@dataclass(frozen=True)
class GenerateCall:
    """The arguments of a call of `AsyncLLM.generate`."""

    prompt: Any
    params: Any
    request_id: str
    more: dict[str, Any]

    async def give(self, client: AsyncLLM) -> None:
        await client.add_request(self.request_id, self.prompt, self.params, **self.more)


@dataclass(frozen=True)
class PreparedRequest:
    """A request as vLLM would make it of a call (vllm/v1/engine/input_processor.py)."""

    request: EngineCoreRequest
    request_id: str

    async def give(self, client: AsyncLLM) -> None:
        """The rest of `AsyncLLM.add_request`, which would prepare and check it once more."""
        if client.errored:
            raise EngineDeadError
        request = self.request
        request.external_req_id = request.request_id
        request.request_id = f"{request.request_id}-{random.getrandbits(32):08x}"
        client._run_output_handler()  # noqa: SLF001  # as add_request does
        await client._add_request(request, None, None, 0, None)  # noqa: SLF001  # as add_request does


class EngineStreamSource:
    """A request whose answer goes to a stream.

    `token_stream.StreamSource`. `translate` turns vLLM's exceptions into ours.
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
        # Not vLLM's state, which knows this: a cycle for each request would have to be collected.
        self._begun: tuple[str, int] | None = None  # its id in the engine, tokens of its prompt

    async def begin(self, stream: TokenStream) -> None:
        token = _beginning.set((self, stream))
        try:
            await self._call.give(self._client)
        except Exception as error:
            raise self._translate(error) from error
        finally:
            _beginning.reset(token)

    def is_for(self, request: EngineCoreRequest) -> bool:
        """A task that vLLM starts while one begins inherits the context: it is for no other."""
        return self._begun is None and request.external_req_id == self._call.request_id

    def began(self, state: StreamedRequestState, stream: TokenStream) -> None:
        self._begun = (state.request_id, state.prompt_len)
        state.stream = stream
        state.asked = self
        # Where vLLM puts an engine's failure; tokens do not come this way.
        state.queue = _Failures(self, stream)

    def failure(self, error: Exception) -> LLMServeError:
        return self._translate(error)

    async def abort(self) -> None:
        if self._begun is not None:
            await self._client.abort(self._begun[0], internal=True)

    @property
    def prompt_tokens(self) -> int:
        return self._begun[1] if self._begun is not None else 0


class _Failures:
    def __init__(self, asked: EngineStreamSource, stream: TokenStream) -> None:
        self._asked = asked
        self._stream = stream

    def put(self, error: Exception) -> None:
        self._stream.failed(self._asked.failure(error))


class StreamedRequestState(RequestState):
    """A request whose text goes to a stream."""

    stream: TokenStream
    asked: EngineStreamSource

    def plain(self) -> TokenStream:
        """Its stream, with all that a token takes: others' objects are in no cache by then."""
        known, stream = self.detokenizer, self.stream
        assert known is not None  # noqa: S101  # Asked requests have text
        stream.decode = known.decode_next
        stream.table, stream.partial = (), False
        if isinstance(known, TableDetokenizer):
            stream.table, stream.partial = known.table, known.partial
        return stream

    def settle(self) -> None:
        """Enter what its stream has had since vLLM's loop last saw it."""
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
        """Called once a step, after statistics, detokenizer and stop strings."""
        since_s = self.stats.last_token_ts if self.stats is not None else 0.0
        if finish_reason is FinishReason.ERROR:
            self.stream.failed(self.asked.failure(GenerationError("Internal server error")))
            return
        assert self.detokenizer is not None  # noqa: S101  # Asked requests have text
        text = self.detokenizer.get_next_output_text(finish_reason is not None, True)
        if finish_reason is not None:
            self.stream.finished(str(finish_reason), stop_reason, since_s)
        if text or new_token_ids:
            self.stream.pieces.append(text)
            self.stream.took(len(new_token_ids), since_s)


class FinalOnlyRequestState(RequestState):
    """A request that says nothing before it is finished, and has no stop strings."""


class StreamingOutputProcessor(OutputProcessor):
    """vLLM's, with a short way for tokens at which nothing else happens."""

    plain: dict[str, TokenStream]  # by request; past their first token, no stop strings
    table: Table | None

    @classmethod
    def take_over(cls, client: AsyncLLM) -> None:
        """Become the output processor of a client that has had no request yet.

        It stays vLLM's own if an engine's output has fields that this one does not know.
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
            return  # more input for a request that is here already
        if self.table is not None:
            TableDetokenizer.take_over(state.detokenizer, self.table)
        else:
            start_clean(state.detokenizer, request.prompt_token_ids)
        beginning = _beginning.get()
        if beginning is not None and beginning[0].is_for(request):
            state.__class__ = StreamedRequestState
            asked, stream = beginning
            asked.began(state, stream)
        elif _silent(state):
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
        """Once per engine step. `engine_core_timestamp` is the engine's `time.monotonic()`."""
        others: list[EngineCoreOutput] = []
        plain = self.plain
        now: float = engine_core_timestamp or 0.0
        tokens = same = 0
        before = 0.0  # when most requests of this step had their last token
        for output in engine_core_outputs:
            stream = plain.get(output.request_id)
            if stream is None or output.finish_reason is not None or output.events is not None:
                others.append(output)
                continue
            ids = output.new_token_ids
            if not ids:
                continue
            # One id at a time: `DecodeStream` holds back all of a list that ends inside a
            # character. What the table has, `TableDetokenizer.decode_next` would look up there as well.
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
        return self._others(others, engine_core_timestamp, iteration_stats, **more)

    def _others(
        self,
        outputs: list[EngineCoreOutput],
        timestamp: float | None,
        stats: IterationStats | None,
        **more: Any,
    ) -> OutputProcessorOutput:
        """vLLM's own loop. What a stream has had without it is entered first."""
        left = []
        for output in outputs:
            state: Any = self.request_states.get(output.request_id)
            if type(state) is StreamedRequestState and not state.is_prefilling:
                state.settle()
            if (
                type(state) is FinalOnlyRequestState
                and not any(more.values())
                and _only_tokens(state, output)
            ):
                self._update_stats_from_output(state, output, timestamp, stats)
                state.detokenizer.update(output.new_token_ids, False)
            else:
                left.append(output)
            if output.finish_reason is not None:
                self.plain.pop(output.request_id, None)
        done = super().process_outputs(left, timestamp, stats, **more)
        for output in left:
            state = self.request_states.get(output.request_id)
            if type(state) is StreamedRequestState and _unwatched(state):
                self.plain[output.request_id] = state.plain()
        return done


def _only_tokens(state: RequestState, output: EngineCoreOutput) -> bool:
    return (
        output.finish_reason is None
        and output.events is None
        and output.routed_experts is None
        and output.new_sampling_mask is None
        and not state.is_prefilling
    )


def _silent(state: RequestState) -> bool:
    """Whether it is for one answer at the end, of tokens alone."""
    return (
        _unwatched(state)
        and state.output_kind is RequestOutputKind.FINAL_ONLY
        and state.parent_req is None
        and not state.streaming_input
        and state.logprobs_processor is not None
        and state.logprobs_processor.num_logprobs is None
        and state.logprobs_processor.num_prompt_logprobs is None
    )


def _unwatched(state: RequestState) -> bool:
    """Whether its text is made token by token and nobody looks for a stop string in it."""
    detokenizer = state.detokenizer
    return isinstance(detokenizer, FastIncrementalDetokenizer) and not detokenizer.stop


def note_gap(stats: IterationStats | None, gap_s: float, count: int) -> None:
    """An inter-token latency that `count` requests had; a step's streams share one."""
    if stats is not None and count:
        gaps: list[tuple[float, int]] = stats.__dict__.setdefault("gaps", [])
        gaps.append((gap_s, count))
