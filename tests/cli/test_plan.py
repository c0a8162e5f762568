"""`finetune plan` on the command line: ceilings, spot or on-demand, JSON, --write; without importing torch or SkyPilot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.cli.main import main
from tests.helpers.catalog_fixture import lay_out_catalog, shared_catalog
from tests.helpers.next_commands import parsed
from tests.helpers.plan_examples import run_values, write_manifest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "configs" / "mistral_7b_qlora.yaml"
Shown = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a price catalog that SkyPilot fetched today."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SKY_RUNTIME_DIR", raising=False)
    lay_out_catalog(tmp_path / "home", fetched=datetime.now(UTC))
    return tmp_path / "home"


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(write(tmp_path))


def write(folder: Path, **sections: dict[str, Any]) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_values(**sections)), encoding="utf-8")
    return path


def output(shown: Shown, *arguments: str) -> str:
    shown.readouterr()
    assert main(["plan", *arguments]) == 0
    said = shown.readouterr()
    cost, *following = said.err.splitlines()
    assert cost.startswith("plan: ") and cost.endswith(" (measured)") and len(following) == 1
    parsed(following[0].removeprefix("next: "))
    return said.out


def values(shown: Shown, *arguments: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found: dict[str, Any] = json.loads(output(shown, *arguments, "--json"), parse_constant=refuse)
    return found


def refused(shown: Shown, *arguments: str) -> str:
    """The one line that reports a user error."""
    shown.readouterr()
    assert main(["plan", *arguments]) == 2
    said = shown.readouterr().err
    assert said.startswith("finetune: ") and said.count("\n") == 1
    return said


# in a separate process

BLOCKED = """
import sys
for name in ("torch", "sky", "transformers", "numpy", "pandas"):
    sys.modules[name] = None
