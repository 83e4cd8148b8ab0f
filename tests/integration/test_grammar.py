"""Constraints that fail to compile, beside other requests."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import psutil

from tests.integration.conftest import CHAT, STOP_S, Server, write_registry

if TYPE_CHECKING:
    from pathlib import Path

ASK = {"model": "chat", "messages": [{"role": "user", "content": "Name a city."}]}


def _format(of: dict[str, Any]) -> dict[str, Any]:
    form = {"name": "it", "schema": of}
    return {"response_format": {"type": "json_schema", "json_schema": form}}


def _hostile(n: int) -> dict[str, Any]:
    """One of 10, each with a text of its own."""
    names = [f"{n}w{i}" for i in range(30_000)]
    heavy: list[dict[str, Any]] = [
        {"structured_outputs": {"choice": names[:20_000]}},
        {"structured_outputs": {"choice": names}},
        _format({"enum": names}),
    ]
    light: list[dict[str, Any]] = [
        _format({"$ref": "#", "title": str(n)}),
        _format({"$ref": "https://example.org/schema", "title": str(n)}),
        {"structured_outputs": {"regex": "(" * (50_000 + n)}},
        {"structured_outputs": {"grammar": f"root ::= missing{n}"}},
    ]
    return heavy[n] if n < 3 else light[n % 4]


def test_hostile_constraints_leave_all_others_served(tmp_path: Path) -> None:
    engine = {"max_model_len": 2048, "max_num_seqs": 32, "dtype": "float32"}
    models = {"chat": {"model": CHAT, "kv_cache": "512MiB", "engine": engine}}
    with (
        Server(write_registry(tmp_path, models=models)) as server,
        ThreadPoolExecutor(8) as threads,
    ):
        server.ready()
        engines = [engine.pid for engine in server.engines()]

        def post(**body: Any) -> httpx.Response:
            url = f"{server.url}/v1/chat/completions"
            return httpx.post(url, json={**ASK, "max_tokens": 40, **body}, timeout=300)

        hostile = [threads.submit(post, **_hostile(n)) for n in range(10)]
        while not all(each.done() for each in hostile):
            stream = post(stream=True, ignore_eos=True, max_tokens=20)
            assert stream.text.endswith("data: [DONE]\n\n")
            assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        for each in hostile:
            reply = each.result()
            assert reply.status_code in {400, 503}, reply.text
            assert reply.json()["error"]["code"].startswith(("invalid_grammar", "grammar_"))
        assert [engine.pid for engine in server.engines()] == engines

        schema = {
            "type": "object",
            "properties": {"big": {"type": "boolean"}},
            "required": ["big"],
            "additionalProperties": False,
        }
        answer = post(**_format(schema), temperature=0).json()["choices"][0]["message"]["content"]
        assert json.loads(answer).keys() == {"big"}
        choice = post(structured_outputs={"choice": ["yes", "no"]}).json()
        assert choice["choices"][0]["message"]["content"] in {"yes", "no"}
        family = server.family()
        assert any(
            "llmserve.engine.structured_output.compiler_process" in process.cmdline()
            for process in family
        )
        server.process.terminate()
        server.process.wait(STOP_S)
        _, left = psutil.wait_procs(family, timeout=STOP_S)
        assert not left
