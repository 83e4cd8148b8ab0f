"""llm-comply: its checks of OpenAI's chat completions, Open Responses and Anthropic's messages."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import llm_comply
import pytest
from llm_comply.config import ComplianceConfig
from llm_comply.runner import TestRunner as Runner
from llm_comply.schema import SpecLoader
from llm_comply.tests import get_tests

from tests.conformance.conftest import KEY

SPECS = Path(llm_comply.__file__).parent / "specs"
FORMATS = {
    "openai-chat": "openai_chat.json",
    "open-responses": "openresponses.json",
    "anthropic": "anthropic.json",
}
CHECKS = [(form, check) for form in FORMATS for check in get_tests(form)]


@pytest.mark.filterwarnings("ignore:jsonschema.RefResolver")
@pytest.mark.parametrize(
    ("form", "check"), CHECKS, ids=[f"{form}-{check.id}" for form, check in CHECKS]
)
def test_check(base_url: str, form: str, check: Any) -> None:
    config = ComplianceConfig(
        base_url, KEY, "chat", timeout=120, extra_headers={"anthropic-version": "2023-06-01"}
    )
    result = Runner(config, [check], SpecLoader(str(SPECS / FORMATS[form]))).run_one(check)
    if result.status.name == "SKIPPED":
        pytest.skip("; ".join(result.errors))
    for warning in result.warnings:
        warnings.warn(warning, stacklevel=1)
    if result.errors:
        pytest.fail("\n".join(result.errors), pytrace=False)
