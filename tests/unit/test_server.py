from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from llmserve import server
from llmserve.config import ServerSpec
from llmserve.errors import StartupError

if TYPE_CHECKING:
    from pathlib import Path


def test_any_free_port_is_bound_and_listens() -> None:
    with server.bind(ServerSpec(port=0)) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        socket.create_connection((host, port), timeout=2).close()


def test_ipv6_is_an_address_too() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        listener = server.bind(ServerSpec(host="::1", port=0))
    except StartupError as error:
        pytest.skip(f"no IPv6 here: {error.message}")
    with listener:
        assert listener.family == socket.AF_INET6


def test_a_taken_port_is_told_before_anything_loads() -> None:
    with server.bind(ServerSpec(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(StartupError) as refused:
            server.bind(ServerSpec(port=port))
    assert refused.value.message == (
        f"port {port} on 127.0.0.1 cannot be bound: Address already in use; "
        "choose another with --port or end the process that has it"
    )
    assert refused.value.exit_code == 3


@pytest.mark.parametrize(
    "host", ["no-such-host.invalid", "256.256.256.256", "a" * 70, "a..b", "host\0name"]
)
def test_a_host_that_is_no_address_is_told(host: str) -> None:
    with pytest.raises(StartupError, match="is no address here"):
        server.bind(ServerSpec(host=host, port=0))


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_is_none_is_told_and_no_other_is_taken(port: int) -> None:
    """As `--port` gives it."""
    asked = ServerSpec().model_copy(update={"port": port})
    with pytest.raises(StartupError, match=f"port {port}"):
        server.bind(asked).close()


def test_an_address_of_another_machine_is_told() -> None:
    with pytest.raises(StartupError, match=r"203\.0\.113\.7"):
        server.bind(ServerSpec(host="203.0.113.7", port=0))


def test_a_certificate_that_is_none_is_told(tmp_path: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("no certificate", encoding="utf-8")
    tls = ServerSpec(ssl_certfile=tmp_path / "cert.pem", ssl_keyfile=tmp_path / "key.pem")
    with pytest.raises(StartupError, match="the TLS certificate or key cannot be used"):
        server._uvicorn_config(tls, object())


def test_a_log_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with server.bind(ServerSpec(port=0)) as listener:
        spec = ServerSpec(log_dir=tmp_path / "file")
        with pytest.raises(StartupError, match=r"log_dir .* cannot be written"):
            server._log_folder(spec, listener)


def test_what_holds_a_connection_and_no_model_ends_soon_after_the_drain() -> None:
    config = server._uvicorn_config(ServerSpec(drain_timeout=0.5), object())
    assert config.timeout_graceful_shutdown == 3
