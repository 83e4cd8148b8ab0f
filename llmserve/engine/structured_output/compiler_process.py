"""The process that compiles constraints for `compiler`. `sandbox` starts it.

It imports vLLM once and loads each engine's tokenizer once. A constraint is compiled in a fork
with limits (`sandbox`), by vLLM's own validation and structured-output manager, as in the engine
core.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.mistral import is_mistral_tokenizer
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.request import StructuredOutputRequest

from llmserve.engine.structured_output.compiler import KINDS
from llmserve.engine.structured_output.json_schema import rewrite_schema
from llmserve.engine.structured_output.pattern import check_regex
from llmserve.engine.structured_output.sandbox import SandboxServer, sandboxed
from llmserve.engine.structured_output.subschema import ARGUMENTS

if TYPE_CHECKING:
    from collections.abc import Iterator

_MODELS = 8  # tokenizers that stay loaded
_PROBED = 16  # tokens for which a mask is computed, as in the engine's steps
_REASON = 400  # characters
_WHITESPACE = 32  # characters in a row in a call's arguments: a model could write them endlessly


@dataclass(frozen=True)
class Loaded:
    """A model's config and structured-output manager, as in its engine core."""

    config: Any
    manager: StructuredOutputManager

    @classmethod
    def from_config(cls, pickled: bytes) -> Loaded:
        config = pickle.loads(pickled)  # noqa: S301  # from the server
        manager = StructuredOutputManager(config)
        # In this thread: the manager's pool would not survive a fork.
        manager._use_async_grammar_compilation = False  # noqa: SLF001  # no public setting
        structured = config.structured_outputs_config
        if structured.backend == "auto":
            structured.backend = fixed_backend(manager.tokenizer)
        loaded = cls(config, manager)
        # Runs vLLM's late imports and creates the backend, which the forks then share.
        _check(loaded, {"regex": "a"}, math.inf)
        return loaded


def fixed_backend(tokenizer: Any) -> str:
    """Return the backend for `auto`.

    vLLM validates each request for a backend of its own and compiles all with the first one's
    (StructuredOutputManager.grammar_init), so one request would decide for all.
    """
    tekken = is_mistral_tokenizer(tokenizer) and tokenizer.is_tekken
    return "guidance" if tekken else "xgrammar"


def main() -> None:
    models: OrderedDict[str, Loaded] = OrderedDict()
    server = SandboxServer()
    for ask, config in server.requests():
        try:
            model = _loaded(models, ask["model"], config)
        except Exception as error:  # of any tokenizer; the server refuses the request
            server.answer({"outcome": "unavailable", "reason": _bounded_line(error)})
        else:
            check = partial(_answer, model, ask["constraint"], ask["step_s"])
            server.answer(sandboxed(check, ask))


def _loaded(models: OrderedDict[str, Loaded], key: str, config: bytes) -> Loaded:
    if key not in models:
        models[key] = Loaded.from_config(config)
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
    except Exception as error:  # of any compiler; the request is refused
        if "bad_alloc" in str(error):
            return {"outcome": "memory"}
        return {"outcome": "invalid", "reason": _bounded_line(error)}


def _check(model: Loaded, constraint: dict[str, Any], step_s: float) -> dict[str, Any]:
    structured = StructuredOutputsParams(**_rewritten(model, constraint))
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


