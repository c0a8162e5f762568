"""`finetune job dev`: JupyterLab and TensorBoard, reachable through ssh.

Both listen on 127.0.0.1 only, and Jupyter requires its token, which is kept out of SkyPilot's log. Ends after IDLE_SECONDS
without activity, so that autostop can terminate the machine.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from finetune.errors import EXIT_OK, UserError
from finetune.job.limits import hours_left, run_limited
from finetune.job.programs import last_lines, say, tensorboard
from finetune.job.settings import JobSettings
from finetune.runtime.confined import remove_file

IDLE_SECONDS = 1800
PORT = 8888
NOTEBOOKS = "notebooks"
JUPYTER = (
    *("jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={PORT}", "--ServerApp.port_retries=0"),
    f"--ServerApp.shutdown_no_activity_timeout={IDLE_SECONDS}",
    f"--MappingKernelManager.cull_idle_timeout={IDLE_SECONDS}",
    "--MappingKernelManager.cull_connected=True",
    f"--TerminalManager.cull_inactive_timeout={IDLE_SECONDS}",
)


def dev(settings: JobSettings) -> int:
    settings.require_bucket()
    hours = hours_left(settings, of_machine=True)
    with tensorboard(settings):
        say(f"JupyterLab for at most {hours:.4f} hours, or until it is idle for {IDLE_SECONDS // 60} minutes:")
        say(f"  ssh -L {PORT}:localhost:{PORT} -L 6006:localhost:6006 {settings.cluster}")
        say(f"  ssh {settings.cluster} finetune-env/bin/jupyter server list      # the address with its token")
        say(f"  save what should outlive the machine in the folder {NOTEBOOKS}, which is in the bucket")
        _link(Path(NOTEBOOKS), settings.mount / NOTEBOOKS)
        os.umask(0o077)
        log = settings.state / "jupyter.log"
        with log.open("wb") as file:
            ended = run_limited(JUPYTER, hours, settings, file)
    if ended.out_of_time or ended.code == EXIT_OK:
        return EXIT_OK
    print(last_lines(log, 5), file=sys.stderr)
    return ended.code


def _link(link: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if link.exists() and not link.is_symlink():
        raise UserError(
            f"{link}: exists in the working directory, and is needed as a link to the bucket's notebooks; rename yours",
            code="job.name_taken",
        )
    remove_file(link, inside=link.parent)
    link.symlink_to(folder)
