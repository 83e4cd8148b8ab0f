"""All errors that users can see.

    LLMServeError
      ConfigError              exit 2, before anything starts
        PlacementError
      ShapeUnknown             (the size of a model is unknown)
        ModelUnusable          (its files are missing, broken or not a model)
        ModelOutOfReach        (the hub does not provide it)
      StartupError             exit 3
      RequestError             400
        Unauthorized           401
        Forbidden              403
        ModelNotFound          404
        RouteNotFound          404
        MethodNotAllowed       405
        RequestTimeout         408
        BodyTooLarge           413
        UnsupportedEncoding    415
        HeadTooLarge           431
        ContextTooLong         400
        Unsupported            400
        InvalidGrammar         400
        GrammarTooComplex      400
      Overloaded               503, Retry-After   (a model is full or not ready)
      DeadlineExceeded         504
      EngineError              500
        EngineDead             503

Clients get all of them as `{"error": {"message", "type", "param", "code"}}`, as in the OpenAI API
reference.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class LLMServeError(Exception):
    status: int = 500
    type: ClassVar[str] = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code

    def headers(self) -> dict[str, str]:
        return {}


class ConfigError(LLMServeError):
    """All problems of a registry, one line each."""

    exit_code: ClassVar[int] = 2

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class PlacementError(ConfigError):
    """All models that do not fit on the GPUs, one line each."""


class ShapeUnknown(LLMServeError):
    """The memory of a model cannot be computed; one line names what is missing."""


class ModelUnusable(ShapeUnknown):
    """No engine can load a model's files; one line names what is wrong."""


class ModelOutOfReach(ShapeUnknown):
    """The hub does not provide a model, and the cache does not contain it."""


class StartupError(LLMServeError):
    exit_code: ClassVar[int] = 3


class RequestError(LLMServeError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class Unauthorized(RequestError):
    status = 401
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class Forbidden(RequestError):
    """No key permits the client to do this."""

    status = 403
    code = "admin_only"


class ModelNotFound(RequestError):
    status = 404
    code = "model_not_found"

    def __init__(self, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = nearest(name, known)
        super().__init__(
            f"The model {quoted(name)} does not exist; "
            + (f"did you mean {quoted(near)}? " if near else "")
            + f"models here: {', '.join(known)}.",
            param="model",
        )


class RouteNotFound(RequestError):
    status = 404
    code = "unknown_url"


class MethodNotAllowed(RequestError):
    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, allowed: Iterable[str]) -> None:
        super().__init__(message)
        self.allowed = sorted(allowed)

    def headers(self) -> dict[str, str]:
        return {"allow": ", ".join(self.allowed)}


class RequestTimeout(RequestError):
    """The client stopped in the middle of a request."""

    status = 408
    code = "request_timeout"


class BodyTooLarge(RequestError):
    status = 413
    code = "request_too_large"


class UnsupportedEncoding(RequestError):
    """The body has a Content-Encoding that is not decoded."""

    status = 415
    code = "unsupported_encoding"

    def __init__(self, message: str, allowed: Iterable[str]) -> None:
        super().__init__(message)
        self.allowed = tuple(allowed)

    def headers(self) -> dict[str, str]:
        return {"accept-encoding": ", ".join(self.allowed)}  # RFC 9110, 12.5.3


class HeadTooLarge(RequestError):
    status = 431
    code = "headers_too_large"


class ContextTooLong(RequestError):
    code = "context_length_exceeded"


class Unsupported(RequestError):
    """The model does not support the route."""

    code = "unsupported_model"


class InvalidGrammar(RequestError):
    """A schema, pattern or grammar that does not compile for the model."""

    code = "invalid_grammar"


class GrammarTooComplex(RequestError):
    """A schema, pattern or grammar that exceeds the limits of compilation."""

    code = "grammar_too_complex"


class Overloaded(LLMServeError):
    """The model cannot accept the request now; a later request may succeed."""

    status = 503
    type = "service_unavailable_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        return {"retry-after": str(self.retry_after_s)}


class DeadlineExceeded(LLMServeError):
    """The time limit of the request has passed."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class EngineError(LLMServeError):
    code = "engine_error"


class EngineDead(EngineError):
    status = 503
    type = "service_unavailable_error"
    code = "engine_dead"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most similar to `word`; None if none is similar."""
    by_lower = {k.lower(): k for k in known}
    match = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[match[0]] if match else None


def quoted(name: str, limit: int = 80) -> str:
    """A client's text for one line of a message: quoted, shortened and printable."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[:limit])
    return f"`{shown}`" if len(name) <= limit else f"`{shown}...`"
