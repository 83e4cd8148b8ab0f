from __future__ import annotations

import hashlib
import json
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from llmserve.checkpoint import files as checkpoint
from llmserve.checkpoint import hub
from llmserve.errors import StartupError
from tests.fakes import spec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHA = "a" * 40
NOBODY = "http://127.0.0.1:9"  # nothing listens there
AWAY = "org/m could not be downloaded: the hub is not reachable"
HEADER = b'{"w": {"dtype": "F32", "shape": [75000], "data_offsets": [0, 300000]}}'
WEIGHTS = struct.pack("<Q", len(HEADER)) + HEADER + b"w" * 300_000
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.model": b"t" * 2000,
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": WEIGHTS,
    "original/consolidated.pt": WEIGHTS,
    "model.gguf": WEIGHTS,
    "onnx/model.onnx": WEIGHTS,
    "README.md": b"# A model",
}


class Hub(ThreadingHTTPServer):
    """As much of the hub's API as a download needs."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, dict[str, bytes]] = {"org/m": FILES}
        self.refused: dict[str, tuple[int, str]] = {}  # repo: status and the hub's error code
        self.fetched: list[str] = []
        self.tokens: set[str] = set()
        self.silent = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        while self.server.silent:
            time.sleep(0.01)
        self.server.tokens.add(self.headers.get("authorization", ""))
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in self.server.refused:
            self._send(*self.server.refused[repo])
        elif repo not in self.server.repos:
            self._send(404, "RepoNotFound")
        elif rest[1:2] == ["no-such"]:
            self._send(404, "RevisionNotFound")
        elif api:
            self._send_listing(repo, rest)
        else:
            self._send_file(repo, "/".join(rest[2:]), with_body=with_body)

    def _send(self, status: int, code: str = "", body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _send_listing(self, repo: str, rest: list[str]) -> None:
        files = self.server.repos[repo]
        siblings = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
        tree = [
            {"type": "file", "path": name, "size": len(body), "oid": "b" * 40}
            for name, body in files.items()
        ]
        info = {"id": repo, "sha": SHA, "siblings": siblings, "tags": []}
        body = json.dumps(tree if rest[:1] == ["tree"] else info).encode()
        self._send(200, body=body, Content_Type="application/json")

    def _send_file(self, repo: str, name: str, *, with_body: bool) -> None:
        content = self.server.repos[repo][name]
        if with_body:
            self.server.fetched.append(name)
        self._send(
            200,
            body=content if with_body else b"",
            Content_Length=str(len(content)),
            ETag=f'"{hashlib.sha256(content).hexdigest()}"',
            X_Repo_Commit=SHA,
        )


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of this machine, and an empty cache."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    # The library reads HF_ENDPOINT and HF_HOME when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, "")
    path = template[template.index("/{repo_id}") :]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def download(model: str = "org/m", **more: Any) -> list[tuple[int, int]]:
    """The reported progress."""
    reported: list[tuple[int, int]] = []
    for wanted in hub.HubRevision.of(spec("chat", model=model, **more)):
        hub.download(wanted, lambda done, total: reported.append((done, total)))
    return reported


def warned(**more: Any) -> str | None:
    (wanted,) = hub.HubRevision.of(spec("chat", model="org/m", **more))
    return hub.download(wanted, lambda done, total: None).warning


def cached(folder: Path) -> set[str]:
    snapshot = folder / "models--org--m" / "snapshots" / SHA
    return {str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file()}


def test_one_kind_of_weights_is_fetched_with_its_files(box: Hub, tmp_path: Path) -> None:
    download()
    assert cached(tmp_path / "hub") == {"config.json", "tokenizer.model", "model.safetensors"}
    assert sorted(box.fetched) == ["config.json", "model.safetensors", "tokenizer.model"]


def test_progress_is_reported_in_bytes_up_to_the_end(box: Hub) -> None:
    reported = download()
    total = sum(len(FILES[name]) for name in box.fetched)
    assert reported[-1] == (total, total)
    assert [done for done, _ in reported] == sorted(done for done, _ in reported)
    assert all(done <= whole for done, whole in reported)


def test_a_second_download_fetches_nothing(box: Hub) -> None:
    download()
    box.fetched.clear()
    download()
    assert box.fetched == []


def test_a_token_and_a_folder_of_the_registry_are_used(box: Hub, tmp_path: Path) -> None:
    download(engine={"hf_token": "hf_secret", "download_dir": str(tmp_path / "elsewhere")})
    assert box.tokens == {"Bearer hf_secret"}
    assert "model.safetensors" in cached(tmp_path / "elsewhere")


def test_adapters_are_fetched_too_and_folders_are_not(box: Hub) -> None:
    box.repos["org/lora"] = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"l"}
    download("/models/chat", loras={"sql": "org/lora", "py": "/loras/py"})
    assert sorted(box.fetched) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_revision_is_the_model_s_and_not_its_adapters() -> None:
    engine = {"revision": "v2", "download_dir": "/big", "hf_token": True}
    wanted = hub.HubRevision.of(spec(model="org/m", loras={"sql": "org/lora"}, engine=engine))
    assert wanted == (("org/m", "v2", "/big", True), ("org/lora", None, "/big", True))


def test_a_folder_needs_no_hub(box: Hub) -> None:
    assert download("/models/chat") == []
    assert box.tokens == set()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (
            404,
            "RepoNotFound",
            "org/m is not a local folder and not a model on the hub; for a private model set HF_TOKEN",
        ),
        (
            401,
            "RepoNotFound",
            "org/m is not a local folder and not a model on the hub; for a private model set HF_TOKEN",
        ),
        (403, "GatedRepo", "org/m is gated on the hub; accept its terms and set HF_TOKEN"),
        (401, "GatedRepo", "org/m is gated on the hub; accept its terms and set HF_TOKEN"),
        (400, "", "org/m could not be downloaded: "),
        (401, "", "org/m could not be downloaded: "),
    ],
)
def test_refusal_of_the_hub_is_one_line(box: Hub, status: int, code: str, message: str) -> None:
    box.refused["org/m"] = (status, code)
    with pytest.raises(StartupError) as refused:
        download()
    assert refused.value.message.startswith(message)
    assert code or str(status) in refused.value.message
    assert refused.value.message.isprintable()


def test_a_revision_that_is_not_there(box: Hub) -> None:
    assert box.repos
    with pytest.raises(StartupError) as refused:
        download(engine={"revision": "no-such"})
    assert refused.value.message.startswith("org/m has no revision no-such on the hub; ")


def test_a_name_that_no_hub_can_have(box: Hub) -> None:
    assert box.repos
    with pytest.raises(StartupError, match="SmolLM2 135M"):
        download("SmolLM2 135M")


@pytest.fixture
def waits(box: Hub, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A hub that cannot be reached any more; the seconds that would have been waited for it."""
    assert box.repos
    waited: list[float] = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=waited.append, time=time.time))
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    template = f"{NOBODY}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return waited


