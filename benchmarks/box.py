"""A running `llmserve up` for benchmarks: requests to it, its processes, findings."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import orjson
import psutil
import yaml

from benchmarks.servers import free_port

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Callable,
        Iterable,
        Sequence,
    )

    Entry = dict[str, Any]  # of a registry

HOST = "127.0.0.1"
TREE = Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "llmserve")
CHAT, EMBED = "SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"
START_S = 240.0  # of a whole server, on two cores
_LOOK_S = 0.1
_END_S = 60.0  # that a server gets to end

# --- what is found


@dataclass(frozen=True)
class Finding:
    name: str
    value: float
    unit: str = ""
    bound: str = ""  # empty: a number without a bound
    passed: bool = True
    detail: str = ""

    def __str__(self) -> str:
        mark = ("PASS" if self.passed else "FAIL") if self.bound else "    "
        bound = f" ({self.bound})" if self.bound else ""
        detail = f": {self.detail}" if self.detail else ""
        return f"{mark}  {self.name}: {self.value:.4g}{self.unit}{bound}{detail}"


class Verdicts:
    """Prints what is found as it is found."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def figure(self, name: str, value: float, unit: str = "", detail: str = "") -> None:
        self._add(Finding(name, value, unit, detail=detail))

    def at_most(
        self, name: str, value: float, bound: float, unit: str = "", detail: str = ""
    ) -> None:
        allowed = f"at most {bound:.4g}{unit}"
        self._add(Finding(name, value, unit, allowed, value <= bound, detail))

    def exactly(self, name: str, value: float, bound: float, detail: str = "") -> None:
        self._add(Finding(name, value, "", f"{bound:g} it must be", value == bound, detail))

    def holds(self, name: str, passed: bool, detail: str = "") -> None:
        self._add(Finding(name, passed, "", "true it must be", passed, detail))

    def none(self, name: str, bad: Sequence[Reply | str]) -> None:
        """How many, and the first."""
        detail = next((each if isinstance(each, str) else each.summary() for each in bad), "")
        self.at_most(name, len(bad), 0, detail=detail)

    @property
    def failed(self) -> int:
        return sum(not finding.passed for finding in self.findings)

    def _add(self, finding: Finding) -> None:
        self.findings.append(finding)
        print(finding, flush=True)


# --- requests


@dataclass(eq=False)
class Reply:
    """One completion. Times are `time.monotonic()`; infinite: not yet."""

    model: str
    streams: bool
    tokens: int
    sent_s: float = math.inf
    first_s: float = math.inf  # byte of the answer itself, no comment
    done_s: float = math.inf
    status: int = 0
    retry_after: str | None = None
    content: bytes = b""
    broken: str = ""  # why the connection ended early

    @property
    def took_s(self) -> float:
        return self.done_s - self.sent_s

    @property
    def commented(self) -> bool:
        return self.content.startswith(b":")

    @property
    def ended(self) -> bool:
        """As a stream should, with or without an error."""
        return not self.broken and self.content.rstrip().endswith(b"data: [DONE]")

    @property
    def erred(self) -> bool:
        return b'{"error":' in self.content

    @property
    def whole(self) -> bool:
        answered = self.status == 200 and not self.broken and not self.erred
        return answered and b'"choices"' in self.content and (self.ended or not self.streams)

    def summary(self) -> str:
        kind = "stream" if self.streams else "plain"
        end = self.broken or self.content[-300:].decode(errors="replace")
        return f"{kind} {self.model} {self.status} after {self.took_s:.2f} s: {end!r}"

    async def receive(self, http: httpx.AsyncClient) -> Self:
        body = {"model": self.model, "prompt": "Once upon a time", "ignore_eos": True}
        body |= {"max_tokens": self.tokens, "stream": self.streams}
        self.sent_s = time.monotonic()
        try:
            async with http.stream("POST", "/v1/completions", json=body) as response:
                self.status = response.status_code
                self.retry_after = response.headers.get("retry-after")
                async for part in response.aiter_bytes():
                    self._take(part)
        except httpx.HTTPError as error:
            self.broken = repr(error)
        self.done_s = time.monotonic()
        return self

    def _take(self, part: bytes) -> None:
        self.content += part
        if self.first_s == math.inf and (not self.streams or b"data: " in self.content):
            self.first_s = time.monotonic()


def failures(replies: Iterable[Reply]) -> list[Reply]:
    return [reply for reply in replies if not reply.whole]


class Load:
    """Requests for models, some streams and some plain, from its beginning to its end."""

    def __init__(self, box: Box, models: Iterable[str], each: int = 2, tokens: int = 24) -> None:
        self.replies: list[Reply] = []
        self._box = box
        self._askers = [
            (model, streams, tokens) for model in models for streams in (True, False) * each
        ]
        self._over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._go_on(*asker)) for asker in self._askers]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over.set()
        await asyncio.gather(*self._tasks)

    async def _go_on(self, model: str, streams: bool, tokens: int) -> None:
        while not self._over.is_set():
            reply = Reply(model, streams, tokens)
            self.replies.append(reply)
            await reply.receive(self._box.http)
            if not reply.whole:
                await asyncio.sleep(_LOOK_S)

    def of(self, model: str) -> list[Reply]:
        return [reply for reply in self.replies if reply.model == model]


# --- the server


