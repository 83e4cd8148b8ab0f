from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from llmserve.errors import Forbidden, Unauthorized
from llmserve.http import auth
from llmserve.registry.spec import ServerSpec

if TYPE_CHECKING:
    from starlette.types import Scope

CHAT = "/v1/chat/completions"
FAR = ("10.0.0.7", 1)
KEYS = ServerSpec(api_keys=("k-one", "k-two"))
PAGES = ServerSpec(allowed_origins=("https://chat.example", "http://ui.example:3000"))


# --- /admin


def scope_of(
    headers: list[tuple[str, str]] | None = None,
    client: tuple[str, int] | None = ("127.0.0.1", 1),
    *,
    method: str = "GET",
    path: str = "/admin/models",
) -> Scope:
    headers = [("host", "127.0.0.1:8000")] if headers is None else headers
    raw = [(name.encode(), value.encode()) for name, value in headers]
    return {"type": "http", "method": method, "path": path, "client": client, "headers": raw}


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "127.0.0.1:8000",
        "127.1.2.3",
        "[::1]:8000",
        "[::1]",
        "[::ffff:127.0.0.1]:1",
    ],
)
@pytest.mark.parametrize("client", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_admin_without_a_key_serves_this_machine(host: str, client: str) -> None:
    auth.check(scope_of([("host", host), ("sec-fetch-site", "none")], (client, 1)), ServerSpec())


@pytest.mark.parametrize(
    "client",
    [
        None,
        ("10.0.0.7", 1),
        ("::ffff:10.0.0.7", 1),
        ("fe80::1%eth0", 1),
        ("testclient", 1),
        ("", 0),
    ],
)
def test_admin_without_a_key_refuses_other_machines(client: tuple[str, int] | None) -> None:
    with pytest.raises(Forbidden, match=r"is not a loopback address.*server\.admin_key"):
        auth.check(scope_of(client=client), ServerSpec())


@pytest.mark.parametrize(
    "name",
    [
        *("Origin", "Forwarded", "Via", "X-Real-IP"),
        *("X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"),
    ],
)
def test_admin_without_a_key_refuses_pages_and_proxies(name: str) -> None:
    headers = [("host", "localhost"), (name.lower(), "http://localhost")]
    with pytest.raises(Forbidden, match=rf"(?i)`{name}`.*Set server") as refused:
        auth.check(scope_of(headers), ServerSpec())
    assert refused.value.code == "admin_only"


@pytest.mark.parametrize("site", ["cross-site", "same-site", "same-origin"])
def test_admin_without_a_key_refuses_images_of_pages(site: str) -> None:
    with pytest.raises(Forbidden, match="A web page"):
        auth.check(scope_of([("host", "localhost"), ("sec-fetch-site", site)]), ServerSpec())


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        [""],
        ["evil.example:8000"],
        ["localhost.evil.example"],
        ["127.0.0.1.nip.io"],
        ["evil@localhost"],
        ["localhost:80:80"],
        ["localhost/x"],
        ["[::1"],
        ["10.0.0.7"],
        ["0.0.0.0"],
        ["localhost", "evil.example"],
    ],
)
def test_admin_without_a_key_refuses_other_hosts(hosts: list[str]) -> None:
    with pytest.raises(Forbidden, match="The Host header"):
        auth.check(scope_of([("host", host) for host in hosts]), ServerSpec())


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        *(("/admin", True), ("/admin/", True), ("/admin/models", True)),
        *(("/", False), ("/administer", False), ("/v1/admin/models", False), ("/Admin", False)),
    ],
)
def test_is_admin_is_true_below_admin_only(path: str, expected: bool) -> None:
    assert auth.is_admin(path) is expected


def keyed(value: str | None, client: tuple[str, int] = ("127.0.0.1", 1)) -> Scope:
    headers = [("host", "127.0.0.1:8000")]
    headers += [("authorization", f"Bearer {value}")] if value is not None else []
    return scope_of(headers, client)


def test_admin_with_api_keys_alone_needs_one_of_them() -> None:
    """A plain proxy on this machine makes every client local."""
    auth.check(keyed("k-two"), KEYS)
    with pytest.raises(Unauthorized, match=r"server\.admin_key, /admin needs one of server\.api"):
        auth.check(keyed(None), KEYS)
    with pytest.raises(Unauthorized, match=r"not one of server\.api_keys"):
        auth.check(keyed("k-three"), KEYS)


def test_admin_with_api_keys_alone_stays_local() -> None:
    with pytest.raises(Forbidden, match="is not a loopback address"):
        auth.check(keyed("k-two", FAR), KEYS)


ADMIN = ServerSpec(api_keys=("k-one",), admin_key="k\u00e9y")


