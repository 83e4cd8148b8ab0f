"""`registry.chat_template` accepts the templates that transformers compiles."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import jinja2
import pytest

from llmserve.registry.chat_template import syntax_error
from tests.unit.test_chat_template import INVALID, VALID

VLLM = Path(str((find_spec("vllm") or pytest.skip("needs vLLM")).origin)).parent
SHIPPED = [file.read_text(encoding="utf-8") for file in sorted(VLLM.rglob("*.jinja"))]


@pytest.mark.parametrize("template", [*VALID, *INVALID, *SHIPPED])
def test_a_template_is_accepted_as_by_transformers(template: str) -> None:
    assert syntax_error(template, "t") == error_of_transformers(template)


def error_of_transformers(template: str) -> str | None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(template)
    except jinja2.TemplateSyntaxError as error:
        return f"t:{error.lineno}: invalid Jinja: {error.message}"
    return None
