"""Why something cannot be fetched from the Hugging Face hub, in a few words.

What the libraries raise hides it: transformers reports a missing network as a missing `config.json`. So the hub itself is asked.
"""

from __future__ import annotations

from typing import Literal

from finetune.errors import first_line
from finetune.runtime.credentials import without_secrets

COPY = "or name the folder of a copy in its place, without a revision"


def hub_reason(name: str, revision: str | None, kind: Literal["model", "dataset"]) -> tuple[str, str] | None:
    """(why, what to do). None if the hub is there and shows the repository at that revision, so that the fault is another one."""
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi()
    try:
        api.auth_check(name, repo_type=kind)
        api.repo_info(name, repo_type=kind, revision=revision)
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set", f"unset it, {COPY}"
    except GatedRepoError:
        return (
            "it is gated",
            f"accept its terms on {without_secrets(api.endpoint)}/{_page(name, kind)}, and set HF_TOKEN",
        )
    except RevisionNotFoundError:
        return "it has no such revision", "take a commit that its page lists"
    except RepositoryNotFoundError:
        return f"no such {kind} there, or a private one", "check the id; a private one needs HF_TOKEN"
    except HFValidationError as error:
        return first_line(error), "check the id"
    except HfHubHTTPError as error:
        return f"it answers {error.response.status_code}", f"try again later, {COPY}"
    except (HTTPError, OSError, RuntimeError) as error:
        return without_secrets(f"no connection to {api.endpoint}: {first_line(error)}"), f"connect, {COPY}"
    return None


def _page(name: str, kind: str) -> str:
    return f"datasets/{name}" if kind == "dataset" else name
