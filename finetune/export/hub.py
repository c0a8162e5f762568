"""Uploads an export to the Hugging Face hub. The token comes from HF_TOKEN or the login of `hf auth login` and is never shown."""

from __future__ import annotations

from glob import escape
from pathlib import Path

from finetune.errors import UserError, first_line, shown
from finetune.export.export_folder import MANIFEST, open_export
from finetune.runtime.console import say

_ADVICE = {
    401: "the hub does not know you: set HF_TOKEN or run `hf auth login`, with a token that may write",
    403: "your token may not write there: use one with write access, or another --repo",
    404: "the hub has no such place: check --repo",
}


def check_repository(name: str) -> None:
    """Raises UserError unless it is USER/NAME and a token is set: before hours of work."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("no owner in it")
    except HFValidationError:
        raise UserError(f"--repo {shown(name)}: expected USER/NAME", code="export.bad_option") from None
    if not get_token():
        raise UserError(f"--to hub: no token; {_ADVICE[401].partition(': ')[2]}", code="export.no_token")


def upload(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a complete export in one commit. Returns its address. Raises UserError if the export is damaged, or if the hub
    cannot be reached or refuses."""
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    export = open_export(folder, verify=True)
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise UserError(
                f"--private: {repository} is there already and is public; choose another --repo", code="export.public"
            )
        say(f"uploading {export.path} to {repository}")
        api.upload_folder(
            repo_id=repository,
            folder_path=export.path,
            allow_patterns=[
                escape(name) for name in (*export.manifest["files"], MANIFEST)
            ],  # no file that came into it later
            commit_message=f"{export.kind} export of {export.manifest['run']}",
        )
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        why = _ADVICE.get(status or 0, first_line(error))
        raise UserError(
            f"{repository}: not uploaded: {why}; the export stays in {folder}", code="export.hub_refused"
        ) from error
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{repository}: not uploaded: {first_line(error)}; is the hub reachable? The export stays in {folder}",
            code="export.hub_unreachable",
        ) from error
    return str(address)
