"""Chat templates of the registry and of a model's own files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from llmserve.errors import ConfigError
from llmserve.planning import survey
from llmserve.registry.chat_template import syntax_error
from llmserve.registry.loader import load
from tests.unit.test_survey import llama

if TYPE_CHECKING:
    from pathlib import Path

BROKEN = "{% for m in messages %}\n{{ m.content }\n{% endfor %}"
ERROR = "2: invalid Jinja: unexpected '}'"
VALID = [
    "{{ messages | tojson(indent=2) }}{{ raise_exception('no') }}{{ strftime_now('%d') }}",
    "{% for m in messages %}{% if m %}{% continue %}{% else %}{% break %}{% endif %}{% endfor %}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "{%- set ns = namespace(x=1) -%}{%- macro m(a) %}{{ a }}{% endmacro -%}{{ m(ns.x) }}{# note #}",
]
INVALID = [
    "{{ m",
    "{% for m in messages %}",
    "{% endif %}",
    "{{ messages | no_filter }}",
    "{% generation %}",
    "{% trans %}x{% endtrans %}",
]


def problems(file: Path, entry: str) -> list[str]:
    """What `check` finds in a registry with one model."""
    file.write_text(f"models:\n  chat: {{{entry}}}\n", encoding="utf-8")
    try:
        found = survey.mistakes(load(file))
    except ConfigError as error:
        found = list(error.problems)
    return [problem.replace(f"{file.parent}/", "") for problem in found]


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    llama(tmp_path / "m")
    return tmp_path / "models.yaml"


@pytest.mark.parametrize("template", VALID)
def test_valid_template_has_no_error(template: str) -> None:
    assert syntax_error(template, "t") is None


@pytest.mark.parametrize("template", INVALID)
def test_invalid_template_has_an_error(template: str) -> None:
    assert str(syntax_error(template, "t")).startswith("t:1: invalid Jinja: ")


def test_nested_template_has_an_error() -> None:
    assert syntax_error("{{" + "(" * 9999, "t") == "t: invalid Jinja: nested too deeply"


def test_invalid_template_of_the_registry_is_a_problem(registry: Path) -> None:
    (registry.parent / "t.jinja").write_text(BROKEN)
    lead = "models.yaml:2: models.chat.chat_template: "
    assert problems(registry, "model: m, chat_template: t.jinja") == [f"{lead}t.jinja:{ERROR}"]
    text = json.dumps(BROKEN)
    assert problems(registry, f"model: m, chat_template: {text}") == [f"{lead}template:{ERROR}"]


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"chat_template.jinja": BROKEN}, f"chat_template.jinja:{ERROR}"),
        ({"tokenizer_config.json": {"chat_template": BROKEN}},
         f"tokenizer_config.json: chat_template:{ERROR}"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": BROKEN}]}},
         f"tokenizer_config.json: rag:{ERROR}"),
        ({"chat_template.json": {"chat_template": BROKEN}},
         f"chat_template.json: chat_template:{ERROR}"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json is not a JSON object"),
        ({"tokenizer_config.json": {"chat_template": BROKEN}, "chat_template.jinja": ""}, None),
        ({"tokenizer_config.json": {"chat_template": None}}, None),
    ],
)  # fmt: skip
def test_invalid_template_of_a_model_is_a_problem(
    registry: Path, files: dict[str, Any], error: str | None
) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (registry.parent / "m" / name).write_text(text)
    lead = "models.yaml:2: models.chat.model: m: "
    expected = [] if error is None else [f"{lead}{error}; repair it or set `chat_template`"]
    assert problems(registry, "model: m") == expected
    assert problems(registry, "model: m, engine: {tokenizer_mode: hf}") == expected
    for other in ("chat_template: '{{ m }}'", "engine: {tokenizer: m}"):
        assert problems(registry, f"model: m, {other}") == []


def test_template_that_an_encoder_does_not_use_is_no_problem(registry: Path) -> None:
    folder = registry.parent / "m"
    (folder / "chat_template.jinja").write_text(BROKEN)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert problems(registry, "model: m") == []
