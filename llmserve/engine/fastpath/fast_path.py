"""The short way of streamed chat and completions.

Two halves, each of which vLLM's handlers can do alone:

- Tokens. vLLM prepares the request; its call of `generate` is noted instead of made, and
  a `TokenStream` carries the answer.
- Requests. The first request of a kind goes through vLLM's handler and input processor.
  What they made of the body is kept as a `RequestTemplate`: a later body that differs in its messages
  alone only needs its template rendered, its text tokenized and its `max_tokens` set. A
  recipe is kept only if it gives, for that first request, exactly what they gave.

Whatever does not fit goes the long way, and so does every error: its words are vLLM's.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from jinja2.runtime import new_context
from transformers.utils.chat_template_utils import _compile_jinja_template
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens, should_include_usage
from vllm.renderers.chat_utils import _CLAUDE_CODE_BILLING_HEADER
from vllm.renderers.hf import (
    resolve_chat_template,
    resolve_chat_template_content_format,
    resolve_chat_template_kwargs,
)
from vllm.v1.engine.detokenizer import uses_fast_detokenizer

from llmserve.api.context import RequestContext
from llmserve.api.token_stream import TokenStream
from llmserve.engine.fastpath import guards
from llmserve.engine.fastpath.chunk_templates import ChatModels, ChunkTemplate, CompletionModels
from llmserve.engine.fastpath.output_processor import (
    EngineStreamSource,
    GenerateCall,
    PreparedRequest,
)
from llmserve.engine.fastpath.tokenizer import Encode, encoder

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    import jinja2
    from starlette.types import Scope
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM

    from llmserve.api.token_stream import FlushScheduler
    from llmserve.errors import LLMServeError

log = logging.getLogger(__name__)

_RECIPES = 256  # kinds of requests that are remembered, per endpoint
_KEY_LIMIT = 4096  # bytes of a body without its messages
_TEXT_LIMIT = 8192  # characters; longer texts are tokenized in vLLM's threads
_MESSAGES = 256  # of a chat; longer ones are rendered in vLLM's threads
_ROLES = frozenset({"system", "user", "assistant"})
_SEED_LIMIT = 2**63
# How headers begin that vLLM's handlers read besides the request's id.
_HEADERS = (b"x-vllm-", b"x-data-parallel-", b"x-session-id", b"traceparent", b"tracestate")

# Arguments of `generate` that do not depend on the prompt.
_MORE = frozenset({"lora_request", "priority"})

_noted: ContextVar[list[GenerateCall] | None] = ContextVar("noted", default=None)


@dataclass(frozen=True)
class StreamTerms:
    """What a stream needs from the one who serves it."""

    translate: Callable[[Exception], LLMServeError]
    failure: Callable[[LLMServeError], bytes]
    prune: Callable[[bytes], bytes]


class CapturingEngine:
    """An engine as vLLM's handlers see it: while noting, calls of `generate` are kept.

    `AsyncLLM.generate` does nothing before its answer is read, so a noted call that
    nobody reads has not happened.
    """

    def __init__(self, client: AsyncLLM) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **more: Any
    ) -> AsyncGenerator[Any, None]:
        noted = _noted.get()
        if noted is not None:
            noted.append(GenerateCall(prompt, sampling_params, request_id, more))
        answer: AsyncGenerator[Any, None] = self._client.generate(
            prompt, sampling_params, request_id, **more
        )
        return answer


class CapturedCalls:
    """`with Noted() as calls`: the calls of `generate` made inside."""

    def __enter__(self) -> list[GenerateCall]:
        self._calls: list[GenerateCall] = []
        self._token = _noted.set(self._calls)
        return self._calls

    def __exit__(self, *_: object) -> None:
        _noted.reset(self._token)


class EndpointAdapter(Protocol):
    """What chat and completions do each in their own way."""

    prompt: str  # the key of a body that holds it
    limits: tuple[str, ...]  # keys for `max_tokens`, the one that counts first

    def plain(self, prompt: Any) -> Any:
        """A prompt as `text` takes it; None if a recipe cannot take it."""
        ...

    def able(self, request: Any) -> bool: ...
    def template(
        self, request: Any, name: str, prune: Callable[[bytes], bytes]
    ) -> ChunkTemplate: ...
    def text(self, request: Any) -> Callable[[Any], str]:
        """How the prompt of a body becomes the text that is tokenized."""
        ...

    def answer_id(self, request_id: str) -> str:
        """Of the id that `generate` was given."""
        ...

    def request_id(self, base: str) -> str: ...


@dataclass
class RequestTemplate:
    """How to make the request to the engine out of a body of one kind."""

    lane: EndpointAdapter
    client: AsyncLLM
    serving: Any
    template: ChunkTemplate
    text: Callable[[Any], str]
    encode: Encode
    first: EngineCoreRequest  # what vLLM made of the first body
    add_special_tokens: bool
    limit: int | None  # `max_tokens` of a body that names none

    def request(self, prompt: Any, body: dict[str, Any], base_id: str) -> PreparedRequest | None:
        """The request to the engine; None if vLLM should have a look at the body.

        Raises what the template finds wrong with it.
        """
        text = self.text(prompt)
        if len(text) > _TEXT_LIMIT:
            return None
        ids = self.encode(text, add_special_tokens=self.add_special_tokens)
        limit = next((body[name] for name in self.lane.limits if name in body), self.limit)
        if not ids or len(ids) + (limit or 1) > self.client.model_config.max_model_len:
            return None
        params = copy.copy(self.first.params)
        params.max_tokens = self._max_tokens(limit, len(ids))
        params.seed = body.get("seed", params.seed)
        request = copy.copy(self.first)
        request.request_id = self.lane.request_id(base_id)
        request.prompt_token_ids = ids
        request.sampling_params = params
        request.arrival_time = time.time()
        return PreparedRequest(request, request.request_id)

    def _max_tokens(self, limit: int | None, length: int) -> int:
        return int(
            get_max_tokens(
                self.client.model_config.max_model_len,
                limit,
                length,
                self.serving.default_sampling_params,
                self.serving.override_max_tokens,
            )
        )


@dataclass
class RequestTemplates:
    """The last kinds of requests of one endpoint; None for those that have no recipe."""

    kept: OrderedDict[bytes, RequestTemplate | None] = field(default_factory=OrderedDict)

    def find(self, key: bytes) -> RequestTemplate | None:
        recipe = self.kept.get(key)
        if recipe is not None:
            self.kept.move_to_end(key)
        return recipe

    def keep(self, key: bytes, recipe: RequestTemplate | None) -> None:
        self.kept[key] = recipe
        if len(self.kept) > _RECIPES:
            self.kept.popitem(last=False)


class RunningEngine(Protocol):
    """What of `engine.Engine` is used here."""

    client: AsyncLLM
    flow: FlushScheduler


class FastPath:
    """The short way of one endpoint of one model."""

    def __init__(
        self,
        lane: EndpointAdapter,
        serving: Any,
        engine: RunningEngine,
        encode: Encode | None,
        terms: StreamTerms,
    ) -> None:
        client = engine.client
        self._lane = lane
        self._serving = serving
        self._client = client
        self._flow = engine.flow
        self._terms = terms
        self._recipes = RequestTemplates()
        self._encode = encode
        self.open = guards.is_open(serving, client)
        if self.open:
            serving.engine_client = CapturingEngine(client)

    # --- requests

    def stream(self, body: dict[str, Any], asked_name: str, scope: Scope) -> TokenStream | None:
        """The answer to a body whose recipe is known; None: go the long way."""
        if not (self.open and self._fits(body, scope)):
            return None
        prompt = self._lane.plain(body.get(self._lane.prompt))
        recipe = self._recipes.find(self._key(body, asked_name)) if prompt is not None else None
        if recipe is None:
            return None
        try:
            ready = recipe.request(prompt, body, RequestContext.of(scope).id)
        except Exception:
            log.debug("model=%s the template refuses", asked_name, exc_info=True)
            return None  # in vLLM's own words
        return None if ready is None else self._carried(ready, recipe.template)

    def _fits(self, body: dict[str, Any], scope: Scope) -> bool:
        """Whether nothing but the body says what is asked for, and its numbers are plain."""
        limits = (body[name] for name in self._lane.limits if name in body)
        seed = body.get("seed", 0)
        return (
            body.get("stream") is True
            and all(type(limit) is int and limit > 0 for limit in limits)
            and type(seed) is int
            and 0 <= seed < _SEED_LIMIT
            and not any(name.startswith(_HEADERS) for name, _ in scope["headers"])
        )

    def _key(self, body: dict[str, Any], asked_name: str) -> bytes:
        """All of a body but the prompt, and of its limits and its seed that they are there.

        In the order of its keys: a template can tell the order of a document's, say. Empty
        for a body that is nested too deep to be written down.
        """
        given = (*self._lane.limits, "seed")
        rest = {name: None if name in given else value for name, value in body.items()}
        del rest[self._lane.prompt]
        try:
            return asked_name.encode() + orjson.dumps(rest)
        except TypeError:
            return b""

    # --- tokens

    def carry(
        self,
        request: Any,
        body: dict[str, Any],
        asked_name: str,
        scope: Scope,
        calls: list[GenerateCall],
    ) -> TokenStream | None:
        """The answer to a request that vLLM has prepared; None if it must give it itself."""
        if not (self.open and len(calls) == 1 and guards.is_plain(request, calls[0].params)):
            return None
        if not self._lane.able(request):
            return None
        name = self._serving.models.model_name(calls[0].more.get("lora_request"))
        template = self._lane.template(request, name, self._terms.prune)
        (call,) = calls
        if self._fits(body, scope) and guards.is_repeatable(request, call.prompt, call.params):
            self._learn(request, body, asked_name, call, template)
        return self._carried(call, template)

    def _carried(
        self, call: GenerateCall | PreparedRequest, template: ChunkTemplate
    ) -> TokenStream:
        asked = EngineStreamSource(self._client, call, self._terms.translate)
        frames = template.answer(self._lane.answer_id(call.request_id))
        return TokenStream(asked, self._flow, frames, self._terms.failure)

    # --- learning

    def _learn(
        self,
        request: Any,
        body: dict[str, Any],
        asked_name: str,
        call: GenerateCall,
        template: ChunkTemplate,
    ) -> None:
        """Keep a recipe if it makes of this body what vLLM's handler made of it."""
        prompt = self._lane.plain(body.get(self._lane.prompt))
        key = self._key(body, asked_name)
        if prompt is None or key in self._recipes.kept or not 0 < len(key) <= _KEY_LIMIT:
            return
        made = _made(self._client, call)
        if made is None or not guards.is_known(made):
            return
        try:
            recipe = self._recipe(request, made, template)
            again = recipe.request(prompt, body, "")
        except Exception:
            log.info("model=%s no short way for this kind", asked_name, exc_info=True)
            self._recipes.keep(key, None)
            return
        if again is None:
            return  # too long for it: that says nothing of its kind
        again.request.request_id = made.request_id
        again.request.arrival_time = made.arrival_time
        if again.request == made:
            self._recipes.keep(key, recipe)
        else:
            log.warning("model=%s a short way differs from vLLM's and is not used", asked_name)
            self._recipes.keep(key, None)

    def _recipe(
        self, request: Any, made: EngineCoreRequest, template: ChunkTemplate
    ) -> RequestTemplate:
        """Raises ValueError for a kind of request that has none."""
        if self._encode is None:
            raise ValueError("a tokenizer without a fast backend")
        return RequestTemplate(
            self._lane,
            self._client,
            self._serving,
            template,
            self._lane.text(request),
            self._encode,
            made,
            request.add_special_tokens,
            request.max_tokens,
        )


