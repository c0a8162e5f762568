"""Who is logged in to Google Cloud, and in which project: read from gcloud's own files, without network or subprocess.

SkyPilot takes the project from its own config or from google.auth, which reads the environment, the credentials and then gcloud's
settings. They are read here in the same order, so that our bucket is in the project of SkyPilot's machines; tests compare with
google.auth and with gcloud itself.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.runtime.files import load_json, read_text

LOG_IN = "gcloud auth login"
LOG_IN_APPLICATIONS = "gcloud auth application-default login"
SET_PROJECT = "gcloud config set project <project id>"

CREDENTIALS = "application_default_credentials.json"
KINDS = (
    *("authorized_user", "service_account", "impersonated_service_account", "gdch_service_account"),
    *("external_account", "external_account_authorized_user"),
)
"""Values of `type` in a credentials file (google.auth)."""

BUCKET_LETTERS = 63
"""Longest bucket name without dots (Google Cloud's rules for bucket names)."""
HASH_LETTERS = 8
RESERVED = re.compile("g[o0][o0]gle")
"""A bucket name must not contain `google` or a look-alike."""


@dataclass(frozen=True)
class Login:
    """A project id, and the account's e-mail address, which must not be printed and is left out of the repr."""

    project: str
    account: str = field(repr=False)


def local_login() -> Login:
    """The login that SkyPilot would use here.

    Whether it has expired is not checked, which needs the network. Raises UserError, with the command to run, if there are no
    application default credentials, no project or no account, and if a file is not in gcloud's format.
    """
    folder = gcloud_folder()
    path = Path(os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") or folder / CREDENTIALS)
    credentials = _credentials(path, folder)
    project = _skypilot_project() or _project(credentials, path, folder)
    account = _property("account", folder) or _text(credentials, "client_email", path)
    if not account:
        raise UserError(f"{folder}: nobody is logged in to gcloud; run `{LOG_IN}`", code="gcloud.not_logged_in")
    return Login(project, account)


def bucket_name(login: Login) -> str:
    """The name of this user's bucket: finetune-<project>-<user>, a valid name that is always the same.

    user is the part of the account before the @. Everything but letters and digits becomes a dash. A name that is too long,
    reserved or not ASCII is truncated or replaced, and a hash of project and account makes it unique.
    """
    raw = f"finetune-{login.project}-{login.account.partition('@')[0]}".lower()
    plain = re.sub("[^a-z0-9]+", "-", raw).strip("-")
    name = RESERVED.sub("g-gle", plain)
    if name == plain and len(name) <= BUCKET_LETTERS and raw.isascii():
        return name
    digest = hashlib.sha256(f"{login.project} {login.account}".encode()).hexdigest()[:HASH_LETTERS]
    return f"{name[: BUCKET_LETTERS - 1 - HASH_LETTERS]}-{digest}"


def gcloud_folder() -> Path:
    """The folder of gcloud's settings and logins; it need not exist."""
    return Path(os.environ.get("CLOUDSDK_CONFIG") or "~/.config/gcloud").expanduser()


def skypilot_config() -> Path:
    """SkyPilot's own config: ~/.sky/config.yaml, or what SKYPILOT_GLOBAL_CONFIG names. It need not exist."""
    return Path(os.environ.get("SKYPILOT_GLOBAL_CONFIG") or "~/.sky/config.yaml").expanduser()


def skypilot_setting(*keys: str) -> Any:
    """A value from SkyPilot's own config, None if it is not set: skypilot_setting("jobs", "controller"). Raises UserError if the
    file is not YAML."""
    from finetune.runtime.yaml_file import load_yaml

    path = skypilot_config()
    try:
        value = load_yaml(read_text(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UserError(
            f"{path}: not readable as YAML; correct or remove SkyPilot's config file", code="cloud.bad_skypilot_config"
        ) from None
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _credentials(path: Path, folder: Path) -> dict[str, Any]:
    """The application default credentials at `path`."""
    if not path.is_file():
        if path != folder / CREDENTIALS:
            raise UserError(
                f"{path}: no such file, but GOOGLE_APPLICATION_CREDENTIALS names it; correct or unset that",
                code="gcloud.missing_credentials",
            )
        if not folder.is_dir():
            run = (
                f"{'' if shutil.which('gcloud') else 'install gcloud, then '}run `{LOG_IN}` and `{LOG_IN_APPLICATIONS}`"
            )
            raise UserError(
                f"{folder}: missing, so nobody is logged in to Google here; {run}", code="gcloud.not_set_up"
            )
        raise UserError(
            f"{path}: missing, and SkyPilot needs it; run `{LOG_IN_APPLICATIONS}`", code="gcloud.missing_credentials"
        )
    try:
        value = load_json(path)
    except OSError as error:
        raise UserError(
            f"{path}: not readable ({error.strerror}); correct its permissions", code="file.unreadable"
        ) from None
    except ValueError:
        raise UserError(
            f"{path}: not valid JSON; run `{LOG_IN_APPLICATIONS}` again", code="gcloud.bad_credentials"
        ) from None
    if not isinstance(value, dict) or value.get("type") not in KINDS:
        raise UserError(
            f"{path}: holds no Google credentials; run `{LOG_IN_APPLICATIONS}` again",
            code="gcloud.bad_credentials",
        )
    return value


def _skypilot_project() -> str:
    """The project that SkyPilot's config sets for its active workspace, "" if none."""
    workspace = skypilot_setting("active_workspace") or "default"
    project = skypilot_setting("workspaces", str(workspace), "gcp", "project_id")
    return project if isinstance(project, str) else ""


def _project(credentials: dict[str, Any], path: Path, folder: Path) -> str:
    """The project as google.auth.default finds it; it does not use `quota_project_id`."""
    environment = os.environ.get("GOOGLE_CLOUD_PROJECT", os.environ.get("GCLOUD_PROJECT"))
    key = {"service_account": "project_id", "gdch_service_account": "project"}.get(credentials["type"])
    project = environment or (_text(credentials, key, path) if key else "")
    if project:
        return project
    if path != folder / CREDENTIALS:  # gcloud's project is used only with gcloud's own credentials
        raise UserError(
            f"{path}: names no project; set GOOGLE_CLOUD_PROJECT to the project's id", code="gcloud.no_project"
        )
    project = _property("project", folder)
    if not project:
        raise UserError(f"{folder}: gcloud has no project set; run `{SET_PROJECT}`", code="gcloud.no_project")
    return project


def _text(credentials: dict[str, Any], key: str, path: Path) -> str:
    value = credentials.get(key, "")
    if not isinstance(value, str):
        raise UserError(
            f"{path}: {key} is not a string; run `{LOG_IN_APPLICATIONS}` again", code="gcloud.bad_credentials"
        )
    return value


def _property(name: str, folder: Path) -> str:
    """A property of gcloud's section [core], "" if it is not set. The environment variable takes precedence, even if empty."""
    value = os.environ.get(f"CLOUDSDK_CORE_{name.upper()}")
    if value is not None:
        return value
    path = folder / "configurations" / f"config_{_active_configuration(folder)}"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(read_text(path))
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(
            f"{path}: not readable ({error.strerror}); correct its permissions", code="file.unreadable"
        ) from None
    except (configparser.Error, ValueError):
        raise UserError(
            f"{path}: not a file that gcloud wrote; remove it and run `gcloud init`", code="gcloud.bad_config"
        ) from None
    return parser.get("core", name, fallback="")


def _active_configuration(folder: Path) -> str:
    """The name of gcloud's active configuration, "" if it has none; gcloud then uses an empty one."""
    named = os.environ.get("CLOUDSDK_ACTIVE_CONFIG_NAME")
    if named:
        return named
    path = folder / "active_config"
    try:
        name = read_text(path) or "default"
    except FileNotFoundError:
        return ""
    except (OSError, ValueError):
        name = "?"
    if not re.fullmatch("[a-z][-a-z0-9]*|NONE", name):
        raise UserError(
            f"{path}: expected one name, such as default for configurations/config_default; write it there",
            code="gcloud.bad_config",
        )
    return name
