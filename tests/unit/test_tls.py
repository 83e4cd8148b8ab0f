"""Certificates and keys as openssl writes them."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from llmserve.errors import ConfigError
from llmserve.registry import tls
from llmserve.registry.loader import load
from llmserve.registry.spec import ServerSpec
from llmserve.server import process as server

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates with their keys; `b.key` has a pass phrase."""
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


def problems(certificate: Path, key: Path) -> list[str]:
    """What `load` reports for a registry with these files."""
    registry = certificate.parent / "models.yaml"
    (certificate.parent / "m").mkdir(exist_ok=True)
    registry.write_text(
        f"server: {{ssl_certfile: {certificate}, ssl_keyfile: {key}}}\nmodels: {{chat: {{model: m}}}}\n"
    )
    try:
        load(registry)
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize("certificate", ["a.pem", "chain.pem"])
def test_certificate_with_its_key_is_used(pems: Path, certificate: str) -> None:
    spec = ServerSpec(ssl_certfile=pems / certificate, ssl_keyfile=pems / "a.key")
    assert problems(pems / certificate, pems / "a.key") == []
    assert server._uvicorn_config(spec, object()).is_ssl


@pytest.mark.parametrize(
    ("certificate", "key", "words"),
    [
        ("a.pem", "b.key", r"ssl_keyfile: .*b\.key has a pass phrase, .*openssl pkey"),
        ("b.pem", "b.key", r"ssl_keyfile: .*b\.key has a pass phrase"),
        ("b.pem", "a.key", r"a\.key is not the key of the first certificate in .*b\.pem; put"),
        ("wrong.pem", "a.key", "put the server's own certificate first"),
        ("a.key", "a.key", r"ssl_certfile: .*a\.key must contain a CERTIFICATE in PEM; .* PRIVATE"),
        ("a.pem", "a.pem", r"ssl_keyfile: .* a PRIVATE KEY in PEM; it contains CERTIFICATE"),
        ("text", "a.key", "it contains no PEM block"),
        (
            "a.pem",
            "torn.key",
            r"ssl_certfile: .*a\.pem cannot be used with ssl_keyfile .*torn\.key: ",
        ),
        ("none", "a.key", r"ssl_certfile: no such file: .*none"),
    ],
)
def test_unusable_certificate_or_key_is_a_problem(
    pems: Path, certificate: str, key: str, words: str
) -> None:
    (problem,) = problems(pems / certificate, pems / key)
    assert re.match(rf"models.yaml:1: server\..*{words}", problem)


def test_unusable_certificate_and_key_are_two_problems(pems: Path) -> None:
    assert len(problems(pems / "a.key", pems / "a.pem")) == 2


def test_unreadable_key_is_a_problem(pems: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(pems), "read_text", refuse)
    found = tls.problems(pems / "a.pem", pems / "a.key")
    assert found["ssl_keyfile"] == f"{pems / 'a.key'} cannot be read: Permission denied"


def test_check_does_not_prompt_for_a_pass_phrase(pems: Path) -> None:
    """On a terminal, where OpenSSL would prompt."""
    code = (
        "from pathlib import Path\nfrom llmserve.registry import tls\n"
        f"folder = Path({str(pems)!r})\n"
        "if tls.problems(folder / 'b.pem', folder / 'b.key'): print('refused')\n"
    )
    master, slave = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=slave, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b"refused\n"
    os.close(master)
    os.close(slave)