# --- the requests of one kind


def _as_text(message: Any) -> dict[str, str] | None:
    """A message that has a role, a text and nothing else; the text may be one part of a list.

    vLLM joins parts of text with newlines, where a template takes strings.
    """
    if type(message) is not dict or len(message) != 2:
        return None
    role, text = message.get("role"), message.get("content")
    if type(role) is not str or role not in _ROLES:
        return None
    if type(text) is list:
        text = _only_text(text)
    if type(text) is not str or not text:
        return None
    if role == "system" and text.startswith(_CLAUDE_CODE_BILLING_HEADER):
        return None  # vLLM drops this line
    return {"role": role, "content": text}


def _only_text(parts: list[Any]) -> Any:
    if len(parts) != 1 or type(parts[0]) is not dict:
        return None
    (part,) = parts
    return part.get("text") if len(part) == 2 and part.get("type") == "text" else None


def _made(client: AsyncLLM, call: GenerateCall) -> EngineCoreRequest | None:
    """What `AsyncLLM.add_request` makes of a call; None if it adds to that, or refuses it."""
    more = {name: value for name, value in call.more.items() if value is not None}
    if not more.keys() <= _MORE:
        return None
    try:
        return client.input_processor.process_inputs(
            call.request_id, call.prompt, call.params, supported_tasks=("generate",), **more
        )
    except Exception:  # which the request itself will raise again
        return None


