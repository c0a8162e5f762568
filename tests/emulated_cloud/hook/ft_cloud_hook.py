"""Points Google's client libraries at the emulated cloud. SkyPilot's processes have it on PYTHONPATH, the machines' environments
among their packages.

It changes modules when they are loaded, and only if an emulated cloud is configured, by FT_CLOUD_API or, on a machine, by
/etc/ft-machine.json. It has to run on Python 3.10, which SkyPilot's runtime on the machines uses.
"""

import importlib.abc
import json
import os
import pathlib
import sys
import time
from typing import Any


def _settings() -> tuple[str, str, str]:
    if os.environ.get("FT_CLOUD_API"):
        return (
            os.environ["FT_CLOUD_API"],
            os.environ.get("GOOGLE_CLOUD_PROJECT", ""),
            os.environ.get("FT_CLOUD_LOGIN", ""),
        )
    try:
        machine = json.loads(pathlib.Path("/etc/ft-machine.json").read_text(encoding="utf-8"))
        return machine["api"], machine["project"], ""
    except (OSError, ValueError, KeyError):
        return "", "", ""


API, PROJECT, LOGIN = _settings()


def _credentials() -> Any:
    from google.auth import credentials, exceptions

    class Login(credentials.AnonymousCredentials):
        """Credentials without a token. While the file LOGIN contains "expired", they are refused like an expired login."""

        def before_request(self, request: Any, method: str, url: str, headers: dict[str, str]) -> None:
            try:
                expired = pathlib.Path(LOGIN).read_text(encoding="utf-8").strip() == "expired"
            except OSError:
                expired = False
            if expired:
                raise exceptions.RefreshError(
                    "invalid_grant: Token has been expired or revoked.", {"error": "invalid_grant"}
                )

    return Login()


def _google_auth(module: Any) -> None:
    module.default = lambda *args, **kwargs: (_credentials(), PROJECT)


def _discovery(module: Any) -> None:
    real = module.build

    def build(service: str, version: str, *args: Any, **kwargs: Any) -> Any:
        path = f"/{service}/{version}/" if service == "compute" else "/"
        kwargs["client_options"] = {"api_endpoint": API + path}
        kwargs["credentials"] = _credentials()
        kwargs["static_discovery"] = True
        return real(service, version, *args, **kwargs)

    module.build = build


def _storage(module: Any) -> None:
    """With an emulator this library uses no login at all, and would never notice that ours has expired."""
    real = module.Client.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **({"credentials": _credentials()} | kwargs))

    module.Client.__init__ = init


def _constants(module: Any) -> None:
    """SkyPilot's price catalog comes from the emulated cloud. SkyPilot keeps this log in /tmp and never removes it."""
    module.HOSTED_CATALOG_DIR_URL = API + "/catalogs"
    if os.environ.get("TMPDIR"):
        module.HA_PERSISTENT_RECOVERY_LOG_PATH = os.environ["TMPDIR"] + "/{}ha_recovery.log"


def _backend_utils(module: Any) -> None:
    module._TEST_IP_LIST = [API + "/network"] * 2


def _controller_utils(module: Any) -> None:
    """SkyPilot starts as many controllers of managed jobs as memory allows, a dozen on 24 GB; one is enough for a test."""
    module.get_number_of_jobs_controllers = lambda: 1


def _events(module: Any) -> None:
    """On a machine SkyPilot checks every minute whether it is idle, and every five whether a job's process has ended."""
    module.EVENT_CHECKING_INTERVAL_SECONDS = module.StopEvent.EVENT_INTERVAL_SECONDS = 5
    module.JobSchedulerEvent.EVENT_INTERVAL_SECONDS = 60


def _optimizer(module: Any) -> None:
    """While a GPU computes a step, the CPU is free. Here the CPU computes it, so each step is followed by a pause, which leaves
    the CPU to other processes."""
    seconds = float(os.environ.get("FT_STEP_SECONDS", "0"))
    if seconds:
        module.register_optimizer_step_post_hook(lambda *_: time.sleep(seconds))


def _answers(module: Any) -> None:
    """An answer takes a while, so that an evaluation of six questions can be interrupted in the middle."""
    seconds = float(os.environ.get("FT_ANSWER_SECONDS", "0"))
    if not seconds:
        return
    real = module.AnswerFile._line

    def line(*arguments: Any) -> Any:
        time.sleep(seconds)
        return real(*arguments)

    module.AnswerFile._line = line


def _fetch(module: Any) -> None:
    """So does that which a machine fetches."""
    module.URLS = (f"{API}/catalogs/{module.SCHEMA}/{module.VMS}",)


CHANGES = {
    "finetune.cloud.catalog.fetch": _fetch,
    "finetune.evaluation.answers": _answers,
    "google.auth": _google_auth,
    "googleapiclient.discovery": _discovery,
    "google.cloud.storage.client": _storage,
    "sky.backends.backend_utils": _backend_utils,
    "sky.skylet.constants": _constants,
    "sky.skylet.events": _events,
    "sky.utils.controller_utils": _controller_utils,
    "torch.optim.optimizer": _optimizer,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module, and changes it once it is loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in CHANGES:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            CHANGES[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if API:
    sys.meta_path.insert(0, _Finder())
