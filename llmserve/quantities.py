"""How many of each thing a body may hold. Pure.

vLLM handles each of these on the event loop, some one by one: the limits keep what it does
for all of them in one turn of the loop short.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmserve.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

# Items of a list, keys of an object, at the top of a body.
LENGTHS: Mapping[str, int] = {
    "messages": 4096,
    "input": 2**19,
}
KEYS_LIMIT = 1000  # of a body itself


def check_quantities(body: dict[str, Any]) -> None:
    """Raises RequestError for the first that is too long."""
    if len(body) > KEYS_LIMIT:
        raise RequestError(
            f"The body has {len(body)} keys; the limit is {KEYS_LIMIT}. Send fewer keys."
        )
