from __future__ import annotations

import inspect
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve import errors
from llmserve.errors import (
    BodyTooLarge,
    ConfigError,
    ContextTooLong,
    DeadlineExceeded,
    EngineDead,
    EngineError,
    Forbidden,
    GrammarTooComplex,
    HeadTooLarge,
    InvalidGrammar,
    LLMServeError,
    MethodNotAllowed,
    ModelNotFound,
    ModelOutOfReach,
    ModelUnusable,
    Overloaded,
    PlacementError,
    RequestError,
    RequestTimeout,
    RouteNotFound,
    ShapeUnknown,
    StartupError,
    Unauthorized,
    Unsupported,
    UnsupportedEncoding,
    nearest,
    quoted,
)

INVALID = "invalid_request_error"
UNAVAILABLE = "service_unavailable_error"

# error, parent, status, type, code, headers
TREE: list[tuple[LLMServeError, type[Exception], int, str, str | None, dict[str, str]]] = [
    (LLMServeError("m"), Exception, 500, "server_error", None, {}),
    (ConfigError(["m"]), LLMServeError, 500, "server_error", None, {}),
    (PlacementError(["m"]), ConfigError, 500, "server_error", None, {}),
    (ShapeUnknown("m"), LLMServeError, 500, "server_error", None, {}),
    (ModelUnusable("m"), ShapeUnknown, 500, "server_error", None, {}),
    (ModelOutOfReach("m"), ShapeUnknown, 500, "server_error", None, {}),
    (StartupError("m"), LLMServeError, 500, "server_error", None, {}),
    (RequestError("m"), LLMServeError, 400, INVALID, "invalid_value", {}),
    (
        Unauthorized("m"),
        RequestError,
        401,
        INVALID,
        "invalid_api_key",
        {"www-authenticate": "Bearer"},
    ),
    (Forbidden("m"), RequestError, 403, INVALID, "admin_only", {}),
    (ModelNotFound("m", ()), RequestError, 404, INVALID, "model_not_found", {}),
    (RouteNotFound("m"), RequestError, 404, INVALID, "unknown_url", {}),
    (
        MethodNotAllowed("m", ["POST", "GET"]),
        RequestError,
        405,
        INVALID,
        "method_not_allowed",
        {"allow": "GET, POST"},
    ),
    (RequestTimeout("m"), RequestError, 408, INVALID, "request_timeout", {}),
    (BodyTooLarge("m"), RequestError, 413, INVALID, "request_too_large", {}),
    (
        UnsupportedEncoding("m", ["gzip", "zstd"]),
        RequestError,
        415,
        INVALID,
        "unsupported_encoding",
        {"accept-encoding": "gzip, zstd"},
    ),
    (HeadTooLarge("m"), RequestError, 431, INVALID, "headers_too_large", {}),
    (ContextTooLong("m"), RequestError, 400, INVALID, "context_length_exceeded", {}),
    (Unsupported("m"), RequestError, 400, INVALID, "unsupported_model", {}),
    (InvalidGrammar("m"), RequestError, 400, INVALID, "invalid_grammar", {}),
    (GrammarTooComplex("m"), RequestError, 400, INVALID, "grammar_too_complex", {}),
    (
        Overloaded("m", retry_after_s=7),
        LLMServeError,
        503,
        UNAVAILABLE,
        "overloaded",
        {"retry-after": "7"},
    ),
    (DeadlineExceeded("m"), LLMServeError, 504, "timeout_error", "deadline_exceeded", {}),
    (EngineError("m"), LLMServeError, 500, "server_error", "engine_error", {}),
    (EngineDead("m"), EngineError, 503, UNAVAILABLE, "engine_dead", {}),
]


@pytest.mark.parametrize(
    ("error", "parent", "status", "kind", "code", "headers"),
    TREE,
    ids=[type(row[0]).__name__ for row in TREE],
)
def test_error_has_its_parent_and_its_wire_form(
    error: LLMServeError,
    parent: type[Exception],
    status: int,
    kind: str,
    code: str | None,
    headers: dict[str, str],
) -> None:
    assert type(error).__bases__ == (parent,)
    assert (error.status, error.type, error.code) == (status, kind, code)
    assert error.headers() == headers
    assert str(error) == error.message


def _classes() -> dict[str, type[LLMServeError]]:
    return {
        name: each
        for name, each in inspect.getmembers(errors, inspect.isclass)
        if issubclass(each, LLMServeError)
    }


def test_table_has_every_class() -> None:
    assert {type(row[0]).__name__ for row in TREE} == _classes().keys()


def test_docstring_draws_the_tree() -> None:
    drawn = re.findall(r"^( {4,})(\w+) *(?:exit (\d))?(\d{3})?", errors.__doc__ or "", re.MULTILINE)
    assert [name for _, name, _, _ in drawn] == [type(row[0]).__name__ for row in TREE]
    above: dict[int, str] = {}
    for indent, name, exit_code, status in drawn:
        above[len(indent)] = name
        each = _classes()[name]
        if len(indent) > 4:
            assert each.__base__ is not None
            assert each.__base__.__name__ == above[len(indent) - 2]
        if status:
            assert each.status == int(status)
        if exit_code:
            assert vars(each)["exit_code"] == int(exit_code)


def test_a_config_error_has_a_line_for_each_problem() -> None:
    error = ConfigError(["a: is missing", "b: is empty"])
    assert error.message == "a: is missing\nb: is empty"
    assert error.problems == ("a: is missing", "b: is empty")


def test_explicit_code_replaces_the_class_s() -> None:
    assert RequestError("m", code="invalid_json").code == "invalid_json"
    assert RequestError("m").code == "invalid_value"


def test_unknown_model_names_the_nearest_and_all_names() -> None:
    error = ModelNotFound("Chatt", ["embed", "chat"])
    assert error.message == (
        "The model `Chatt` does not exist; did you mean `chat`? models here: chat, embed."
    )
    assert error.param == "model"


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("tensor_paralel_size", ["tensor_parallel_size", "memory"], "tensor_parallel_size"),
        ("CHAT", ["chat"], "chat"),
        ("chat", ["Chat"], "Chat"),
        ("zzz", ["chat"], None),
        ("chat", [], None),
    ],
)
def test_nearest(word: str, known: list[str], expected: str | None) -> None:
    assert nearest(word, known) == expected


@given(st.text(max_size=200))
def test_a_quoted_name_is_one_bounded_printable_line(name: str) -> None:
    shown = quoted(name)
    assert shown.isprintable()
    assert len(shown) <= 80 + len("``...")
    assert shown.startswith("`")
    assert shown.endswith("`")
