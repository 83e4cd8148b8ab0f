"""instructor: pydantic models by way of tools, JSON mode and schemas."""

from __future__ import annotations

from typing import Any, Literal

import anthropic
import instructor
import openai
import pytest
from instructor import Mode
from pydantic import BaseModel

from tests.conformance.conftest import KEY

MESSAGES: Any = [{"role": "user", "content": "Which city is the capital of France?"}]
OPENAI_MODES = [Mode.TOOLS, Mode.JSON, Mode.JSON_SCHEMA]
ANTHROPIC_MODES = [Mode.ANTHROPIC_TOOLS]


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    is_capital: bool


@pytest.fixture
def client(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=0, timeout=120)


def asked(create: Any, **extra: Any) -> Any:
    return create(model="chat", messages=MESSAGES, max_tokens=200, max_retries=0, **extra)


@pytest.mark.parametrize("mode", OPENAI_MODES, ids=lambda mode: mode.name)
def test_create(client: openai.OpenAI, mode: Mode) -> None:
    patched = instructor.from_openai(client, mode=mode)
    assert isinstance(asked(patched.chat.completions.create, response_model=City), City)


@pytest.mark.parametrize("mode", OPENAI_MODES, ids=lambda mode: mode.name)
def test_partial(client: openai.OpenAI, mode: Mode) -> None:
    patched = instructor.from_openai(client, mode=mode)
    parts = list(asked(patched.chat.completions.create_partial, response_model=City))
    assert City.model_validate(parts[-1].model_dump())


def test_iterable(client: openai.OpenAI) -> None:
    patched = instructor.from_openai(client, mode=Mode.TOOLS)
    found = asked(patched.chat.completions.create_iterable, response_model=City)
    assert all(isinstance(city, City) for city in found)


def test_responses(client: openai.OpenAI) -> None:
    patched = instructor.from_openai(client, mode=Mode.RESPONSES_TOOLS)
    found = patched.responses.create(
        model="chat",
        input="Which city is the capital of France?",
        response_model=City,
        max_output_tokens=200,
        max_retries=0,
    )
    assert isinstance(found, City)


@pytest.mark.parametrize("mode", ANTHROPIC_MODES, ids=lambda mode: mode.name)
def test_anthropic(origin: str, mode: Mode) -> None:
    client = anthropic.Anthropic(base_url=origin, api_key=KEY, max_retries=0, timeout=120)
    patched = instructor.from_anthropic(client, mode=mode)
    assert isinstance(asked(patched.messages.create, response_model=City), City)
