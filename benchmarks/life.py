"""Whether models keep their bounds under load while engines die, sleep and reload.

`kills` ends engines and the server, `drain` lets requests end, `reloads` changes the registry,
`eviction` has more models than fit, `broken` has models that cannot start.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import orjson

from benchmarks import record
from benchmarks.box import (
    CHAT,
    COMMAND,
    START_S,
    TREE,
    Box,
    Load,
    Reply,
    Setting,
    Verdicts,
    begun,
    bindable,
    failures,
    left_of,
    object_of,
    run_command,
    until,
)

if TYPE_CHECKING:
    from collections.abc import (
        Awaitable,
        Callable,
        Coroutine,
        Iterator,
        Sequence,
    )

    Entry = dict[str, Any]  # of a registry
    Scenario = Callable[[Setting, Verdicts], Coroutine[Any, Any, None]]

_LOOK_S = 0.1
_NOTICED_S = 0.5  # within which a death is noticed: what comes before is its engine's
_AT_ONCE_S = 0.5
_ENDS_S = 2.0  # that begun streams of a dead engine get
_END_S = 60.0  # that a server gets to end


# --- kills


async def kills(setting: Setting, verdicts: Verdicts) -> None:
    registry = setting.registry({"a": setting.chat(), "b": setting.chat()})
    async with Box(setting.folder, registry) as box:
        await box.ready()
        await _second_server(box, verdicts)
        processes = len(box.family())
        async with Load(box, ["b"], each=1) as other:
            await _killed_under_load(box, verdicts)
            await _killed_to_the_end(box, verdicts)
            verdicts.at_most("processes after quarantine", len(box.family()), processes - 1)
            code, output = await box.cli("load", "a")
            verdicts.exactly("exit code of `load` after quarantine", code, 0, output)
            await _stopped_silently(box, verdicts)
        failed = failures(other.replies)
        verdicts.figure("requests to the other model", len(other.replies))
        verdicts.none("of them failed", failed)
        await _loop_lag(box, verdicts)
        await _killed_server(box, verdicts)


async def _loop_lag(box: Box, verdicts: Verdicts) -> None:
    """How often the server's loop stood still, which all its models feel."""
    name = "llmserve_event_loop_lag_seconds"
    looks = await box.metric(f"{name}_count")
    for bound_s in ("0.1", "0.5"):
        late = looks - await box.metric(f"{name}_bucket", le=bound_s)
        verdicts.figure(f"looks at the loop that were {bound_s} s late", late, "", f"of {looks:g}")


async def _second_server(box: Box, verdicts: Verdicts) -> None:
    began = time.monotonic()
    code, output = await run_command(*COMMAND, "up", str(box.file))
    verdicts.at_most("second server on the port ends after", time.monotonic() - began, 2, " s")
    verdicts.exactly("its exit code", code, 3, output)


async def _killed_under_load(box: Box, verdicts: Verdicts) -> None:
    shown, pid = (await box.model("a"))["replicas"][0], await box.pid("a")
    async with Load(box, ["a"], each=3, tokens=200) as load:
        await asyncio.sleep(_LOOK_S)  # until all are sent
        await begun(reply for reply in load.replies if reply.streams)
        at_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        ready_s = await box.until_ready("a", but=pid)
        again_s = at_s + ready_s
        await asyncio.sleep(1)
    bound_s = shown["start_s"] + 10
    verdicts.at_most("ready again after", ready_s, bound_s, " s", "its load time and 10 s")
    _judge_killed(load.replies, at_s, again_s, verdicts)


def _judge_killed(
    replies: Sequence[Reply], at_s: float, again_s: float, verdicts: Verdicts
) -> None:
    noticed_s = at_s + _NOTICED_S
    caught = [r for r in replies if r.sent_s < at_s < r.done_s]
    streams = [r for r in caught if r.streams and r.first_s < noticed_s]
    rest = [r for r in caught if r not in streams and r.done_s > noticed_s]
    late = [r for r in replies if noticed_s + _LOOK_S < r.sent_s < again_s - 1]
    verdicts.figure("streams that had begun at the kill", len(streams))
    incomplete = [r for r in streams if not (r.ended and r.erred)]
    verdicts.none("of them without error and [DONE]", incomplete)
    last_s = max((r.done_s - at_s for r in streams), default=math.inf)
    verdicts.at_most("the last of them ended after", last_s, _ENDS_S, " s")
    verdicts.figure("requests without a byte at the kill", len(rest))
    unanswered = failures(rest)
    verdicts.none("of them not answered", unanswered)
    verdicts.figure("new requests while it was away", len(late))
    odd = [r for r in late if r.status != 503 or not r.retry_after]
    verdicts.none("of them not 503 with Retry-After", odd)
    verdicts.figure("refusals slower than 0.1 s", sum(r.took_s > 0.1 for r in late))
    slowest_s = max((r.took_s for r in late), default=math.inf)
    verdicts.at_most("the slowest refusal", slowest_s, _AT_ONCE_S, " s")


