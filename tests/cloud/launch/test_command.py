"""`finetune launch`, and the policy's line in SkyPilot's config. `sky` is a script that says what it was given; the
real one runs in test_policy_cli.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finetune.cli.launch import _most, _plan
from finetune.cli.main import main
from finetune.cloud.gcloud.policy_setting import KEY, POLICY, name_policy, named_policy
from finetune.cloud.launch.command import FLAGS, launch_of
from finetune.cloud.launch.task_file import PATHS, alternatives
from finetune.doctor.cloud import policy_check
from finetune.machine.price import Ceilings
from finetune.runtime.commands import as_command
from tests.helpers.catalog_fixture import needs_skypilot
from tests.helpers.errors import raises

ROOT = Path(__file__).resolve().parents[3]
A100 = ROOT / "sky" / "train_a100.yaml"
SKY = '#!/bin/sh\necho "cwd $PWD"\nfor word in "$@"; do echo "word $word"; done\nexit 9\n'
SOURCES = "'data.sources=[{kind: spider, path: x}]'"
PROGRAM = """
import sys
from finetune.cli.main import main
from finetune.cloud.launch import command
command.sysconfig.get_path = lambda _: sys.argv[1]
raise SystemExit(main(["launch", *sys.argv[2:]]))
"""


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a `sky` in it, which is taken for this environment's."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "sky").write_text(SKY)
    (folder / "sky").chmod(0o755)
    monkeypatch.setattr("finetune.cloud.launch.command.sysconfig.get_path", lambda _: str(folder))
    return folder


def launched(scripts: Path, cwd: Path, *words: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    if path is None:  # so that `sky` is named so
        path = os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent)))
    env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(scripts), *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )  # fmt: skip


def test_the_command_runs_in_the_folder_of_the_policy(scripts: Path, tmp_path: Path) -> None:
    """The words after the task are SkyPilot's, whatever they are, and so is the exit code."""
    done = launched(scripts, tmp_path, str(A100), "--yes", "--env", "MAX_RUN_USD=0.6", "-c", "my cluster", "--down")
    assert done.returncode == 9
    plan, _, said = done.stdout.partition(f"in {ROOT}: ")
    assert done.stderr == (
        "launch: at most $0.6 in all, $4.5/h (ceilings of the task)\n"
        "next: sky logs 'my cluster'   (once it runs; the job's last lines say what it has cost and what is next)\n"
    )
    words = ["launch", "sky/train_a100.yaml", "--yes", "--env", "MAX_RUN_USD=0.6", "-c", "my cluster", "--down"]
    assert said.splitlines()[1:] == [f"cwd {ROOT}", *(f"word {word}" for word in words)]
    assert "is above the ceiling of $0.60 for the run" in plan


def test_the_next_command_is_typed_where_the_launch_was(scripts: Path) -> None:
    """And not in the folder of the policy, to which it goes."""
    done = launched(scripts, ROOT / "sky", "train_a100.yaml", "--yes", path="/usr/bin:/bin")
    program = done.stderr.partition("next: ")[2].split()[0]
    assert done.returncode == 9 and program.endswith("sky")
    assert program == "sky" or (ROOT / "sky" / program).is_file(), "by a path, where there is a SkyPilot beside Python"


def test_a_dry_run_has_no_next_step(scripts: Path, tmp_path: Path) -> None:
    done = launched(scripts, tmp_path, str(A100), "--dryrun", "--yes")
    assert (done.returncode, done.stderr) == (9, "") and "word --dryrun" in done.stdout


def test_a_managed_job_and_a_task_without_a_config(scripts: Path) -> None:
    done = launched(scripts, ROOT / "sky", "--jobs", "serve.yaml")
    assert done.returncode == 9 and done.stdout.startswith(f"in {ROOT}: ")
    assert done.stdout.splitlines()[2:] == ["word jobs", "word launch", "word sky/serve.yaml"]


def test_a_config_that_is_not_here_or_cannot_be_planned_is_left_to_the_policy(scripts: Path, tmp_path: Path) -> None:
    done = launched(scripts, tmp_path, str(A100), "--env", "CONFIG=configs/none.yaml")
    assert done.returncode == 9 and done.stdout.startswith("in ")
    done = launched(scripts, tmp_path, str(A100), "--env=OVERRIDES=model.name=nobody/knows-it")
    assert done.returncode == 9 and done.stdout.startswith("no plan: ")