def encoder_of(client: AsyncLLM) -> Encode | None:
    tokenizer = client.renderer.tokenizer
    if not uses_fast_detokenizer(tokenizer):
        return None  # not one of transformers' with a fast backend
    return encoder(tokenizer, str(client.model_config.served_model_name))


# --- chat and completions


class Chat:
    prompt = "messages"
    limits: tuple[str, ...] = ("max_completion_tokens", "max_tokens")

    def __init__(self, serving: Any) -> None:
        self._serving = serving
        self._parsed = serving is not None and serving.parser_cls is not None

    def plain(self, prompt: Any) -> Any:
        if type(prompt) is not list or not 0 < len(prompt) <= _MESSAGES:
            return None
        messages = [_as_text(message) for message in prompt]
        if None in messages:
            return None
        short = sum(len(message["content"]) for message in messages if message) <= _TEXT_LIMIT
        return messages if short else None

    def able(self, request: Any) -> bool:
        aside = not self._parsed or (request.tool_choice == "none" and request.include_reasoning)
        return not request.return_prompt_text and not request.tools and aside

    def template(self, request: Any, name: str, prune: Callable[[bytes], bytes]) -> ChunkTemplate:
        include_usage, _ = should_include_usage(request.stream_options, False)
        role = self._serving.get_chat_request_role(request)
        fingerprint = self._serving.system_fingerprint
        models = ChatModels(
            name, role, fingerprint, include_usage=include_usage, parsed=self._parsed
        )
        return ChunkTemplate(models, prune, include_usage=include_usage)

    def text(self, request: Any) -> Callable[[Any], str]:
        """vLLM's `render_messages` for messages of strings (vllm/renderers/hf.py).

        Raises ValueError for what depends on the messages in another way.
        """
        renderer = self._serving.online_renderer
        tokenizer = renderer.renderer.tokenizer
        config = renderer.model_config
        asked = request.build_chat_params(
            renderer.chat_template, renderer.chat_template_content_format
        ).with_defaults({**(renderer.default_chat_template_kwargs or {}), "tools": None})
        options = asked.get_apply_chat_template_kwargs()
        for name in ("tools", "tokenize"):
            options.pop(name, None)
        template = resolve_chat_template(
            tokenizer,
            chat_template=options.pop("chat_template", None),
            tools=None,
            model_config=config,
        )
        form = resolve_chat_template_content_format(
            chat_template=asked.chat_template,
            tools=None,
            given_format=asked.chat_template_content_format,
            tokenizer=tokenizer,
            model_config=config,
        )
        if template is None or form != "string" or not request.add_generation_prompt:
            raise ValueError(f"content format {form}, or a prompt that goes on")
        known = resolve_chat_template_kwargs(
            tokenizer=tokenizer, chat_template=template, chat_template_kwargs=options
        )
        for name in ("continue_final_message", "return_assistant_tokens_mask"):
            known.pop(name, None)  # not the template's; a prompt that goes on has left above
        # What `tokenizer.apply_chat_template` comes down to.
        given = {"tools": None, "documents": None, **tokenizer.special_tokens_map, **known}
        compiled = _compile_jinja_template(template)
        return partial(_rendered, compiled, {**compiled.globals, **given})

    def answer_id(self, request_id: str) -> str:
        return request_id

    def request_id(self, base: str) -> str:
        return f"chatcmpl-{base}"


