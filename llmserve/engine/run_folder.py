"""A server's folder for its sockets and for a file per engine process.

The server holds a lock on the folder. A folder with a free lock belongs to a dead server: the next
start removes it and what that server's processes left in shared memory.
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

SOCKETS = "VLLM_RPC_BASE_PATH"  # vLLM's folder for sockets, whose names have 36 characters
_NAME = "llmserve-"
_LOCK = "lock"
_SOCKET_BYTES = 107  # of a path in sockaddr_un, without its final zero
_TEMPORARY = ("TMPDIR", "TEMP", "TMP")  # in the order of Python's tempfile
_SHARED = Path("/dev/shm")  # noqa: S108  # POSIX shared memory on Linux


class RunFolder:
    def __init__(self, path: Path, lock: int, env: MutableMapping[str, str]) -> None:
        self.path = path
        self._lock = lock
        self._env = env
        self._before = env.get(SOCKETS)
        env[SOCKETS] = str(path)

    @classmethod
    def make(cls, env: MutableMapping[str, str] = os.environ) -> RunFolder:
        """Create a folder, set it for vLLM, and remove those of dead servers. Raises StartupError."""
        _require_temporary(env)
        bases = _bases(env)
        for base in bases:
            _sweep(base)
        for base in bases:
            with contextlib.suppress(OSError):
                return cls(*_create(base), env)
        raise StartupError(
            f"no folder for sockets: {', '.join(map(str, bases)) or 'TMPDIR, /tmp'}: not writable or "
            f"path too long; set {SOCKETS} to a writable folder with a path of at most "
            f"{_longest()} bytes"
        )

    def remove(self) -> None:
        """Remove the folder, after the server's engines have ended."""
        del self._env[SOCKETS]
        if self._before is not None:
            self._env[SOCKETS] = self._before
        _remove(self.path, _registered(self.path))
        with contextlib.suppress(OSError):
            os.close(self._lock)


def register_process(env: Mapping[str, str] = os.environ) -> None:
    """Register this engine process, and clean up after those that have ended."""
    folder = Path(env.get(SOCKETS, ""))
    if folder.name.startswith(_NAME) and (folder / _LOCK).exists():
        (folder / str(os.getpid())).touch()
        for pid in _registered(folder):
            if not _is_alive(pid):
                _remove_openmp_file(pid)
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
                f"cannot create a file in {name}={env[name]}: {error.strerror}; "
                f"set {name} to a writable folder or unset it"
            ) from None


def _bases(env: Mapping[str, str]) -> list[Path]:
    """Return the candidates for parent folders, explicit ones first, with paths short enough."""
    named = [env.get(name, "") for name in (SOCKETS, *_TEMPORARY, "XDG_RUNTIME_DIR")]
    usual = ["/tmp", "/var/tmp", str(_SHARED)]  # noqa: S108  # `_create` creates a private folder
    bases = [Path(each).absolute() for each in (*named, *usual) if each]
    return [each for each in dict.fromkeys(bases) if len(os.fsencode(each)) <= _longest()]


def _longest() -> int:
    return _SOCKET_BYTES - len(f"/{_NAME}{secrets.token_hex(4)}/") - 36


def _create(base: Path) -> tuple[Path, int]:
    """Create a private folder, locked before it has its final name. Raises OSError."""
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
                _remove(folder, (pid for pid in _registered(folder) if not _is_alive(pid)))
            finally:
                os.close(lock)


def _folders(base: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError), os.scandir(base) as found:
        for each in found:
            is_own = each.name.startswith(_NAME) and each.is_dir(follow_symlinks=False)
            if is_own and each.stat(follow_symlinks=False).st_uid == os.getuid():
                yield Path(each.path)


def _registered(folder: Path) -> list[int]:
    try:
        return [int(each.name) for each in folder.iterdir() if each.name.isdecimal()]
    except OSError:
        return []


def _remove(folder: Path, ended: Iterable[int]) -> None:
    for pid in ended:
        _remove_openmp_file(pid)
    shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _remove_openmp_file(pid: int) -> None:
    """Remove the file that Intel's and LLVM's OpenMP keep of a killed process."""
    with contextlib.suppress(OSError):
        (_SHARED / f"__KMP_REGISTERED_LIB_{pid}_{os.getuid()}").unlink()
