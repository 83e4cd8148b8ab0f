"""vLLM's exceptions and error objects as llmserve's errors."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from vllm.entrypoints.serve.engine.protocol import ErrorInfo
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMError
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from llmserve.api import sse
from llmserve.api.validation_errors import mistake
from llmserve.engine import token_count
from llmserve.engine.structured_output.checked_client import Refused
from llmserve.errors import (
    ContextTooLong,
    EngineDead,
    EngineError,
    LLMServeError,
    Overloaded,
    RequestError,
    Unsupported,
    quoted,
)
from llmserve.registry.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from llmserve.engine.engine import Engine

log = logging.getLogger(__name__)

# str() of VLLMValidationError: "... (parameter=temperature, value=-1)"
_APPENDED = re.compile(r" \((?:parameter|value)=.*$", re.DOTALL)
_WRONG = re.compile(r"\b([a-z_]+) must be ")
_PARAMETERS = frozenset({*SamplingParams.__struct_fields__, *PoolingParams.__struct_fields__})
# An option of vLLM's command line in a message, and the beginning of messages about tool calls.
_OPTION = re.compile(r"(`)?--([a-z][a-z-]*)((?:\.\w+)*)((?(1)[^`]*`?))")
_NO_PARSER = "--tool-call-parser"
# Text about options of vLLM's server that a registry does not have, and what replaces it.
_WITHOUT_OPTION = {
    "but --trust-request-chat-template is not set": "but only the model's own is allowed",
    " (requires --trust-request-chat-template)": "",
    "--enable-auto-tool-choice and ": "",
    " Start the server with --trust-request-mm-kwargs only when clients are trusted.": "",
}
# Phrases of vLLM's messages about a prompt that does not fit; it has no class for them.
TOO_LONG = ("maximum context length", "maximum model length", "exceeds the max_model_len")
# The beginning of OpenAI's message, by which LiteLLM and other clients recognize this error.
_CONTEXT = "This model's maximum context length is"


class ErrorMapper:
    """Maps the failures of one model's requests."""

    def __init__(self, model: str, engine: Engine) -> None:
        self._model = model
        self._engine = engine

    async def mapped(self, work: Awaitable[Any]) -> Any:
        """Return the result of `work`. Raises LLMServeError for every failure."""
        try:
            return await work
        except LLMServeError:
            raise
        except Exception as error:
            raise self.from_exception(error) from error

    def from_exception(self, error: Exception) -> LLMServeError:
        """Return any exception of vLLM's as an error of ours.

        The message of an exception that vLLM does not expect is for the log only.
        """
        if isinstance(error, EngineDeadError) or self._engine.dead:
            return self._dead()
        if isinstance(error, Refused):
            return error.refusal
        if isinstance(error, ValidationError):  # of a class that vLLM creates from part of a body
            found = mistake(error.errors(include_url=False), None)
            found.param = None  # the place of that part in the body is unknown here
            return found
        mapped = self.from_info(create_error_response(error).error)
        is_expected = isinstance(error, VLLMError | ValueError)
        if isinstance(mapped, EngineError) or not is_expected:
            log.error("model=%s request failed", self._model, exc_info=error)
        if isinstance(error, TypeError | OverflowError):  # Python's message
            mapped.message = (
                f"A value in the body has a type that {quoted(self._model)} does not accept."
            )
        if is_expected or mapped.status != 500:
            return mapped
        return EngineError(f"{quoted(self._model)} failed on this request.")

    def from_info(self, info: ErrorInfo) -> LLMServeError:
        """Return vLLM's error object as an error of ours."""
        message = bounded_line(info.message) or f"{quoted(self._model)} failed on this request."
        if info.code >= 500:
            return self._server_error(info.code, message)
        if _NO_PARSER in info.message:
            return no_tool_parser(self._model)
        if any(phrase in message for phrase in TOO_LONG):
            return ContextTooLong(self._too_long(message), param=info.param or "input_tokens")
        error = RequestError(
            message,
            param=info.param or _parameter_in(message),
            code="not_found" if info.code == 404 else None,
        )
        error.status = info.code
        return error

    def check_event(self, frame: bytes) -> None:
        """Raises LLMServeError for an error event of vLLM's."""
        if b'"error":{' not in frame and b'"error": {' not in frame:
            return
        payload = sse.payload(frame)
        info = payload.get("error") if isinstance(payload, dict) else None
        if not isinstance(info, dict) or "message" not in info or "choices" in payload:
            return
        code = info.get("code")
        raise self.from_info(
            ErrorInfo(
                message=info["message"],
                type=info.get("type") or "",
                param=info.get("param"),
                code=code if isinstance(code, int) else 500,
            )
        )

    def _dead(self) -> EngineDead:
        return EngineDead(f"The engine of {quoted(self._model)} has died; its requests are lost.")

    def _too_long(self, message: str) -> str:
        """Return a message that begins as OpenAI's, with the known number of tokens."""
        if not message.startswith(_CONTEXT):
            limit = int(self._engine.client.model_config.max_model_len)
            message = f"{_CONTEXT} {limit} tokens. {message}"
        return token_count.corrected(message)

    def _server_error(self, status: int, message: str) -> LLMServeError:
        if self._engine.dead:
            return self._dead()
        if status == 503:
            return Overloaded(message, retry_after_s=1)
        if status == 501:
            return Unsupported(message, param="model")
        return EngineError(message)


def bounded_line(message: str, limit: int = 500) -> str:
    """Return a message of vLLM's as one bounded line, without the parts of the request."""
    line = " ".join(_APPENDED.sub("", str(message)).split())
    if "--" in line:
        for text, own in _WITHOUT_OPTION.items():
            line = line.replace(text, own)
        line = _OPTION.sub(_registry_key, line)
    return line if len(line) <= limit else line[:limit] + "..."


def no_tool_parser(model: str) -> RequestError:
    """Return the error for tools of a model whose calls no parser finds."""
    return RequestError(
        f"{quoted(model)} has no tool parser, so it cannot call `tools`. Set `tool_call_parser` "
        "of the model in the registry, or remove `tools`.",
        param="tools",
    )


def _registry_key(option: re.Match[str]) -> str:
    """Return the registry's name of an option of vLLM's command line."""
    _, name, inner, value = option.groups()
    key = name.replace("-", "_")
    key = key if key in ModelSpec.model_fields else f"engine.{key}"
    return f"`{key}{inner}{value.rstrip('`')}` (registry)"


def _parameter_in(message: str) -> str | None:
    """Return the wrong parameter from vLLM's message; some of its errors have no field for it."""
    return next((name for name in _WRONG.findall(message) if name in _PARAMETERS), None)