async def _killed_to_the_end(box: Box, verdicts: Verdicts) -> None:
    """Each time that it is ready, and in between while it starts, until it is given up."""
    other, died, starting = await box.pid("b"), 1, False
    while (shown := await box.model("a"))["state"] != "failed":
        if starting:
            await until(lambda: bool(box.cores() - {other}), START_S)
            await asyncio.sleep(3)  # somewhere in its imports
            (pid,) = box.cores() - {other}
        else:
            pid = await box.pid("a")
        os.kill(pid, signal.SIGKILL)
        died += 1
        await until(lambda pid=pid: pid not in box.cores(), 10)  # type: ignore[misc]
        starting = not starting
        await asyncio.sleep(1)
        if not starting and (await box.model("a"))["state"] != "failed":
            await box.until_ready("a")
        if died > 8:
            break
    shown = await box.model("a")
    verdicts.exactly("deaths until quarantine", died, 5, shown["note"])
    verdicts.exactly("deaths that /admin/models tells", shown["deaths"], died)
    counted = await box.metric("llmserve_engine_deaths_total", model="a")
    verdicts.exactly("deaths that /metrics counts", counted, died)
    ready = await box.http.get("/ready")
    failed = orjson.loads(ready.content)["models"].get("a")
    verdicts.holds("/ready tells it failed", "failed" in str(failed), ready.text)
    refused = await Reply("a", False, 4).receive(box.http)
    verdicts.exactly("status of a request for it", refused.status, 503, refused.summary())


async def _stopped_silently(box: Box, verdicts: Verdicts) -> None:
    """An engine core that is there and does nothing."""
    pid = await box.pid("a")
    start_s = (await box.model("a"))["replicas"][0]["start_s"]
    os.kill(pid, signal.SIGSTOP)
    noticed_s = await until(lambda: pid not in box.cores(), 120)
    verdicts.at_most("SIGSTOP: killed after", noticed_s, 60, " s")
    ready_s = await box.until_ready("a", but=pid)
    verdicts.at_most("and ready again after", ready_s, start_s + 10, " s")


async def _killed_server(box: Box, verdicts: Verdicts) -> None:
    family = box.family()
    box.process.kill()
    box.process.wait()
    verdicts.none("processes 5 s after kill -9 of the server", await left_of(family))
    verdicts.holds("its port is free", bindable(box.port))


# --- drain


async def drain(setting: Setting, verdicts: Verdicts) -> None:
    models = {"a": setting.chat(), "b": setting.chat()}
    async with Box(setting.folder, setting.registry(models, drain_timeout=60)) as box:
        await box.ready()
        await _unloaded(box, verdicts)
        await _unloaded_now(box, verdicts)
        code, output = await box.cli("load", "a")
        verdicts.exactly("exit code of `load`", code, 0, output)
        await _terminated(box, verdicts)


async def _streams(box: Box, model: str, count: int) -> tuple[list[Reply], Awaitable[Any]]:
    """So many that have begun, and their end."""
    replies = [Reply(model, True, 300) for _ in range(count)]
    ends = asyncio.gather(*(reply.receive(box.http) for reply in replies))
    await begun(replies)
    return replies, ends


async def _unloaded(box: Box, verdicts: Verdicts) -> None:
    replies, ends = await _streams(box, "a", 4)
    code, output = await box.cli("unload", "a")
    early = sum(reply.done_s == math.inf for reply in replies)
    await ends
    verdicts.exactly("exit code of `unload`", code, 0, output)
    verdicts.at_most("streams that had not ended by then", early, 0)
    failed = failures(replies)
    verdicts.none("of 4 streams not whole", failed)


