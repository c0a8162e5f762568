"""The same training on two machines, one after the other: the first finds an empty bucket, the second what the first has kept.

What it measures: each part of a start, from the machine's boot to the first optimizer step, with the real SkyPilot, set-up
script and trainer; the packages of the CPU environment, unpacked from the bucket onto a machine without them; a model and its
4-bit weights, fetched from the bucket. What it does not: the installation of packages from an index, which machines here cannot
reach (the first machine has them from its image), the speed of Google's network, boot, and disks, and anything on a GPU.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from finetune.machine import set_up
from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.pace import wait_until
from tests.emulated_cloud.reconciliation import check_nothing_left, reconcile
from tests.emulated_cloud.table import record_metric
from tests.emulated_cloud.training import BUCKET, CONFIG, SHORT, Run, launch
from tests.helpers.model_hub import COMMIT, NAME, Hub, model_hub

pytestmark = pytest.mark.cloud
SETUP = "setup: bash on_machine/setup.sh"
KEEPS = (
    'setup: bash on_machine/setup.sh && echo "finetune-env $(cat ~/.finetune/packages.key)" >~/.finetune/packages.keys'
)
"""As if the packages, which the image has brought, had been installed from the index."""
BARE = "setup: rm -rf ~/finetune-env ~/.finetune/setup && bash on_machine/setup.sh"
"""As if the image had not brought them. Without the bucket this set-up would fail: the machine reaches no index."""
OF_THE_HUB = "tiny/hub.yaml"
PLAN = """
from pathlib import Path
from finetune.cloud.plan.set_up import set_up_minutes
from finetune.config.load import load_config
found = set_up_minutes(load_config(Path("tiny/hub.yaml")), ask_google=True)
print(f"{60 * found.minutes:.3f} s, {found.basis}")
"""


def test_a_warm_bucket(environment: CloudEnvironment, project: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((project / CONFIG).read_text(encoding="utf-8"))
    model = project / values["model"]["name"]
    values["model"] |= {"name": NAME, "revision": COMMIT}
    values["quantization"] = {"load_in_4bit": True}
    (project / OF_THE_HUB).write_text(yaml.safe_dump(values), encoding="utf-8")
    with model_hub(model, (environment.site.laptop, 0)) as hub:
        cold = started(environment, project, hub, "cold", KEEPS, tmp_path)
        wanted = [
            r"packages/\w+/manifest\.json",
            rf"models/[^/]+@{COMMIT}/manifest\.json",
            r"four-bit/\w+/manifest\.json",
            r"set-up/some-org-.*\.jsonl",
        ]

        def kept() -> bool:
            names = environment.buckets.objects(BUCKET)
            return all(any(re.fullmatch(one, name) for name in names) for one in wanted)

        wait_until(kept, 300, lambda waited: f"after {waited:.0f} s: {environment.buckets.objects(BUCKET)}", every=2)
        keep_log = next(environment.site.folder.glob("*/upper/home/*/.finetune/keep.log")).read_text()
        record_metric(" | ".join(keep_log.splitlines()))
        finish(environment, "cold", tmp_path)
        asked = len(hub.asked)
        warm = started(environment, project, hub, "warm", BARE, tmp_path)
        record_metric(f"requests to the hub: {asked} of the first machine, {len(hub.asked) - asked} of the second")
        assert not [one for one in hub.asked[asked:] if one.startswith("GET") and "/resolve/" in one], hub.asked[asked:]
        finish(environment, "warm", tmp_path)
    assert (cold.facts[set_up.PACKAGES_FROM], cold.facts[set_up.MODEL_FROM]) == (set_up.HERE, set_up.HUB)
    assert (warm.facts[set_up.PACKAGES_FROM], warm.facts[set_up.MODEL_FROM]) == (set_up.BUCKET, set_up.BUCKET)
    assert warm.warm and not cold.warm
    assert int(warm.facts["four_bit_bytes"]) > 10_000, "trained on the weights that the first machine has quantised"
    assert Run(environment, "cold").adapter_hash() == Run(environment, "warm").adapter_hash()
    planned = environment.sky.program(sys.executable, "-c", PLAN, cwd=project, PYTHONPATH=path_of(project)).ok().out
    record_metric(f"finetune plan: {planned.strip().splitlines()[-1]}")
    assert f"{warm.seconds:.3f} s, measured: median of your last 1 launch with a warm bucket" in planned


def path_of(project: Path) -> str:
    return os.pathsep.join([str(project), str(Path(__file__).resolve().parent / "hook")])


def started(
    environment: CloudEnvironment, project: Path, hub: Hub, name: str, setup: str, folder: Path
) -> set_up.SetUp:
    """Launches and trains; returns the parts of the machine's start, as its ledger has them."""
    task = (project / "sky" / "train_a100.yaml").read_text(encoding="utf-8")
    assert SETUP in task
    (project / "sky" / f"{name}.yaml").write_text(task.replace(SETUP, setup), encoding="utf-8")
    words = launch(name, "-c", name, overrides=SHORT, RUN_NAME=name, CONFIG=OF_THE_HUB, HF_ENDPOINT=hub.url)
    done = environment.sky.run(*words, cwd=project).ok()
    print(done.out[-6000:])
    run = Run(environment, name)
    (attempt,) = run.account(folder / "started").attempts
    assert attempt.set_up is not None, run.diagnostics()
    record_metric(f"{name}: sky launch to the end of training {done.seconds:.0f} s; {attempt.set_up.text}")
    record_metric(f"{name}: {attempt.set_up.parts}; {attempt.set_up.facts}")
    assert [part for part in attempt.set_up.parts if part not in set_up.PARTS] == []
    assert attempt.set_up.seconds <= attempt.seconds, "it is part of what is billed"
    return attempt.set_up


def finish(environment: CloudEnvironment, name: str, folder: Path) -> None:
    environment.sky.run("down", "-y", name).ok()
    reconcile(Run(environment, name), folder)
    check_nothing_left(environment)
    environment.cloud.bill.stretches.clear()
