"""The first question of the README, and the answer that it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def _found(pattern: str) -> str:
    match = re.search(pattern, README, re.DOTALL)
    assert match is not None, pattern
    return match[1]


BODY = _found(r"curl localhost:8000/v1/chat/completions -d '(.*?)'")
ASKED: dict[str, Any] = json.loads(BODY)
REPLY: dict[str, Any] = json.loads(_found(r"```json\n(.*?)```"))
SYSTEM, QUESTION = (message["content"] for message in ASKED["messages"])
ANSWER: str = REPLY["choices"][0]["message"]["content"]
