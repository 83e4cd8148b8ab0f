"""Which engines, requests and sampling parameters may take the fast path.

The rules fail closed: a request with a field that is set and in no list of `known_fields` takes
vLLM's path.
"""

from __future__ import annotations

import logging
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import isfunction
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.serve.utils.api_utils import should_include_usage
from vllm.parser.abstract_parser import DelegatingParser
from vllm.sampling_params import SamplingParams

from llmserve.engine.fastpath.known_fields import (
    CONFIG,
    ENGINE_FIELDS,
    EVENTLESS,
    HANDLER,
    KNOWN,
    MODEL,
    OBSERVABILITY,
    PARSER,
    PLAIN,
    PROMPT_KEYS,
    REPEATED,
    REQUEST_FIELDS,
    SCHEDULER,
    STREAM_OPTIONS,
)

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator

    from pydantic import BaseModel
    from vllm.parser import Parser
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)


def is_open(serving: Any, client: AsyncLLM) -> bool:
    """Whether this engine and these handlers use nothing that the fast path lacks."""
    if serving is None:
        return False
    found = list(_obstacles(serving, client.vllm_config))
    if found:
        name = client.vllm_config.model_config.served_model_name
        log.info("model=%s no fast path: %s", name, ", ".join(found))
    return not found


def _obstacles(serving: Any, config: Any) -> Iterator[str]:
    model, scheduler = config.model_config, config.scheduler_config
    parts = (
        (serving, HANDLER),
        (config, CONFIG),
        (config.observability_config, OBSERVABILITY),
        (scheduler, SCHEDULER),
        (model, MODEL),
    )
    for owner, names in parts:
        yield from _other_attributes(owner, names)
    if not passes_text_through(getattr(serving, "parser_cls", None)):
        yield "parser_cls"
    if scheduler.stream_interval != 1:
        yield "stream_interval"
    if model.is_encoder_decoder:
        yield "is_encoder_decoder"
    for kind, known in KNOWN.items():
        yield from (f"{kind.__name__}.{name}" for name in _fields_of(kind) if name not in known)


def knows(kind: type) -> bool:
    """Whether a class in KNOWN has no further field."""
    return KNOWN[kind].issuperset(_fields_of(kind))


def _fields_of(kind: Any) -> Iterable[str]:
    """Return the field names of a struct or a model."""
    names: Iterable[str] = getattr(kind, "__struct_fields__", None) or kind.model_fields
    return names


def _other_attributes(owner: Any, names: Container[str]) -> Iterator[str]:
    """Yield the true fields of a config, or attributes of a handler, that are not in `names`."""
    found = [each.name for each in fields(owner)] if is_dataclass(owner) else vars(owner)
    for name in found:
        if name not in names and getattr(owner, name):
            yield name


def passes_text_through(parser: type[Parser] | None) -> bool:
    """Whether there is no parser, or one that does not change text for requests without tools.

    `DelegatingParser` passes text through with `tool_choice: none`, if it has no reasoning parser
    and its tool parser is not one that parses everything
    (vllm/parser/abstract_parser.py, `parse_delta` and `_extract_tool_calls_streaming`).
    """
    if parser is None:
        return True
    own = {name: value for name, value in vars(parser).items() if name not in PARSER}
    return (
        parser.__base__ is DelegatingParser
        and not any(map(isfunction, own.values()))
        and not any(value for name, value in own.items() if not name.startswith("_"))
        and parser.reasoning_parser_cls is None
        and parser.tool_parser_cls is not None
        and not parser.tool_parser_cls.engine_based_streaming
    )


def is_plain(request: Any, params: Any) -> bool:
    """Whether the stream is the text of one choice, in chunks without further fields."""
    _, continuous = should_include_usage(request.stream_options, False)
    return (
        isinstance(params, SamplingParams)
        and params.n == 1
        and _has_defaults(params, EVENTLESS)
        and not continuous
        and _sets_only(request, REQUEST_FIELDS)
        and _sets_only(request.stream_options, STREAM_OPTIONS)
        and all(_is_one_of(getattr(request, name, None), PLAIN[name]) for name in PLAIN)
    )


def is_repeatable(request: Any, prompt: Any, params: SamplingParams) -> bool:
    """Whether only the prompt and `max_tokens` depend on the prompt."""
    return (
        prompt.get("type") == "token"
        and all(prompt[key] is None for key in prompt if key not in PROMPT_KEYS)
        and request.truncate_prompt_tokens is None
        and "request_id" not in request.model_fields_set
        and _has_defaults(params, REPEATED)
    )


def is_known(request: EngineCoreRequest) -> bool:
    """Whether a request template can reproduce all fields of an engine request."""
    return _has_defaults(request, ENGINE_FIELDS)


def _sets_only(model: BaseModel | None, names: frozenset[str]) -> bool:
    """Whether all other fields of its class are unset, and off by default.

    Fields that the class does not have are ignored by vLLM and may be set.
    """
    if model is None:
        return True
    values, given = vars(model), model.model_fields_set
    return not any(values.get(name) or name in given for name in _other_fields(type(model), names))


@cache
def _other_fields(kind: Any, names: frozenset[str]) -> tuple[str, ...]:
    """Return the fields of a class that are not in `names`; cached for all requests."""
    return tuple(name for name in _fields_of(kind) if name not in names)


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """As `in`, except that `0` is not `False`: the number requests logprobs."""
    return any(type(value) is type(each) and value == each for each in allowed)


def _has_defaults(struct: Any, but: frozenset[str]) -> bool:
    """Whether all fields but those have their default; an empty list equals None."""
    kind: Any = type(struct)
    defaults = _default_struct(kind)
    return all(
        _is_one_of(getattr(struct, name), (getattr(defaults, name), []))
        for name in _other_fields(kind, but)
    )


@cache
def _default_struct(kind: Any) -> Any:
    """Return a struct with its defaults, and None in required fields."""
    required = len(kind.__struct_fields__) - len(kind.__struct_defaults__)
    return kind(*(None,) * required)
