"""The commands that show and control a running server: clients of `/admin`."""

from __future__ import annotations

import json
import sys
import time
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from rich.table import Table
from rich.text import Text

from llmserve import terminal
from llmserve.cli.client import Client, error_message, sse_data
from llmserve.cli.errors import NoServer, Refused
from llmserve.gpus.device import GIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_ANSWER_S = 30  # for answers that need no engine
_QUIET_S = 60  # without an event or a ping
_WIDE = 10_000  # columns of output that is not a terminal
_STYLES = {"ready": "green", "failed": "bold red", "stopped": "dim", "sleeping": "dim"}
_HEADINGS: Mapping[str, Literal["left", "right"]] = {
    "MODEL": "left",
    "STATE": "left",
    "LEVEL": "left",
    "IN FLIGHT": "right",
    "QUEUED": "right",
    "IDLE": "right",
    "GPUS": "left",
    "GiB": "right",
    "WAKE s": "right",
    "SWAPS": "right",
    "NOTE": "left",
}

Body = dict[str, Any]


class AdminClient(Client):
    """A client of `/admin`."""

    def __init__(self, url: str, key: str | None) -> None:
        super().__init__(url, key, "LLMSERVE_ADMIN_KEY")

    def models(self) -> list[Body]:
        return self.fetch("GET", "admin/models", itemgetter("models"), timeout_s=_ANSWER_S)

    def change(self, action: str, name: str, body: Body) -> Body:
        """Start, stop, sleep or wake a model and return its new state; can take minutes."""
        path = f"admin/{_model(name)}/{action}"
        return self.fetch("POST", path, _require("state"), body=body)

    def reload(self, *, dry_run: bool) -> Body:
        return self.fetch("POST", "admin/reload", _require("lines"), body={"dry_run": dry_run})

    def events(self) -> Iterator[Body]:
        """Yield events until the server ends, then raise NoServer."""
        with self.stream("GET", "admin/events", timeout_s=_QUIET_S) as reply:
            for data in sse_data(reply.iter_bytes()):
                event = json.loads(data)
                if "error" in event:
                    raise Refused(error_message(event))
                yield event
        raise NoServer(self.url, "the server has ended")

    def log(self, name: str, *, lines: int, replica: int, follow: bool) -> Iterator[bytes]:
        """Yield parts of the log; with `follow` until the server ends, then raise NoServer."""
        query = {"lines": lines, "replica": replica, "follow": follow}
        with self.stream("GET", f"admin/{_model(name)}/logs", query=query) as reply:
            yield from reply.iter_bytes()
        if follow:
            raise NoServer(self.url, "the server has ended")


def _require(key: str) -> Callable[[Body], Body]:
    def read(answer: Body) -> Body:
        answer[key]
        return answer

    return read


def _model(name: str) -> str:
    """The path of a model; the server merges slashes that are not escaped."""
    is_plain = name == "/".join(filter(None, name.split("/")))
    # In a locale without UTF-8 the bytes of an argument arrive as lone surrogates.
    return f"models/{quote(name, safe='/' if is_plain else '', errors='surrogateescape')}"


class AdminCommands:
    """The commands, which print for people or, `as_json`, for programs."""

    def __init__(self, client: AdminClient, *, as_json: bool) -> None:
        self._client = client
        self._as_json = as_json

    def ps(self) -> None:
        models = self._client.models()
        console = terminal.console()
        if self._as_json:
            console.print_json(data={"models": models}, ensure_ascii=True)
        else:
            console = console if console.is_terminal else terminal.console(width=_WIDE)
            console.print(table(models))

    def change(self, action: str, names: Sequence[str], body: Body) -> bool:
        """Change models one after another; return whether the server changed all of them."""
        complete = True
        for name in names:
            began = time.monotonic()
            try:
                model = self._client.change(action, name, body)
            except Refused as error:
                terminal.print_error(str(error))
                complete = False
                continue
            seconds = time.monotonic() - began
            self._print(
                model | {"seconds": round(seconds, 3)},
                f"{model['name']}: {model['state']} {seconds:.1f} s",
            )
        return complete

    def reload(self, *, dry_run: bool) -> None:
        answer = self._client.reload(dry_run=dry_run)
        self._print(answer, "\n".join(answer["lines"]) or "Nothing has changed.")

    def events(self) -> None:
        for event in self._client.events():
            self._print(event, line(event))

    def logs(self, name: str, *, lines: int, replica: int, follow: bool) -> None:
        parts = self._client.log(name, lines=lines, replica=replica, follow=follow)
        if self._as_json:
            for text in _lines(parts):
                self._print({"line": text}, text)
            return
        for part in parts:  # the bytes of the engine's log
            sys.stdout.buffer.write(part)
            sys.stdout.buffer.flush()

    def _print(self, value: Body, text: str) -> None:
        """Print a line of text, or JSON in ASCII, which every terminal supports."""
        terminal.console().print(json.dumps(value) if self._as_json else text, soft_wrap=True)


def _lines(parts: Iterator[bytes]) -> Iterator[str]:
    """Lines that end with a line feed; str.splitlines() has other separators too."""
    rest = b""
    for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        for each in whole:
            yield each.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


# --- output


def line(event: Body) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
    change = f"{at} {event['model']}/{event['replica']}: {event['from']} -> {event['to']}"
    note = f": {event['note']}" if event["note"] else ""
    lost = f" ({event['lost']} earlier events lost)" if event.get("lost") else ""
    return change + note + lost


def table(models: Sequence[Body]) -> Table:
    """A row for each model, followed by a row for each replica if there are several."""
    shown = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading, justify in _HEADINGS.items():
        shown.add_column(heading, justify=justify, no_wrap=heading != "NOTE")
    for model in models:
        for row in _rows(model):
            shown.add_row(*row)
    return shown


def _rows(model: Body) -> Iterator[list[Text]]:
    replicas = model["replicas"]
    yield _cells(model, model["name"], replicas)
    if len(replicas) > 1:
        for replica in replicas:
            yield _cells(replica, f"  {model['name']}/{replica['number']}", [replica])


def _cells(one: Body, name: str, replicas: Sequence[Body]) -> list[Text]:
    """The row of a model or of one replica, which has no request counts."""
    devices = dict.fromkeys(str(each) for replica in replicas for each in replica["devices"])
    held = sum(replica["gpu_bytes"] or 0 for replica in replicas)
    wake_s = replicas[0]["wake_s"] if len(replicas) == 1 else None
    return [
        Text(name),
        Text(one["state"], style=_STYLES.get(one["state"], "yellow")),
        Text(one["level"]),
        Text(str(one.get("in_flight", ""))),
        Text(str(one.get("queued", ""))),
        Text(span(one["idle_s"]) if "idle_s" in one else ""),
        Text(",".join(devices) or "-"),
        Text(f"{held / GIB:.1f}" if held else "-"),
        Text("-" if wake_s is None else f"{wake_s:.1f}"),
        Text(str(one.get("swaps", ""))),
        Text(one["note"]),
    ]


def span(seconds: float) -> str:
    """A duration in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