def _rewritten(model: Loaded, constraint: dict[str, Any]) -> dict[str, Any]:
    """Return a constraint of which the backend ignores nothing. Raises ValueError.

    llguidance refuses unsupported keywords itself, but does not know llmserve's keyword.
    """
    is_guidance = model.config.structured_outputs_config.backend == "guidance"
    rewritten = dict(constraint)
    given, tag, pattern = (constraint.get(kind) for kind in ("json", "structural_tag", "regex"))
    is_of_tools = given is not None and ARGUMENTS in json.dumps(given)
    if is_of_tools or not (given is None or is_guidance):
        rewritten["json"] = json.dumps(rewrite_schema(_parsed(given)), ensure_ascii=False)
    if is_of_tools and not is_guidance:
        rewritten["structural_tag"] = _arguments_tag(json.loads(rewritten.pop("json")))
    if isinstance(pattern, str) and not is_guidance:
        _check_regex(pattern)
    if tag is not None:
        tag = copy.deepcopy(_parsed(tag))
        for holder, key in [] if is_guidance else constraints_of_tag(tag):
            if key == "pattern":
                _check_regex(holder[key])
                continue
            if key == "json_schema" and ARGUMENTS in json.dumps(holder[key]):
                holder["max_whitespace_cnt"] = _WHITESPACE
            holder[key] = rewrite_schema(holder[key])
        rewritten["structural_tag"] = json.dumps(tag, ensure_ascii=False)
    return rewritten


def _arguments_tag(schema: Any) -> str:
    """Return the tag for the schema of all tools, in which whitespace is bounded."""
    form = {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": _WHITESPACE}
    return json.dumps({"type": "structural_tag", "format": form}, ensure_ascii=False)


def constraints_of_tag(tag: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the schemas and expressions of a structural tag: the object, and its key."""
    unseen = [tag]
    while unseen:
        value = unseen.pop()
        if isinstance(value, list):
            unseen += value
        elif isinstance(value, dict):
            for key, each in value.items():
                is_expression = (key, value.get("type")) == ("pattern", "regex")
                if is_expression or key in {"json_schema", "schema"}:
                    yield value, key
                else:
                    unseen.append(each)


def _check_regex(pattern: Any) -> None:
    if isinstance(pattern, str) and (reason := check_regex(pattern)):
        raise ValueError(f"the regular expression {reason}")


def _parsed(given: Any) -> Any:
    return json.loads(given) if isinstance(given, str) else given


def _compiled(model: Loaded, params: SamplingParams) -> Any:
    """Compile as EngineCore.preprocess_add_request does."""
    wanted = StructuredOutputRequest.from_sampling_params(params)
    request = SimpleNamespace(
        request_id="check", sampling_params=params, structured_output_request=wanted
    )
    model.manager.grammar_init(request)
    pending = wanted._grammar  # noqa: SLF001  # its property does not wait
    return pending.result() if hasattr(pending, "result") else pending


class _SlowStep(Exception):
    """A mask of this constraint takes too long for an engine's step."""


def _probe(model: Loaded, grammar: Any, step_s: float) -> None:
    """Compute masks as the engine's steps do.

    Raises _SlowStep, or ValueError if no text is possible.
    """
    _require_no_error(grammar)
    words = (model.config.model_config.get_vocab_size() + 31) // 32
    mask = torch.full((1, words), -1, dtype=torch.int32)
    for position in range(_PROBED):
        if grammar.is_terminated():
            return
        began = time.process_time()
        grammar.fill_bitmask(mask, 0)
        _require_no_error(grammar)
        if time.process_time() - began > step_s:
            raise _SlowStep
        allowed = mask[0].nonzero()
        if not len(allowed):
            if position:
                return
            raise ValueError("no text satisfies the constraint")
        word = int(allowed[0])
        bits = int(mask[0, word]) & 0xFFFFFFFF
        if not grammar.accept_tokens("check", [word * 32 + (bits & -bits).bit_length() - 1]):
            return


def _require_no_error(grammar: Any) -> None:
    """Raises ValueError for an error in llguidance, whose mask would then end the answer."""
    matcher = getattr(grammar, "ll_matcher", None)
    if matcher is not None and (error := matcher.get_error()):
        raise ValueError(error)


def _bounded_line(error: BaseException) -> str:
    """Return an exception and its cause in one bounded line."""
    texts = [str(each) for each in (error, error.__cause__) if each is not None]
    return " ".join(": ".join(dict.fromkeys(texts)).split())[:_REASON] or type(error).__name__
