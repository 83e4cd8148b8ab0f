"""A chat in the terminal with llmserve or another server with OpenAI's API."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TextIO, TypedDict

from llmserve.api.endpoint_id import EndpointId
from llmserve.cli.client import Client, error_message, sse_data
from llmserve.cli.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

HELP = """\
!!reset        start a new conversation with the same system message
!!regen        regenerate the last answer
!!remove       remove the last message and its answer
!!save FILE    save the conversation as JSON
!!load FILE    load a saved conversation
!!model NAME   change the model; without NAME, list the models
!!system TEXT  set the system message; without TEXT, remove it
!!exit         leave; also Ctrl-D, or Ctrl-C twice
Ctrl-C stops an answer. With --multiline, Ctrl-D sends a message."""
ROLES = ("system", "user", "assistant")
_CHAT = EndpointId.CHAT_COMPLETIONS
_LIST_S = 10  # for the list of models

# Control characters of a model's answer must not control the terminal: they become visible.
_VISIBLE = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\t\n"}
_VISIBLE |= dict.fromkeys(range(0x7F, 0xA0), "\N{REPLACEMENT CHARACTER}")


@dataclass(frozen=True)
class ChatOptions:
    model: str | None = None  # None: the only model, or the user chooses
    url: str = "http://127.0.0.1:8000"
    key: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    multiline: bool = False


class Message(TypedDict):
    role: str
    content: str
    cut: NotRequired[bool]  # stopped by the user


@dataclass(frozen=True)
class Delta:
    content: str = ""
    reasoning: str = ""
    tokens: int | None = None  # of the answer so far, if the server counts them
    finish: str | None = None


def parse_delta(data: str) -> Delta:
    """Read one event. Raises CommandError for an error or an invalid chunk."""
    try:
        chunk = json.loads(data)
        if chunk.get("error"):
            raise CommandError(error_message(chunk))
        choice = (chunk.get("choices") or [{}])[0]
        delta = choice.get("delta") or {}
        return Delta(
            content=delta.get("content") or "",
            reasoning=delta.get("reasoning") or delta.get("reasoning_content") or "",
            tokens=(chunk.get("usage") or {}).get("completion_tokens"),
            finish=choice.get("finish_reason"),
        )
    except (ValueError, TypeError, AttributeError):
        raise CommandError(f"invalid chat chunk from the server: {data[:200]}") from None


@dataclass
class Conversation:
    """Each command returns a message for the user, or raises and changes nothing."""

    system: str = ""
    messages: list[Message] = field(default_factory=list)  # without the system message

    def head(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def last_question(self) -> int:
        for i in reversed(range(len(self.messages))):
            if self.messages[i]["role"] == "user":
                return i
        raise CommandError("the conversation has no message yet")

    def reset(self, _: str = "") -> str:
        self.messages = []
        return "New conversation."

    def remove(self, _: str = "") -> str:
        self.messages = self.messages[: self.last_question()]
        return f"Removed the last message; {len(self.messages)} messages remain."

    def set_system(self, text: str) -> str:
        self.system = text
        return "System message set." if text else "System message removed."

    def save(self, file: str) -> str:
        text = json.dumps(self.head() + self.messages, ensure_ascii=False, indent=2) + "\n"
        Path(file).expanduser().write_text(text, encoding="utf-8", errors="replace")
        return f"Saved {len(self.messages)} messages to {file}."

    def load(self, file: str) -> str:
        try:
            loaded = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
            valid = all(m["role"] in ROLES and isinstance(m["content"], str) for m in loaded)
        except (ValueError, TypeError, KeyError):
            valid = False
        if not valid:
            raise CommandError(
                f"{file}: not a conversation; expected a list of "
                f"{{role: {'|'.join(ROLES)}, content: text}}"
            )
        has_system = bool(loaded) and loaded[0]["role"] == "system"
        self.system = loaded[0]["content"] if has_system else ""
        self.messages = loaded[has_system:]
        return f"Loaded {len(self.messages)} messages from {file}."


@dataclass
class Answer:
    """A streamed answer; times are seconds of one clock."""

    sent_s: float
    content: str = ""
    tokens: int | None = None
    finish: str | None = None
    times_s: list[float] = field(default_factory=list)  # of each part, with the reasoning

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
        return text + (", stopped at the token limit" if self.finish == "length" else "")


class ChatClient(Client):
    """A client of `/v1`."""

    def __init__(self, options: ChatOptions, timeout_s: float = 600) -> None:
        super().__init__(options.url, options.key, "LLMSERVE_KEY")
        self._timeout_s = timeout_s
        sampling = {"temperature": options.temperature, "max_tokens": options.max_tokens}
        self._sampling = {k: v for k, v in sampling.items() if v is not None}

    def models(self) -> list[str]:
        """List the ids of all models, without those that llmserve lists as unable to chat."""
        return self.fetch("GET", "v1/models", _chat_models, timeout_s=_LIST_S)

    def answer(self, model: str, messages: Sequence[Message]) -> Generator[Delta]:
        body = self._sampling | {
            "model": model,
            "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with self.stream(
            "POST", "v1/chat/completions", body=body, timeout_s=self._timeout_s
        ) as reply:
            if "text/event-stream" not in reply.headers.get("content-type", ""):
                raise CommandError(f"{reply.url} did not return an event stream")
            finished = False
            for data in sse_data(reply.iter_bytes()):
                if data.strip() == "[DONE]":
                    return
                delta = parse_delta(data)
                finished = finished or delta.finish is not None
                yield delta
            if not finished:
                raise CommandError("the stream ended before the answer was complete")


def _chat_models(answer: Any) -> list[str]:
    # Other servers list no endpoints.
    return [card["id"] for card in answer["data"] if _CHAT in card.get("endpoints", [_CHAT])]


@dataclass
class Loop:
    """Messages and commands; without a terminal, only answers are written to `out`."""

    client: ChatClient
    options: ChatOptions
    read: Callable[[str], str]  # prompt to line; EOFError at the end
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
        """Choose the model. Raises CommandError without a server or a chat model."""
        models = self.client.models()
        if not self.options.model and not models:
            raise CommandError("the server has no chat model")
        self.model = self.options.model or models[0]
        if not self.options.model and len(models) > 1:
            if self.interactive:
                self.model = self._pick(models)
            else:
                self.note(f"Model: {self.model}, the first of {', '.join(models)}")
        if self.interactive:
            self.note(f"Model: {self.model} at {self.client.url}; !!help lists the commands.")

    def run(self) -> None:
        """Process the input to its end; without a terminal, Ctrl-C raises KeyboardInterrupt."""
        warned = False
        while True:
            try:
                text = self._read_message()
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
                self.note("To leave: Ctrl-C again, Ctrl-D or !!exit.")

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
        """End the line on which the terminal shows ^C or ^D."""
        self.write("\n" if self.interactive else "")

    def _read_message(self) -> str:
        lines = [self.read("> ")]
        try:
            while self.options.multiline and not lines[0].startswith("!!"):
                lines.append(self.read(". "))
        except EOFError:
            self._break_line()
        return "\n".join(lines)

    def _handle(self, text: str) -> None:
        try:
            message = self._command(text) if text.startswith("!!") else self._ask(text)
            if self.interactive:
                self.note(message)
        except (CommandError, OSError, RuntimeError) as error:  # RuntimeError: `~` without a home
            self.error(error)

    def _command(self, text: str) -> str:
        name, _, argument = text.strip().partition(" ")
        if name not in self._commands:
            raise CommandError(f"unknown command {name}; !!help lists the commands")
        return self._commands[name](argument.strip())

    def _ask(self, text: str) -> str:
        return self._answer([*self.conversation.messages, {"role": "user", "content": text}])

    def _answer(self, asked: list[Message]) -> str:
        """Stream the answer; if it fails, the conversation does not change."""
        answer = Answer(sent_s=time.perf_counter())
        reply: Message = {"role": "assistant", "content": ""}
        try:
            with closing(
                self.client.answer(self.model, self.conversation.head() + asked)
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
                return "Stopped before the answer began; your message was removed."
            reply["cut"] = True
        reply["content"] = answer.content
        self.conversation.messages = [*asked, reply]
        self._end_line()
        return f"[{'stopped, ' if 'cut' in reply else ''}{answer.summary()}]"

    def _change_model(self, name: str) -> str:
        self.model = name or self.model
        listed = [] if name else [f"  {known}" for known in self.client.models()]
        return "\n".join([*listed, f"Model: {self.model}."])

    def _pick(self, models: Sequence[str]) -> str:
        choices = {str(i): name for i, name in enumerate(models, 1)}
        self.note("\n".join(f"{number:>3}  {name}" for number, name in choices.items()))
        while (choice := self.read("Which model? ").strip()) not in choices:
            pass
        return choices[choice]


def chat(options: ChatOptions) -> int:
    """Chat until the user leaves or the input ends; return the exit code.

    1: the server did not answer at the start, or, without a terminal, a message failed.
    130: Ctrl-C before the conversation began or without a terminal.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401, PLC0415  # line editing and history for input()

    def read_pipe(_: str) -> str:
        if line := sys.stdin.readline():
            return line.removesuffix("\n")
        raise EOFError

    read = input if interactive else read_pipe
    try:
        client = ChatClient(options)
    except CommandError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    with closing(client):
        loop = Loop(client, options, read, sys.stdout, sys.stderr, interactive)
        try:
            loop.start()
            loop.run()
        except CommandError as error:
            loop.error(error)
            return 1
        except (EOFError, KeyboardInterrupt):
            return 130
        return int(loop.failed and not interactive)
