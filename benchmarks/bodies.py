"""What a request's body costs a server: the loop's longest stall and the peak of its memory.

    python -m benchmarks.bodies [--only WORD] [--limit-s 60] [--json FILE]

Each case is a process of its own with llmserve's whole ASGI app and vLLM's front end on a
fake engine core, which answers every request at once. A stall is how late the loop runs a
timer of 1 ms while the body comes, in chunks of 64 KiB, and is answered. The peak is the
resident memory that comes on top of the body. A process gets `--limit-s` seconds and 6 GiB.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import multiprocessing
import os
import resource
import tempfile
import time
import uuid
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.attached import AttachedBackend
from llmserve.engine import environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

MODELS = Path(__file__).parents[1] / "models"
FOLDERS = {"chat": "SmolLM2-135M-Instruct", "embed": "all-MiniLM-L6-v2"}
MIB = 2**20
_CHUNK = 64 * 2**10
_CHAT, _COMPLETIONS, _RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
_MESSAGES, _COUNT = "/v1/messages", "/v1/messages/count_tokens"
_EMBEDDINGS, _POOLING, _SCORE, _RERANK = "/v1/embeddings", "/pooling", "/v1/score", "/v1/rerank"
_TOKENIZE, _DETOKENIZE, _AUDIO = "/tokenize", "/detokenize", "/v1/audio/transcriptions"


class Case:
    """A body for a path. `add` puts one into CASES."""

    def __init__(self, path: str, kind: str, body: Callable[[], bytes], **headers: str) -> None:
        self.path, self.kind, self.body = path, kind, body
        self.headers = {"content-type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }

    @property
    def model(self) -> str:
        return "embed" if self.path in {_EMBEDDINGS, _POOLING, _SCORE, _RERANK} else "chat"


def of(**values: Any) -> Callable[[], bytes]:
    return partial(_json, {"max_tokens": 4} | values)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def text(before: str, item: str, count: int, after: str, between: str = ",") -> Callable[[], bytes]:
    """Text with `item` repeated, made only in its own process."""
    return partial(_repeated, before, item, count, after, between)


def _repeated(before: str, item: str, count: int, after: str, between: str) -> bytes:
    return (before + between.join([item] * count) + after).encode()


def listed(path: str, key: str, kind: str, item: str, count: int, more: str = "") -> Case:
    return Case(path, kind, text(f'{{"max_tokens":4,"{key}":[', item, count, "]" + more + "}"))


_USER = '{"role":"user","content":"hello"}'
_HI = [{"role": "user", "content": "hello"}]
_HELLO = ',"messages":[' + _USER + "]"
_PARTS = '{"role":"user","content":[{"type":"text","text":"a"}]}'
_FORM = {"content_type": "multipart/form-data; boundary=x"}
_FIELD = '--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n'
_FILE = '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
_LAST = "\r\n--x--\r\n"
_IMAGE = '{"type":"image_url","image_url":{"url":"data:image/png;base64,%s"}}' % ("A" * 600_000)
_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {
                f"k{i}": {"type": "string", "description": "what it is", "enum": ["a", "b"]}
                for i in range(50)
            },
        },
    },
}

CASES: tuple[Case, ...] = (
    Case(_CHAT, "empty", of(messages=_HI)),
    listed(_CHAT, "messages", '`{"role":1}`, 1 MiB', '{"role":1}', 95_000),
    listed(_CHAT, "messages", "64 KiB of `{}`", "{}", 21_000),
    listed(_CHAT, "messages", "64 KiB of messages", _USER, 1900),
    listed(_CHAT, "messages", "2,048 messages", _USER, 2048),
    listed(_CHAT, "messages", "2,048 messages with parts", _PARTS, 2048),
    listed(_CHAT, "x", "64 MiB of `0`", "0", 32 * MIB - 100, _HELLO),
    listed(_CHAT, "x", "64 MiB of `{}`", "{}", 64 * MIB // 3 - 100, _HELLO),
    listed(_CHAT, "x", "390,000 numbers", "50000", 390_000, _HELLO),
    Case(_CHAT, "100,000 keys", of(messages=_HI, x={f"k{i}": i for i in range(100_000)})),
    Case(_CHAT, "4,000 top keys", of(messages=_HI, **{f"k{i}": 0 for i in range(4000)})),
    Case(_CHAT, "depth 1,000", text('{"messages":[],"tools":', "[" * 1000, 1, "]" * 1000 + "}")),
    Case(_CHAT, "depth 32 Mi", text('{"messages":', "[", 32 * MIB, "}", "")),
    Case(_CHAT, "digits, 60 MiB", text('{"x":', "1", 60 * MIB, "}", "")),
    Case(_CHAT, "spaces, 60 MiB", text('{"x":', " ", 60 * MIB, "1}", "")),
    Case(_CHAT, "a key of 60 MiB", text('{"', "k", 60 * MIB, '":1}', "")),
    Case(_CHAT, "a message of 60 MiB", text('{"messages":[{"role":"user","content":"', "hello ", 10 * MIB, '"}]}', "")),
    Case(_CHAT, "60 MiB of text, one emoji", text('{"messages":[{"role":"user","content":"\\ud83d\\ude00', "hello ", 10 * MIB, '"}]}', "")),
    Case(_CHAT, "4 MiB of text", text('{"messages":[{"role":"user","content":"', "hello ", 680_000, '"}]}', "")),
    Case(_CHAT, "`{` and spaces, 2 KiB", of(messages=_HI, structured_outputs={"regex": "{" + " " * 900 + "," + " " * 900})),
    Case(_CHAT, "a long key with a list", of(messages=_HI, tools={"k" * 15_000: [0] * 30_000})),
    Case(_CHAT, "128 tools", of(messages=_HI, tools=[_TOOL] * 128)),
    Case(_CHAT, "8 MiB of tools", listed(_CHAT, "tools", "", "0", 4 * MIB, _HELLO).body),
    Case(_CHAT, "stop, 100,000", of(messages=_HI, stop=["a"] * 100_000)),
    Case(_CHAT, "bad_words, 20,000", of(messages=_HI, bad_words=[f"w{i}" for i in range(20_000)])),
    Case(_CHAT, "logit_bias, 50,000", of(messages=_HI, logit_bias={str(i): 1 for i in range(50_000)})),
    Case(_CHAT, "allowed_token_ids, 49,000", of(messages=_HI, allowed_token_ids=list(range(49_000)))),
    Case(_CHAT, "n 16,000", of(messages=_HI, n=16_000)),
    Case(_CHAT, "n 128", of(messages=_HI, n=128)),
    Case(_CHAT, "100 images, 60 MiB", text('{"messages":[{"role":"user","content":[', _IMAGE, 100, "]}]}")),
    Case(_CHAT, "gzip of 2 GiB", lambda: gzip.compress(bytes(64 * MIB)) * 32, content_encoding="gzip"),
    listed(_COMPLETIONS, "prompt", "100,000 prompts", '"a"', 100_000),
    listed(_COMPLETIONS, "prompt", "256 prompts", '"a"', 256),
    listed(_COMPLETIONS, "prompt", "390,000 ids", "50", 390_000),
    listed(_RESPONSES, "input", '`{"role":1}`, 64 KiB', '{"role":1}', 5900),
    listed(_RESPONSES, "input", "10,000 items", '{"role":"user","content":"a"}', 10_000),
    listed(_RESPONSES, "input", "1,000 items", '{"role":"user","content":"a"}', 1000),
    listed(_MESSAGES, "messages", "2,048 messages", _USER, 2048, ',"model":"chat"'),
    listed(_MESSAGES, "messages", "100,000 messages", _USER, 100_000, ',"model":"chat"'),
    listed(_COUNT, "messages", "2,048 messages", _USER, 2048, ',"model":"chat"'),
    listed(_EMBEDDINGS, "input", '1,000,000 `"a"`', '"a"', 1_000_000),
    listed(_EMBEDDINGS, "input", '100,000 `"a"`', '"a"', 100_000),
    listed(_EMBEDDINGS, "input", "2,048 inputs", '"a few words of text"', 2048),
    listed(_EMBEDDINGS, "input", "300,000 ids in 2,000 lists", "[" + ",".join(["2000"] * 150) + "]", 2000),
    listed(_EMBEDDINGS, "input", "bad, 1 MiB", "null", 200_000),
    listed(_POOLING, "input", '100,000 `"a"`', '"a"', 100_000),
    listed(_SCORE, "text_2", "100,000 texts", '"a"', 100_000, ',"text_1":"a"'),
    listed(_RERANK, "documents", "1,000,000 documents", '"a"', 1_000_000, ',"query":"a"'),
    listed(_RERANK, "documents", "100,000 documents", '"a"', 100_000, ',"query":"a"'),
    listed(_RERANK, "documents", "1,000 documents", '"a few words of text"', 1000, ',"query":"a"'),
    Case(_TOKENIZE, "60 MiB prompt", text('{"prompt":"', "hello ", 10 * MIB, '"}', "")),
    Case(_TOKENIZE, "4 MiB prompt", text('{"prompt":"', "hello ", 680_000, '"}', "")),
    Case(_TOKENIZE, "490,000 tokens", text('{"prompt":"', "hello ", 490_000, '"}', "")),
    Case(_TOKENIZE, "and their strings", text('{"return_token_strs":true,"prompt":"', "hello ", 490_000, '"}', "")),
    listed(_TOKENIZE, "messages", "2,048 messages", _USER, 2048),
    listed(_DETOKENIZE, "tokens", "390,000 ids", "500", 390_000),
    Case(_AUDIO, "a file of 60 MiB", text(_FILE, "a", 60 * MIB, _LAST, ""), **_FORM),
    Case(_AUDIO, "1,000,000 parts", text("", _FIELD, 1_000_000, _LAST, ""), **_FORM),
    Case(_AUDIO, "60 MiB of `\\r\\n-`", text(_FILE, "\r\n-", 20 * MIB, _LAST, ""), **_FORM),
    Case(_AUDIO, "a part's header of 60 MiB", text("--x\r\nA: ", "b", 60 * MIB, "", ""), **_FORM),
)  # fmt: skip


# --- one case, in a process of its own


def measured(case: Case, answer: Connection) -> None:
    body = case.body()
    soft = _status("VmSize") + 6 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    answer.send({"bytes": len(body)} | uvloop.run(_measured(case, body)))


async def _measured(case: Case, body: bytes) -> dict[str, Any]:
    async with _app(case.model) as app:
        for _ in range(3):
            await _ask(app, case.path, {"content-type": "application/json"}, b"{}")
        await _ask(app, _CHAT if case.model == "chat" else _EMBEDDINGS, *_warm(case.model))
        _forget_peak()
        before = _status("VmRSS")
        began = time.perf_counter()
        async with _Ticks() as ticks:
            status, answer = await _ask(app, case.path, case.headers, body)
        return {
            "status": status,
            "answer": answer.decode(errors="replace")[:300],
            "stall_ms": ticks.longest_s * 1000,
            "peak_mib": (_status("VmHWM") - before) / MIB,
            "took_s": time.perf_counter() - began,
        }


def _warm(model: str) -> tuple[dict[str, str], bytes]:
    body = {"messages": _HI, "max_tokens": 2} if model == "chat" else {"input": "hello"}
    return {"content-type": "application/json"}, json.dumps(body).encode()


class _Ticks:
    """The longest time by which a timer of 1 ms was late."""

    longest_s = 0.0

    async def __aenter__(self) -> _Ticks:
        self._task = asyncio.ensure_future(self._tick())
        await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0.01)
        self._task.cancel()

    async def _tick(self) -> None:
        while True:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            self.longest_s = max(self.longest_s, time.perf_counter() - due)


async def _ask(app: Any, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
    at, status, answer = 0, 0, bytearray()

    async def receive() -> Any:
        nonlocal at
        await asyncio.sleep(0)
        if at > len(body):
            await asyncio.Event().wait()
        chunk, at = body[at : at + _CHUNK], at + _CHUNK
        more = at < len(body)
        at += 0 if more else 1
        return {"type": "http.request", "body": chunk, "more_body": more}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)
        answer.extend(message.get("body", b"")[: 300 - len(answer)])

    fields = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1"), *fields],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    return status, bytes(answer)


@contextlib.asynccontextmanager
async def _app(model: str) -> Any:
    from llmserve.http import app  # noqa: PLC0415  # `main` has prepared the environment
    from llmserve.http.services import Services  # noqa: PLC0415  # as above
    from llmserve.lifecycle.operator import ModelOperator  # noqa: PLC0415  # as above
    from llmserve.lifecycle.pool import Pool  # noqa: PLC0415  # as above
    from llmserve.metrics import Metrics  # noqa: PLC0415  # as above
    from llmserve.registry.spec import Config, ModelSpec, ServerSpec  # noqa: PLC0415  # as above

    spec = ModelSpec(name=model, model=str(MODELS / FOLDERS[model]))
    names = [f"ipc://@llmserve-bodies-{uuid.uuid4().hex}" for _ in range(2)]
    with _core(model, *names), tempfile.TemporaryDirectory() as logs:
        addresses = {model: [{"input_address": names[0], "output_address": names[1]}]}
        backend = AttachedBackend(addresses, Path(logs))
        metrics = Metrics()
        pool = Pool([spec], backend, metrics)
        await pool.start()
        while not pool.models[model].running:  # noqa: ASYNC110  # a benchmark may look
            await asyncio.sleep(0.05)
        config = Config(file=Path("models.yaml"), server=ServerSpec(), models=(spec,))
        control = ModelOperator(config.server, pool, backend, lambda: config)
        yield app.build(Services(pool, metrics, control))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


# --- the engine core


@contextlib.contextmanager
def _core(model: str, inputs: str, outputs: str) -> Iterator[None]:
    """A core beside a case; it ends when the case does, also if the case is killed."""
    control, kept = os.pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_run_core, args=(model, inputs, outputs, control, kept), daemon=True
    )
    process.start()
    try:
        yield
    finally:
        process.kill()
        os.close(kept)
        os.close(control)


def _run_core(model: str, inputs: str, outputs: str, control: int, kept: int) -> None:
    """Answer each request in one output."""
    import torch  # noqa: PLC0415  # as in `_app`
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason  # noqa: PLC0415  # as above

    from benchmarks.fake_core import FakeCore, Settings  # noqa: PLC0415  # as above

    embeds = model == "embed"
    vector = torch.zeros(384) if embeds else None
    finish = FinishReason.STOP if embeds else FinishReason.LENGTH

    class AtOnce(FakeCore):
        def _decode_add(self, frames: Any) -> Any:
            return self._decode_first(frames[0].buffer)[0]

        def _add(self, request_id: Any) -> None:
            ids = [] if embeds else [1]
            output = EngineCoreOutput(request_id, ids, pooling_output=vector, finish_reason=finish)
            self._send(EngineCoreOutputs(outputs=[output]))

        _decode_first = staticmethod(msgspec.msgpack.Decoder().decode)

    os.close(kept)
    tasks = ("embed", "token_embed") if embeds else ("generate",)
    AtOnce(inputs, outputs, Settings(), [1], tasks, control).run()


# --- all cases


def run(case: Case, limit_s: float) -> dict[str, Any]:
    """The figures of a case; without `stall_ms` if its process did not end well in time."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=measured, args=(case, theirs))
    process.start()
    theirs.close()
    found: dict[str, Any] = {}
    try:
        found = ours.recv() if ours.poll(limit_s) else {"answer": f"more than {limit_s:.0f} s"}
    except EOFError:
        found = {"answer": "out of 6 GiB of memory"}
    finally:
        process.kill()
        process.join()
    return {"path": case.path, "kind": case.kind} | found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--limit-s", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    environment.prepare(engines=1, log_dir=Path(tempfile.mkdtemp()))
    import llmserve.engine.handlers  # noqa: F401, PLC0415  # once, before the cases' processes are forked

    cases = [case for case in CASES if options.only in f"{case.path} {case.kind}"]
    table = Table("endpoint", "body", "MiB", "status", "stall, ms", "peak, MiB", "s")
    console = Console(width=160)
    results = []
    for case in cases:
        found = run(case, options.limit_s)
        results.append(found)
        row = [f"{found.get(key, 0):.1f}" for key in ("stall_ms", "peak_mib", "took_s")]
        size = f"{found.get('bytes', 0) / MIB:.2f}"
        status = str(found.get("status", found.get("answer")))
        table.add_row(case.path, case.kind, size, status, *row)
        console.print(case.path, case.kind, size, status, *row, found.get("answer", "")[:150])
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
