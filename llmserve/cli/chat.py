"""A chat in the terminal with a running server, ours or any other that speaks OpenAI's API."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TextIO, TypedDict

import httpx

from llmserve.api.endpoint_id import EndpointId
from llmserve.cli.client import SettingError, connected, error_message, sse_data, url_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

HELP = """\
!!reset        start anew, with the same system text
!!regen        answer the last message again
!!remove       forget the last message and its answer
!!save FILE    write the conversation, as JSON
!!load FILE    go on with a saved conversation
!!model NAME   change to this model; without NAME, list them
!!system TEXT  set the system text; without TEXT, have none
!!exit         leave; so do Ctrl-D, and Ctrl-C twice
Ctrl-C stops an answer. With --multiline, Ctrl-D ends a message."""
ROLES = ("system", "user", "assistant")
_CHAT = EndpointId.CHAT_COMPLETIONS

# What a model writes must not drive the terminal: control characters are shown, not obeyed.
_VISIBLE = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\t\n"}
_VISIBLE |= dict.fromkeys(range(0x7F, 0xA0), "\N{REPLACEMENT CHARACTER}")


@dataclass(frozen=True)
class ChatOptions:
    model: str | None = None  # None: the only one, or ask
    url: str = "http://127.0.0.1:8000"
    key: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    multiline: bool = False


class ChatError(Exception):
    """What went wrong, in words for the user."""


class Message(TypedDict):
    role: str
    content: str
    cut: NotRequired[bool]  # stopped by the user


@dataclass(frozen=True)
class Delta:
    content: str = ""
    reasoning: str = ""
    tokens: int | None = None  # of the answer so far, where the server counts them
    finish: str | None = None


def parse_delta(data: str) -> Delta:
    """Read one event; raises ChatError if it is an error, or no chunk of a chat completion."""
    try:
        chunk = json.loads(data)
        if chunk.get("error"):
            raise ChatError(error_message(chunk))
        choice = (chunk.get("choices") or [{}])[0]
        delta = choice.get("delta") or {}
        return Delta(
            content=delta.get("content") or "",
            reasoning=delta.get("reasoning") or delta.get("reasoning_content") or "",
            tokens=(chunk.get("usage") or {}).get("completion_tokens"),
            finish=choice.get("finish_reason"),
        )
    except (ValueError, TypeError, AttributeError):
        raise ChatError(f"the server sent what is no chat chunk: {data[:200]}") from None


@dataclass
class Conversation:
    """Each command returns what to tell the user, or raises and has changed nothing."""

    system: str = ""
    messages: list[Message] = field(default_factory=list)  # without the system text

    def head(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def last_question(self) -> int:
        for i in reversed(range(len(self.messages))):
            if self.messages[i]["role"] == "user":
                return i
        raise ChatError("nothing was asked yet")

    def reset(self, _: str = "") -> str:
        self.messages = []
        return "A new conversation."

    def remove(self, _: str = "") -> str:
        self.messages = self.messages[: self.last_question()]
        return f"Removed; {len(self.messages)} messages left."

    def set_system(self, text: str) -> str:
        self.system = text
        return "System text set." if text else "No system text."

    def save(self, file: str) -> str:
        text = json.dumps(self.head() + self.messages, ensure_ascii=False, indent=2) + "\n"
        Path(file).expanduser().write_text(text, encoding="utf-8", errors="replace")
        return f"{len(self.messages)} messages saved in {file}."

    def load(self, file: str) -> str:
        try:
            loaded = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
            valid = all(m["role"] in ROLES and isinstance(m["content"], str) for m in loaded)
        except (ValueError, TypeError, KeyError):
            valid = False
        if not valid:
            raise ChatError(f"{file} must be a list of {{role: {'|'.join(ROLES)}, content: text}}")
        leads = bool(loaded) and loaded[0]["role"] == "system"
        self.system = loaded[0]["content"] if leads else ""
        self.messages = loaded[leads:]
        return f"{len(self.messages)} messages loaded from {file}."


@dataclass
class Answer:
    """An answer as it comes in; times in seconds of one clock."""

    sent_s: float
    content: str = ""
    tokens: int | None = None
    finish: str | None = None
    times_s: list[float] = field(default_factory=list)  # of each piece, reasoning too

    def add(self, delta: Delta, now_s: float) -> None:
        if delta.content or delta.reasoning:
            self.times_s.append(now_s)
        self.content += delta.content
        self.tokens = delta.tokens if delta.tokens is not None else self.tokens
        self.finish = delta.finish or self.finish

    def summary(self) -> str:
        tokens = self.tokens if self.tokens is not None else len(self.times_s)
        text = f"{tokens} tokens" if self.tokens is not None else f"~{tokens} tokens"
        if self.times_s:
            first_s, last_s = self.times_s[0], self.times_s[-1]
            if tokens > 1 and last_s > first_s:
                text += f", {(tokens - 1) / (last_s - first_s):.1f} tokens/s"
            text += f", first after {first_s - self.sent_s:.2f} s"
        return text + (", ended by the token limit" if self.finish == "length" else "")


class ChatClient:
    """HTTP to one server; whatever keeps a method from its answer is a ChatError."""

    def __init__(self, options: ChatOptions, timeout_s: float = 600) -> None:
        self.url = url_of(options.url)
        sampling = {"temperature": options.temperature, "max_tokens": options.max_tokens}
        self._sampling = {k: v for k, v in sampling.items() if v is not None}
        try:
            self._http = connected(
                self.url,
                options.key,
                httpx.Timeout(timeout_s, connect=min(timeout_s, 10)),
                # People think for longer than servers keep an idle connection.
                limits=httpx.Limits(max_keepalive_connections=0),
            )
        except SettingError as error:
            raise ChatError(str(error)) from None

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """List the ids of all models but those of llmserve that do not chat."""
        with self._explained():
            reply = self._http.get(f"{self.url}/v1/models", timeout=10)
            _check(reply)
            try:
                # llmserve's list tells what each model can do; others' may chat or not.
                return [
                    card["id"]
                    for card in reply.json()["data"]
                    if _CHAT in card.get("endpoints", [_CHAT])
                ]
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ChatError(f"{reply.url} did not answer with a list of models") from None

    def stream(self, model: str, messages: Sequence[Message]) -> Generator[Delta]:
        body = self._sampling | {
            "model": model,
            "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with (
            self._explained(),
            self._http.stream(
                "POST",
                f"{self.url}/v1/chat/completions",
                content=json.dumps(body),  # escapes a lone surrogate; `json=` fails on it
                headers={"content-type": "application/json"},
            ) as reply,
        ):
            _check(reply)
            if "text/event-stream" not in reply.headers.get("content-type", ""):
                raise ChatError(f"{reply.url} did not answer with an event stream")
            finished = False
            for data in sse_data(reply.iter_bytes()):
                if data.strip() == "[DONE]":
                    return
                delta = parse_delta(data)
                finished = finished or delta.finish is not None
                yield delta
            if not finished:
                raise ChatError("the stream ended before the answer did")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException:
            raise ChatError(f"{self.url} did not answer in time") from None
        except httpx.ConnectError as error:
            raise ChatError(f"no connection to {self.url}: {error}; is it running?") from None
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise ChatError(f"the request to {self.url} failed: {error}") from None


def _check(reply: httpx.Response) -> None:
    if reply.is_success:
        return
    reply.read()
    try:
        said = error_message(reply.json())
    except ValueError:
        said = reply.text[:200] or reply.reason_phrase
    hint = " (give the right key with --key)" if reply.status_code == 401 else ""
    raise ChatError(f"{reply.status_code} from {reply.url}: {said}{hint}")


@dataclass
class Loop:
    """Turns and commands; with nobody at the terminal, answers are all that `out` gets."""

    client: ChatClient
    options: ChatOptions
    read: Callable[[str], str]  # prompt to line; EOFError where there are no more
    out: TextIO
    err: TextIO
    interactive: bool
    model: str = ""
    failed: bool = False
    _line_open: bool = False

    def __post_init__(self) -> None:
        talk = self.conversation = Conversation(self.options.system or "")
        self._commands: dict[str, Callable[[str], str]] = {
            "!!reset": talk.reset,
            "!!regen": lambda _: self._answer(talk.messages[: talk.last_question() + 1]),
            "!!remove": talk.remove,
            "!!save": talk.save,
            "!!load": talk.load,
            "!!model": self._change_model,
            "!!system": talk.set_system,
            "!!help": lambda _: HELP,
        }

    def start(self) -> None:
        """Settle the model; raises ChatError if there is none, no server or no entry."""
        models = self.client.models()
        if not self.options.model and not models:
            raise ChatError("the server has no model that chats")
        self.model = self.options.model or models[0]
        if not self.options.model and len(models) > 1:
            if self.interactive:
                self.model = self._pick(models)
            else:
                self.note(f"Talking to {self.model}, the first of: {', '.join(models)}")
        if self.interactive:
            self.note(f"{self.model} at {self.client.url}; !!help lists the commands.")

    def run(self) -> None:
        """Go on to the end of the input; Ctrl-C passes through if nobody is there."""
        warned = False
        while True:
            try:
                text = self._turn()
                warned = False
                if text.strip() == "!!exit":
                    return
                if text.strip():
                    self._handle(text)
            except EOFError:
                self._break_line()
                return
            except KeyboardInterrupt:
                self._break_line()
                if not self.interactive:
                    raise
                if warned:
                    return
                warned = True
                self.note("Ctrl-C again, Ctrl-D or !!exit leaves.")

    def write(self, text: str, *, dim: bool = False) -> None:
        if text:
            self._line_open = not text.endswith("\n")
            text = text.translate(_VISIBLE) if self.interactive else text
            self.out.write(f"\x1b[2m{text}\x1b[22m" if dim else text)
            self.out.flush()

    def note(self, text: str) -> None:
        self._end_line()
        if self.interactive:
            self.write(f"{text}\n", dim=True)
        else:
            self.err.write(f"{text}\n")

    def error(self, error: Exception) -> None:
        self.failed = True
        self._end_line()
        self.err.write(f"Error: {' '.join(str(error).split())}".translate(_VISIBLE) + "\n")
        self.err.flush()

    def _end_line(self) -> None:
        self.write("\n" if self._line_open else "")

    def _break_line(self) -> None:
        """After a ^C or ^D, which the terminal shows where the cursor was."""
        self.write("\n" if self.interactive else "")

    def _turn(self) -> str:
        lines = [self.read("> ")]
        try:
            while self.options.multiline and not lines[0].startswith("!!"):
                lines.append(self.read(". "))
        except EOFError:
            self._break_line()
        return "\n".join(lines)

    def _handle(self, text: str) -> None:
        try:
            told = self._command(text) if text.startswith("!!") else self._say(text)
            if self.interactive:
                self.note(told)
        except (ChatError, OSError, RuntimeError) as error:  # the last: `~` without a home
            self.error(error)

    def _command(self, text: str) -> str:
        name, _, argument = text.strip().partition(" ")
        if name not in self._commands:
            raise ChatError(f"no command {name}; !!help lists them")
        return self._commands[name](argument.strip())

    def _say(self, text: str) -> str:
        return self._answer([*self.conversation.messages, {"role": "user", "content": text}])

    def _answer(self, asked: list[Message]) -> str:
        """Stream the answer; without one, the conversation stays as it was."""
        answer = Answer(sent_s=time.perf_counter())
        reply: Message = {"role": "assistant", "content": ""}
        try:
            with closing(
                self.client.stream(self.model, self.conversation.head() + asked)
            ) as deltas:
                for delta in deltas:
                    self.write(delta.reasoning if self.interactive else "", dim=True)
                    if delta.content and not answer.content:
                        self._end_line()  # of the reasoning
                    answer.add(delta, time.perf_counter())
                    self.write(delta.content)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self._break_line()
            if not answer.content:
                return "Stopped before the answer; your message is taken back."
            reply["cut"] = True
        reply["content"] = answer.content
        self.conversation.messages = [*asked, reply]
        self._end_line()
        return f"[{'stopped, ' if 'cut' in reply else ''}{answer.summary()}]"

    def _change_model(self, name: str) -> str:
        self.model = name or self.model
        listed = [] if name else [f"  {known}" for known in self.client.models()]
        return "\n".join([*listed, f"Talking to {self.model}."])

    def _pick(self, models: Sequence[str]) -> str:
        choices = {str(i): name for i, name in enumerate(models, 1)}
        self.note("\n".join(f"{number:>3}  {name}" for number, name in choices.items()))
        while (choice := self.read("Which model? ").strip()) not in choices:
            pass
        return choices[choice]


def chat(options: ChatOptions) -> int:
    """Chat until the user leaves or the input ends; returns the exit code.

    1: no talking to the server at the start or, where the input is no terminal, anything
    failed. 130: Ctrl-C there, or before the conversation began.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401, PLC0415  # gives input() line editing and a history

    def read_pipe(_: str) -> str:
        if line := sys.stdin.readline():
            return line.removesuffix("\n")
        raise EOFError

    read = input if interactive else read_pipe
    try:
        client = ChatClient(options)
    except ChatError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    with closing(client):
        loop = Loop(client, options, read, sys.stdout, sys.stderr, interactive)
        try:
            loop.start()
            loop.run()
        except ChatError as error:
            loop.error(error)
            return 1
        except (EOFError, KeyboardInterrupt):
            return 130
        return int(loop.failed and not interactive)
