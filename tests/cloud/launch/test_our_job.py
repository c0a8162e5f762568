"""Variables that the machine's job would refuse, by its own parsers: refused before anything is launched, by the real client."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from finetune.cloud.launch.our_job import JOBS, check_variables, job_of
from tests.helpers.errors import raises
from tests.helpers.sky_home import SkyWorker

ROOT = Path(__file__).resolve().parents[3]
POLICY = "finetune.cloud.launch.policy.CostPolicy"
Json = dict[str, Any]


@pytest.mark.parametrize("job", JOBS)
def test_the_job_is_the_script_that_run_names(job: str) -> None:
    def named(run: object) -> str:
        return job_of(SimpleNamespace(run=run))

    assert named(f"bash on_machine/{job}.sh") == named(f"set -e\n./on_machine/{job}.sh && on_machine/dev.sh") == job
    assert not any(
        map(named, (None, "true", f"python {job}.py", f"bash mine/{job}.sh", f"bash on_machine/{job}.sh.old"))
    )


def ours(name: str, *, nodes: int = 1, run: str = "", **envs: str) -> SimpleNamespace:
    """A task of sky/, as far as its variables are concerned."""
    task = yaml.safe_load((ROOT / "sky" / f"{name}.yaml").read_text(encoding="utf-8"))
    return SimpleNamespace(run=run or task["run"], envs=task["envs"] | envs, num_nodes=nodes, workdir=str(ROOT))


@pytest.mark.parametrize("path", sorted((ROOT / "sky").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_variables_of_our_own_tasks_pass(path: Path) -> None:
    check_variables(ours(path.stem))


TRAINING = (
    ({"RUN_NAME": "my run/1"}, "job.bad_setting", "RUN_NAME: expected at most"),
    ({"RUN_NAME": "sweeps"}, "job.bad_setting", "RUN_NAME: "),
    ({"VLLM_MINUTES": "soon"}, "job.bad_setting", "VLLM_MINUTES: expected a number above 0"),
    ({"GRACE_SECONDS": "-1"}, "job.bad_setting", "GRACE_SECONDS: expected a number above 0"),
    ({"RUN_NAME": "a/b", "VLLM_MINUTES": "x"}, "job.bad_setting", "VLLM_MINUTES: .*; RUN_NAME: "),
    ({"CONFIG": ""}, "job.missing_setting", "CONFIG: expected a config file"),
    ({"OVERRIDES": "lora.r='8"}, "config.bad_overrides", "OVERRIDES: "),
)
SERVING = (
    ({"EXECUTE": "yes", "IDLE_MINUTES": "abc"}, "job.bad_setting", "EXECUTE: expected 1 or 0.*; IDLE_MINUTES: "),
    ({"EXECUTE": "yes", "RUN_NAME": "a/b"}, "job.bad_setting", "RUN_NAME: "),
    ({"RUN_NAME": "a", "EXPORT": "b"}, "job.bad_setting", "EXPORT and RUN_NAME: expected one of them"),
    ({"MAX_USD_PER_DAY": "much"}, "job.bad_setting", "MAX_USD_PER_DAY: "),
)
SWEEPING = (
    ({"SWEEP": "lora.rr=8,16"}, "config.unknown_key", "unknown key lora.rr"),
    ({"SWEEP": "lora.r=8,x"}, "config.bad_type", "lora.r: expected int"),
    ({"SWEEP": "lora.r=8"}, "sweep.bad_space", "two or more values"),
    ({"SWEEP": ""}, "job.bad_setting", "CONFIG and SWEEP: expected"),
    ({"CONFIG": ""}, "job.bad_setting", "CONFIG and SWEEP: expected"),
    ({"SWEEP_SEARCH": "random"}, "job.bad_setting", "SWEEP_SEARCH: expected grid or optuna"),
    ({"SWEEP_ETA": "1", "SWEEP_RUNGS": "x"}, "job.bad_setting", "SWEEP_RUNGS: .*; SWEEP_ETA: "),
    ({"RUN_NAME": "a" * 95}, "job.bad_setting", "RUN_NAME: expected at most 90 characters"),
    ({"OVERRIDES": "training.eval_steps=0"}, "sweep.no_validation", "training.eval_steps: 0"),
    ({"SWEEP_SEARCH": "optuna", "SWEEP_TRIALS": "5000"}, "sweep.too_many_trials", "from 1 to"),
)
BAD = [("train_cheapest", *one) for one in TRAINING] + [("serve", *one) for one in SERVING]
BAD += [("sweep", *one) for one in SWEEPING]
BAD += [(name, {"RUN_NAME": "a b"}, "job.bad_setting", "RUN_NAME: ") for name in ("evaluate", "dev", "smoke")]


@pytest.mark.parametrize(("name", "envs", "code", "says"), BAD)
def test_what_the_job_refuses_is_refused(name: str, envs: dict[str, str], code: str, says: str) -> None:
    task = ours(name)
    task.envs |= envs
    with raises(code, match=says):
        check_variables(task)


def test_a_sweep_does_not_take_several_nodes_and_training_does() -> None:
    check_variables(ours("train_t4", nodes=2))
    with raises("job.bad_setting", match="a sweep's machines do not wait for each other"):
        check_variables(ours("sweep", nodes=2))


def test_a_search_needs_optuna_on_the_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.sweep.search.importlib.util.find_spec", lambda _: None)
    check_variables(ours("sweep", SWEEP_SEARCH="optuna", SWEEP_TRIALS="4", SWEEP="lora.r=4..64"))


def test_what_only_the_machine_has_is_left_to_it() -> None:
    check_variables(ours("train_t4", CONFIG="", RUN_NAME="begun"))
    check_variables(ours("sweep", CONFIG="/bucket/mine.yaml", SWEEP="lora.rr=1,2"))
    check_variables(ours("serve", EXPORT="runs/none/exports/merged", DATABASES="shop=/bucket/shop.sqlite"))


def test_the_users_own_task_may_call_its_variables_as_it_likes() -> None:
    check_variables(ours("train_t4", run="python mine.py", RUN_NAME="my run/1", CONFIG="", VLLM_MINUTES="soon"))


def test_every_job_that_a_task_runs_is_asked() -> None:
    with raises("job.bad_setting", match="EXECUTE: "):
        check_variables(ours("serve", run="bash on_machine/evaluate.sh && bash on_machine/serve.sh", EXECUTE="yes"))


# by the real client


@pytest.mark.parametrize(("name", "envs", "code", "says"), [BAD[0], BAD[5], BAD[7], BAD[11], BAD[16]])
def test_nothing_is_launched(worker: SkyWorker, name: str, envs: dict[str, str], code: str, says: str) -> None:
    task = yaml.safe_load((ROOT / "sky" / f"{name}.yaml").read_text(encoding="utf-8"))
    answer = worker.ask("optimize", task | {"envs": task["envs"] | envs}, policy=POLICY)
    assert (answer["error"], answer["code"]) == ("UserRequestRejectedByPolicy", code), answer
    assert "finetune: " in answer["message"] and "chosen" not in answer


def test_on_a_machine_without_gpu_too(worker: SkyWorker) -> None:
    task = {"run": "bash on_machine/train.sh", "resources": {"infra": "gcp", "cpus": "4+"}, "workdir": str(ROOT)}
    answer = worker.ask("optimize", task | {"envs": {"CONFIG": ""}}, policy=POLICY)
    assert answer["code"] == "job.missing_setting", answer
