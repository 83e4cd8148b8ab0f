"""What the hub's library raises, as errors of ours with the cause in one line."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from huggingface_hub import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llmserve.errors import LLMServeError

# The hub's library has its own errors derive from those of the HTTP client it uses.
TRANSPORT = errors.HfHubHTTPError.__mro__[1]
_AWAY = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, TRANSPORT)


@contextlib.contextmanager
def translated(
    repo: str, revision: str | None, raised: Callable[[str], LLMServeError]
) -> Iterator[None]:
    """Raises one of ours in place of an error of the hub's."""
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
    except _AWAY:
        cause = "could not be downloaded: the hub is not reachable"
    except OSError as error:
        cause = f"could not be downloaded: {error}"
    else:
        return
    raise raised(f"{repo} {cause}") from None
