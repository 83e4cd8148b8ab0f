"""Bodies as vLLM's request classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from vllm.exceptions import VLLMValidationError

from llmserve.api.body_limits import check_choices
from llmserve.api.context import RequestContext
from llmserve.api.endpoints import TITLES
from llmserve.api.validation_errors import mistake
from llmserve.engine.endpoint_handlers import HANDLERS
from llmserve.engine.error_mapping import bounded_line
from llmserve.errors import RequestError

if TYPE_CHECKING:
    from starlette.types import Scope

    from llmserve.api.endpoint_id import EndpointId


async def parse_beside_loop(endpoint: EndpointId, body: dict[str, Any], scope: Scope) -> Any:
    """As `parse`; a large body is parsed in the thread for bodies."""
    thread = RequestContext.of(scope).body_thread
    return parse(endpoint, body) if thread is None else await thread.run(parse, endpoint, body)


def parse(endpoint: EndpointId, body: dict[str, Any]) -> Any:
    """Return a body as vLLM's request class.

    Raises RequestError with one bounded line about the deepest mistake.
    """
    try:
        parsed = HANDLERS[endpoint].request.validate_python(body)
    except ValidationError as error:
        raise mistake(error.errors(include_url=False), body) from None
    except VLLMValidationError as error:
        raise RequestError(bounded_line(error.args[0]), param=error.parameter) from None
    except (TypeError, ValueError, AttributeError, KeyError):
        # vLLM's validators read the body before its types are checked.
        raise _wrong_types(endpoint, body) from None
    check_choices("n", getattr(parsed, "n", None) or 1, _count_prompts(parsed))
    return parsed


def _count_prompts(parsed: Any) -> int:
    prompt = getattr(parsed, "prompt", None)
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return len(prompt)
    return 1


def _wrong_types(endpoint: EndpointId, body: dict[str, Any]) -> RequestError:
    """Return the error of a body on which one of vLLM's validators failed."""
    try:
        HANDLERS[endpoint].shape.validate_python(body)
    except ValidationError as error:
        return mistake(error.errors(include_url=False), body)
    return RequestError(f"The body is not a valid request for {TITLES[endpoint]}.")


def drop_own_size(request: Any, model_config: Any) -> None:
    """Unset `dimensions` if it is the model's own size: vLLM refuses it for most models."""
    dimensions = getattr(request, "dimensions", None)
    if dimensions is not None and dimensions == model_config.embedding_size:
        request.dimensions = None
