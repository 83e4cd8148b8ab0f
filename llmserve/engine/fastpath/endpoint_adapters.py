"""How chat and completions differ on the fast path."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from jinja2.runtime import new_context
from transformers.utils.chat_template_utils import _compile_jinja_template
from vllm.entrypoints.serve.utils.api_utils import should_include_usage
from vllm.renderers.chat_utils import _CLAUDE_CODE_BILLING_HEADER
from vllm.renderers.hf import (
    resolve_chat_template,
    resolve_chat_template_content_format,
    resolve_chat_template_kwargs,
)

from llmserve.engine.fastpath.chunk_templates import ChatModels, CompletionModels

if TYPE_CHECKING:
    from collections.abc import Callable

    import jinja2

TEXT_LIMIT = 8192  # characters; longer texts are tokenized in vLLM's threads
_MESSAGES = 256  # of a chat; longer ones are rendered in vLLM's threads
_ROLES = frozenset({"system", "user", "assistant"})


class ChatAdapter:
    prompt = "messages"  # the key of a body's prompt
    limits: tuple[str, ...] = ("max_completion_tokens", "max_tokens")  # the effective one first
    prefix, suffix = "chatcmpl-", ""  # of a request's id; an answer's has no suffix

    def __init__(self, serving: Any) -> None:
        self._serving = serving
        self._parsed = serving is not None and serving.parser_cls is not None

    def plain(self, prompt: Any) -> Any:
        """Return a prompt as `text` accepts it; None if no request template accepts it."""
        if type(prompt) is not list or not 0 < len(prompt) <= _MESSAGES:
            return None
        messages = [_plain_message(message) for message in prompt]
        if None in messages:
            return None
        short = sum(len(message["content"]) for message in messages if message) <= TEXT_LIMIT
        return messages if short else None

    def can_stream(self, request: Any) -> bool:
        """Whether the fast path can write the events of this request."""
        unparsed = not self._parsed or (request.tool_choice == "none" and request.include_reasoning)
        return not request.return_prompt_text and not request.tools and unparsed

    def chunks(self, request: Any, name: str) -> ChatModels:
        """Return the chunks of an answer by the model of this name."""
        include_usage, _ = should_include_usage(request.stream_options, False)
        role = self._serving.get_chat_request_role(request)
        fingerprint = self._serving.system_fingerprint
        return ChatModels(name, role, fingerprint, include_usage=include_usage, parsed=self._parsed)

    def text(self, request: Any) -> Callable[[Any], str]:
        """Return a function from a plain prompt to the text that is tokenized.

        vLLM's `render_messages` for messages of strings (vllm/renderers/hf.py). Raises ValueError
        for a kind of request that needs more.
        """
        renderer = self._serving.online_renderer
        tokenizer = renderer.renderer.tokenizer
        config = renderer.model_config
        params = request.build_chat_params(
            renderer.chat_template, renderer.chat_template_content_format
        ).with_defaults({**(renderer.default_chat_template_kwargs or {}), "tools": None})
        options = params.get_apply_chat_template_kwargs()
        for name in ("tools", "tokenize"):
            options.pop(name, None)
        template = resolve_chat_template(
            tokenizer,
            chat_template=options.pop("chat_template", None),
            tools=None,
            model_config=config,
        )
        content_format = resolve_chat_template_content_format(
            chat_template=params.chat_template,
            tools=None,
            given_format=params.chat_template_content_format,
            tokenizer=tokenizer,
            model_config=config,
        )
        if template is None or content_format != "string" or not request.add_generation_prompt:
            raise ValueError(f"content format {content_format}, or a continued message")
        known = resolve_chat_template_kwargs(
            tokenizer=tokenizer, chat_template=template, chat_template_kwargs=options
        )
        for name in ("continue_final_message", "return_assistant_tokens_mask"):
            known.pop(name, None)  # not for the template; a continued message is excluded above
        # What `tokenizer.apply_chat_template` passes to the template.
        given = {"tools": None, "documents": None, **tokenizer.special_tokens_map, **known}
        compiled = _compile_jinja_template(template)
        return partial(_rendered, compiled, {**compiled.globals, **given})


def _plain_message(message: Any) -> dict[str, str] | None:
    """Return a message of one role and one text; None for any other.

    The text may be the only part of a list: vLLM joins text parts where a template takes strings.
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


def _rendered(template: jinja2.Template, given: dict[str, Any], messages: Any) -> str:
    """`Template.render` without its preparation of arguments, which takes half of its time.

    `given` includes the template's globals.
    """
    names = {**given, "messages": messages}
    context = new_context(template.environment, template.name, template.blocks, names, shared=True)
    return "".join(template.root_render_func(context))


class CompletionAdapter:
    prompt = "prompt"
    limits: tuple[str, ...] = ("max_tokens",)
    prefix, suffix = "cmpl-", "-0"

    def __init__(self, serving: Any) -> None:
        self._serving = serving

    def plain(self, prompt: Any) -> Any:
        return prompt if type(prompt) is str and 0 < len(prompt) <= TEXT_LIMIT else None

    def can_stream(self, request: Any) -> bool:
        return True

    def chunks(self, request: Any, name: str) -> CompletionModels:
        include_usage, _ = should_include_usage(request.stream_options, False)
        fingerprint = self._serving.system_fingerprint
        return CompletionModels(name, fingerprint, include_usage=include_usage)

    def text(self, request: Any) -> Callable[[Any], str]:
        if request.suffix is not None or request.prompt_embeds is not None:
            raise ValueError("a suffix or embeddings")
        return str


EndpointAdapter = ChatAdapter | CompletionAdapter
