from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmserve.api import sse
from llmserve.api.endpoint_id import EndpointId
from llmserve.api.endpoints import (
    ENDPOINTS,
    TITLES,
    cannot,
    error_body,
    error_response,
    failure,
    parse_object,
)
from llmserve.errors import (
    BodyTooLarge,
    ContextTooLong,
    DeadlineExceeded,
    EngineDead,
    EngineError,
    Forbidden,
    LLMServeError,
    MethodNotAllowed,
    ModelNotFound,
    Overloaded,
    RequestError,
    RouteNotFound,
    Unauthorized,
)
from llmserve.http.models import model_card, requested_model
from llmserve.registry.names import ModelNames
from tests.fakes import FakeRunning, spec


def registry_of(names: list[str]) -> ModelNames:
    return ModelNames(spec(name=name) for name in names)


KEYS = st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


def test_no_path_leads_to_two_endpoints() -> None:
    paths = [path for endpoint in ENDPOINTS for path in endpoint.paths]
    assert len(set(paths)) == len(paths)
    assert [endpoint.id for endpoint in ENDPOINTS] == list(EndpointId)


def test_endpoint_ids_have_the_values_of_metric_labels() -> None:
    assert ", ".join(EndpointId) == (
        "chat completions, completions, responses, messages, token counts, embeddings, scores, "
        "reranking, pooling, classification, tokenization, detokenization, transcriptions, "
        "translations"
    )


def test_title_that_is_reworded_changes_messages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    error = EngineError("no")
    before = failure(EndpointId.MESSAGES, error)
    monkeypatch.setitem(TITLES, EndpointId.MESSAGES, "Claude's messages")
    assert "does not support Claude's messages;" in cannot("chat", EndpointId.MESSAGES, ())
    assert failure(EndpointId.MESSAGES, error) == before


def test_the_error_object_has_four_keys_always() -> None:
    error = Overloaded("busy", retry_after_s=1)
    assert error_body(error) == {
        "error": {
            "message": "busy",
            "type": "service_unavailable_error",
            "param": None,
            "code": "overloaded",
        }
    }


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RequestError("m"), "invalid_request_error"),
        (ContextTooLong("m"), "invalid_request_error"),
        (Unauthorized("m"), "authentication_error"),
        (Forbidden("m"), "permission_error"),
        (ModelNotFound("m", ()), "not_found_error"),
        (RouteNotFound("m"), "not_found_error"),
        (MethodNotAllowed("m", ()), "invalid_request_error"),
        (BodyTooLarge("m"), "request_too_large"),
        (Overloaded("m", retry_after_s=1), "overloaded_error"),
        (DeadlineExceeded("m"), "timeout_error"),
        (EngineError("m"), "api_error"),
        (EngineDead("m"), "api_error"),
    ],
    ids=lambda each: type(each).__name__,
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_error_of_messages_has_anthropic_s_shape(
    error: LLMServeError, kind: str, path: str
) -> None:
    body = {"type": "error", "error": {"type": kind, "message": error.message}}
    reply = error_response(error, path, "req_1")
    assert json.loads(bytes(reply.body)) == body | {"request_id": "req_1"}
    assert reply.status_code == error.status
    last = failure(EndpointId.MESSAGES, error)
    assert last.startswith(b"event: error\n")
    assert sse.payload(last) == body


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messagesx", "/v1/responses", ""])
def test_error_of_other_routes_has_openai_s_shape(path: str) -> None:
    error = Overloaded("busy", retry_after_s=1)
    assert json.loads(bytes(error_response(error, path, "1").body)) == error_body(error)


def test_failure_of_a_response_has_both_shapes_of_its_event() -> None:
    error = RequestError("no", param="input")
    flat = {"type": "error", "sequence_number": 7, "message": "no", "param": "input"}
    assert sse.payload(failure(EndpointId.RESPONSES, error, 7)) == {
        **flat,
        "code": "invalid_value",
        **error_body(error),
    }


