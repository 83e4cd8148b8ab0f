"""A folder of a server's own for what must end with it: sockets, and marks of its processes.

The server holds a lock on it. A folder whose lock is free is a dead server's, and the next
start removes it, with what that server's processes left in shared memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, MutableMapping

SOCKETS = "VLLM_RPC_BASE_PATH"  # where vLLM puts its sockets, each with 36 characters
_NAME = "llmserve-"
_LOCK = "lock"
_SOCKET_BYTES = 107  # of a path; sockaddr_un has one more for its end
_TEMPORARY = ("TMPDIR", "TEMP", "TMP")  # in the order of Python's tempfile
_SHARED = Path("/dev/shm")  # noqa: S108  # as POSIX shared memory is named on Linux


class RunFolder:
    def __init__(self, path: Path, lock: int, env: MutableMapping[str, str]) -> None:
        self.path = path
        self._lock = lock
        self._env = env
        self._before = env.get(SOCKETS)
        env[SOCKETS] = str(path)

    @classmethod
    def make(cls, env: MutableMapping[str, str] = os.environ) -> RunFolder:
        """Make one, tell it to vLLM, and remove those of dead servers. Raises StartupError."""
        _require_temporary(env)
        bases = _bases(env)
        for base in bases:
            _sweep(base)
        for base in bases:
            with contextlib.suppress(OSError):
                return cls(*_made(base), env)
        raise StartupError(
            f"no folder for sockets: one of {', '.join(map(str, bases)) or 'TMPDIR, /tmp'} must be "
            f"writable, and its path have at most {_longest()} bytes; set {SOCKETS} to such a folder"
        )

    def remove(self) -> None:
        """At the server's end, once its engines have ended."""
        del self._env[SOCKETS]
        if self._before is not None:
            self._env[SOCKETS] = self._before
        _remove(self.path, _marks(self.path))
        with contextlib.suppress(OSError):
            os.close(self._lock)


def mark(env: Mapping[str, str] = os.environ) -> None:
    """Note this process, one of an engine's, and clear up after those that have ended."""
    folder = Path(env.get(SOCKETS, ""))
    if folder.name.startswith(_NAME) and (folder / _LOCK).exists():
        (folder / str(os.getpid())).touch()
        for pid in _marks(folder):
            if not _lives(pid):
                _clear(pid)
                (folder / str(pid)).unlink(missing_ok=True)


def _require_temporary(env: Mapping[str, str]) -> None:
    for name in _TEMPORARY:
        if not env.get(name):
            continue
        try:
            with tempfile.TemporaryFile(dir=env[name]):
                pass
        except OSError as error:
            raise StartupError(
                f"{name} is {env[name]}, where no file can be made: {error.strerror}; "
                f"make it a writable folder or unset {name}"
            ) from None


def _bases(env: Mapping[str, str]) -> list[Path]:
    """Where a run folder may be: what was asked for first, if a socket's path is short enough."""
    named = [env.get(name, "") for name in (SOCKETS, *_TEMPORARY, "XDG_RUNTIME_DIR")]
    usual = ["/tmp", "/var/tmp", str(_SHARED)]  # noqa: S108  # `_made` makes a private folder
    bases = [Path(each).absolute() for each in (*named, *usual) if each]
    return [each for each in dict.fromkeys(bases) if len(os.fsencode(each)) <= _longest()]


def _longest() -> int:
    return _SOCKET_BYTES - len(f"/{_NAME}{secrets.token_hex(4)}/") - 36


def _made(base: Path) -> tuple[Path, int]:
    """A private folder, locked before it has the name that others look for. Raises OSError."""
    hidden = Path(tempfile.mkdtemp(prefix=f".{_NAME}", dir=base))
    lock = os.open(hidden / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return hidden.rename(base / f"{_NAME}{secrets.token_hex(4)}"), lock


def _sweep(base: Path) -> None:
    """Remove the folders of this user's dead servers."""
    for folder in _folders(base):
        with contextlib.suppress(OSError):
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder, (pid for pid in _marks(folder) if not _lives(pid)))
            finally:
                os.close(lock)


def _folders(base: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError), os.scandir(base) as found:
        for each in found:
            is_own = each.name.startswith(_NAME) and each.is_dir(follow_symlinks=False)
            if is_own and each.stat(follow_symlinks=False).st_uid == os.getuid():
                yield Path(each.path)


def _marks(folder: Path) -> list[int]:
    try:
        return [int(each.name) for each in folder.iterdir() if each.name.isdecimal()]
    except OSError:
        return []


def _remove(folder: Path, ended: Iterable[int]) -> None:
    for pid in ended:
        _clear(pid)
    shutil.rmtree(folder, ignore_errors=True)


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _clear(pid: int) -> None:
    """Remove what Intel's and LLVM's OpenMP leave of a process that was killed."""
    with contextlib.suppress(OSError):
        (_SHARED / f"__KMP_REGISTERED_LIB_{pid}_{os.getuid()}").unlink()