async def _unloaded_now(box: Box, verdicts: Verdicts) -> None:
    replies, ends = await _streams(box, "b", 4)
    at_s = time.monotonic()
    code, output = await box.cli("unload", "b", "--now")
    await ends
    verdicts.exactly("exit code of `unload --now`", code, 0, output)
    incomplete = [reply for reply in replies if not (reply.ended and reply.erred)]
    verdicts.none("of 4 streams without error and [DONE]", incomplete)
    last_s = max(reply.done_s for reply in replies) - at_s
    verdicts.figure("the last of them ended after", last_s, " s", "the command's start included")


async def _terminated(box: Box, verdicts: Verdicts) -> None:
    kept = httpx.AsyncClient(base_url=box.url, timeout=10, trust_env=False)
    async with kept:
        await kept.get("/health")
        replies, ends = await _streams(box, "a", 10)
        family = box.family()
        at_s = time.monotonic()
        box.process.terminate()
        await asyncio.sleep(0.5)  # uvicorn looks ten times a second
        over_new = await Reply("a", False, 1).receive(box.http)
        over_kept = await Reply("a", False, 1).receive(kept)
        meanwhile = sum(reply.done_s == math.inf for reply in replies)
        await ends
    verdicts.figure("streams that ran when new requests were refused", meanwhile)
    let_in = [reply for reply in (over_new, over_kept) if reply.whole or reply.status == 200]
    verdicts.none("new requests let in", let_in)
    for reply in (over_new, over_kept):
        verdicts.figure("  refused with", reply.status, "", reply.summary())
    failed = failures(replies)
    verdicts.none("of 10 streams not whole", failed)
    ended_s = await until(lambda: box.process.poll() is not None, _END_S)
    verdicts.figure("the server ended after the last by", ended_s, " s")
    verdicts.figure("and after the signal by", time.monotonic() - at_s, " s")
    verdicts.exactly("its exit code", box.process.returncode, 0)
    verdicts.none("processes left after 5 s", await left_of(family))


# --- reloads


# What makes a registry bad, and a word of what the server says of it.
BROKEN: tuple[tuple[str, Callable[[str], bytes]], ...] = (
    ("YAML", lambda text: f"{text}\nmodels: [".encode()),
    ("unknown key", lambda text: text.replace("  a:", "  a:\n    modle: x", 1).encode()),
    (
        "max_in_flight",
        lambda text: text.replace("  a:", "  a:\n    max_in_flight: many", 1).encode(),
    ),
    ("max_queue", lambda text: text.replace("  a:", "  a:\n    max_queue: -1", 1).encode()),
    ("/nowhere", lambda text: text.replace("model: /", "model: /nowhere/", 1).encode()),
    ("aliases", lambda text: text.replace("  a:", "  a:\n    aliases: [b]", 1).encode()),
    ("max_modl_len", lambda text: text.replace("max_model_len", "max_modl_len", 1).encode()),
    ("mdels", lambda text: text.replace("models:", "mdels:", 1).encode()),
    ("NOT_SET_ANYWHERE", lambda text: text.replace("2.5GiB", "${NOT_SET_ANYWHERE}", 1).encode()),
    (
        "stop_after",
        lambda text: text.replace("  a:", "  a:\n    idle: {stop_after: soon}", 1).encode(),
    ),
    ("port", lambda text: re.sub(r"port: \d+", "port: 99999", text).encode()),
    ("UTF-8", lambda text: b"\xff\xfe\x00" + text.encode("utf-16")),
    ("is empty", lambda _: b""),
)


