"""The rows of `finetune doctor --cloud`: login, quotas, bucket, the command `sky` and what it needs.

Google is queried through gcloud, with all calls in parallel, so it takes as long as the slowest call.
"""

from __future__ import annotations

import shlex
import shutil
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from finetune.cloud.gcloud import cli as gcloud_cli
from finetune.cloud.gcloud import quota
from finetune.cloud.gcloud.cli import Answer, ask
from finetune.cloud.gcloud.config import (
    LOG_IN,
    LOG_IN_APPLICATIONS,
    SET_PROJECT,
    Login,
    bucket_name,
    local_login,
    skypilot_setting,
)
from finetune.cloud.gcloud.policy_setting import POLICY, named_policy, names_policy
from finetune.doctor.check import Check, Need, Status, absent
from finetune.errors import UserError
from finetune.runtime.files import parse_json

HOME_REGION = "us-central1"
"""Where to request quota if no region is given: it has all four GPUs (Google's page on GPU regions)."""
COPYING = ("rsync", "ssh")
UNREADABLE = Answer("", "an unexpected answer of gcloud", "run `gcloud info` by hand")
NO_QUOTAS = Answer("", "Google returned none", f"run doctor again later, or look on {quota.QUOTA_PAGE}")


def cloud_checks(need: Need, regions: list[str] | None = None) -> list[Check]:
    """All rows that launching needs; for `train` only gcloud's login and project, as warnings.

    regions: those that the plan would use, the cheapest first; None for all regions with quota.
    """
    if need == "train":
        return gcloud_checks(need)
    rows = [sky_program_check(need), copying_check(need), policy_check(), sky_check_hint(), controller_check()]
    if shutil.which("gcloud") is None:
        return [*gcloud_checks(need), *rows]
    try:
        login = local_login()
    except UserError as error:
        missing = Check("SkyPilot's login", absent("cloud", need), "none", "", _without_home(str(error)))
        return [*gcloud_checks(need), missing, *rows]
    with ThreadPoolExecutor(max_workers=5) as pool:
        project = f"--project={login.project}"
        first = pool.submit(gcloud_checks, need)
        token = pool.submit(lambda: replace(ask(gcloud_cli.TOKEN), output=""))  # only whether there is a token
        listed = pool.submit(ask, gcloud_cli.REGIONS, project)
        everywhere = pool.submit(ask, gcloud_cli.PROJECT, project)
        bucket = pool.submit(ask, gcloud_cli.BUCKET, f"gs://{bucket_name(login)}", project)
    expired = gcloud_cli.EXPIRED in {call.result().trouble for call in (listed, everywhere, bucket)}
    return [
        *login_checks(need, first.result(), login, expired, token.result()),
        all_regions_check(need, everywhere.result()),
        *quota_checks(need, listed.result(), login.project, regions),
        bucket_check(need, bucket.result(), login),
        *rows,
    ]