from finetune.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_plan_needs_neither_torch_nor_skypilot(home: Path) -> None:
    source = shared_catalog()
    if source is not None:  # the larger price list
        lay_out_catalog(home, source=source)
    command = [sys.executable, "-c", BLOCKED, "plan", "configs/mistral_7b_qlora.yaml", "data.output_dir=no/such/folder"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert [line.partition(" ")[0] for line in done.stderr.splitlines()] == ["plan:", "next:"]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("configs/mistral_7b_qlora.yaml: 6,790 examples x 515 tokens, 1,275 optimizer steps")
    assert any(line.startswith("prices: SkyPilot's catalog") for line in lines)
    assert sum(line.startswith(("1.", "2.", "3.", "4.", "5.", "6.", "7.", "8.")) for line in lines) == 8
    assert any(line.startswith("order: ") and " spot, then " in line for line in lines)


@pytest.mark.parametrize(("name", "records", "steps"), [("qlora", 6790, 1275), ("quick", 2122, 133)])
def test_the_shipped_7b_configs_are_planned_with_16_examples_per_step(
    name: str, records: int, steps: int, capsys: Shown
) -> None:
    shipped = str(ROOT / "configs" / f"mistral_7b_{name}.yaml")
    found = values(capsys, shipped, "data.output_dir=no/such/folder")
    assert (found["run"]["records"], found["run"]["steps"]) == (records, steps)
    assert all(row["memory_gib"]["fits"] and row["step"]["layers"] == "fused" for row in found["rows"])
    assert all(row["step"]["uncheckpointed_layers"] >= 30 for row in found["rows"])
    hf = values(capsys, shipped, "data.output_dir=no/such/folder", "training.kernels=hf")
    assert {row["gpu"]: row["tokens_per_second"] for row in hf["rows"]}["A100"] < 2500
    table = output(capsys, shipped, "--memory")
    assert "activations kept" in table and "  yes" in table and "  no" not in table


def test_without_a_catalog_the_plan_warns_that_it_uses_an_old_snapshot(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    assert "\nprices: OUR OLD SNAPSHOT" in output(capsys, config)
    assert values(capsys, config)["prices"]["snapshot"] is True


def test_a_fetched_catalog_is_named_with_its_date(config: str, capsys: Shown) -> None:
    today = f"{datetime.now().astimezone():%Y-%m-%d}"
    assert f"\nprices: SkyPilot's catalog, fetched {today} (today); host" in output(capsys, config)
    assert values(capsys, config)["prices"]["snapshot"] is False


# options


def test_each_ceiling_can_be_given_and_defaults_to_the_budget(tmp_path: Path, capsys: Shown) -> None:
    config = str(write(tmp_path, budget={"max_run_usd": 7.0, "max_hours": 8.0}))
    assert values(capsys, config)["ceilings"] == {"usd_per_hour": None, "run_usd": 7.0, "hours": 8.0}
    given = ["--max-run-usd", "1.5", "--max-hourly-usd", "2", "--max-hours", "3e0"]
    assert values(capsys, config, *given)["ceilings"] == {"usd_per_hour": 2.0, "run_usd": 1.5, "hours": 3.0}
    free = {(row["gpu"], row["spot"]): row["usd_per_hour"] for row in values(capsys, config)["rows"]}
    for row in values(capsys, config, "--max-hourly-usd", "1")["rows"]:
        assert row["chosen"] == (free[row["gpu"], row["spot"]] <= 1)
    assert {usd > 1 for usd in free.values()} == {True, False}


@pytest.mark.parametrize("option", ["--max-run-usd", "--max-hourly-usd", "--max-hours"])
@pytest.mark.parametrize("value", ["0", "-1", "-0.5", "nan", "inf", "-inf", "much", "", "$5", "1,5"])
def test_a_ceiling_that_is_not_a_positive_number_is_refused(
    option: str, value: str, config: str, capsys: Shown
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", config, f"{option}={value}"])
    said = capsys.readouterr()
    assert said.err.endswith(f"finetune plan: error: argument {option}: expected a number above 0, found {value!r}\n")
    assert said.out == ""


def test_spot_on_demand_or_both(config: str, capsys: Shown) -> None:
    found = {option: [row["spot"] for row in values(capsys, config, *option.split())["rows"]]
             for option in ("", "--both", "--spot", "--on-demand")}  # fmt: skip
    assert sorted(found[""]) == sorted(found["--both"]) == [False] * 4 + [True] * 4
    assert (found["--spot"], found["--on-demand"]) == ([True] * 4, [False] * 4)
    with pytest.raises(SystemExit, match="2"):
        main(["plan", config, "--spot", "--on-demand"])


def test_trust_prices_ranks_an_anomalous_price(config: str, capsys: Shown) -> None:
    """In the snapshot an A100 in europe-west4 costs half of its price elsewhere."""
    chosen = ["plan.gpus=[A100]", "--on-demand"]
    [careful] = values(capsys, config, *chosen)["rows"]
    [trusting] = values(capsys, config, *chosen, "--trust-prices")["rows"]
    assert careful["region"] != trusting["region"] == "europe-west4"
    assert careful["price_anomalies"] == [] and "europe-west4" in careful["passed_over"]
    assert trusting["price_anomalies"] and trusting["usd"] < careful["usd"]


@pytest.mark.parametrize("order", [("--spot", "training.max_steps=5"), ("training.max_steps=5", "--spot")])
def test_overrides_may_stand_before_and_after_options(order: tuple[str, str], config: str, capsys: Shown) -> None:
    found = values(capsys, config, *order, "plan.gpus=[T4]")
    assert found["run"]["steps"] == 5
    assert [(row["gpu"], row["spot"]) for row in found["rows"]] == [("T4", True)]


@pytest.mark.parametrize("word", ["--max-usd=5", "--sport", "nonsense"])
def test_an_unknown_option_or_argument_is_refused(word: str, config: str, capsys: Shown) -> None:
    try:
        assert main(["plan", config, "--spot", word]) == 2
    except SystemExit as error:
        assert error.code == 2
    said = capsys.readouterr()
    assert word in said.err and said.out == ""


def test_memory_prints_its_own_table_and_conflicts_with_flex_and_write(
    config: str, tmp_path: Path, capsys: Shown
) -> None:
    text = output(capsys, config, "--memory")
    assert "optimizer" in text and "for the run" not in text
    for option in (["--flex"], ["--write", str(tmp_path / "task.yaml")]):
        assert "--memory" in refused(capsys, config, "--memory", *option)
    assert not (tmp_path / "task.yaml").exists()


def test_json_is_the_table_and_nothing_else(config: str, capsys: Shown) -> None:
    text, found = output(capsys, config), values(capsys, config)
    lines = [line for line in text.splitlines() if line.startswith(tuple("12345678-"))]
    assert len(lines) == len(found["rows"]) == 8
    for line, row in zip(lines, found["rows"], strict=True):
        assert {row["gpu"], row["zone"], f"{row['usd_per_hour']:.3f}"} <= set(line.split())
        assert row["machine"] and row["hours"] > 0 and row["usd"] > 0


# data and mistakes


def test_prepared_data_are_counted_and_others_assumed(tmp_path: Path, capsys: Shown) -> None:
    config = str(write(tmp_path))
    prepared = tmp_path / "prepared"
    manifest = write_manifest(prepared)
    counted = output(capsys, config, f"data.output_dir={prepared}")
    assert (
        counted.startswith(f"{config}: 1,000 examples x 120 tokens, ")
        and f"\ntokens: counted in {manifest}\n" in counted
    )
    assert "\ntokens: 4,000 training examples (plan.records), 300 tokens each" in output(capsys, config)
    manifest.write_text("{}")
    assert f"{manifest}: not a manifest" in refused(capsys, config, f"data.output_dir={prepared}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plan.gpus=[K80]"], "plan.gpus: unknown GPU 'K80'; known: A100, L4, T4, V100, H100"),
        (["plan.gpus=[A100,A100]"], "plan.gpus: a GPU is listed twice"),
        (["plan.gpus=[RTXPRO6000]"], "plan.gpus: RTXPRO6000 is on Google Cloud, but its price is not known here; for"),
        (["plan.records=null"], "set plan.records to the number of training examples"),
        (["model.name=someone/model"], "model.name: the shape of someone/model is not known"),
        (["plan.gpu=[T4]"], "unknown key plan.gpu (did you mean plan.gpus?)"),
        (["plan.spot_preemptions_per_hour=often"], "plan.spot_preemptions_per_hour: expected float, found 'often'"),
    ],
)
def test_what_cannot_be_planned_is_reported_in_one_line(
    overrides: list[str], message: str, config: str, capsys: Shown
) -> None:
    assert message in refused(capsys, config, *overrides)