def _rendered(template: jinja2.Template, given: dict[str, Any], messages: Any) -> str:
    """`ChunkTemplate.render`, half of whose time goes into putting its arguments together.

    `given` has the template's globals too.
    """
    names = {**given, "messages": messages}
    context = new_context(template.environment, template.name, template.blocks, names, shared=True)
    return "".join(template.root_render_func(context))


class Completions:
    prompt = "prompt"
    limits: tuple[str, ...] = ("max_tokens",)

    def __init__(self, serving: Any) -> None:
        self._serving = serving

    def plain(self, prompt: Any) -> Any:
        return prompt if type(prompt) is str and 0 < len(prompt) <= _TEXT_LIMIT else None

    def able(self, request: Any) -> bool:
        return True

    def template(self, request: Any, name: str, prune: Callable[[bytes], bytes]) -> ChunkTemplate:
        include_usage, _ = should_include_usage(request.stream_options, False)
        fingerprint = self._serving.system_fingerprint
        models = CompletionModels(name, fingerprint, include_usage=include_usage)
        return ChunkTemplate(models, prune, include_usage=include_usage)

    def text(self, request: Any) -> Callable[[Any], str]:
        if request.suffix is not None or request.prompt_embeds is not None:
            raise ValueError("a suffix or embeddings")
        return str

    def answer_id(self, request_id: str) -> str:
        return request_id.removesuffix("-0")

    def request_id(self, base: str) -> str:
        return f"cmpl-{base}-0"
