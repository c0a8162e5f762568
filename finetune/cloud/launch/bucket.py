"""The bucket of a launch: named after project and user, and possibly created from another computer.

Part of the launch policy, so SkyPilot is installed; it is imported inside functions, because that takes seconds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from finetune.cloud.gcloud.config import bucket_name, local_login
from finetune.errors import UserError

VARIABLE = "BUCKET"
"""Environment variable of our task YAMLs with the name of the mounted bucket."""
DERIVED = "auto"
SECONDS = 1.0
FORBIDDEN = 403
NEEDED = tuple(f"storage.objects.{verb}" for verb in ("list", "get", "create", "delete"))
"""Permissions that a run needs to save its checkpoints."""
TO_COME = {False: ", to be created", None: ", to be created unless it exists: Google gave no answer"}


def fill_bucket(task: Any, say: Any) -> None:
    """Name the mounted bucket `auto` of a sky.Task finetune-<project>-<user>, and set BUCKET in the task's envs.

    SkyPilot creates a bucket that is mounted by name. It accepts an existing bucket that was not created on this computer only by
    its address, also if the user names it. Raises UserError without a login, with an expired login, and for a bucket that this
    account cannot access or write to.
    """
    from sky import global_user_state

    ours = ("", DERIVED, task.envs.get(VARIABLE, DERIVED))
    mounts = [one for one in task.storage_mounts.values() if one.name in ours and not one.source]
    if not mounts:
        return
    name = next((one.name for one in mounts if one.name not in ("", DERIVED)), None) or bucket_name(local_login())
    is_there = _is_there(name)  # asked at every launch: finds an expired login before anything starts
    known = global_user_state.get_handle_from_storage_name(name) is not None
    by_address = bool(is_there) and not known
    for storage in mounts:
        if by_address:
            storage.name, storage.source = None, f"gs://{name}"
        else:
            storage.name = name
    task.update_envs({VARIABLE: name})
    say(f"finetune: bucket gs://{name}" + ("" if known or by_address else TO_COME[is_there]))


def holds(name: str, path: str) -> bool:
    """Whether the bucket has this object. Also False if Google does not answer within SECONDS."""
    found: list[bool] = []
    _within_seconds(lambda client: found.append(client.bucket(name).blob(path).exists()))
    return found == [True]


@dataclass
class _Answer:
    """Google's answer about a bucket so far. is_there: None before there is one; lacking: the missing ones of NEEDED; error:
    raised by one of several libraries."""

    is_there: bool | None = None
    lacking: list[str] = field(default_factory=list)
    error: Exception | None = None


def _is_there(name: str) -> bool | None:
    """Whether the bucket exists. None if Google does not answer within SECONDS: SkyPilot asks again, and reports the problem."""
    from google.auth.exceptions import RefreshError

    answer = _ask(name)
    if isinstance(answer.error, RefreshError) and not answer.error.retryable:
        raise UserError(
            "Google refuses this login, which has expired or was revoked; run `gcloud auth login` and "
            "`gcloud auth application-default login`",
            code="gcloud.login_expired",
        )
    if getattr(answer.error, "code", None) == FORBIDDEN:
        raise UserError(
            f"bucket gs://{name}: this account may not access it; ask for the role Storage Admin, or launch with "
            f"--env {VARIABLE}=NAME",
            code="bucket.forbidden",
        )
    if answer.lacking:
        raise UserError(
            f"bucket gs://{name}: this account lacks {', '.join(answer.lacking)}, so a run could not save its checkpoints "
            f"there; ask for the role Storage Object Admin on it, or launch with --env {VARIABLE}=NAME",
            code="bucket.forbidden",
        )
    return answer.is_there


def _ask(name: str) -> _Answer:
    """The answer, after at most SECONDS."""
    answer = _Answer()

    def look_up(client: Any) -> None:
        try:
            bucket = client.lookup_bucket(name)
        except Exception as error:
            answer.error = error
            return
        answer.is_there = bucket is not None
        if bucket is not None:
            with suppress(Exception):  # a launch is not refused if this is unknown
                allowed = bucket.test_iam_permissions(list(NEEDED))
                answer.lacking = [one for one in NEEDED if one not in allowed]

    _within_seconds(look_up)
    return answer


def _within_seconds(question: Callable[[Any], object]) -> None:
    """Put a question to Google's storage client in a thread, and wait for SECONDS; errors and late answers are dropped."""
    from sky.adaptors import gcp

    try:
        client = gcp.storage_client()  # outside the time limit: the import takes most of a second
    except Exception:  # SkyPilot reports the problem
        return

    def ask_quietly() -> None:
        with _no_warnings_of_retries(), suppress(Exception):  # in the thread, because it may run longer than we wait
            question(client)

    asking = threading.Thread(target=ask_quietly, daemon=True)
    asking.start()
    asking.join(SECONDS)


@contextmanager
def _no_warnings_of_retries() -> Iterator[None]:
    """Without a network urllib3 would log a warning for each retry."""
    retries = logging.getLogger("urllib3.connectionpool")
    level = retries.level
    retries.setLevel(logging.ERROR)
    try:
        yield
    finally:
        retries.setLevel(level)
