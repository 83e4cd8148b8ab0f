"""Certificates and keys as openssl writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from llmserve.errors import StartupError
from llmserve.registry.spec import ServerSpec
from llmserve.server import process as server
from llmserve.server import tls

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two certificates with their keys; the second key has a pass phrase."""
    folder = tmp_path_factory.mktemp("tls")
    for name, options in (("a", "-nodes"), ("b", "-passout pass:secret")):
        line = f"openssl req -x509 -newkey rsa:2048 -subj /CN={name} {options}".split()
        files = ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem")]
        subprocess.run([*line, *files], check=True, capture_output=True)
    a, b = ((folder / f"{name}.pem").read_text() for name in "ab")
    (folder / "chain.pem").write_text(a + b)
    (folder / "wrong.pem").write_text(b + a)
    (folder / "text").write_text("no certificate")
    (folder / "torn.key").write_text((folder / "a.key").read_text()[:300])
    return folder


@pytest.mark.parametrize("certificate", ["a.pem", "chain.pem"])
def test_certificate_with_its_key_is_used(pems: Path, certificate: str) -> None:
    spec = ServerSpec(ssl_certfile=pems / certificate, ssl_keyfile=pems / "a.key")
    assert server._uvicorn_config(spec, object()).is_ssl


@pytest.mark.parametrize(
    ("certificate", "key", "words"),
    [
        ("a.pem", "b.key", r"ssl_keyfile .*b\.key has a pass phrase, .*openssl pkey"),
        ("b.pem", "b.key", r"ssl_keyfile .*b\.key has a pass phrase"),
        ("b.pem", "a.key", r"a\.key is not the key of the first certificate in .*b\.pem; put"),
        ("wrong.pem", "a.key", "put the server's own certificate first"),
        ("a.key", "a.pem", r"ssl_certfile .*a\.key must contain a CERTIFICATE in PEM; .* PRIVATE"),
        (
            "a.pem",
            "a.pem",
            r"ssl_keyfile .* must contain a PRIVATE KEY in PEM; it contains CERTIFICATE",
        ),
        ("text", "a.key", "it contains no PEM block"),
        ("a.pem", "torn.key", "cannot be used: "),
        ("none", "a.key", r"ssl_certfile .*none cannot be read: No such file"),
        ("a.pem", ".", r"ssl_keyfile .* cannot be read: Is a directory"),
    ],
)
def test_unusable_certificate_or_key_is_an_error(
    pems: Path, certificate: str, key: str, words: str
) -> None:
    with pytest.raises(StartupError, match=words):
        tls.require_usable(pems / certificate, pems / key)


def test_server_does_not_prompt_for_a_pass_phrase(pems: Path, tmp_path: Path) -> None:
    """On a terminal, where OpenSSL would prompt."""
    code = (
        "from pathlib import Path\nfrom llmserve.registry.spec import ServerSpec\n"
        "from llmserve.errors import StartupError\nfrom llmserve.server.process import _uvicorn_config\n"
        f"folder = Path({str(pems)!r})\n"
        "spec = ServerSpec(ssl_certfile=folder / 'b.pem', ssl_keyfile=folder / 'b.key')\n"
        "try:\n    _uvicorn_config(spec, object())\nexcept StartupError: print('refused')\n"
    )
    master, slave = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=slave, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b"refused\n"
    os.close(master)
    os.close(slave)