# What LiteLLM 1.110 looks for in the text of an error, next to its status
# (litellm/litellm_core_utils/exception_mapping_utils.py).
@pytest.mark.parametrize(
    "error",
    [
        RequestError("`n` must be an integer; it is null."),
        Unauthorized("m"),
        ModelNotFound("m", ()),
        Overloaded("m", retry_after_s=1),
        EngineDead("m"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_error_is_what_litellm_takes_it_for(error: LLMServeError) -> None:
    text = str(error_body(error)).lower()
    assert ("invalid_request_error" in text) is (error.status < 500)
    assert ("model_not_found" in text) is (error.status == 404)
    assert re.search(r"rate[\s_-]*limit|timeout occurred|maximum context", text) is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The body is empty; send a JSON object."),
        (b"[1]", "The body must be a JSON object."),
        (b"null", "The body must be a JSON object."),
        (b"3", "The body must be a JSON object."),
        (b'{"secret": ', "The body is not valid JSON: "),
        (b"secret", "The body is not valid JSON: "),
        (b'{"secret": "\xff"}', "The body is not valid JSON: "),
        (b'{"secret": NaN}', "The body is not valid JSON: "),
        (b"[" * 100_000, "The body is not valid JSON: "),
    ],
)
def test_a_body_that_is_no_object_is_refused_and_not_repeated(body: bytes, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_object(body)
    assert refused.value.message.startswith(message)
    assert refused.value.code == "invalid_json"
    assert "secret" not in refused.value.message
    assert len(refused.value.message) < 200


def number(text: str) -> int | float:
    """Beyond 64 bits, as orjson has it."""
    value = int(text)
    return value if -(2**63) <= value < 2**64 else float(value)


@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b'{"seed": -9223372036854775809, "n": [18446744073709551616, 18446744073709551615]}')
def test_any_body_is_an_object_or_a_refusal_in_one_line(body: bytes) -> None:
    try:
        taken = parse_object(body)
    except RequestError as error:
        message = error.message
    else:
        assert taken == json.loads(body, parse_int=number)
        return
    assert message.isprintable()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"model": "embed"}, "embed"),
        ({}, "chat"),
        ({"model": None}, "chat"),
        ({"model": ""}, "chat"),
    ],
)
def test_requested_model_defaults_to_the_only_one(body: dict[str, Any], expected: str) -> None:
    assert requested_model(body, registry_of(["chat"])) == expected


@pytest.mark.parametrize("names", [["embed", "chat"], ["chat"]])
@pytest.mark.parametrize(
    ("value", "kind"), [(3, "int"), (["chat"], "list"), (False, "bool"), ({}, "dict")]
)
def test_model_of_another_type_is_refused(value: Any, kind: str, names: list[str]) -> None:
    known = ", ".join(sorted(names))
    with pytest.raises(RequestError) as refused:
        requested_model({"model": value}, registry_of(names))
    assert refused.value.message == f"`model` must be a string, not {kind}; models here: {known}."
    assert (refused.value.code, refused.value.param) == ("invalid_type", "model")


@pytest.mark.parametrize("body", [{}, {"model": ""}, {"model": None}])
def test_missing_model_of_several_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        requested_model(body, registry_of(["embed", "chat"]))
    assert refused.value.message == "`model` is missing; models here: chat, embed."
    assert (refused.value.code, refused.value.param) == ("missing_required_parameter", "model")


def test_the_card_of_a_model_and_of_its_adapter() -> None:
    model = spec("chat", loras={"sql": "/loras/sql"})
    assert model_card(
        "chat", model, 7, FakeRunning(endpoints=frozenset({EndpointId.SCORES, EndpointId.POOLING}))
    ) == {
        "id": "chat",
        "object": "model",
        "created": 7,
        "owned_by": "llmserve",
        "type": "model",
        "display_name": "chat",
        "created_at": "1970-01-01T00:00:07+00:00",
        "lifecycle": "active",
        "max_model_len": 2048,
        "endpoints": ["pooling", "scores"],
    }
    card = model_card("sql", model, 7, None)
    assert card["parent"] == "chat"
    assert "max_model_len" not in card


def test_unsupported_endpoint_lists_supported_ones() -> None:
    assert cannot("chat", EndpointId.SCORES, [EndpointId.RESPONSES, EndpointId.COMPLETIONS]) == (
        "The model `chat` does not support scores; supported: completions, responses."
    )
