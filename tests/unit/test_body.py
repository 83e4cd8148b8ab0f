"""Bodies as they come, through `llmserve.http.body` and through the whole app."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys
import tracemalloc
import zlib
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

import pytest
import zstandard

from llmserve.api.body_thread import BodyThread
from llmserve.api.context import RequestContext
from llmserve.errors import BodyTooLarge, RequestError
from llmserve.http.body import form_fields, form_of, json_object
from tests.fakes import error_of, http_scope
from tests.unit.test_app import CHAT, HI, asgi

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from starlette.types import Message, Receive, Scope

MIB = 2**20
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
AUDIO = "/v1/audio/transcriptions"
PACKED = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}
each_packed = pytest.mark.parametrize(("coding", "pack"), PACKED.items(), ids=PACKED)
FORM = {"content-type": "multipart/form-data; boundary=x"}
FIELD = b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\nwords\r\n'
FILE = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


class Counted(BodyThread):
    runs = 0

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:  # type: ignore[override]
        self.runs += 1
        return await super().run(work, *arguments)


def scope_of(**headers: str) -> Scope:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return http_scope(headers=pairs)


def chunks(parts: Iterable[bytes]) -> Receive:
    left = iter(parts)

    async def receive() -> Message:
        part = next(left, None)
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}

    return receive


async def taken(body: bytes, limit: int = 64 * MIB) -> tuple[dict[str, Any], int, bool]:
    """The object, how often work left the loop, and whether its validation will."""
    off_loop, scope = Counted(), scope_of()
    value = await json_object(scope, chunks([body]), limit, off_loop)
    return value, off_loop.runs, RequestContext.of(scope).body_thread is off_loop


async def test_a_light_body_stays_on_the_loop() -> None:
    body = {"messages": [{"role": "user", "content": "a word " * 5000}] * 1}
    assert await taken(json.dumps(body).encode()) == (body, 0, False)


@pytest.mark.parametrize(
    "body",
    [{"prompt": "a" * 70_000}, {"input": ["a"] * 1500}, {"x": [[]] * 2000}],
    ids=["long", "many values", "many arrays"],
)
async def test_a_heavy_body_leaves_the_loop(body: dict[str, Any]) -> None:
    assert await taken(json.dumps(body).encode()) == (body, 1, True)


async def test_a_body_in_tiny_chunks_takes_memory_by_its_bytes() -> None:
    body = json.dumps({"prompt": "ab" * 500_000}).encode()
    receive = chunks(body[i : i + 2] for i in range(0, len(body), 2))
    tracemalloc.start()
    try:
        await json_object(scope_of(), receive, 2 * MIB, BodyThread())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(body)


async def test_a_body_that_grows_over_the_limit_ends_there() -> None:
    came = 0

    def endless() -> Iterable[bytes]:
        nonlocal came
        while True:
            came += 1
            yield b" " * 1000

    with pytest.raises(BodyTooLarge, match=r"server\.max_body, 10000 bytes"):
        await json_object(scope_of(), chunks(endless()), 10_000, BodyThread())
    assert came == 11


@each_packed
async def test_a_packed_body_is_served(coding: str, pack: Callable[[bytes], bytes]) -> None:
    async with asgi() as box:
        headers = {"content-encoding": coding}
        packed = pack(json.dumps(HI).encode())
        reply = await box.client.post(CHAT, content=packed, headers=headers)
        assert box.running.calls[0].body == HI
    assert reply.status_code == 200


@each_packed
async def test_a_packed_upload_is_served(coding: str, pack: Callable[[bytes], bytes]) -> None:
    form = FIELD % b"model" + FILE + b"sound\r\n--x--\r\n"
    async with asgi() as box:
        headers = FORM | {"content-encoding": coding}
        form = form.replace(b"words", b"chat")
        reply = await box.client.post(AUDIO, content=pack(form), headers=headers)
        assert box.running.calls[0].body["model"] == "chat"
    assert reply.status_code == 200


@pytest.mark.parametrize("path", [CHAT, AUDIO])
@pytest.mark.parametrize(
    ("coding", "content", "status", "code"),
    [
        ("br", b"{}", 415, "unsupported_encoding"),
        ("gzip", gzip.compress(json.dumps(HI).encode())[:-3], 400, "invalid_encoding"),
        ("gzip", gzip.compress(bytes(65 * MIB)), 413, "request_too_large"),
    ],
    ids=["unknown", "damaged", "bomb"],
)
async def test_coding_that_fails_is_refused(
    path: str, coding: str, content: bytes, status: int, code: str
) -> None:
    async with asgi() as box:
        headers = FORM | {"content-encoding": coding}
        reply = await box.client.post(path, content=content, headers=headers)
        assert box.running.calls == []
    assert (reply.status_code, error_of(reply)["code"]) == (status, code)
    if status == 415:
        assert reply.headers["accept-encoding"] == "gzip, deflate, zstd"
        assert "`br` is not supported; supported: gzip, deflate, zstd" in error_of(reply)["message"]


async def form(body: bytes) -> dict[str, Any]:
    scope = scope_of(content_type=FORM["content-type"])
    request = await form_of(scope, chunks([body]), 64 * MIB, BodyThread())
    try:
        return await form_fields(request)
    finally:
        await request.close()


@pytest.mark.parametrize(
    "body",
    [
        FIELD % b"a" * 1000 + b"--x--\r\n",
        (FILE + b"a\r\n") * 10 + b"--x--\r\n",
        b"--x\r\nA: " + b"b" * 100_000,
        b"--x\r\n" + b"A: b\r\n" * 1000,
        FIELD.replace(b"words", b"w" * 2 * MIB) % b"a" + b"--x--\r\n",
    ],
    ids=["fields", "files", "long header", "headers", "long field"],
)
async def test_a_form_with_too_much_of_a_thing_is_refused(body: bytes) -> None:
    async with asgi() as box:
        reply = await box.client.post(AUDIO, content=body, headers=FORM)
        assert box.running.calls == []
    assert reply.status_code == 400
    assert len(error_of(reply)["message"]) < 300


async def test_large_form_is_parsed_over_many_loop_iterations() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.ensure_future(count())
    body = FILE + b"\r\n-" * 100_000 + b"\r\n--x--\r\n"
    fields = await form(body)
    counting.cancel()
    assert fields["file"].size == 300_000
    assert turns > len(body) / 10_000


# In a process of its own: what C code takes is in no Python figure.
PEAK = """
import asyncio, re, sys
from pathlib import Path
from llmserve.api.body_thread import BodyThread
from llmserve.errors import RequestError
from llmserve.http.body import json_object
from tests.fakes import http_scope

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