def test_a_corrupt_catalog_is_reported_in_one_line(home: Path, config: str, capsys: Shown) -> None:
    prices = home / ".sky" / "catalogs" / "v8" / "gcp" / "vms.csv"
    prices.write_bytes(prices.read_bytes()[:-20])
    assert f"{prices}: line " in refused(capsys, config)


# --write

TASK = "name: x\nresources:\n  infra: gcp  # comment\n  any_of:\n    - {accelerators: A100:1}\nrun: echo\n"


def test_write_puts_the_order_into_the_task_with_the_command_that_produced_it(
    config: str, tmp_path: Path, capsys: Shown
) -> None:
    task = tmp_path / "task.yaml"
    task.write_text(TASK)
    options = ["training.max_steps=50", "--max-hourly-usd", "1", "--spot", "--trust-prices"]
    text = output(capsys, config, *options, "--write", str(task))
    assert text.endswith(f"\nwritten: {task}\n")
    head, tail = TASK.split("  any_of:\n    - {accelerators: A100:1}\n")
    written = task.read_text()
    assert written.startswith(head) and written.endswith(tail)
    [comment] = [line for line in written.splitlines() if "ordered:" in line]
    command = comment.split("estimated: ")[1].split()
    assert command[:2] == ["finetune", "plan"] and sorted(command[2:]) == sorted([config, *options])
    entries = yaml.safe_load(written)["resources"]["ordered"]
    rows = [row for row in values(capsys, *command[2:])["rows"] if row["chosen"]]
    assert [entry["accelerators"] for entry in entries] == [f"{row['gpu']}:1" for row in rows]
    assert len(entries) > 1 and all(entry["use_spot"] for entry in entries)