@pytest.mark.parametrize(
    ("name", "value"), [("authorization", "bearer  k\u00e9y"), ("x-api-key", "k\u00e9y")]
)
def test_admin_key_opens_admin_from_anywhere(name: str, value: str) -> None:
    headers = [("host", "box"), ("origin", "http://page.example"), (name, value)]
    assert auth.check(scope_of(headers, FAR), ADMIN) is None


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (("accept", "*/*"), "The request has no admin key"),
        (("authorization", "Basic key"), "The request has no admin key"),
        (("authorization", "Bearer k-one"), "API keys do not open /admin"),
        (("x-api-key", "k"), "API keys do not open /admin"),
    ],
)
def test_admin_without_the_admin_key_is_refused(header: tuple[str, str], message: str) -> None:
    with pytest.raises(Unauthorized, match=message):
        auth.check(scope_of([("host", "localhost"), header]), ADMIN)


# --- the other routes


def asking(
    headers: dict[str, str] | None = None,
    *,
    method: str = "POST",
    path: str = CHAT,
    client: tuple[str, int] | None = ("127.0.0.1", 1),
) -> Scope:
    sent = {"host": "127.0.0.1:8000"} | (headers or {})
    return scope_of(list(sent.items()), client, method=method, path=path)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "localhost",
        "LocalHost:8000",
        "localhost.",
        "chat.localhost:8000",
        "127.0.0.1:8000",
        "0.0.0.0:8000",
        "192.168.1.5:8000",
        "[::1]:8000",
        "[fe80::1]",
        "llmserve:8000",
        "host.docker.internal:8000",
        "gpu-box.local",
        socket.gethostname(),
    ],
)
def test_host_that_no_page_can_have_is_served(host: str) -> None:
    auth.check(asking({"host": host}), ServerSpec())


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "evil.example@localhost",
        "localhost, evil.example",
        "internal.evil.example:8000",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_host_of_a_rebinding_page_is_refused(host: str, method: str) -> None:
    with pytest.raises(Forbidden, match=r"Host header .*server\.allowed_origins") as refused:
        auth.check(asking({"host": host}, method=method), ServerSpec())
    assert refused.value.code == "host_refused"


def test_host_of_a_network_client_is_not_checked() -> None:
    """Names of a server in a network cannot be known."""
    auth.check(asking({"host": "gpu.corp.example"}, client=FAR), ServerSpec(host="0.0.0.0"))


def test_host_is_looked_up_by_our_server_s_extension() -> None:
    scope = asking({"host": "evil.example"}, client=None)
    for address, refused in (("127.0.0.1", True), ("10.0.0.7", False), (None, False)):
        scope["extensions"] = {auth.PEER: lambda address=address: address}
        if refused:
            with pytest.raises(Forbidden):
                auth.check(scope, ServerSpec())
        else:
            auth.check(scope, ServerSpec())


@pytest.mark.parametrize("host", ["chat.example", "ui.example:3000", "ui.example"])
def test_host_of_an_allowed_origin_is_served(host: str) -> None:
    """A proxy on this machine that passes its own Host on."""
    auth.check(asking({"host": host}), PAGES)
    auth.check(asking({"host": host}), ServerSpec(allowed_origins=("*",)))


def test_host_does_not_count_where_a_key_is_needed() -> None:
    auth.check(asking({"host": "evil.example", "x-api-key": "k-one"}), KEYS)
    auth.check(asking({"host": "evil.example"}, path="/health"), ServerSpec())


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "application/x-www-form-urlencoded"},  # curl -d
        {"sec-fetch-mode": "cors"},  # Node's fetch
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": "same-origin"},
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "https://127.0.0.1:8000"},  # a proxy ends TLS
        {"origin": "chrome-extension://abcdef"},
        {"origin": "vscode-webview://abcdef"},
        {"origin": "app://obsidian.md"},
    ],
)
def test_origin_of_a_program_or_an_own_page_is_served(headers: dict[str, str]) -> None:
    auth.check(asking(headers), ServerSpec())


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "https://evil.example", "content-type": "text/plain"},  # mode: no-cors
        {"origin": "http://localhost:3000"},
        {"origin": "http://127.0.0.1"},
        {"origin": "http://127.0.0.1:8000.evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "file://"},
        {"origin": "HTTPS://EVIL.EXAMPLE"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT"])
def test_origin_of_a_foreign_page_is_refused(headers: dict[str, str], method: str) -> None:
    for server in (ServerSpec(), PAGES):
        with pytest.raises(Forbidden, match=r"web page .*server\.allowed_origins") as refused:
            auth.check(asking(headers, method=method), server)
        assert refused.value.code == "origin_refused"


def test_origin_that_is_allowed_is_served() -> None:
    auth.check(asking({"origin": "https://chat.example"}), PAGES)
    auth.check(asking({"origin": "https://any.example"}), ServerSpec(allowed_origins=("*",)))


def test_origin_of_a_read_is_for_the_browser_to_judge() -> None:
    foreign = {"origin": "https://evil.example"}
    auth.check(asking(foreign, method="GET", path="/v1/models"), ServerSpec())


def test_repeated_header_counts_as_its_first() -> None:
    scope = asking({"x-api-key": "k-one"})
    scope["headers"].append((b"x-api-key", b"wrong"))
    auth.check(scope, KEYS)
