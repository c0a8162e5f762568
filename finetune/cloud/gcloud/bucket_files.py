"""Copies of a bucket's small files on this computer, so that what reads a run's folder also reads one in a bucket.

CACHE/buckets/BUCKET/FOLDER/         CACHE: $FINETUNE_CACHE, else the user's cache folder
    .copied.json                     the generation of each file, so that only what has changed is fetched again
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.cloud.gcloud.config import LOG_IN_APPLICATIONS
from finetune.errors import TransientError, UserError
from finetune.runtime.confined import remove_file, within
from finetune.runtime.files import atomic_file, load_json, write_json
from finetune.runtime.installed import install_command
from finetune.runtime.paths import cache_root

ADDRESS = re.compile(r"gs://(?P<bucket>[a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/(?P<folder>.*))?")
OF_ONE_RUN = r"(?:config\.yaml|run\.json|eval\.json|ledger/[^/]+\.jsonl)"
"""Relative to its folder: what says how a run is doing."""
OF_RUNS = re.compile(r"[^/]+/" + OF_ONE_RUN)
MOST_BYTES = 64 << 20
SECONDS = 20.0
"""For one request, with its repetitions."""
INDEX = ".copied.json"
FORBIDDEN = (401, 403)
NOT_FOUND = 404


def copy_small_files(address: str, wanted: re.Pattern[str] = OF_RUNS) -> Path:
    """The local copy of gs://BUCKET/FOLDER, brought up to date. wanted: matches the names, relative to FOLDER, of what is copied.

    Raises UserError for an address that is none, without Google's storage client, without a login, and for a bucket that does not
    exist, may not be read, or does not answer within SECONDS.
    """
    found = ADDRESS.fullmatch(address)
    bucket, folder = found.groups(default="") if found else ("", "")
    prefix = "/".join(part for part in folder.split("/") if part)
    target = within(cache_root() / "buckets", f"{bucket}/{prefix}".rstrip("/"))
    if not bucket or target is None:
        raise UserError(f"{address}: expected gs://BUCKET or gs://BUCKET/FOLDER", code="bucket.bad_address")
    with _errors_in_one_line(bucket):
        _update(_client().bucket(bucket), f"{prefix}/" if prefix else "", target, wanted)
    return target


def _update(bucket: Any, prefix: str, target: Path, wanted: re.Pattern[str]) -> None:
    known = _index(target)
    now: dict[str, int] = {}
    try:
        for blob in bucket.client.list_blobs(bucket, prefix=prefix, timeout=SECONDS, retry=_retry()):
            name = blob.name[len(prefix) :]
            path = within(target, name) if wanted.fullmatch(name) and (blob.size or 0) <= MOST_BYTES else None
            if path is None:
                continue
            generation, updated = blob.generation, blob.updated  # as listed: a download replaces them
            if known.get(name) != generation or not path.is_file():
                content = blob.download_as_bytes(timeout=SECONDS, retry=_retry())
                with atomic_file(path) as file:  # all of them are text
                    file.write(content.decode("utf-8", errors="replace"))
                if updated is not None:
                    os.utime(path, (updated.timestamp(), updated.timestamp()))
            now[name] = generation
    finally:
        write_json(target / INDEX, known | now)
    others = {name: generation for name, generation in known.items() if not wanted.fullmatch(name)}
    for name in known.keys() - now.keys() - others.keys():  # deleted in the bucket
        if path := within(target, name):
            remove_file(path, inside=target)
    write_json(target / INDEX, others | now)


def _index(target: Path) -> dict[str, int]:
    try:
        found = load_json(target / INDEX)
    except (OSError, ValueError):
        return {}
    return {name: number for name, number in found.items() if type(number) is int} if isinstance(found, dict) else {}


def _client() -> Any:
    try:
        from google.cloud import storage  # type: ignore[import-untyped]
    except ImportError:
        raise UserError(
            f"Google's storage client is not installed; run `{install_command('cloud')}`",
            code="install.missing_package",
        ) from None
    return storage.Client()


def _retry() -> Any:
    from google.cloud.storage.retry import DEFAULT_RETRY  # type: ignore[import-untyped]

    return DEFAULT_RETRY.with_timeout(SECONDS)


@contextmanager
def _errors_in_one_line(bucket: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of google.auth, google.api_core, requests and urllib3
        raise _in_one_line(error, bucket) from error


def _in_one_line(error: Exception, bucket: str) -> UserError:
    from google.auth.exceptions import DefaultCredentialsError, RefreshError

    if isinstance(error, DefaultCredentialsError | RefreshError):
        return UserError(
            f"gs://{bucket}: nobody is logged in to Google, or the login has expired; run `{LOG_IN_APPLICATIONS}`",
            code="gcloud.login_expired",
        )
    code = getattr(error, "code", None)
    if code in FORBIDDEN:
        return UserError(
            f"gs://{bucket}: this account may not read it; ask for the role Storage Object Viewer on it",
            code="bucket.forbidden",
        )
    if code == NOT_FOUND:
        return UserError(f"gs://{bucket}: no such bucket", code="bucket.not_found")
    return TransientError(
        f"gs://{bucket}: Google's storage does not answer ({type(error).__name__}); try again later",
        code="bucket.no_answer",
    )
