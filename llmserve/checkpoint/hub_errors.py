"""The errors of the hub's library as errors of llmserve, with the cause in one line."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from huggingface_hub import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llmserve.errors import LLMServeError

# The errors of the hub's library derive from those of its HTTP client.
TRANSPORT = errors.HfHubHTTPError.__mro__[1]
_AWAY = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, TRANSPORT)


@contextlib.contextmanager
def translated(
    repo: str, revision: str | None, raised: Callable[[str], LLMServeError]
) -> Iterator[None]:
    """Raise `raised` in place of an error of the hub's library."""
    try:
        yield
    except errors.GatedRepoError:
        cause = "is gated on the hub; accept its terms and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        cause = f"has no revision {revision} on the hub"
    except errors.RepositoryNotFoundError:
        cause = "is not a local folder and not a model on the hub; for a private model set HF_TOKEN"
    except errors.HFValidationError:
        cause = "is not a local folder and not a valid name on the hub"
    except errors.SafetensorsParsingError:
        cause = "has a broken safetensors file on the hub"
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no status")
        cause = f"could not be downloaded: the hub answered {status}"
    except _AWAY:
        cause = "could not be downloaded: the hub is not reachable"
    except OSError as error:
        cause = f"could not be downloaded: {error}"
    else:
        return
    raise raised(f"{repo} {cause}") from None
