"""Downloads of models from the Hugging Face hub before their engine starts, with progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import huggingface_hub
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm

from llmserve.checkpoint import files as checkpoint
from llmserve.checkpoint.hub_errors import translated
from llmserve.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from llmserve.registry.spec import ModelSpec

_HUB_TIMEOUT_S = 10
# All files that vLLM may read besides weights.
_BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")  # in vLLM's order of preference


class HubRevision(NamedTuple):
    """A repository of the hub, and all that determines its folder in the cache."""

    repo: str
    revision: str | None
    cache_dir: str | None
    token: str | bool | None

    @classmethod
    def of(cls, spec: ModelSpec) -> tuple[HubRevision, ...]:
        """Return the model and its adapters that are on the hub.

        `download_dir`, `revision` and `hf_token` of `engine:` apply as in vLLM.
        """
        engine = spec.engine
        return tuple(
            cls(
                repo,
                engine.get("revision") if repo == spec.model else None,
                engine.get("download_dir"),
                engine.get("hf_token"),
            )
            for repo in spec.hub_names
        )


class HubFolder(NamedTuple):
    """The folder of a repository in the cache, and why the hub was not used."""

    folder: str
    warning: str | None = None


def download(wanted: HubRevision, progress: Callable[[int, int], None]) -> HubFolder:
    """Download a repository to the cache that vLLM reads. Blocks.

    `progress` receives the bytes so far and the total. HF_TOKEN, HF_HOME and HF_HUB_OFFLINE apply as
    in vLLM. If the hub fails, a complete copy in the cache is used.

    Raises StartupError with the cause in one line.
    """
    try:
        with translated(wanted.repo, wanted.revision, StartupError):
            huggingface_hub.utils.validate_repo_id(wanted.repo)
            return HubFolder(_fetch(wanted, progress))
    except StartupError as error:
        return _from_cache(wanted, error)


def _from_cache(wanted: HubRevision, error: StartupError) -> HubFolder:
    """Return the cached copy. Raises StartupError if it is missing or incomplete."""
    folder = checkpoint.cached(wanted.repo, wanted.revision, wanted.cache_dir)
    if folder is None:
        raise StartupError(f"{error.message}; the cache has no copy") from error
    if (lacks := folder.lacks()) is not None:
        raise StartupError(
            f"{error.message}; the copy in the cache is incomplete: {lacks}"
        ) from error
    warned = (
        None
        if huggingface_hub.is_offline_mode()
        else f"{error.message}; the copy in the cache is used"
    )
    return HubFolder(str(folder.path), warned)


def _fetch(wanted: HubRevision, progress: Callable[[int, int], None]) -> str:
    info = huggingface_hub.HfApi(token=wanted.token).model_info(
        wanted.repo, revision=wanted.revision, timeout=_HUB_TIMEOUT_S
    )
    files = [file.rfilename for file in info.siblings or ()]
    folder: str = snapshot_download(
        wanted.repo,
        revision=wanted.revision,
        cache_dir=wanted.cache_dir,
        token=wanted.token,
        allow_patterns=[*_BESIDE_WEIGHTS, _weights_of(files)],
        ignore_patterns=["original/**", "*.onnx", "*.gguf"],
        tqdm_class=_reporting(progress),
    )
    return folder


def _weights_of(files: Iterable[str]) -> str:
    """Return the pattern of the kind of weights that vLLM loads."""
    for pattern in _WEIGHTS:
        if any(file.endswith(pattern[1:]) for file in files):
            return pattern
    return _WEIGHTS[0]


def _reporting(progress: Callable[[int, int], None]) -> type[tqdm[Any]]:
    class Reporting(tqdm):
        """A progress bar that reports bytes and draws nothing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.in_bytes = kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            super().__init__(*args, **(kwargs | {"disable": False, "file": _Nowhere()}))

        def display(self, *_: Any, **__: Any) -> None:
            pass

        def update(self, n: float | None = 1) -> bool | None:
            changed = super().update(n)
            if self.in_bytes and self.total:
                progress(int(self.n), int(self.total))
            return bool(changed)

    return Reporting


class _Nowhere:
    def write(self, _: str) -> None:
        pass

    def flush(self) -> None:
        pass
