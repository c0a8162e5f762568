"""The bucket of a launch: its name belongs to project and user, and it may have been made from another computer.

Part of the launch policy, so SkyPilot is there; imported inside, because it takes seconds.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from finetune.cloud.gcloud import bucket_name, local_login
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


def _is_there(name: str) -> bool:
    """Whether the bucket has been made. False too when Google gives no answer within SECONDS: SkyPilot asks again, and then
    says what is wrong."""
    from google.auth.exceptions import RefreshError
    from sky.adaptors import gcp

    answers: list[bool | Exception] = []
    allowed: list[str] = list(NEEDED)
    try:
        client = gcp.storage_client()  # its import takes most of a second, which is not Google's
    except Exception:  # SkyPilot says what is wrong
        return False

    def look() -> None:
        try:
            bucket = client.lookup_bucket(name)
            answers.append(bucket is not None)
            if bucket is not None:
                allowed[:] = bucket.test_iam_permissions(list(NEEDED))  # no answer to it is no reason against a launch
        except Exception as error:  # of several libraries below
            answers.append(error)
        finally:
            retries.setLevel(level)

    retries = logging.getLogger("urllib3.connectionpool")
    level = retries.level
    retries.setLevel(logging.ERROR)  # without network it would warn of each attempt
    asking = threading.Thread(target=look, daemon=True)
    asking.start()
    asking.join(SECONDS)
    answer = answers[0] if answers else False
    if isinstance(answer, RefreshError) and not answer.retryable:
        raise UserError(
            "Google refuses this login, which has expired or been withdrawn; run `gcloud auth login` and "
            "`gcloud auth application-default login`"
        )
    if getattr(answer, "code", None) == FORBIDDEN:
        raise UserError(
            f"bucket gs://{name}: Google forbids this account to see it; ask for the role Storage Admin, or launch with "
            f"--env {VARIABLE}=NAME"
        )
    if lacking := [one for one in NEEDED if one not in allowed]:
        raise UserError(
            f"bucket gs://{name}: this account lacks {', '.join(lacking)}, so a run could not keep its checkpoints there; ask "
            f"for the role Storage Object Admin on it, or launch with --env {VARIABLE}=NAME"
        )
    return answer is True
