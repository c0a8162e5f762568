"""The plan's order in a task YAML: only the list changes, and a list that cannot be replaced safely is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.cloud.plan.plan import Plan
from finetune.cloud.plan.task_yaml import write_order
from finetune.machine.price import Ceilings
from tests.helpers.catalog_fixture import lay_out_catalog, needs_skypilot
from tests.helpers.errors import raises
from tests.helpers.plan_examples import plan_of, priced, run_config

ROOT = Path(__file__).resolve().parents[3]
COMMAND = "finetune plan configs/c.yaml --spot"
HEAD = """\
# sky launch task.yaml      (any_of: in a comment)

name: x                      # two  spaces kept
resources:
  infra: gcp
  disk_size: 200             # GB
"""
TAIL = """\
  autostop: {idle_minutes: 10, down: true}   # after the list

# about what follows
envs:
  any_of: "not a list of machines"
run: |
  echo "ordered:"   

"""
LISTS = {
    "any_of": "  any_of:\n    - {accelerators: A100:1, use_spot: true}\n    - {accelerators: L4:1}\n",
    "ordered": "  ordered:   # as it was\n    - accelerators: A100:1\n      instance_type: a2-highgpu-1g\n      use_spot: true\n",
    "not indented": "  any_of:\n  - accelerators: {A100: 1}\n  - accelerators: L4:1\n",
    "inline": "  any_of: [{accelerators: A100:1}, {accelerators: L4:1}]  # here\n",
    "inline on many lines": "  ordered: [\n    {accelerators: A100:1},\n    {accelerators: L4:1}\n  ]\n",
    "empty": "  any_of:\n",
    "empty inline": "  any_of: []\n",
    "a comment among its entries": "  any_of:\n    - {accelerators: A100:1}\n    # the other\n\n    - {accelerators: L4:1}\n",
}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """L4 spot, then T4 on-demand: $0.35 and $0.53 an hour; L4 on-demand is above the ceiling, T4 spot is not sold."""
    catalog = priced(tmp_path, T4=(0.4, ""), L4=(0.9, 0.27))
    return plan_of(run_config(plan={"gpus": ["T4", "L4"]}), catalog, Ceilings(usd_per_hour=0.9))


def expected(indent: str = "  ", end: str = "\n") -> str:
    """The list for `plan`, with the costs as a pattern."""
    lines = [
        re.escape(f"{indent}ordered:  # by dollars for the run, estimated: {COMMAND}"),
        re.escape(f"{indent}  - {{accelerators: L4:1, instance_type: g2-standard-8, use_spot: true}}")
        + r"  # \$\d+\.\d\d, \d+\.\d h",
        re.escape(f"{indent}  - {{accelerators: T4:1, instance_type: n1-highmem-8, use_spot: false}}")
        + r"  # \$\d+\.\d\d, \d+\.\d h",
    ]
    return "".join(line + end for line in lines)


def written(plan: Plan, folder: Path, text: str) -> str:
    task = folder / "task.yaml"
    task.write_bytes(text.encode())
    write_order(plan, task, COMMAND)
    assert {path.name for path in folder.glob("*task*")} == {"task.yaml"}  # no temporary file is left
    return task.read_bytes().decode()


@pytest.mark.parametrize("layout", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("tail", [TAIL, "", "\n# the end\n", "name2: y\n"], ids=["middle", "end", "comment", "section"])
def test_only_the_list_changes(layout: str, tail: str, plan: Plan, tmp_path: Path) -> None:
    after = written(plan, tmp_path, HEAD + layout + tail)
    assert re.fullmatch(re.escape(HEAD) + expected() + re.escape(tail), after)
    before = yaml.safe_load(HEAD + layout + tail)
    content = yaml.safe_load(after)
    for tree in (before, content):
        for name in ("any_of", "ordered"):
            tree["resources"].pop(name, None)
    assert content == before


def test_the_file_lists_the_chosen_machines_in_order(plan: Plan, tmp_path: Path) -> None:
    content = yaml.safe_load(written(plan, tmp_path, HEAD + LISTS["any_of"] + TAIL))
    assert "any_of" not in content["resources"]
    assert content["resources"]["ordered"] == [
        {"accelerators": "L4:1", "instance_type": "g2-standard-8", "use_spot": True},
        {"accelerators": "T4:1", "instance_type": "n1-highmem-8", "use_spot": False},
    ]
    costs = re.findall(r"# \$([\d.]+), ([\d.]+) h$", (tmp_path / "task.yaml").read_text(), re.M)
    chosen = [row.cost for row in plan.rows if row.cost and row.chosen]
    assert costs == [(f"{cost.usd:.2f}", f"{cost.hours:.1f}") for cost in chosen]


def test_what_was_written_can_be_written_again(plan: Plan, tmp_path: Path) -> None:
    once = written(plan, tmp_path, HEAD + LISTS["any_of"] + TAIL)
    assert written(plan, tmp_path, once) == once


def test_a_list_at_the_end_of_a_file_without_a_final_newline(plan: Plan, tmp_path: Path) -> None:
    for name in ("any_of", "inline"):
        assert re.fullmatch(re.escape(HEAD) + expected(), written(plan, tmp_path, HEAD + LISTS[name].rstrip("\n")))


def test_windows_line_ends_are_kept(plan: Plan, tmp_path: Path) -> None:
    head, tail = (part.replace("\n", "\r\n") for part in (HEAD, TAIL))
    after = written(plan, tmp_path, head + LISTS["any_of"].replace("\n", "\r\n") + tail)
    assert re.fullmatch(re.escape(head) + expected(end="\r\n") + re.escape(tail), after)


def test_a_file_with_another_indentation_keeps_it(plan: Plan, tmp_path: Path) -> None:
    head = "resources:\n    infra: gcp\n"
    tail = "    disk_size: 200\nrun: echo\n"
    after = written(plan, tmp_path, head + "    any_of:\n        - {accelerators: A100:1}\n" + tail)
    assert re.fullmatch(re.escape(head) + expected(indent="    ") + re.escape(tail), after)


# refusals, which write nothing

UNTOUCHED = [
    ("a missing list", HEAD + TAIL, r"expected one list `ordered:` or `any_of:` under"),
    ("both lists", HEAD + LISTS["any_of"] + LISTS["ordered"], r"expected one list `ordered:` or `any_of:` under"),
    ("a list elsewhere", "name: x\nany_of: []\nresources:\n  infra: gcp\n", r"expected one list"),
    ("resources twice", HEAD + LISTS["any_of"] + "resources:\n  infra: gcp\n", r"expected one list .* one `resources:`"),
    ("no resources", "name: x\n", r"expected a SkyPilot task with a section `resources:`"),
    ("resources empty", "name: x\nresources:\n", r"expected a SkyPilot task with a section `resources:`"),
    ("not a task", "- any_of: []\n", r"expected a SkyPilot task with a section `resources:`"),
    ("an empty file", "", r"expected a SkyPilot task with a section `resources:`"),
    ("not YAML", "resources: [\n", r"not a readable task YAML"),
    ("a tab", "resources:\n\tany_of: []\n", r"not a readable task YAML"),
    ("two documents", "name: x\n---\n" + HEAD + LISTS["any_of"], r"not a readable task YAML"),
    ("all on one line", "resources: {infra: gcp, any_of: [{accelerators: A100:1}]}\n", r"edit it by hand"),
    ("a flow section", "resources: {any_of: [{accelerators: A100:1}],\n  infra: gcp}\n", r"edit it by hand"),
    ("an alias of the list", "resources:\n  any_of: &a\n    - {accelerators: A100:1}\nother: *a\n", r"edit it by hand"),
    ("a region", HEAD + "  any_of:\n    - {accelerators: A100:1, region: us-central1}\n",
     r"an entry of any_of: has more keys than a machine needs \(region\), which would be lost"),
    ("a ceiling of its own", HEAD + "  ordered:\n    - {accelerators: A100:1}\n    - {accelerators: L4:1, max_hourly_cost: 1}\n",
     r"an entry of ordered: has more keys than a machine needs \(max_hourly_cost\)"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), [case[1:] for case in UNTOUCHED], ids=[case[0] for case in UNTOUCHED])
def test_a_file_without_one_replaceable_list_is_refused_and_stays(
    text: str, message: str, plan: Plan, tmp_path: Path
) -> None:
    task = tmp_path / "task.yaml"
    task.write_text(text)
    before = task.stat()
    with raises("plan.unwritable_task", match=f"^{re.escape(str(task))}: .*{message}") as caught:
        write_order(plan, task, COMMAND)
    assert "\n" not in str(caught.value)
    assert task.read_text() == text and task.stat().st_ino == before.st_ino


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(b"\xff\xfe")]
)
def test_a_missing_file_a_folder_and_a_binary_file_are_refused(
    make: Callable[[Path], Any], plan: Plan, tmp_path: Path
) -> None:
    make(tmp_path / "task.yaml")
    with raises("plan.unwritable_task", match=r"task\.yaml: not a readable task YAML \("):
        write_order(plan, tmp_path / "task.yaml", COMMAND)


def test_a_plan_that_refuses_every_machine_writes_nothing(plan: Plan, tmp_path: Path) -> None:
    nothing = plan_of(run_config(plan={"gpus": ["T4"]}), plan.catalog, Ceilings(run_usd=0.001))
    with raises(
        "plan.all_refused", match=r"task\.yaml: not written, because the plan refuses every machine: see the table"
    ):
        written(nothing, tmp_path, HEAD + LISTS["any_of"])
    assert (tmp_path / "task.yaml").read_text() == HEAD + LISTS["any_of"]


# SkyPilot reads it

PROGRAM = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
print(json.dumps([[type(task.resources).__name__], *(
    [each.instance_type, each.accelerators, each.use_spot, each.disk_size] for each in task.resources)]))
"""


@needs_skypilot
@pytest.mark.parametrize("shipped", [False, True], ids=["example", "train_cheapest.yaml"])
def test_skypilot_loads_the_file_with_the_machines_in_the_plans_order(
    shipped: bool, plan: Plan, tmp_path: Path
) -> None:
    task = ROOT / "sky" / "train_cheapest.yaml"
    assert task.is_file()
    text = task.read_text(encoding="utf-8") if shipped else HEAD + LISTS["any_of"] + TAIL
    home = tmp_path / "home"
    lay_out_catalog(home)
    written(plan, tmp_path, text)
    environment = {name: value for name, value in os.environ.items() if name not in ("SKY_RUNTIME_DIR", "PYTHONPATH")}
    environment |= {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "task.yaml")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [
        ["list"],  # an ordered one; any_of gives a set
        ["g2-standard-8", {"L4": 1}, True, 200],
        ["n1-highmem-8", {"T4": 1}, False, 200],
    ]