@dataclass
class Setting:
    """Where the models are, and where servers keep what they write."""

    models: Path
    folder: Path

    def chat(self, **more: Any) -> Entry:
        return {"model": str(self.models / CHAT), **more}

    def embed(self, **more: Any) -> Entry:
        engine = {"max_model_len": 256}  # it knows no further positions
        return {"model": str(self.models / EMBED), "kv_cache": "64MiB", "engine": engine, **more}

    def registry(self, models: dict[str, Entry], **server: Any) -> Entry:
        engine = {"dtype": "float32", "max_model_len": 512}
        return {
            "server": {"host": HOST, "port": free_port(), "log_dir": str(self.folder), **server},
            "defaults": {"kv_cache": "256MiB", "memory": "2.5GiB", "engine": engine},
            "models": models,
        }


@dataclass
class Box:
    """A running `llmserve up`."""

    folder: Path
    registry: Entry
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.port: int = self.registry["server"]["port"]
        self.url = f"http://{HOST}:{self.port}"
        self.file = self.folder / f"models-{self.port}.yaml"
        self.output = self.folder / f"up-{self.port}.out"
        self.write(self.registry)

    def write(self, registry: Entry) -> None:
        self.file.write_text(yaml.safe_dump(registry, sort_keys=False))

    async def __aenter__(self) -> Self:
        with self.output.open("w") as out:
            self.process = subprocess.Popen(  # noqa: ASYNC220  # takes milliseconds
                [*COMMAND, "up", str(self.file)],
                cwd=TREE,
                env={**os.environ, **self.env},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this benchmark, which then ends the server
            )
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(None, connect=10)
        self.http = httpx.AsyncClient(
            base_url=self.url, timeout=timeout, limits=limits, trust_env=False
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()
        family = self.family()
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(TimeoutError):
                await until(lambda: self.process.poll() is not None, _END_S)
            self.process.kill()
        self.process.wait()
        await left_of(family)  # who tidies up after the server ends last
        for left in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()

    def printed(self) -> str:
        return self.output.read_text(errors="replace")

    async def ready(self) -> None:
        def serving() -> bool:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended:\n{self.printed()}")
            return "Serving " in self.printed()

        await until(serving, START_S)

    # --- processes

    def family(self) -> list[psutil.Process]:
        try:
            below: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return below

    def cores(self) -> set[int]:
        """The engine cores, those that start as well."""
        return {p.pid for p in self.family() if "VLLM::EngineCor" in _name(p)}

    def open_files(self) -> int:
        """Descriptors of the server itself."""
        count: int = psutil.Process(self.process.pid).num_fds()
        return count

    def memory(self) -> int:
        """Bytes of the server and all below it, what they share once."""
        family = [psutil.Process(self.process.pid), *self.family()]
        return sum(process.memory_full_info().pss for process in family if _lives(process))

    async def cli(self, *words: str) -> tuple[int, str]:
        """The exit code and output of a command to this server."""
        return await run_command(*COMMAND, *words, "--url", self.url)

    # --- what it says

    async def model(self, name: str) -> Entry:
        return object_of(await self.http.get(f"/admin/models/{name}"))

    async def pid(self, name: str) -> int:
        found = (await self.model(name))["replicas"][0]["pid"]
        if not isinstance(found, int):
            raise TypeError(f"{name} has no engine")
        return found

    async def until_ready(self, name: str, but: int = 0, within_s: float = START_S) -> float:
        """Seconds until it is ready, by another engine than that of the process `but`."""
        began = time.monotonic()
        while True:
            shown = await self.model(name)
            if shown["state"] == "ready" and shown["replicas"][0]["pid"] != but:
                return time.monotonic() - began
            if shown["state"] == "failed" or time.monotonic() > began + within_s:
                raise RuntimeError(f"{name} is {shown['state']}: {shown['note']}")
            await asyncio.sleep(_LOOK_S)

    async def metric(self, name: str, **labels: str) -> float:
        page = (await self.http.get("/metrics")).text
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in page.splitlines() if re.match(rf"{name}[{{ ]", line)]
        return sum(float(li.rpartition(" ")[2]) for li in lines if all(w in li for w in wanted))

    @contextlib.asynccontextmanager
    async def events(self) -> AsyncIterator[list[Entry]]:
        """A list that grows; `at_s` of an event is `time.monotonic()`."""
        happened: list[Entry] = []
        listening = asyncio.create_task(self._listen(happened))
        try:
            yield happened
        finally:
            listening.cancel()
            await asyncio.wait({listening})

    async def _listen(self, happened: list[Entry]) -> None:
        async with self.http.stream("GET", "/admin/events") as response:
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    event = orjson.loads(line.removeprefix("data: "))
                    happened.append(event | {"at_s": event["at"] - time.time() + time.monotonic()})


async def run_command(*command: str) -> tuple[int, str]:
    """The exit code, and the output of both kinds."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=TREE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    out, _ = await process.communicate()
    return process.returncode or 0, out.decode().strip()


def object_of(response: httpx.Response) -> Entry:
    found: Entry = response.raise_for_status().json()
    return found


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return str(process.name())
    return ""


async def left_of(family: Iterable[psutil.Process], within_s: float = 5) -> list[str]:
    """The names of processes that run after that time; zombies do not count."""
    family = list(family)

    def alive() -> list[str]:
        return [_name(process) for process in family if _lives(process)]

    with contextlib.suppress(TimeoutError):
        await until(lambda: not alive(), within_s)
    return alive()


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def bindable(port: int) -> bool:
    try:
        socket.create_server((HOST, port)).close()
    except OSError:
        return False
    return True


async def until(holds: Callable[[], bool], within_s: float) -> float:
    """Seconds until it holds. Raises TimeoutError."""
    began = time.monotonic()
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110  # of other processes
            await asyncio.sleep(_LOOK_S)
    return time.monotonic() - began


async def begun(replies: Iterable[Reply]) -> None:
    replies = list(replies)
    await until(lambda: all(reply.first_s < math.inf for reply in replies), _END_S)