def test_write_keeps_to_the_ceilings_of_the_task(config: str, tmp_path: Path, capsys: Shown) -> None:
    task = tmp_path / "task.yaml"
    every = values(capsys, config)["rows"]
    hourly = sorted(row["usd_per_hour"] for row in every if row["chosen"])
    limit = hourly[len(hourly) // 2]
    task.write_text(
        TASK.replace("resources:\n", f"resources:\n  max_hourly_cost: {limit}\n") + 'envs: {MAX_HOURS: "20"}\n'
    )
    output(capsys, config, "--write", str(task))
    [comment] = [line for line in task.read_text().splitlines() if "ordered:" in line]
    assert f"--max-hourly-usd {limit:g} --max-hours 20" in comment
    entries = yaml.safe_load(task.read_text())["resources"]["ordered"]
    within = [row for row in every if row["chosen"] and row["usd_per_hour"] <= limit and row["hours"] <= 20]
    assert 0 < len(entries) == len(within) < len(hourly)


@pytest.mark.parametrize(
    ("options", "recovery", "launch"),
    [
        ("", "[75]", "finetune launch --jobs {task} --env CONFIG={config}"),
        ("", "75", "finetune launch --jobs {task} --env CONFIG={config}"),
        ("", "[76]", "finetune launch {task} --env CONFIG={config}"),
        ("", "", "finetune launch {task} --env CONFIG={config}"),
        ("--on-demand", "[75]", "finetune launch {task} --env CONFIG={config}"),
        ("--max-run-usd 25 --max-hours 24.0 --max-hourly-usd 4.5", "", "finetune launch {task} --env CONFIG={config}"),
        (
            "--max-run-usd 20 --max-hours 12.5 --no-score --trust-prices",
            "",
            "finetune launch {task} --env CONFIG={config} --env MAX_RUN_USD=20 --env MAX_HOURS=12.5 --env EVALUATE=0 "
            "--env FINETUNE_TRUST_PRICES=1",
        ),
    ],
)
def test_the_launch_of_a_written_plan_keeps_what_was_typed(
    options: str, recovery: str, launch: str, config: str, tmp_path: Path, capsys: Shown
) -> None:
    task = tmp_path / "task.yaml"
    recovers = f"  job_recovery: {{recover_on_exit_codes: {recovery}}}\n" if recovery else ""
    text = TASK.replace("resources:\n", f"resources:\n  max_hourly_cost: 4.5\n{recovers}")
    task.write_text(text + 'envs: {MAX_RUN_USD: "25", MAX_HOURS: "24", EVALUATE: "1"}\n')
    assert main(["plan", config, *options.split(), "--write", str(task)]) == 0
    following = capsys.readouterr().err.splitlines()[-1].removeprefix("next: ")
    assert Path(following.split()[0]).name == "finetune"
    assert parsed(following) == launch.format(task=task, config=config)


def test_the_launch_of_a_written_plan_says_what_no_option_can(config: str, tmp_path: Path, capsys: Shown) -> None:
    task = tmp_path / "task.yaml"
    task.write_text(TASK.replace("resources:\n", "resources:\n  max_hourly_cost: 4.5\n") + 'envs: {EVALUATE: "0"}\n')
    assert main(["plan", config, "--max-hourly-usd", "3", "--write", str(task)]) == 0
    following = capsys.readouterr().err.splitlines()[-1]
    assert following.endswith("(first set max_hourly_cost: 3 in it; trains, and takes the machine down)")
    assert "EVALUATE" not in following and "--no-score" in task.read_text(), (
        "the plan is without the score, as the task"
    )


@pytest.mark.parametrize("cost", ["null", '"x"', "[1]", "-1", ".nan"])
def test_write_to_a_task_without_a_ceiling_that_is_a_number(
    config: str, tmp_path: Path, capsys: Shown, cost: str
) -> None:
    task = tmp_path / "task.yaml"
    task.write_text(TASK.replace("resources:\n", f"resources:\n  max_hourly_cost: {cost}\n") + "envs:\n")
    assert "--max" not in output(capsys, config, "--write", str(task)) + task.read_text()


def test_write_with_json_prints_json_alone(config: str, tmp_path: Path, capsys: Shown) -> None:
    task = tmp_path / "task.yaml"
    task.write_text(TASK)
    assert len(values(capsys, config, "--write", str(task))["rows"]) == 8
    assert "ordered:" in task.read_text()


def test_write_when_every_machine_is_refused_shows_the_table_and_writes_nothing(
    config: str, tmp_path: Path, capsys: Shown
) -> None:
    task = tmp_path / "task.yaml"
    task.write_text(TASK)
    assert main(["plan", config, "--max-run-usd", "0.001", "--write", str(task)]) == 2
    said = capsys.readouterr()
    assert "order: none; every machine is refused" in said.out and "written:" not in said.out
    assert said.err == f"finetune: {task}: not written, because the plan refuses every machine: see the table\n"
    assert task.read_text() == TASK


def test_flex_start_is_shown_beside_the_plan_and_not_in_it(config: str, capsys: Shown) -> None:
    wanted = [config, "plan.gpus=[H100,A100-80GB,L4]"]
    plain, flex = values(capsys, *wanted), values(capsys, *wanted, "--flex")
    assert flex == plain | {"flex": flex["flex"]}
    assert {row["gpu"] for row in flex["flex"]} == {"H100", "A100-80GB"}
    text = output(capsys, *wanted, "--flex")
    assert text.startswith(output(capsys, *wanted).rstrip("\n")) and "managed_instance_group" in text
    assert "omit --write and --flex" in refused(capsys, *wanted, "--flex", "--memory")
