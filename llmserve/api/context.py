"""The facts of one request."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Scope

    from llmserve.api.body_thread import BodyThread
    from llmserve.api.endpoint_id import EndpointId

_KEY = "llmserve.request"
_CLIENT_CLOSED = 499  # nginx's status for a client that left; never sent


@dataclass(eq=False, slots=True)
class RequestContext:
    """One request, from its arrival to the end of its answer.

    The outermost layer of the application creates it and attaches it to the ASGI scope. Each
    layer below enters the facts that it learns. Times are of `time.monotonic`, and None before
    the event; counts of tokens are None where nothing counts them.
    """

    id: str
    endpoint: EndpointId | None  # None: no model answers on this path
    model: str = ""  # empty until it is found
    owner: str = ""  # hash of the API key; empty: the server has none
    body_thread: BodyThread | None = None  # where to validate a large body
    arrival_s: float = field(init=False)
    body_read_s: float | None = None
    leased_s: float | None = None  # by the last attempt
    first_byte_s: float | None = None
    end_s: float | None = None
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    status: int = _CLIENT_CLOSED  # of the answer, once it has begun
    is_complete: bool = False  # the answer's last byte was sent

    def __post_init__(self) -> None:
        self.arrival_s = time.monotonic()

    @classmethod
    def of(cls, scope: Scope) -> RequestContext:
        context: RequestContext = scope[_KEY]
        return context

    def attach(self, scope: Scope) -> None:
        scope[_KEY] = self

    @property
    def has_begun(self) -> bool:
        """Whether the status was sent."""
        return self.first_byte_s is not None

    def begin(self, status: int) -> None:
        self.status, self.first_byte_s = status, time.monotonic()

    def end(self) -> None:
        self.end_s = time.monotonic()

    def count_tokens(self, prompt: int, generated: int) -> None:
        self.prompt_tokens, self.generated_tokens = prompt, generated
