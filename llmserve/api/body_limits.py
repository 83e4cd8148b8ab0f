"""Limits of quantities in a body. Pure.

vLLM prepares the items one after another on the event loop; the limits bound that time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmserve.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

# Items of lists at the top of a body. A list of numbers is a single text of token ids.
ITEMS: Mapping[str, int] = {
    "messages": 2048,
    "input": 2048,
    "prompt": 256,
    "documents": 2048,
    "queries": 2048,
    "text_1": 2048,
    "text_2": 2048,
    "data_1": 2048,
    "data_2": 2048,
    "query": 2048,
    "data": 2048,
    "tools": 2048,
    "stop": 1024,
    "bad_words": 1024,
}
PARTS_LIMIT = 4096  # content parts and tool calls of all messages
KEYS_LIMIT = 1024  # keys of the body
CHOICES_LIMIT = 128  # choices of one prompt
ANSWERS_LIMIT = 2048  # choices of all prompts together


def check_quantities(body: dict[str, Any]) -> None:
    """Raise RequestError for the first quantity that exceeds its limit."""
    if len(body) > KEYS_LIMIT:
        raise RequestError(
            f"The body has {len(body)} keys; the limit is {KEYS_LIMIT}. Send fewer keys."
        )
    for key, limit in ITEMS.items():
        value = body.get(key)
        if isinstance(value, list) and not _is_numbers(value) and len(value) > limit:
            raise _refused(key, f"{len(value)} items", limit)
    for key in ("messages", "input"):
        if isinstance(body.get(key), list) and (parts := _parts(body[key])) > PARTS_LIMIT:
            raise _refused(key, f"{parts} content parts and tool calls", PARTS_LIMIT)
    for key in ("n", "best_of"):
        if isinstance(body.get(key), int | float):
            check_choices(key, body[key])


def check_choices(key: str, choices: float, prompts: int = 1) -> None:
    """Raise RequestError for too many choices of one request."""
    if choices > CHOICES_LIMIT:
        raise _refused(key, "a larger value", CHOICES_LIMIT)
    if choices * prompts > ANSWERS_LIMIT:
        raise RequestError(
            f"`{key}` asks for {choices} answers to each of {prompts} prompts; the limit is "
            f"{ANSWERS_LIMIT} in all. Send fewer.",
            param=key,
        )


def _is_numbers(values: list[Any]) -> bool:
    return all(isinstance(each, int | float) for each in values)


def _parts(messages: list[Any]) -> int:
    return sum(
        len(value)
        for message in messages
        if isinstance(message, dict)
        for value in message.values()
        if isinstance(value, list)
    )


def _refused(key: str, came: str, limit: int) -> RequestError:
    return RequestError(f"`{key}` has {came}; the limit is {limit}. Send fewer.", param=key)
