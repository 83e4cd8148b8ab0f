"""Models from the Hugging Face hub, downloaded before their engine starts, with progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import huggingface_hub
from huggingface_hub import errors, snapshot_download
from tqdm.auto import tqdm

from llmserve.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from llmserve.config import ModelSpec

# Everything that vLLM may read besides weights.
_BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")  # in vLLM's order of preference


def download(spec: ModelSpec, progress: Callable[[int, int], None]) -> None:
    """Bring a hub model (and hub adapters) into the cache that vLLM reads. Blocks.

    `progress` gets bytes done and bytes in all. `download_dir`, `revision` and
    `hf_token` of `engine:` and HF_TOKEN, HF_HOME and HF_HUB_OFFLINE hold as in vLLM.

    Raises StartupError with the cause in one line.
    """
    engine = spec.engine
    sources = [] if spec.is_folder else [(spec.model, engine.get("revision"))]
    sources += [(lora, None) for lora in spec.loras.values() if not lora.startswith("/")]
    for repo, revision in sources:
        try:
            _fetch(repo, revision, engine, progress)
        except errors.GatedRepoError:
            raise StartupError(
                f"{repo} is gated on the hub: accept its terms, set HF_TOKEN"
            ) from None
        except errors.RevisionNotFoundError:
            raise StartupError(f"{repo} has no revision {revision} on the hub") from None
        except errors.RepositoryNotFoundError:
            raise StartupError(
                f"{repo} is neither a folder here nor a model on the hub "
                "(if it is private, set HF_TOKEN)"
            ) from None
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
            raise StartupError(
                f"{repo} is not in the cache, and the hub is not reachable"
            ) from None
        except (errors.HfHubHTTPError, OSError) as error:
            raise StartupError(f"{repo} could not be downloaded: {type(error).__name__}") from error


def _fetch(
    repo: str, revision: str | None, engine: dict[str, Any], progress: Callable[[int, int], None]
) -> None:
    token = engine.get("hf_token")
    if huggingface_hub.is_offline_mode():
        patterns = None
    else:
        files = huggingface_hub.HfApi(token=token).list_repo_files(repo, revision=revision)
        patterns = [*_BESIDE_WEIGHTS, _weights_of(files)]
    snapshot_download(
        repo,
        revision=revision,
        cache_dir=engine.get("download_dir"),
        token=token,
        allow_patterns=patterns,
        ignore_patterns=["original/**", "*.onnx", "*.gguf"],
        tqdm_class=_reporting(progress),
    )


def _weights_of(files: Iterable[str]) -> str:
    """The pattern of the one kind of weights that vLLM will load."""
    for pattern in _WEIGHTS:
        if any(file.endswith(pattern[1:]) for file in files):
            return pattern
    return _WEIGHTS[0]


def _reporting(progress: Callable[[int, int], None]) -> type[tqdm[Any]]:
    class Reporting(tqdm):
        """Draws nothing; passes the bytes on."""

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
