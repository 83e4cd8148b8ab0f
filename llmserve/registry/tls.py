"""The check of `ssl_certfile` and `ssl_keyfile`."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from pathlib import Path

_BEGIN = "-----BEGIN "


class _PassPhraseNeeded(Exception):
    pass


def problems(certificate: Path, key: Path) -> dict[str, str]:
    """Return what is wrong with the two files, by key of `server`; {} if both can be used."""
    files = {"ssl_certfile": (certificate, "CERTIFICATE"), "ssl_keyfile": (key, "PRIVATE KEY")}
    found = {name: problem for name, each in files.items() if (problem := _pem_problem(*each))}
    if found:
        return found
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without the callback OpenSSL would prompt for a pass phrase.
        context.load_cert_chain(certificate, key, _refuse)
    except _PassPhraseNeeded:
        return {
            "ssl_keyfile": f"{key} has a pass phrase, which is not supported; "
            f"remove it: openssl pkey -in {key} -out KEY.pem"
        }
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            return {
                "ssl_keyfile": f"{key} is not the key of the first certificate in "
                f"ssl_certfile {certificate}; put the server's own certificate first"
            }
        return {"ssl_certfile": f"{certificate} cannot be used with ssl_keyfile {key}: {error}"}
    return {}


def _refuse() -> NoReturn:
    raise _PassPhraseNeeded


def _pem_problem(file: Path, kind: str) -> str | None:
    """Return why a file has no PEM block of a kind."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    found = [line.strip("\ufeff -").removeprefix("BEGIN ") for line in lines if _BEGIN in line]
    if any(each.endswith(kind) for each in found):
        return None
    held = ", ".join(dict.fromkeys(found)) or "no PEM block"
    return f"{file} must contain a {kind} in PEM; it contains {held}"
