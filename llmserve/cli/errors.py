"""Errors of commands that talk to a server. Without httpx, so that `check` need not import it."""

from __future__ import annotations


class CommandError(Exception):
    """An error message that ends a command."""

    exit_code = 1


class Refused(CommandError):
    """The server returned an error or an unexpected answer."""


class InvalidRegistry(Refused):
    """All problems of a reloaded registry, one line each."""

    exit_code = 2


class NoServer(CommandError):
    """The server cannot be reached, or it ended."""

    exit_code = 3

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url}: {reason}; name another server with --url or LLMSERVE_URL")