async def main(body):
    at = 0
    async def receive():
        nonlocal at
        at += 65536
        return {"type": "http.request", "body": body[at - 65536:at], "more_body": at < len(body)}
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    try:
        value = await json_object(http_scope(), receive, 64 * 2**20, BodyThread())
    except RequestError as error:
        value = error.message
    peak = status("VmHWM") - before
    assert peak <= 8 * len(body) + 32 * 2**20, (peak >> 20, str(value)[:99])

asyncio.run(main(eval(sys.argv[1])))
"""
LARGE = {
    "base64": "b'{\"url\":\"' + b'A' * 67000000 + b'\"}'",
    "a text": "b'{\"prompt\":\"' + b'a ' * 33000000 + b'\"}'",
    "escapes": "b'{\"url\":\"' + b'\\\\n' * 33000000 + b'\"}'",
    "an emoji": "b'{\"prompt\":\"\\\\ud83d\\\\ude00' + b'a' * 8000000 + b'\"}'",
    "short texts": "b'{\"a\":[' + b'\"\\xf0\\x9f\\x98\\x80aaaaaaaaaaaaaaaaaaaa\",' * 250000 + b'0]}'",
    "numbers": "b'{\"a\":[' + b'50000,' * 390000 + b'0]}'",
    "floats": "b'{\"a\":[' + b'1.5,' * 390000 + b'0]}'",
    "strings": "b'{\"a\":[' + b'\"ab\",' * 130000 + b'0]}'",
    "objects": "b'{\"a\":[' + b'{\"a\":0},' * 35000 + b'0]}'",
    "arrays": "b'{\"a\":[' + b'[0],' * 65000 + b'0]}'",
    "many objects": "b'{\"a\":[' + b'{},' * 22000000 + b'0]}'",
    "deep": "b'{\"a\":' + b'[' * 60000000",
    "quotes": "b'\"' * 60000000",
}


@pytest.mark.parametrize("body", LARGE.values(), ids=LARGE)
def test_a_large_body_takes_memory_by_its_bytes(body: str) -> None:
    made = subprocess.run(
        [sys.executable, "-c", PEAK, body], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-500:]


async def test_a_refused_body_has_its_place() -> None:
    with pytest.raises(RequestError) as caught:
        await taken(json.dumps({"messages": [{}] * 3000}).encode())
    assert caught.value.param == "messages"