def gcloud_checks(need: Need) -> list[Check]:
    """gcloud, its login and its project, which need no request to Google."""
    if shutil.which("gcloud") is None:
        advice = "to launch on Google Cloud install its CLI: cloud.google.com/sdk"
        return [Check("gcloud", absent("cloud", need), "not on PATH", "", advice)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        account, project = pool.map(ask, (gcloud_cli.ACCOUNT, gcloud_cli.CONFIGURED_PROJECT))
    account = replace(account, output=_masked(account.output))
    log_in = f"{LOG_IN} && {LOG_IN_APPLICATIONS}"
    return [
        _gcloud_check("gcloud login", absent("cloud", need), account, log_in),
        _gcloud_check("gcloud project", absent("cloud", need), project, SET_PROJECT),
    ]


def login_checks(need: Need, rows: list[Check], login: Login, expired: bool, token: Answer) -> Iterator[Check]:
    """gcloud's rows, corrected by Google's answers, and SkyPilot's login, which expires separately."""
    status = absent("cloud", need)
    for row in rows:
        if row.name == "gcloud login" and row.status == "ok" and expired:
            found = f"{row.found}, {gcloud_cli.EXPIRED}"
            yield replace(row, status=status, found=found, advice=f"run `{LOG_IN}`")
        elif row.name == "gcloud project" and row.status == "ok" and row.found != login.project:
            found = f"{row.found}, but SkyPilot uses {login.project}"
            advice = "set by GOOGLE_CLOUD_PROJECT, a key file or SkyPilot's config; use the same project for both"
            yield replace(row, status="warning", found=found, advice=advice)
        else:
            yield row
    if token.trouble:
        advice = f"run `{LOG_IN_APPLICATIONS}`" if token.trouble == gcloud_cli.EXPIRED else token.advice
        yield Check("SkyPilot's login", status, token.trouble, "", advice)
    else:
        yield Check("SkyPilot's login", "ok", "application default credentials work")


def all_regions_check(need: Need, answer: Answer) -> Check:
    """The quota over all regions and GPU models, which is 0 in a new project."""
    name, metric = "quota GPUs, all regions", quota.ALL_REGIONS
    how = f"{quota.how_to_request(metric)}; a free-trial account has to be upgraded first"
    quotas: quota.Quotas = {}
    if not answer.trouble:
        try:
            quotas = quota.read_project(answer.output)
            answer = answer if metric in quotas else NO_QUOTAS
        except ValueError:
            answer = UNREADABLE
    if answer.trouble:
        return Check(name, absent("cloud", need), answer.trouble, metric, answer.advice)
    if quotas[metric].limit == 0:
        return Check(name, absent("cloud", need), "0: no GPU can be started anywhere", metric, how)
    more = quota.how_to_request(metric, wanted=quotas[metric].limit + 1)
    return _used(Check(name, "ok", _count(quotas[metric].limit), metric, more), [quotas[metric]])


def quota_checks(need: Need, answer: Answer, project: str, regions: list[str] | None) -> Iterator[Check]:
    """A row per GPU of our tasks, spot and on-demand. Without quota: missing if no GPU has any, else a warning."""
    listed: dict[str, quota.Quotas] = {}
    if not answer.trouble:
        try:
            listed = quota.read_regions(answer.output)
            answer = answer if listed else NO_QUOTAS
        except ValueError:
            answer = UNREADABLE
    if answer.trouble:
        yield Check("GPU quotas", absent("cloud", need), answer.trouble, "", answer.advice)
        return
    unknown = [region for region in regions or () if region not in listed]
    if unknown:
        advice = "`gcloud compute regions list` shows the regions of this project"
        yield Check("regions", "warning", f"no quotas listed in {', '.join(unknown)}", "", advice)
    chosen = [region for region in regions or () if region in listed] or None
    request_in = chosen[0] if chosen else HOME_REGION
    kinds = [(gpu, spot) for gpu in quota.TASK_GPUS for spot in (True, False) if spot or gpu not in quota.SPOT_ONLY]
    rows = [_gpu_check(gpu, spot, listed, chosen, request_in) for gpu, spot in kinds]
    one_is_enough: Status = absent("cloud", need) if all(row.status == "missing" for row in rows) else "warning"
    yield from (replace(row, status=one_is_enough) if row.status == "missing" else row for row in rows)
    lacking = [row.needed for row in rows if row.status != "ok"]
    if lacking:
        wanted = _limit(listed, request_in, lacking[0]) + 1
        command = quota.request_command(lacking[0], project, request_in, wanted)
        yield Check("more quota", "info", "can also be requested with gcloud", "", f"such as: {command}")


def _gpu_check(
    gpu: str, spot: bool, listed: dict[str, quota.Quotas], chosen: list[str] | None, request_in: str
) -> Check:
    """The row of one GPU, `missing` without quota in the chosen regions; `needed` names the quota."""
    name, metric = f"quota {gpu} {'spot' if spot else 'on-demand'}", quota.metric(gpu, spot)
    how = quota.how_to_request(metric, request_in, _limit(listed, request_in, metric) + 1)
    there = {region: quota.usable(quotas, gpu, spot) for region, quotas in listed.items()}
    some = {region: there[region] for region in sorted(there, key=_americas_first) if there[region].limit > 0}
    here = some if chosen is None else {region: some[region] for region in chosen if region in some}
    if here:
        return _used(Check(name, "ok", _amount(here), metric, how), list(here.values()))
    found = "0 everywhere" if chosen is None else f"0 in {_names(chosen)}"
    if some:
        found += f", but {_amount(some)}"
    if any(quota.passed_over(listed.get(region, {}), gpu) for region in chosen or listed):
        how = f"Google would let spot use the on-demand quota, but SkyPilot skips regions whose spot quota is 0: {how}"
    return Check(name, "missing", found, metric, how)


def _limit(listed: dict[str, quota.Quotas], region: str, metric: str) -> float:
    """Of the quota itself, 0 if it is not listed there."""
    found = listed.get(region, {}).get(metric)
    return found.limit if found else 0.0


def _used(check: Check, quotas: list[quota.Quota]) -> Check:
    """The row of a quota above 0: ok if one GPU is free in some region."""
    if any(found.limit - found.usage >= 1 for found in quotas):
        return replace(check, advice="")
    advice = f"`sky status` shows what uses it; for more {check.advice}"
    return replace(check, status="warning", found=f"{check.found}, all in use", advice=advice)


def _amount(quotas: dict[str, quota.Quota]) -> str:
    limits = {found.limit for found in quotas.values()}
    return f"{'up to ' if len(limits) > 1 else ''}{_count(max(limits))} in {_names(list(quotas))}"


def _names(regions: list[str]) -> str:
    more = len(regions) - 2
    return ", ".join(regions[:2]) + (f" (+{more} region{'s' if more > 1 else ''})" if more > 0 else "")


def _americas_first(region: str) -> tuple[bool, str]:
    return not region.startswith("us-"), region  # where prices are lowest


def _count(limit: float) -> str:
    return "no limit" if limit == float("inf") else f"{limit:g}"


def bucket_check(need: Need, answer: Answer, login: Login) -> Check:
    """Whether the bucket exists. Its name is shown without the user, who is masked in the row of the login too."""
    name = f"gs://{bucket_name(replace(login, account=login.account[:1]))}..."
    if answer.trouble == gcloud_cli.NOT_FOUND:
        return Check("bucket", "info", f"{name} does not exist yet", "", "it is created at the first launch")
    advice = answer.advice
    if answer.trouble == gcloud_cli.FORBIDDEN:
        advice = (
            "it belongs to someone else, or this account lacks the role Storage Admin: ask the project's owner for it"
        )
    if answer.trouble:
        return Check("bucket", absent("cloud", need), f"{name}: {answer.trouble}", "", advice)
    try:
        location = str(parse_json(answer.output)["location"]).lower()
    except (ValueError, KeyError, TypeError):
        return Check("bucket", "warning", f"{name}: {UNREADABLE.trouble}", "", UNREADABLE.advice)
    return Check("bucket", "ok", f"{name} in {location}")


def sky_program_check(need: Need) -> Check:
    """Whether `sky` belongs to this environment: another one cannot import the policy that .sky.yaml names."""
    ours, program = Path(sysconfig.get_path("scripts")), shutil.which("sky")
    activate = f"activate this environment: `{_source(ours / 'activate')}`"
    if program is None:
        return Check(
            "sky program", absent("cloud", need), "not on PATH", "", f"{activate}, with SkyPilot installed in it"
        )
    if ours.resolve() in (Path(program).parent.resolve(), Path(program).resolve().parent):
        return Check("sky program", "ok", "of this environment")
    advice = f"it cannot import the policy that .sky.yaml names, and refuses to launch; {activate}"
    return Check("sky program", absent("cloud", need), f"another: {_without_home(program)}", "", advice)


def copying_check(need: Need) -> Check:
    """The programs with which SkyPilot copies this folder to the machine; without them it refuses to launch."""
    name, lacking = " and ".join(COPYING), [program for program in COPYING if shutil.which(program) is None]
    if not lacking:
        return Check(name, "ok", "on PATH")
    advice = "SkyPilot copies this folder to the machine with them: install the packages rsync and openssh-client"
    return Check(name, absent("cloud", need), f"not on PATH: {', '.join(lacking)}", "", advice)


def policy_check() -> Check:
    """Whether the launch policy holds for commands typed in every folder, or at least in this one."""
    name = "launch policy"
    try:
        found = named_policy()
    except UserError as error:
        return Check(name, "warning", "unknown", "", _without_home(str(error)))
    if found == POLICY:
        return Check(name, "ok", "holds in every folder")
    if found is not None:
        return Check(name, "warning", f"another: {found}", "", f"SkyPilot takes one; ours is {POLICY}")
    advice = "use `finetune launch`, or write it into ~/.sky/config.yaml with `finetune doctor --fix-policy`"
    if names_policy(Path()):
        return Check(name, "info", "holds for `sky launch` typed in this folder only", "", advice)
    return Check(name, "warning", "does not hold for `sky launch` typed in this folder", "", advice)


def sky_check_hint() -> Check:
    advice = "run `sky check gcp` once: it enables the APIs that SkyPilot needs and checks the permissions"
    return Check("APIs, permissions", "info", "not checked here", "", advice)


def controller_check() -> Check:
    """Where the controller of managed jobs would run. SkyPilot reads this setting when its API server starts."""
    name = "jobs controller"
    try:
        on = skypilot_setting("jobs", "controller", "consolidation_mode") is True
    except UserError as error:
        return Check(name, "warning", "unknown", "", _without_home(str(error)))
    if not on:
        advice = "to avoid it: jobs.controller.consolidation_mode: true in ~/.sky/config.yaml, then `sky api stop`"
        return Check(name, "info", "`sky jobs launch` starts a VM for it, which costs money", "", advice)
    in_force = Path("~/.sky/.jobs_controller_consolidation_reloaded_signal").expanduser().exists()
    advice = "" if in_force else "takes effect when SkyPilot's API server restarts: `sky api stop`"
    return Check(name, "info", "on this machine (consolidation_mode)", "", advice)


def _gcloud_check(name: str, status: Status, answer: Answer, remedy: str) -> Check:
    if answer.trouble:
        return Check(name, status, "no answer", "", "gcloud failed, or took too long: run `gcloud info` to see why")
    if answer.output in ("", "(unset)"):
        return Check(name, status, "none", "", f"to launch on Google Cloud run `{remedy}`")
    return Check(name, "ok", answer.output.splitlines()[0])


def _masked(account: str) -> str:
    """The account, masked so that it can be posted: its first letter and its domain."""
    user, at, domain = account.partition("@")
    return f"{user[:1]}...{at}{domain}" if account else ""


def _source(script: Path) -> str:
    """The command, with ~ for the home directory, which stands before the quotes: within them it would be a plain letter."""
    text = _without_home(str(script))
    home = "~/" if text.startswith("~/") else ""
    return f"source {home}{shlex.quote(text.removeprefix(home))}"


def _without_home(text: str) -> str:
    """The text with ~ for the home directory, which names the user."""
    return text.replace(f"{Path.home()}/", "~/")
