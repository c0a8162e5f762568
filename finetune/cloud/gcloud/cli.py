"""Read-only calls of gcloud, each with a time limit, and the meaning of its errors.

gcloud's error texts name accounts and machines, so they are classified here and never passed on.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from dataclasses import dataclass

from finetune.cloud.gcloud.config import LOG_IN, LOG_IN_APPLICATIONS

SECONDS = 15.0
"""Time limit of a call. gcloud takes half a second to start (measured on two cores), Google's answer one or two seconds."""
REGIONS = ("compute", "regions", "list", "--format=json(name,quotas)")
PROJECT = ("compute", "project-info", "describe", "--format=json(quotas)")
BUCKET = ("storage", "buckets", "describe", "--format=json(location)")
TOKEN = ("auth", "application-default", "print-access-token")
ACCOUNT = ("auth", "list", "--filter=status:ACTIVE", "--format=value(account)")
CONFIGURED_PROJECT = ("config", "get-value", "project")

EXPIRED = "expired or revoked"
NOT_FOUND = "not found"
FORBIDDEN = "no permission"
TROUBLES = (
    (r"max retries|failed to resolve|problem connecting|unable to find the server|unreachable|connection ?error",
     "no connection to Google", "check the network, then run doctor again"),
    (r"reauth|invalid_grant|invalid_rapt|refreshing .*tokens|active account|invalid (authentication )?credentials",
     EXPIRED, f"run `{LOG_IN}` and `{LOG_IN_APPLICATIONS}`"),
    (r"has not been used in project|SERVICE_DISABLED|not enabled on project", "the API is off in this project",
     "run `sky check gcp`, which turns on the APIs that SkyPilot needs"),
    (r"billing", "the project has no billing account", "link one on console.cloud.google.com/billing"),
    (r"permission|access denied|\b403\b", FORBIDDEN,
     "ask the project's owner for the roles that `sky check gcp` lists as missing"),
    (r"not found|\b404\b", NOT_FOUND, "`gcloud projects list` shows the projects of this account"),
)  # fmt: skip
"""(pattern of gcloud's error text, its meaning, the remedy); the first match is used, because without a network gcloud also
mentions refreshing tokens. The texts are those of gcloud 528."""


@dataclass(frozen=True)
class Answer:
    """What gcloud printed; `trouble` and `advice` are "" if the call succeeded."""

    output: str
    trouble: str = ""
    advice: str = ""


def ask(question: tuple[str, ...], *arguments: str, seconds: float | None = None) -> Answer:
    """gcloud's answer. After `seconds`, else SECONDS, gcloud is killed, with all processes that it started."""
    by_hand = f"run it by hand: `gcloud {' '.join(question[:3])}`"
    seconds = seconds or SECONDS
    try:
        process = subprocess.Popen(
            ["gcloud", "--quiet", *question, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that the kill also reaches the Python process that gcloud's shell script starts
        )
    except OSError as error:
        return Answer("", f"gcloud cannot be started ({error.strerror})", by_hand)
    with process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return Answer("", f"no answer within {seconds:g} s", by_hand)
    if process.returncode:
        return Answer("", *meaning(errors.decode(errors="replace"), by_hand))
    return Answer(output.decode(errors="replace").strip())


def meaning(errors: str, otherwise: str) -> tuple[str, str]:
    """(trouble, advice) for gcloud's standard error."""
    for pattern, trouble, advice in TROUBLES:
        if re.search(pattern, errors, re.IGNORECASE):
            return trouble, advice
    return "gcloud failed", otherwise