def test_a_hub_that_does_not_answer(waits: list[float]) -> None:
    with pytest.raises(StartupError) as refused:
        download()
    assert refused.value.message == f"{AWAY}; the cache has no copy"
    assert sum(waits) < 60


def test_cached_model_is_used_if_the_hub_does_not_answer(
    box: Hub, request: pytest.FixtureRequest
) -> None:
    download()
    box.fetched.clear()
    waits = request.getfixturevalue("waits")
    assert warned() == f"{AWAY}; the copy in the cache is used"
    assert box.fetched == []
    assert sum(waits) <= 5


def test_cached_model_is_used_without_a_hub(box: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    download()
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    assert warned() == f"{AWAY}; the copy in the cache is used"


def test_silent_hub_is_left_after_a_time(box: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    download()
    monkeypatch.setattr(hub, "_HUB_TIMEOUT_S", 0.05)
    box.silent = True
    try:
        assert warned() == f"{AWAY}; the copy in the cache is used"
    finally:
        box.silent = False


def test_offline_mode_has_no_warning(box: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    download()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    box.fetched.clear()
    assert warned() is None
    assert box.fetched == []


REFUSALS = [
    *((status, "") for status in (401, 403, 429, 500, 502, 503, 504)),
    *((401, code) for code in ("GatedRepo", "RepoNotFound")),
    (403, "GatedRepo"),
    *((404, code) for code in ("RepoNotFound", "RevisionNotFound")),
]


@pytest.mark.parametrize(("status", "code"), REFUSALS)
def test_cached_model_is_used_if_the_hub_refuses(
    box: Hub, tmp_path: Path, status: int, code: str
) -> None:
    download()
    box.refused["org/m"] = (status, code)
    (wanted,) = hub.HubRevision.of(spec(model="org/m"))
    fetched = hub.download(wanted, lambda done, total: None)
    assert fetched.folder == str(tmp_path / "hub" / "models--org--m" / "snapshots" / SHA)
    assert fetched.warning is not None
    assert fetched.warning.endswith("; the copy in the cache is used")
    assert isinstance(checkpoint.of(spec(model="org/m")), checkpoint.Folder)  # as the plan reads it


@pytest.mark.parametrize(
    ("gone", "lacks"),
    [
        ("model.safetensors", "has no weights"),
        ("config.json", "config.json is missing"),
    ],
)
def test_a_part_in_the_cache_is_not_enough(box: Hub, tmp_path: Path, gone: str, lacks: str) -> None:
    download()
    (tmp_path / "hub" / "models--org--m" / "snapshots" / SHA / gone).unlink()
    box.refused["org/m"] = (504, "")
    with pytest.raises(StartupError) as refused:
        download()
    assert refused.value.message.startswith(
        f"org/m could not be downloaded: the hub answered 504; the copy in the cache is incomplete: {lacks}"
    )


def test_weights_cut_short_in_the_cache_are_not_enough(box: Hub, tmp_path: Path) -> None:
    download()
    file = tmp_path / "hub" / "models--org--m" / "snapshots" / SHA / "model.safetensors"
    file.write_bytes(WEIGHTS[:-1])
    box.refused["org/m"] = (500, "")
    with pytest.raises(StartupError, match=r"is incomplete: model\.safetensors is truncated"):
        download()


def test_an_adapter_in_the_cache_is_enough_too(box: Hub) -> None:
    box.repos["org/lora"] = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}
    download("/models/chat", loras={"sql": "org/lora"})
    box.refused["org/lora"] = (500, "")
    assert download("/models/chat", loras={"sql": "org/lora"}) == []


@pytest.mark.parametrize(
    ("files", "pattern"),
    [
        (["a.bin", "b.safetensors", "c.pt"], "*.safetensors"),
        (["c.pt", "a.bin"], "*.bin"),
        (["c.pt"], "*.pt"),
        (["README.md"], "*.safetensors"),
    ],
)
def test_the_weights_that_vllm_prefers(files: list[str], pattern: str) -> None:
    assert hub._weights_of(files) == pattern
