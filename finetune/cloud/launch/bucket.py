"""The bucket of a launch: its name belongs to project and user, and it may have been made from another computer.

Part of the launch policy, so SkyPilot is there; imported inside, because it takes seconds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from finetune.cloud.gcloud.config import bucket_name, local_login
from finetune.errors import UserError

VARIABLE = "BUCKET"
"""Of our task YAMLs; the mount is named after it."""
DERIVED = "auto"
SECONDS = 1.0
FORBIDDEN = 403
NEEDED = tuple(f"storage.objects.{verb}" for verb in ("list", "get", "create", "delete"))
"""Permissions without which a run could not keep its checkpoints."""


def fill_bucket(task: Any, say: Any) -> None:
    """Give mounts of a bucket named `auto` in a sky.Task the name finetune-<project>-<user>, and tell the job by envs.

    SkyPilot makes a bucket that is mounted by name; but one that is there, and that it has not made on this computer, it
    takes only by address; that holds for a bucket that the user names, too. Raises UserError without a login, with an expired
    one, and for a bucket that is forbidden or may not be written.
    """
    from sky import global_user_state

    ours = ("", DERIVED, task.envs.get(VARIABLE, DERIVED))
    mounts = [one for one in task.storage_mounts.values() if one.name in ours and not one.source]
    if not mounts:
        return
    name = next((one.name for one in mounts if one.name not in ("", DERIVED)), None) or bucket_name(local_login())
    is_there = _is_there(name)  # asked at every launch: an expired login shows here, before anything starts
    known = global_user_state.get_handle_from_storage_name(name) is not None
    by_address = is_there and not known
    for storage in mounts:
        if by_address:
            storage.name, storage.source = None, f"gs://{name}"
        else:
            storage.name = name
    task.update_envs({VARIABLE: name})
    say(f"finetune: bucket gs://{name}" + ("" if known or by_address else ", to be made"))


@dataclass
class _Answer:
    """What Google has said about a bucket so far. lacking: of NEEDED; error: of one of several libraries."""

    is_there: bool = False
    lacking: list[str] = field(default_factory=list)
    error: Exception | None = None


def _is_there(name: str) -> bool:
    """Whether the bucket has been made. False too when Google gives no answer within SECONDS: SkyPilot asks again, and then
    says what is wrong."""
    from google.auth.exceptions import RefreshError

    answer = _ask(name)
    if isinstance(answer.error, RefreshError) and not answer.error.retryable:
        raise UserError(
            "Google refuses this login, which has expired or been withdrawn; run `gcloud auth login` and "
            "`gcloud auth application-default login`",
            code="gcloud.login_expired",
        )
    if getattr(answer.error, "code", None) == FORBIDDEN:
        raise UserError(
            f"bucket gs://{name}: Google forbids this account to see it; ask for the role Storage Admin, or launch with "
            f"--env {VARIABLE}=NAME",
            code="bucket.forbidden",
        )
    if answer.lacking:
        raise UserError(
            f"bucket gs://{name}: this account lacks {', '.join(answer.lacking)}, so a run could not keep its checkpoints "
            f"there; ask for the role Storage Object Admin on it, or launch with --env {VARIABLE}=NAME",
            code="bucket.forbidden",
        )
    return answer.is_there


def _ask(name: str) -> _Answer:
    """The answer after SECONDS at most."""
    from sky.adaptors import gcp

    answer = _Answer()
    try:
        client = gcp.storage_client()  # its import takes most of a second, which is not Google's
    except Exception:  # SkyPilot says what is wrong
        return answer

    def look() -> None:
        try:
            bucket = client.lookup_bucket(name)
        except Exception as error:
            answer.error = error
            return
        answer.is_there = bucket is not None
        if bucket is not None:
            with suppress(Exception):  # no answer to it is no reason against a launch
                allowed = bucket.test_iam_permissions(list(NEEDED))
                answer.lacking = [one for one in NEEDED if one not in allowed]

    def look_quietly() -> None:
        with _no_warnings_of_retries():  # here, because it may outlast our patience
            look()

    asking = threading.Thread(target=look_quietly, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return answer


@contextmanager
def _no_warnings_of_retries() -> Iterator[None]:
    """Without a network the library below would warn of each attempt."""
    retries = logging.getLogger("urllib3.connectionpool")
    level = retries.level
    retries.setLevel(logging.ERROR)
    try:
        yield
    finally:
        retries.setLevel(level)
