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
_CLIENT_CLOSED = 499  # nginx's status for a disconnect; never sent


@dataclass(eq=False, slots=True)
class RequestContext:
    """One request, from its arrival to the end of its answer.

    The outer layer of the application creates it and attaches it to the ASGI scope; the other
    layers set its fields. Times are of `time.monotonic`, and None before the event. Token
    counts are None where they are unknown.
    """

    id: str
    endpoint: EndpointId | None  # None: no inference route
    model: str = ""  # empty before the name is known
    owner: str = ""  # hash of the API key; empty without one
    body_thread: BodyThread | None = None  # validates a large body
    arrival_s: float = field(init=False)
    body_read_s: float | None = None
    leased_s: float | None = None  # of the last attempt
    first_byte_s: float | None = None
    end_s: float | None = None
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    status: int = _CLIENT_CLOSED  # of the answer
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
        """Return whether the status was sent."""
        return self.first_byte_s is not None

    def begin(self, status: int) -> None:
        self.status, self.first_byte_s = status, time.monotonic()

    def end(self) -> None:
        self.end_s = time.monotonic()

    def count_tokens(self, prompt: int, generated: int) -> None:
        self.prompt_tokens, self.generated_tokens = prompt, generated