def good(registry: Entry, chat: Entry) -> Iterator[tuple[str, Entry]]:
    """Each with what it changes, one after the other."""
    now = deepcopy(registry)
    a, models, server = now["models"]["a"], now["models"], now["server"]
    for change in (
        {"max_in_flight": 64},
        {"aliases": ["other"]},
        {"sampling": {"temperature": 0.5}},
        {"sampling": {"max_tokens": 32, "top_p": 0.9}},
        {"max_queue": 100},
        {"timeout": "5m"},
        {"idle": {"stop_after": "1h"}},
        {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
        {"aliases": ["other", "third"]},
        {"priority": 3},
        {"hidden": True},
    ):
        a.update(change)
        yield next(iter(change)), deepcopy(now)
    for key, value in (("max_body", "1MiB"), ("drain_timeout", 20)):
        server[key] = value
        yield f"server.{key}", deepcopy(now)
    models["c"] = chat | {"start": "lazy"}
    yield "added", deepcopy(now)
    models["d"] = models.pop("c")
    yield "a new name", deepcopy(now)
    del models["d"]
    yield "removed", deepcopy(now)
    models["a"]["hidden"] = False
    yield "hidden", deepcopy(now)
    yield "changed live", deepcopy(registry)


class Reloads:
    """Reloads by signal and by route, alternately."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self._hangups = itertools.cycle((True, False))

    async def apply(self) -> tuple[bool, str]:
        """Return whether the registry was applied, and the report."""
        return await (self.by_signal() if next(self._hangups) else self.by_route())

    async def by_signal(self) -> tuple[bool, str]:
        before = len(self._box.printed())
        self._box.process.send_signal(signal.SIGHUP)
        report = ""

        def over() -> bool:
            nonlocal report
            report = self._box.printed()[before:]
            return "reload: " in report and report.endswith("\n")

        await until(over, START_S)
        await asyncio.sleep(_LOOK_S)
        report = self._box.printed()[before:]
        return "nothing has changed" not in report, report

    async def by_route(self) -> tuple[bool, str]:
        answer = await self._box.http.post("/admin/reload")
        return answer.status_code == 200, answer.text


async def reloads(setting: Setting, verdicts: Verdicts) -> None:
    registry = setting.registry({"a": setting.chat(), "b": setting.chat()})
    async with Box(setting.folder, registry) as box:
        await box.ready()
        pids = await box.pid("a"), await box.pid("b")
        async with Load(box, ["a", "b"], each=1) as load:
            await _broken_reloads(box, verdicts)
            await _good_reloads(box, setting, verdicts)
            same = pids == (await box.pid("a"), await box.pid("b"))
            verdicts.holds("both engines are those of the start", same)
            await _restarting_reload(box, verdicts)
        for model in ("a", "b"):
            failed = failures(load.of(model))
            verdicts.figure(f"requests to {model}", len(load.of(model)))
            verdicts.none("of them failed", failed)


async def _broken_reloads(box: Box, verdicts: Verdicts) -> None:
    text, reload = box.file.read_text(), Reloads(box)
    unreported: list[str] = []
    times: list[float] = []
    for word, break_it in itertools.islice(itertools.cycle(BROKEN), 100):
        box.file.write_bytes(break_it(text))
        began = time.monotonic()
        applied, report = await reload.apply()
        times.append(time.monotonic() - began)
        if applied or word not in report:
            unreported.append(f"{word}: {report}")
    box.file.write_text(text)
    verdicts.figure("broken reloads", len(times), "", f"{max(times):.2f} s the slowest")
    verdicts.none("of them applied, or without their problem", unreported)


async def _good_reloads(box: Box, setting: Setting, verdicts: Verdicts) -> None:
    reload = Reloads(box)
    odd: list[str] = []
    count = 0
    for word, registry in good(box.registry, setting.chat()):
        box.write(registry)
        applied, report = await reload.apply()
        count += 1
        if not applied or word not in report:
            odd.append(f"{word}: {report}")
    verdicts.figure("good reloads", count)
    verdicts.none("of them not as they say", odd)


async def _restarting_reload(box: Box, verdicts: Verdicts) -> None:
    before = await box.pid("a"), await box.pid("b")
    changed = deepcopy(box.registry)
    changed["models"]["a"]["engine"] = {"max_model_len": 448}
    box.write(changed)
    began = time.monotonic()
    applied, report = await Reloads(box).by_route()
    verdicts.holds("a changed engine argument is taken", applied, report)
    verdicts.figure("it took", time.monotonic() - began, " s")
    after = await box.pid("a"), await box.pid("b")
    restarted = [was != now for was, now in zip(before, after, strict=True)]
    verdicts.holds("its engine alone is another", restarted == [True, False])


# --- eviction


ASKS, AT_A_TIME = 200, 16


async def eviction(setting: Setting, verdicts: Verdicts) -> None:
    models = {
        "a": setting.chat(),
        "b": setting.chat(start="lazy", max_in_flight=1),
        "c": setting.chat(start="lazy", max_in_flight=1),
    }
    rng = random.Random(1)
    replies: list[Reply] = []

    def drawn() -> Iterator[Reply]:
        for _ in range(ASKS):
            reply = Reply(rng.choice("abc"), rng.random() < 0.5, rng.randint(4, 16))
            replies.append(reply)
            yield reply

    async with Box(setting.folder, setting.registry(models, host_memory="5.5GiB")) as box:
        await box.ready()
        open_files, began = box.open_files(), time.monotonic()
        async with box.events() as events, _Looks(box) as looks:
            waiting = drawn()
            await asyncio.gather(*(_ask_on(box, waiting) for _ in range(AT_A_TIME)))
        took_s = time.monotonic() - began
        opened = box.open_files() - open_files
    _judge_eviction(replies, verdicts)
    # One engine more than at the start has some ten.
    verdicts.at_most("file descriptors of the server more than at the start", opened, 30)
    verdicts.at_most("in all", took_s, 360, " s")
    downs = [e for e in events if e["to"] == "draining"]
    by_model = dict(Counter(e["model"] for e in downs))
    verdicts.figure("evicted models", len(downs), "", str(by_model))
    seen = f"of {looks.count} looks"
    verdicts.at_most("requests seen in an engine at rest", looks.odd, 0, detail=seen)
    ends = [e for e in events if e["to"] == "stopped"]
    cut = [e for e in ends if any(_cut_by(e, r) for r in replies)]
    ended = f"of {len(ends)}"
    verdicts.at_most("engines that ended with requests in flight", len(cut), 0, detail=ended)


async def _ask_on(box: Box, waiting: Iterator[Reply]) -> None:
    for reply in waiting:
        await reply.receive(box.http)


def _cut_by(event: Entry, reply: Reply) -> bool:
    at_s: float = event["at_s"]
    return event["model"] == reply.model and reply.first_s < at_s < reply.done_s


class _Looks:
    """Looks often whether a model that is not up has requests in its engine."""

    def __init__(self, box: Box) -> None:
        self.count = self.odd = 0
        self._box = box

    async def __aenter__(self) -> Self:
        self._looking = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._looking.cancel()
        await asyncio.wait({self._looking})

    async def _look(self) -> None:
        while True:
            for shown in object_of(await self._box.http.get("/admin/models"))["models"]:
                self.count += 1
                self.odd += bool(shown["state"] not in {"ready", "draining"} and shown["in_flight"])
            await asyncio.sleep(_LOOK_S)


def _judge_eviction(replies: Sequence[Reply], verdicts: Verdicts) -> None:
    failed = failures(replies)
    verdicts.figure("requests", len(replies), "", f"{AT_A_TIME} at a time")
    verdicts.none("of them not answered", failed)
    verdicts.figure("the longest took", max(reply.took_s for reply in replies), " s")
    commented = [reply for reply in replies if reply.commented]
    verdicts.figure("streams with a comment in the queue", len(commented))
    silent = [r for r in replies if r.streams and r.first_s - r.sent_s > 7 and not r.commented]
    verdicts.none("streams that waited 7 s without a comment", silent)
    for model in "bc":
        pairs, wrong = overtakes([reply for reply in replies if reply.model == model])
        verdicts.at_most(f"overtakings in {model}'s line", wrong, 0, detail=f"of {pairs} pairs")


def overtakes(replies: Sequence[Reply]) -> tuple[int, int]:
    """Pairs that were sent so far apart that they arrived in order; of them, those that changed it.

    A model with one slot answers one after the other: who was let in first is done first.
    """
    ordered = sorted(replies, key=lambda reply: reply.sent_s)
    pairs = [
        (first, then)
        for first, then in itertools.combinations(ordered, 2)
        if first.sent_s + 0.05 < then.sent_s < first.done_s
    ]
    return len(pairs), sum(first.done_s > then.done_s for first, then in pairs)


# --- broken


async def broken(setting: Setting, verdicts: Verdicts) -> None:
    small = setting.folder / "small"
    small.mkdir(exist_ok=True)
    size = "size=4m,nr_inodes=256"
    refused, _ = await run_command("mount", "-t", "tmpfs", "-o", size, "tmpfs", str(small))
    try:
        await _broken(setting, verdicts, None if refused else small)
    finally:
        if not refused:
            await run_command("umount", "-l", str(small))


async def _broken(setting: Setting, verdicts: Verdicts, small: Path | None) -> None:
    cases = {
        "truncated": (_truncated(setting), "model.safetensors"),
        "tokenizerless": (_without_tokenizer(setting), "tokenizer"),
        "vast": (setting.chat(kv_cache="4000GiB"), ""),
        "garbled": (_garbled(setting), "config.json"),
    }
    models = {"good": setting.embed()} | {
        name: entry | {"start": "lazy"} for name, (entry, _) in cases.items()
    }
    models["late"] = setting.embed(start="lazy")
    env = {} if small is None else {"TMPDIR": str(small)}
    async with Box(setting.folder, setting.registry(models), env) as box:
        await box.ready()
        for name, (_, word) in cases.items():
            await _cannot_start(box, name, word, verdicts)
        if small is None:
            print("      a full folder for temporary files: skipped, nothing can be mounted here")
        else:
            with filled(small):
                await _cannot_start(box, "late", str(small), verdicts)
            code, output = await box.cli("load", "late")
            verdicts.exactly("exit code of `load late` with room again", code, 0, output)


async def _cannot_start(box: Box, name: str, word: str, verdicts: Verdicts) -> None:
    family = {process.pid for process in box.family()}
    used = box.memory()
    began = time.monotonic()
    code, output = await box.cli("load", name)
    verdicts.figure(f"{name}: failed after", time.monotonic() - began, " s", output)
    verdicts.exactly("  exit code of `load`", code, 1)
    note = (await box.model(name))["note"]
    lines = len(note.splitlines())
    verdicts.exactly("  lines of its cause", lines, 1, note)
    verdicts.holds("  the cause says what is wrong", word.lower() in note.lower(), word)
    left = await left_of(p for p in box.family() if p.pid not in family)
    verdicts.none("  processes left of it after 5 s", left)
    more = (box.memory() - used) / 2**20
    verdicts.at_most("  memory more than before", more, 200, " MiB")
    body = {"model": "good", "input": "Hello"}
    answer = await box.http.post("/v1/embeddings", json=body)
    verdicts.exactly("  status of a request to the good model", answer.status_code, 200)


def _copy(setting: Setting, name: str) -> Path:
    folder = setting.folder / name
    shutil.copytree(setting.models / CHAT, folder, dirs_exist_ok=True)
    return folder


def _truncated(setting: Setting) -> Entry:
    folder = _copy(setting, "truncated")
    for file in folder.glob("*.safetensors"):
        os.truncate(file, file.stat().st_size // 2)
    return setting.chat() | {"model": str(folder)}


def _without_tokenizer(setting: Setting) -> Entry:
    folder = _copy(setting, "tokenizerless")
    for pattern in ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*"):
        for file in folder.glob(pattern):
            file.unlink()
    return setting.chat() | {"model": str(folder)}


def _garbled(setting: Setting) -> Entry:
    folder = _copy(setting, "garbled")
    (folder / "config.json").write_text("{this is no JSON")
    return setting.chat() | {"model": str(folder)}


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[None]:
    """No byte and no further file fits into it."""
    ballast = folder / "ballast"
    ballast.mkdir()
    with contextlib.suppress(OSError), (ballast / "bytes").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with contextlib.suppress(OSError):
        for number in itertools.count():
            (ballast / str(number)).touch()
    try:
        yield
    finally:
        shutil.rmtree(ballast)


# --- the command


SCENARIOS: dict[str, Scenario] = {
    "kills": kills,
    "drain": drain,
    "reloads": reloads,
    "eviction": eviction,
    "broken": broken,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--models", type=Path, default=TREE / "models", help="folder of both demos")
    parser.add_argument("--logs", type=Path, help="keep what the server wrote in this folder")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    # So that what was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    where, verdicts = record.circumstances("benchmarks.life"), Verdicts()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.logs or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        setting = Setting(options.models.resolve(), folder)
        began = time.monotonic()
        asyncio.run(SCENARIOS[options.scenario](setting, verdicts))
    print(f"{options.scenario}: {verdicts.failed} failed, {time.monotonic() - began:.0f} s")
    if options.json:
        found = {"scenario": options.scenario, "findings": list(map(asdict, verdicts.findings))}
        options.json.write_text(json.dumps(where | found, indent=1) + "\n")
    sys.exit(bool(verdicts.failed))


if __name__ == "__main__":
    main()
