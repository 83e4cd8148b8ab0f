"""Models from the Hugging Face hub, downloaded before their engine starts, with progress."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import huggingface_hub
from huggingface_hub import errors, snapshot_download
from tqdm.auto import tqdm

from llmserve.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from llmserve.config import ModelSpec
    from llmserve.errors import LLMServeError

_HUB_TIMEOUT_S = 10
# The hub's library has its own errors derive from those of the HTTP client it uses.
_TRANSPORT = errors.HfHubHTTPError.__mro__[1]
_NOT_THERE = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, _TRANSPORT)

# Everything that vLLM may read besides weights.
_BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")  # in vLLM's order of preference


class Wanted(NamedTuple):
    """A repository of the hub, and all that decides which folder it becomes."""

    repo: str
    revision: str | None
    cache_dir: str | None
    token: str | bool | None

    @classmethod
    def of(cls, spec: ModelSpec) -> tuple[Wanted, ...]:
        """The model and its adapters, as far as they are on the hub.

        `download_dir`, `revision` and `hf_token` of `engine:` hold as in vLLM.
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


def download(wanted: Wanted, progress: Callable[[int, int], None]) -> str:
    """Bring a repository into the cache that vLLM reads; its folder there. Blocks.

    `progress` gets bytes done and bytes in all. HF_TOKEN, HF_HOME and HF_HUB_OFFLINE hold
    as in vLLM.

    Raises StartupError with the cause in one line.
    """
    with told(wanted.repo, wanted.revision, StartupError):
        huggingface_hub.utils.validate_repo_id(wanted.repo)
        return _fetch(wanted, progress)


@contextlib.contextmanager
def told(repo: str, revision: str | None, raised: Callable[[str], LLMServeError]) -> Iterator[None]:
    """Errors of the hub as one of ours, with the cause in one line."""
    try:
        yield
    except errors.GatedRepoError:
        cause = "is gated on the hub: accept its terms, set HF_TOKEN"
    except errors.RevisionNotFoundError:
        cause = f"has no revision {revision} on the hub"
    except errors.RepositoryNotFoundError:
        cause = "is neither a folder here nor a model on the hub (if it is private, set HF_TOKEN)"
    except errors.HFValidationError:
        cause = "is neither a folder here nor a name the hub allows"
    except errors.SafetensorsParsingError:
        cause = "has a broken safetensors file on the hub"
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no status")
        cause = f"could not be downloaded: the hub said {status}"
    except _NOT_THERE:
        cause = "is not in the cache, and the hub is not reachable"
    except OSError as error:
        cause = f"could not be downloaded: {error}"
    else:
        return
    raise raised(f"{repo} {cause}") from None


def _fetch(wanted: Wanted, progress: Callable[[int, int], None]) -> str:
    files = _files_of(wanted.repo, wanted.revision, wanted.token)
    folder: str = snapshot_download(
        wanted.repo,
        revision=wanted.revision,
        cache_dir=wanted.cache_dir,
        token=wanted.token,
        local_files_only=files is None,  # which weights there are is then vLLM's to find
        allow_patterns=[*_BESIDE_WEIGHTS, *([] if files is None else [_weights_of(files)])],
        ignore_patterns=["original/**", "*.onnx", "*.gguf"],
        tqdm_class=_reporting(progress),
    )
    return folder


def _files_of(repo: str, revision: str | None, token: Any) -> list[str] | None:
    """What the hub has of a model; None if the hub is out of reach."""
    if huggingface_hub.is_offline_mode():
        return None
    try:
        info = huggingface_hub.HfApi(token=token).model_info(
            repo, revision=revision, timeout=_HUB_TIMEOUT_S
        )
    except errors.HfHubHTTPError:
        raise
    except _TRANSPORT:
        return None
    return [file.rfilename for file in info.siblings or ()]


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