def test_limits_are_those_of_the_task_and_of_the_options(scripts: Path) -> None:
    assert launch_of(A100, [], managed=False).ceilings == Ceilings(run_usd=25.0, hours=24.0, usd_per_hour=4.5)
    typed = launch_of(A100, ["--env", "MAX_RUN_USD=5", "--env=MAX_HOURS=", "--env", "HF_TOKEN"], managed=False)
    assert typed.ceilings == Ceilings(run_usd=5.0, hours=None, usd_per_hour=4.5)
    with raises("launch.bad_limit", match="MAX_HOURS: expected a positive number, such as 25, found '-1'"):
        _ = launch_of(A100, ["--env", "MAX_HOURS=-1"], managed=False).ceilings


def edited(path: Path, folder: Path, *changes: tuple[str, str]) -> Path:
    """A copy of a task in a folder with the policy."""
    (folder / ".sky.yaml").write_text(f"{KEY}: {POLICY}\n")
    text = path.read_text()
    for pattern, replacement in changes:
        text, count = re.subn(pattern, replacement, text, flags=re.M)
        assert count
    (folder / "task.yaml").write_text(text)
    return folder / "task.yaml"


def test_ceilings_that_the_task_does_not_set_are_the_defaults_of_the_policy(
    scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neither = (r"^  max_hourly_cost.*", ""), (r"^  MAX_RUN_USD.*", "")
    launch = launch_of(edited(A100, tmp_path, *neither), [], managed=False)
    assert launch.ceilings == Ceilings(run_usd=25.0, hours=24.0, usd_per_hour=5.0)
    assert _most(launch) == "at most $25 in all, $5/h (by default: $25 in all, $5/h)"
    launch = launch_of(edited(A100, tmp_path, neither[1]), [], managed=False)
    assert _most(launch) == "at most $25 in all, $4.5/h (by default: $25 in all)"
    on_cpu = launch_of(edited(A100, tmp_path, *neither, (r"^  (accelerators|instance_type):.*", "")), [], managed=False)
    assert _most(on_cpu) == "no ceiling", "the policy enforces none there"


def test_variables_and_paths_are_those_of_skypilot(
    scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--env wins over --env-file, and a path is of the folder in which it was typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAX_HOURS", "3")
    (tmp_path / "my.env").write_text("# mine\nexport CONFIG='configs/demo_cpu.yaml'\nMAX_RUN_USD=300\nRUN_NAME\n")
    (tmp_path / "sky.yaml").touch()
    paths = ["--env-file", "my.env", "--secret-file=keys.env", "--config", "sky.yaml", "--config=a.b=c"]
    typed = launch_of(A100, [*paths, "--env", "MAX_HOURS"], managed=False)
    assert typed.ceilings == Ceilings(run_usd=300.0, hours=3.0, usd_per_hour=4.5)
    assert typed.config == ROOT / "configs" / "demo_cpu.yaml" and typed.environment["RUN_NAME"] == ""
    here = [f"{tmp_path}/my.env", f"--secret-file={tmp_path}/keys.env", "--config", f"{tmp_path}/sky.yaml"]
    assert typed.words[3:] == ["--env-file", *here, "--config=a.b=c", "--env", "MAX_HOURS"]
    assert launch_of(A100, [*paths, "--env=MAX_RUN_USD=2"], managed=False).ceilings.run_usd == 2.0
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mistral_7b_qlora.yaml").touch()
    elsewhere = launch_of(A100, ["--workdir", "."], managed=False)
    assert elsewhere.config == tmp_path / "configs" / "mistral_7b_qlora.yaml" and elsewhere.words[-1] == str(tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.val_fraction=0.2"], "type `--env OVERRIDES=data.val_fraction=0.2`"),
        (["-y", "lora.r=8"], "type `--env OVERRIDES=lora.r=8`"),
        (["--env=MAX_HOURS=3", "configs/demo_cpu.yaml"], "leave it out"),
        (["--env", "MAX_HOURS=3", "--use-spot", "python x.py"], "leave it out"),
        (["data.sources=[{kind: spider, path: x}]"], as_command("--env", f"OVERRIDES={SOURCES}")),
        (["lora.r=8 lora.alpha=4"], "type `--env 'OVERRIDES=lora.r=8 lora.alpha=4'`"),
    ],
)
def test_a_word_beside_the_task_is_no_shell_command(words: list[str], says: str) -> None:
    """SkyPilot would launch a machine of its own choice, outside our ceilings, and run it there."""
    with raises("launch.stray_word", match=f"^{re.escape(words[-1])}: .*{re.escape(says)}"):
        launch_of(A100, words, managed=False)
    launch_of(A100, ["-c", "mine", "-y", "--env", "MAX_HOURS=3", "--gpus", "T4", "--dryrun"], managed=False)


def test_a_config_in_place_of_a_task(tmp_path: Path) -> None:
    config = ROOT / "configs" / "demo_cpu.yaml"
    with raises("launch.bad_task", match=f"is the config of a run.*finetune launch sky/.*--env CONFIG={config}"):
        launch_of(config, [], managed=False)


@pytest.mark.parametrize(
    "typed",
    [
        "EVALUATE=yes",
        "RUN_NAME=my run",
        "MAX_RUN_USD=zwei",
        "MAX_HOURS=-3",
        "OVERRIDES=lora.r=8 data.sources=[{kind: spider}]",
    ],
)
def test_a_variable_that_the_job_would_refuse_is_refused_before_anything_is_shown(
    typed: str, scripts: Path, tmp_path: Path
) -> None:
    done = launched(scripts, tmp_path, str(A100), "--env", typed, "--dryrun")
    assert (done.returncode, done.stdout) == (2, "") and typed.partition("=")[0] in done.stderr


@needs_skypilot
def test_each_option_of_skypilot_without_a_value_is_known() -> None:
    import click
    from sky.client.cli.command import cli

    assert isinstance(cli, click.Group)
    jobs = cli.commands["jobs"]
    assert isinstance(jobs, click.Group)
    flags = {
        name
        for command in (cli.commands["launch"], jobs.commands["launch"])
        for option in command.params
        if isinstance(option, click.Option) and option.is_flag
        for name in (*option.opts, *option.secondary_opts)
    }
    assert flags == FLAGS


@needs_skypilot
def test_each_option_of_skypilot_with_a_path_is_known() -> None:
    import click
    from sky.client.cli import flags
    from sky.client.cli.command import cli

    assert isinstance(cli, click.Group)
    jobs = cli.commands["jobs"]
    assert isinstance(jobs, click.Group)
    for command in (cli.commands["launch"], jobs.commands["launch"]):
        found = {
            name
            for option in command.params
            for name in option.opts
            if name == "--config"
            or isinstance(option.type, click.Path | click.File)
            or getattr(option.type, "func", None) is flags._parse_dotenv_file
        }
        assert found == set(PATHS)


@pytest.mark.parametrize(
    ("resources", "options", "found"),
    [
        ("accelerators: T4:1, use_spot: true", "", {("T4", True)}),
        ("accelerators: {l4: 2}", "", {("L4:2", False)}),
        ("accelerators: [L4, 'T4:4']", "", {("L4", False), ("T4:4", False)}),
        ("infra: gcp/us-central1, instance_type: g2-standard-24", "", {("L4:2", False)}),
        ("accelerators: T4, any_of: [{use_spot: true}, {use_spot: false}]", "", {("T4", True), ("T4", False)}),
        ("accelerators: T4, any_of: [{use_spot: true}, {use_spot: false}]", "--use-spot", {("T4", True)}),
        ("accelerators: T4", "--gpus L4:2 --use-spot --no-use-spot", {("L4:2", False)}),
        ("accelerators: T4", "-t a2-highgpu-1g --gpus=A100", {("A100", False)}),
        ("infra: aws, accelerators: T4", "", set()),
        ("cpus: 4", "", set()),
        ("ordered: [{accelerators: T4}, {cpus: 4}]", "", set()),
    ],
)
def test_the_machines_that_a_task_may_take(resources: str, options: str, found: set[tuple[str, bool]]) -> None:
    task = yaml.safe_load(f"resources: {{{resources}}}")
    assert {(one.name, one.spot) for one in alternatives(task, options.split())} == found


def test_the_plan_shown_first_is_of_the_machines_of_the_task(scripts: Path, tmp_path: Path) -> None:
    shown = launched(scripts, tmp_path, str(ROOT / "sky" / "train_t4.yaml"), "--dryrun").stdout
    assert "\norder: T4 spot, then T4 on-demand\n" in shown and "L4" not in shown
    shown = launched(scripts, tmp_path, "--jobs", str(ROOT / "sky" / "train_spot.yaml")).stdout
    order = next(line for line in shown.splitlines() if line.startswith("order: "))
    assert set(order.removeprefix("order: ").split(", then ")) == {"L4 spot", "A100 spot"}
    shown = launched(scripts, tmp_path, str(ROOT / "sky" / "train_t4.yaml"), "--gpus", "A100:8").stdout
    assert shown.startswith("no plan: A100:8: a plan knows only A100, L4, T4")
    with raises("launch.not_planned", match="^A100:8: "):
        _plan(launch_of(A100, ["--gpus", "A100:8"], managed=False))


def test_a_sweep_is_shown_with_the_cost_of_all_its_trials(
    scripts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = str(ROOT / "sky" / "sweep.yaml")
    done = launched(scripts, tmp_path, "--jobs", sweep, "--env", "MAX_RUN_USD=0.5")
    config = str(ROOT / "configs" / "mistral_7b_qlora.yaml")
    words = ["training.learning_rate=1e-4,2e-4", "lora.r=8,16,32", 'plan.gpus=["A100","L4"]', "--plan"]
    assert main(["sweep", config, *words]) == 0
    head, _, *rows, _ = capsys.readouterr().out.splitlines()
    assert " spot in " in head and head in done.stdout.splitlines()
    for row in rows:
        assert f"{row.rstrip()}  above MAX_RUN_USD 0.5: the budget would end it" in done.stdout
    assert "at most $0.5 in all, $2.5/h" in done.stderr
    done = launched(scripts, tmp_path, "--jobs", sweep, "--env", "SWEEP_ETA=1")
    assert done.returncode == 2 and done.stderr.startswith("finetune: SWEEP_ETA: expected 2 or more")


def test_what_is_no_task_of_a_folder_with_the_policy_is_refused(
    scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tmp_path / "task.yaml"
    with raises("launch.no_task", match=r"task\.yaml: no such task file; see sky/ for ours"):
        launch_of(task, [], managed=False)
    monkeypatch.setattr("finetune.cloud.launch.command.in_checkout", lambda: False)
    monkeypatch.setattr("finetune.cloud.launch.command.project_files", lambda: Path("/site-packages/finetune/project"))
    with raises("launch.no_task", match="see /site-packages/finetune/project/sky for ours"):
        launch_of(task, [], managed=False)
    for text in ("a: [", "a: 1\n---\nb: 2\n", "- a", ""):
        task.write_text(text)
        with raises("launch.bad_task", match="expected one"):
            launch_of(task, [], managed=False)
    task.write_text(A100.read_text())
    for settings in ("", "a: [", "admin_policy: another.Policy\n"):
        (tmp_path / ".sky.yaml").write_text(settings)
        with raises("launch.no_policy", match="so no ceiling would hold"):
            launch_of(task, [], managed=False)
    (tmp_path / ".sky.yaml").write_text(f"{KEY}: {POLICY}\n")
    assert launch_of(task, [], managed=False).folder == tmp_path
    (scripts / "sky").unlink()
    with raises("launch.no_skypilot", match="SkyPilot is not installed in this environment"):
        launch_of(task, [], managed=False)


def test_the_folder_of_the_project_names_the_policy() -> None:
    assert yaml.safe_load((ROOT / ".sky.yaml").read_text()) == {KEY: POLICY}


# the line in SkyPilot's own config


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home" / "config.yaml"
    monkeypatch.setenv("SKYPILOT_GLOBAL_CONFIG", str(path))
    return path


@pytest.mark.parametrize(
    "text", [None, "", "# mine\njobs:\n  controller:\n    consolidation_mode: true", "gcp: {a: 1}\n\n\n"]
)
def test_the_line_is_added_and_everything_else_stays(
    config: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        config.parent.mkdir()
        config.write_text(text)
    assert policy_check().status == "info" and "finetune doctor --fix-policy" in policy_check().advice
    assert main(["doctor", "--fix-policy"]) == 0
    assert capsys.readouterr().out == f"{config}: {KEY}: {POLICY}\n"
    written = config.read_text()
    assert written.startswith((text or "").rstrip()) and yaml.safe_load(written)[KEY] == POLICY
    assert (yaml.safe_load(text or "") or {}).items() <= yaml.safe_load(written).items()
    assert named_policy() == POLICY and policy_check().status == "ok"
    name_policy()
    assert config.read_text() == written  # once is enough


@pytest.mark.parametrize("settings", [None, "", "a: [\n", "- a\n", "admin_policy: another.Policy\n"])
def test_in_a_folder_whose_settings_do_not_name_it_the_policy_does_not_hold(
    config: Path, settings: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if settings is not None:
        Path(".sky.yaml").write_text(settings)
    found = policy_check()
    assert (found.status, found.found) == ("warning", "does not hold for `sky launch` typed in this folder")
    assert "use `finetune launch`" in found.advice
    Path(".sky.yaml").write_text(f"{KEY}: {POLICY}\n")
    assert policy_check().found == "holds for `sky launch` typed in this folder only"


def test_a_line_that_cannot_be_added_is_asked_for(config: Path) -> None:
    config.parent.mkdir()
    for text, code, said in (
        ("admin_policy: another.Policy\n", "cloud.another_policy", "admin_policy is another.Policy"),
        ("{gcp: {a: 1}}\n", "cloud.bad_skypilot_config", "no line can be added at its end"),
        ("- a\n", "cloud.bad_skypilot_config", "no line can be added at its end"),
        ("a: [\n", "cloud.bad_skypilot_config", "not readable as YAML"),
    ):
        config.write_text(text)
        with raises(code, match=said):
            name_policy()
        assert config.read_text() == text and policy_check().advice
