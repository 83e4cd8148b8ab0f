"""Looking at a running server and steering it: the client side of `admin`."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import httpx
from rich.table import Table
from rich.text import Text

from llmserve import terminal
from llmserve.cli.client import SettingError, connected, error_message, sse_data, url_of
from llmserve.gpus.device import GIB

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_CONNECT_S = 10
_ANSWER_S = 30  # for what is known at once
_QUIET_S = 60  # without an event or a ping: the server is gone
_WIDE = 10_000  # columns, where no terminal cuts lines
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


class Refused(Exception):
    """Why there is no answer, in the server's words if it had any."""

    exit_code = 1


class BadRegistry(Refused):
    """Every problem of the file, a line each."""

    exit_code = 2


class NoServer(Refused):
    exit_code = 3

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"{url}: {why}; name another server with --url or LLMSERVE_URL")


class AdminClient:
    """HTTP to one server; whatever keeps a method from its answer is Refused."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url_of(url)
        try:
            self._http = connected(self.url, key)
        except SettingError as error:
            raise NoServer(self.url, str(error)) from None

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[Body]:
        answer = self._answer("GET", "models", "models", within_s=_ANSWER_S)
        models: list[Body] = answer["models"]
        return models

    def steer(self, action: str, name: str, body: Body) -> Body:
        """The model as it is then; that can take minutes."""
        return self._answer("POST", f"{_model(name)}/{action}", "state", body)

    def reload(self, *, dry_run: bool) -> Body:
        return self._answer("POST", "reload", "lines", {"dry_run": dry_run})

    def events(self) -> Iterator[Body]:
        """Raises NoServer at the end, which only the server's own brings."""
        with self._stream("events", _QUIET_S, {}) as reply:
            for data in sse_data(reply.iter_bytes()):
                happened = json.loads(data)
                if "error" in happened:
                    raise Refused(error_message(happened))
                yield happened
        raise NoServer(self.url, "the server has ended")

    def log(self, name: str, *, lines: int, replica: int, follow: bool) -> Iterator[bytes]:
        """The text in parts; following, it ends as `events` does."""
        query = {"lines": lines, "replica": replica, "follow": follow}
        with self._stream(f"{_model(name)}/logs", None, query) as reply:
            yield from reply.iter_bytes()
        if follow:
            raise NoServer(self.url, "the server has ended")

    def _answer(
        self,
        method: str,
        path: str,
        holds: str,
        body: Body | None = None,
        within_s: float | None = None,
    ) -> Body:
        """An object with the key `holds`."""
        with self._explained():
            reply = self._http.request(
                method,
                f"{self.url}/admin/{path}",
                json=body,
                timeout=httpx.Timeout(within_s, connect=_CONNECT_S),
            )
            _check(reply)
            try:
                answer = reply.json()
            except ValueError:
                answer = None
        if not isinstance(answer, dict) or holds not in answer:
            raise Refused(f"{reply.url} did not answer as llmserve does; is --url right?")
        return answer

    @contextmanager
    def _stream(
        self, path: str, quiet_s: float | None, query: dict[str, int | bool]
    ) -> Iterator[httpx.Response]:
        timeout = httpx.Timeout(quiet_s, connect=_CONNECT_S)
        with (
            self._explained(),
            self._http.stream(
                "GET", f"{self.url}/admin/{path}", params=query, timeout=timeout
            ) as reply,
        ):
            _check(reply)
            yield reply

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException:
            raise NoServer(self.url, "no answer in time") from None
        except httpx.ConnectError as error:
            raise NoServer(self.url, f"no server answers ({error})") from None
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise NoServer(self.url, f"the request failed ({error})") from None


def _model(name: str) -> str:
    """The path of a model; the server merges slashes that are not escaped."""
    plain = name == "/".join(filter(None, name.split("/")))
    # In a locale without UTF-8 an argument's bytes come as lone surrogates.
    return f"models/{quote(name, safe='/' if plain else '', errors='surrogateescape')}"


def _check(reply: httpx.Response) -> None:
    """Raises Refused."""
    if reply.is_success:
        return
    reply.read()
    try:
        body = reply.json()
    except ValueError:
        raise Refused(f"{reply.url}: {reply.status_code} {reply.text[:200]}") from None
    said = error_message(body)
    if _code(body) == "invalid_registry":
        raise BadRegistry(said)
    hint = " Give it with --key or LLMSERVE_ADMIN_KEY." if reply.status_code == 401 else ""
    raise Refused(said + hint)


def _code(body: Any) -> object:
    error = body.get("error") if isinstance(body, dict) else None
    return error.get("code") if isinstance(error, dict) else None


# --- the commands


def ps(client: AdminClient, *, as_json: bool) -> None:
    models = client.models()
    console = terminal.console()
    if as_json:
        console.print_json(data={"models": models}, ensure_ascii=True)
    else:
        console = console if console.is_terminal else terminal.console(width=_WIDE)
        console.print(table(models))


def steer(client: AdminClient, action: str, name: str, body: Body, *, as_json: bool) -> None:
    began = time.monotonic()
    model = client.steer(action, name, body)
    seconds = time.monotonic() - began
    if as_json:
        _say_json(model | {"seconds": round(seconds, 3)})
    else:
        _say(f"{model['name']}: {model['state']} {seconds:.1f} s")


def reload(client: AdminClient, *, dry_run: bool, as_json: bool) -> None:
    answer = client.reload(dry_run=dry_run)
    if as_json:
        _say_json(answer)
    else:
        _say("\n".join(answer["lines"]) or "Nothing has changed.")


def events(client: AdminClient, *, as_json: bool) -> None:
    for each in client.events():
        if as_json:
            _say_json(each)
        else:
            _say(line(each))


def logs(parts: Iterator[bytes], *, as_json: bool) -> None:
    if as_json:
        for text in _lines(parts):
            _say_json({"line": text})
        return
    for part in parts:  # bytes as the engine wrote them
        sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()


def _lines(parts: Iterator[bytes]) -> Iterator[str]:
    """Ended by line feeds alone; str.splitlines() knows more."""
    rest = b""
    for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        for each in whole:
            yield each.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


def _say(text: str) -> None:
    terminal.console().print(text, soft_wrap=True)


def _say_json(value: Body) -> None:
    """In ASCII, which every terminal has."""
    _say(json.dumps(value))


# --- what is shown


def line(event: Body) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
    said = f"{at} {event['model']}/{event['replica']}: {event['from']} -> {event['to']}"
    note = f": {event['note']}" if event["note"] else ""
    lost = f" ({event['lost']} events before it are lost)" if event.get("lost") else ""
    return said + note + lost


def table(models: Sequence[Body]) -> Table:
    """A row for each model, and under one with several replicas a row for each of these."""
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
    """A row: of a model, or of one of its replicas, which has no requests counted."""
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
    """A time in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
