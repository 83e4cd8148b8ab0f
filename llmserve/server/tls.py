"""The check of `ssl_certfile` and `ssl_keyfile` before the server starts."""

from __future__ import annotations

import ssl
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from llmserve.errors import StartupError

if TYPE_CHECKING:
    from pathlib import Path

_BEGIN = "-----BEGIN "


def require_usable(certificate: Path, key: Path) -> None:
    """Raise StartupError, with the file, for a certificate or key that cannot be used."""
    _require("server.ssl_certfile", certificate, "CERTIFICATE")
    _require("server.ssl_keyfile", key, "PRIVATE KEY")
    try:
        # Without the callback OpenSSL would prompt for a pass phrase.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            certificate, key, partial(_refuse, key)
        )
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise StartupError(
                f"server.ssl_keyfile {key} is not the key of the first certificate in "
                f"server.ssl_certfile {certificate}; put the server's own certificate first"
            ) from None
        raise StartupError(
            f"the TLS certificate {certificate} or its key {key} cannot be used: {error}"
        ) from None


def _refuse(key: Path) -> NoReturn:
    raise StartupError(
        f"server.ssl_keyfile {key} has a pass phrase, which is not supported; "
        f"remove it: openssl pkey -in {key} -out KEY.pem"
    )


def _require(name: str, file: Path, kind: str) -> None:
    """Raise StartupError for a file without a PEM block of a kind."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise StartupError(f"{name} {file} cannot be read: {error.strerror}") from None
    found = [line.strip("\ufeff -").removeprefix("BEGIN ") for line in lines if _BEGIN in line]
    if not any(each.endswith(kind) for each in found):
        held = ", ".join(dict.fromkeys(found)) or "no PEM block"
        raise StartupError(f"{name} {file} must contain a {kind} in PEM; it contains {held}")
