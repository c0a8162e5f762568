"""`make cloud-test GCP_PROJECT=project`: runs the scenarios on a real project, after it has shown their cost and got a yes.

However they end, everything that they have launched is taken down.

python -m tests.emulated_cloud.real_run PROJECT [-k NAME] [PYTEST ARGUMENT...]
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

HERE = Path(__file__).resolve().parent

from finetune.cloud.catalog.offers import Catalog, load_catalog  # noqa: E402
from finetune.cloud.gcloud.config import SET_PROJECT, bucket_name, local_login  # noqa: E402
from finetune.errors import UserError  # noqa: E402
from tests.emulated_cloud import real_cost  # noqa: E402
from tests.emulated_cloud.real_gcloud import Gcloud  # noqa: E402
from tests.emulated_cloud.real_sky import RealSky, take_down  # noqa: E402

PROJECT, NAMES, LAUNCHED = "FT_REAL_PROJECT", "FT_REAL_PREFIX", "FT_REAL_LAUNCHED"
"""Environment variables for the scenarios' process."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: that of the scenarios, 1 if something is left, 2 if nothing was started."""
    try:
        project, *rest = arguments
        chosen = selected(rest)
        catalog = check(project)
        print(real_cost.table([real_cost.cost(one, catalog) for one in chosen], project, catalog.source))
        agree()
    except UserError as error:
        print(f"cloud-test: {error}", file=sys.stderr)
        return 2
    return play(project, rest)


def selected(arguments: Sequence[str]) -> list[real_cost.Scenario]:
    """The scenarios that pytest will run: it is asked, because its -k has its own syntax."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-m",
        "cloud",
        "--collect-only",
        "-q",
        *words(arguments),
    ]
    listed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parents[1]).stdout
    collect = [line.rpartition("::")[2] for line in listed.splitlines() if "::" in line]
    found = [one for one in real_cost.SCENARIOS if one.test in collect]
    if not found:
        known = ", ".join(one.test.removeprefix("test_") for one in real_cost.SCENARIOS)
        raise UserError(
            f"SCENARIO={os.environ.get('SCENARIO', '')}: not among those that can run on a real project: {known}",
            code="real_cloud.unknown_scenario",
        )
    return found


def words(arguments: Sequence[str]) -> list[str]:
    return [str(HERE / "real_scenarios.py"), *arguments]


def check(project: str) -> Catalog:
    """Returns the price catalog. Raises UserError for what is missing on this computer."""
    if shutil.which("gcloud") is None:
        raise UserError("gcloud is not installed: https://cloud.google.com/sdk/docs/install", code="gcloud.not_set_up")
    login = local_login()
    if login.project != project:
        raise UserError(
            f"GCP_PROJECT={project}, but SkyPilot would launch in {login.project}; first: {SET_PROJECT}",
            code="gcloud.other_project",
        )
    return load_catalog(allow_snapshot=False)


def agree() -> None:
    """Raises UserError unless the user types yes, or has set YES=1."""
    if os.environ.get("YES") == "1":
        print("YES=1")
        return
    try:
        answer = input("\nType yes to spend it: ")
    except EOFError:
        answer = ""
    if answer.strip().lower() != "yes":
        raise UserError("no `yes`: nothing was launched", code="real_cloud.not_agreed")


def play(project: str, arguments: Sequence[str]) -> int:
    """Runs the scenarios, and takes down what they have launched, however they end."""
    prefix = f"ftreal-{secrets.token_hex(2)}-"
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    sky, gcloud = RealSky(prefix, folder / "launched"), Gcloud(project)
    env = dict(os.environ) | {PROJECT: project, NAMES: prefix, LAUNCHED: str(sky.launched)}
    print(
        f"clusters, jobs and runs of this session begin with {prefix}; if this process is killed with -9, look for them with"
    )
    print(
        f"`sky status`, `sky jobs queue` and `gcloud compute instances list --filter=name~^{prefix} --project={project}`"
    )
    command = [sys.executable, "-m", "pytest", "-vv", "-s", "-ra", "-m", "cloud", *words(arguments)]
    stopping: list[int] = []
    tests: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        """We wait for the end of the scenarios' process: Ctrl-C reaches it anyway, other signals are passed on."""
        stopping.append(number)
        if number != signal.SIGINT and tests:
            tests[0].send_signal(signal.SIGINT)

    for number in SIGNALS:
        signal.signal(number, stop)
    tests.append(subprocess.Popen(command, env=env, cwd=HERE.parents[1]))
    code = tests[0].wait()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # taking down must not be interrupted, nor the programs that it calls
    managed = bool(sky.names()["job"])
    print("\n".join(report := take_down(sky, gcloud)))
    tell_what_stays(prefix, project, managed)
    shutil.rmtree(folder, ignore_errors=True)
    return 1 if stopping or report[-1].startswith("LEFT") else code


def tell_what_stays(prefix: str, project: str, managed: bool) -> None:
    bucket = bucket_name(local_login())
    print(f"the runs stay: gcloud storage rm --recursive 'gs://{bucket}/runs/{prefix}*' --project={project}")
    if managed and not real_cost.consolidated():
        print("SkyPilot's jobs controller, if it made one, stays as well and stops itself: `sky status` shows it")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
