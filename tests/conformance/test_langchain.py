"""LangChain's standard suites for chat models and embeddings (langchain-tests)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests

from tests.conformance.conftest import KEY

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings
    from langchain_core.language_models import BaseChatModel


class TestOpenAI(ChatModelIntegrationTests):
    """ChatOpenAI on /v1/chat/completions."""

    @pytest.fixture(autouse=True)
    def _at(self, origin: str) -> None:
        self.origin = origin

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "chat",
            "base_url": f"{self.origin}/v1",
            "api_key": KEY,
            "max_retries": 0,
            "timeout": 120,
            "max_tokens": 200,
            "stream_usage": True,
        }

    @property
    def model_override_value(self) -> str | None:
        return "gpt-4o-mini"

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return False


class TestOpenAIResponses(TestOpenAI):
    """ChatOpenAI on /v1/responses."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**super().chat_model_params, "use_responses_api": True}


class TestAnthropic(TestOpenAI):
    """ChatAnthropic on /v1/messages."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        used: type[BaseChatModel] = ChatAnthropic
        return used

    @property
    def chat_model_params(self) -> dict[str, Any]:
        params = {**super().chat_model_params, "base_url": self.origin, "model": "claude-haiku"}
        params.pop("timeout")
        return params | {"default_request_timeout": 120}

    @property
    def model_override_value(self) -> str | None:
        return "chat"

    @property
    def supports_json_mode(self) -> bool:
        return False

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True


class TestEmbeddings(EmbeddingsIntegrationTests):
    @pytest.fixture(autouse=True)
    def _at(self, origin: str) -> None:
        self.origin = origin

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {
            "model": "embed",
            "base_url": f"{self.origin}/v1",
            "api_key": KEY,
            "check_embedding_ctx_length": False,
        }
