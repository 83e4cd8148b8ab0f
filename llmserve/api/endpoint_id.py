"""Identities of the inference endpoints."""

from __future__ import annotations

from enum import StrEnum


class EndpointId(StrEnum):
    """The identity of an endpoint, for metric labels and the `endpoints` of GET /v1/models.

    Users depend on the values. Error messages use `Endpoint.title`.
    """

    CHAT_COMPLETIONS = "chat completions"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    MESSAGES = "messages"
    TOKEN_COUNTS = "token counts"  # noqa: S105  # no password
    EMBEDDINGS = "embeddings"
    SCORES = "scores"
    RERANKING = "reranking"
    POOLING = "pooling"
    CLASSIFICATION = "classification"
    TOKENIZATION = "tokenization"
    DETOKENIZATION = "detokenization"
    TRANSCRIPTIONS = "transcriptions"
    TRANSLATIONS = "translations"
