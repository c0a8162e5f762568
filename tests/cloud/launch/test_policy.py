"""What the policy changes in a task besides enforcing the ceiling, applied by the real SkyPilot client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from finetune.machine.price import Machine, price_in
from tests.helpers.catalog_fixture import G4, lay_out_catalog
from tests.helpers.json_server import JsonHandler, serving
from tests.helpers.sky_home import SkyWorker, bucket_stand_in, fake_gcloud_home

ROOT = Path(__file__).resolve().parents[3]
POLICY = "finetune.cloud.launch.policy.CostPolicy"
T4 = {"infra": "gcp", "accelerators": "T4:1", "instance_type": "n1-highmem-8", "max_hourly_cost": 1.0, "disk_size": 200}
A100 = T4 | {"accelerators": "A100:1", "instance_type": "a2-highgpu-1g"}
ENVS = {"CONFIG": "configs/mistral_7b_qlora.yaml", "MAX_RUN_USD": "25"}
Json = dict[str, Any]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SkyWorker]:
    home = tmp_path_factory.mktemp("home")
    env = fake_gcloud_home(home) | {"WANDB_API_KEY": "key-of-the-laptop"}
    lay_out_catalog(home, more=G4)
    with SkyWorker(env, ROOT) as running:
        yield running


def ask(
    worker: SkyWorker, resources: Json, envs: Json = ENVS, op: str = "optimize", request: str = "", **task: Any
) -> Json:
    more = {"request": request} if request else {}
    whole = {"name": "t", "run": "true", "workdir": ".", "resources": resources, "envs": envs} | task
    return worker.ask(op, whole, policy=POLICY, **more)


def alternatives(answer: Json) -> list[Json]:
    found: list[Json] = answer["sent"]["resources"]["ordered"]
    common = {key: value for key, value in answer["sent"]["resources"].items() if key != "ordered"}
    return [common | one for one in found]


def refused(code: str, answer: Json) -> str:
    assert (answer["error"], answer["code"]) == ("UserRequestRejectedByPolicy", code), answer
    message: str = answer["message"]
    return message


@pytest.mark.parametrize("task", sorted((ROOT / "sky").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_task_of_sky_passes_as_typed(worker: SkyWorker, task: Path) -> None:
    managed = task.stem in ("train_spot", "sweep")
    answer = worker.ask("optimize", task, policy=POLICY, request="JOBS_LAUNCH" if managed else "CLUSTER_LAUNCH")
    assert "error" not in answer, answer
    sent = answer["sent"]
    ceiling = alternatives(answer)[0]["max_hourly_cost"]
    prices = [offer["usd_per_hour"] for offer in json.loads(sent["envs"]["FINETUNE_PRICES"])["offers"]]
    assert prices and max(prices) <= ceiling
    assert sent["file_mounts"]["/bucket"]["name"] == sent["envs"]["BUCKET"] == "finetune-text2sql-test-you"
    for one in alternatives(answer):
        assert one["autostop"] == {"idle_minutes": 10, "down": True} and one["disk_size"] == 200
        recovery = one.get("job_recovery", {})
        assert (recovery.get("recover_on_exit_codes") == [75]) == managed


def test_a_catalog_without_g4_costs_the_cheapest_run_nothing_but_that_machine(tmp_path: Path) -> None:
    lay_out_catalog(tmp_path)
    with SkyWorker(fake_gcloud_home(tmp_path), ROOT) as running:
        answer = running.ask("optimize", ROOT / "sky" / "train_cheapest.yaml", policy=POLICY)
        assert "finetune: without RTXPRO6000:1, which has no price in" in answer["printed"]
        assert len({json.dumps(one["accelerators"]) for one in alternatives(answer)}) >= 8
        alone = running.ask("optimize", ROOT / "sky" / "train_g4.yaml", policy=POLICY)
        said = refused("price.unknown", alone)
        assert (
            "RTXPRO6000 is on Google Cloud, but its price is not known here; for Google Cloud SkyPilot's catalog"
            in said
        )
        typo = {"infra": "gcp", "any_of": [{"accelerators": "T4:1"}, {"accelerators": "A1000:1"}]}
        assert "A1000" in refused("cloud.unknown_gpu", ask(running, typo))


def test_the_order_is_by_dollars_for_the_run_not_for_the_hour(worker: SkyWorker) -> None:
    """An A100 costs three times as much an hour as an L4 on demand, and less for the run."""
    both = {"infra": "gcp", "max_hourly_cost": 5.0, "disk_size": 200, "any_of": [
        {"accelerators": "V100:1", "instance_type": "n1-highmem-8", "use_spot": False},
        {"accelerators": "A100:1", "instance_type": "a2-highgpu-1g", "use_spot": False},
    ]}  # fmt: skip
    by_run = [one["accelerators"] for one in alternatives(ask(worker, json.loads(json.dumps(both))))]
    assert list(by_run[0]) == ["A100"], "more per hour, less for the run"
    by_hour = [one["accelerators"] for one in alternatives(ask(worker, both, {"MAX_RUN_USD": "25"}))]
    assert list(by_hour[0]) == ["V100"], "a task that names no config of ours is ranked by its price"


def test_every_candidate_is_pinned_to_its_machine_and_region(worker: SkyWorker) -> None:
    for one in alternatives(ask(worker, T4)):
        assert one["infra"].startswith("gcp/") and one["disk_size"] == 200
    assert {machine["machine"] for machine in ask(worker, T4, op="reachable")["reachable"]} == {"n1-highmem-8"}


def test_a_task_without_autostop_and_budget_gets_both_with_a_message(worker: SkyWorker) -> None:
    answer = ask(worker, T4, {})
    assert all(one["autostop"] == {"idle_minutes": 10, "down": True} for one in alternatives(answer))
    assert answer["sent"]["envs"]["MAX_RUN_USD"] == "25"
    assert "the run gets a budget of $25" in answer["printed"] and "autostop" in answer["printed"]


def test_autostop_of_the_task_is_kept(worker: SkyWorker) -> None:
    answer = ask(worker, T4 | {"autostop": {"idle_minutes": 45, "down": True}})
    assert all(one["autostop"]["idle_minutes"] == 45 for one in alternatives(answer))
    assert "autostop" not in answer["printed"].split("SkyPilot tries")[0]


def test_a_managed_job_needs_no_autostop_and_warns_of_the_controller(worker: SkyWorker) -> None:
    answer = ask(worker, T4 | {"use_spot": True}, request="JOBS_LAUNCH")
    assert not any("autostop" in one for one in alternatives(answer))
    assert "starts a controller machine" in answer["printed"] and "n2-standard-4, from $0." in answer["printed"]
    assert "controller" not in ask(worker, T4)["printed"]


def test_the_job_gets_the_prices_of_its_candidates(worker: SkyWorker) -> None:
    answer = ask(worker, T4)
    table = json.loads(answer["sent"]["envs"]["FINETUNE_PRICES"])
    assert table["ceiling_usd_per_hour"] == 1.0
    chosen = answer["chosen"]
    price = price_in(table, Machine(chosen["zone"], False, "T4"))
    disk = 200 * 0.10 / 730  # pd-balanced in us-central1
    assert price.usd_per_hour == pytest.approx(chosen["usd_per_hour"] + disk, abs=1e-5)
    assert "SkyPilot's catalog" in price.basis


def test_the_policy_may_be_applied_twice(worker: SkyWorker) -> None:
    """As happens if the API server's own config names it too: the client's order is kept, and the ceiling holds."""
    once = ask(worker, T4)
    sent = once["sent"]
    twice = worker.ask("optimize", sent, policy=POLICY)
    assert alternatives(twice) == alternatives(once)
    sent["resources"] = {"ordered": [one | {"max_hourly_cost": 0.5} for one in alternatives(once)]}
    assert "max_hourly_cost" in refused("launch.all_refused", worker.ask("optimize", sent, policy=POLICY))


def test_on_exec_nothing_is_chosen_but_prices_are_passed_on(worker: SkyWorker) -> None:
    answer = ask(worker, T4, request="CLUSTER_EXEC")
    assert "ordered" not in answer["sent"]["resources"]
    assert "FINETUNE_PRICES" in answer["sent"]["envs"]


@pytest.mark.parametrize(
    "resources",
    [{"infra": "gcp", "cpus": "4+"}, {"infra": "aws", "accelerators": "A100:8"}, {}],
)
def test_tasks_without_a_gpu_or_on_another_cloud_pass_unchanged(worker: SkyWorker, resources: Json) -> None:
    """The one for AWS ends in the same refusal with and without us: this home has no login there."""
    plain = worker.ask(
        "optimize", {"name": "t", "run": "true", "workdir": ".", "resources": dict(resources), "envs": {}}
    )
    ours = ask(worker, resources, {})
    assert {key: ours.get(key) for key in ("sent", "message")} == {key: plain.get(key) for key in ("sent", "message")}
    assert "finetune" not in ours["printed"]


def test_a_gpu_without_a_cloud_is_pinned_to_google(worker: SkyWorker) -> None:
    anywhere = {key: value for key, value in T4.items() if key not in ("infra", "instance_type")}
    assert all(one["infra"].startswith("gcp/") for one in alternatives(ask(worker, anywhere)))


def test_the_bucket_gets_its_name_and_the_secrets_come_from_the_environment(worker: SkyWorker) -> None:
    mount = {"/bucket": {"name": "${BUCKET}", "store": "gcs", "mode": "MOUNT"}}
    answer = ask(
        worker, T4, ENVS | {"BUCKET": "auto"}, file_mounts=mount, secrets={"WANDB_API_KEY": "", "HF_TOKEN": ""}
    )
    assert answer["sent"]["file_mounts"]["/bucket"]["name"] == "finetune-text2sql-test-you"
    assert answer["sent"]["envs"]["BUCKET"] == "finetune-text2sql-test-you"
    assert "key-of-the-laptop" not in json.dumps(answer["sent"]["envs"]) + answer["printed"]
    own = ask(worker, T4, ENVS | {"BUCKET": "my-own-bucket"}, file_mounts=mount)
    assert own["sent"]["file_mounts"]["/bucket"]["name"] == "my-own-bucket"
    assert "gs://my-own-bucket, to be created unless it exists: Google gave no answer" in own["printed"]


def test_a_key_in_envs_is_sent_as_the_secret_that_it_would_lose_to(worker: SkyWorker) -> None:
    keys = {"HF_TOKEN": "hf_typed", "WANDB_API_KEY": "", "TRACKIO_SPACE_ID": "typed/space"}
    secrets = {"HF_TOKEN": "", "WANDB_API_KEY": "", "TRACKIO_SPACE_ID": "me/space"}
    answer = ask(worker, T4, ENVS | keys, secrets=secrets)
    sent = answer["sent"]
    assert sent["secrets"] == {
        "HF_TOKEN": "hf_typed",
        "WANDB_API_KEY": "key-of-the-laptop",
        "TRACKIO_SPACE_ID": "me/space",
    }
    assert not set(keys) & set(sent["envs"])
    assert "finetune: HF_TOKEN: taken from envs as a secret; type --secret NAME=VALUE" in answer["printed"]
    assert "finetune: TRACKIO_SPACE_ID: in envs and in secrets, of which the secret is used" in answer["printed"]
    assert "hf_typed" not in answer["printed"] and "WANDB_API_KEY: " not in answer["printed"]


def test_what_an_env_file_made_a_secret_stays_a_setting(worker: SkyWorker) -> None:
    """With --env-file SkyPilot puts each value into envs and into secrets; --env then changes the one in envs alone."""
    envs = ENVS | {"MAX_RUN_USD": "2", "BUCKET": "auto", "HF_TOKEN": "hf_file"}
    secrets = ENVS | {"MAX_RUN_USD": "300", "BUCKET": "auto", "HF_TOKEN": "hf_file", "EVALUATE": "1", "SWEEP": "a=1,2"}
    mount = {"/bucket": {"name": "${BUCKET}", "store": "gcs", "mode": "MOUNT"}}
    answer = ask(worker, T4, envs, secrets=secrets, file_mounts=mount)
    sent = answer["sent"]
    assert sent["secrets"] == {"HF_TOKEN": "hf_file"}
    assert sent["envs"].items() >= (ENVS | {"MAX_RUN_USD": "2", "EVALUATE": "1", "SWEEP": "a=1,2"}).items()
    assert sent["envs"]["BUCKET"] == "finetune-text2sql-test-you" and "HF_TOKEN" not in sent["envs"]
    assert "HF_TOKEN" not in answer["printed"]


def test_a_run_above_its_budget_gets_a_warning(worker: SkyWorker) -> None:
    answer = ask(worker, T4, ENVS | {"MAX_RUN_USD": "2"})
    assert "above its budget of $2" in answer["printed"]
    assert "WARNING" not in ask(worker, T4)["printed"]


def test_a_gpu_that_is_too_small_for_the_run_is_refused(worker: SkyWorker) -> None:
    big = ENVS | {"OVERRIDES": "training.per_device_train_batch_size=16 training.gradient_checkpointing=false"}
    assert "does not fit: needs" in refused("launch.all_refused", ask(worker, T4, big))


def test_a_task_without_a_ceiling_gets_one(worker: SkyWorker) -> None:
    endless = {key: value for key, value in T4.items() if key != "max_hourly_cost"}
    assert "the ceiling is $5/h for all machines of the task" in ask(worker, endless)["printed"]
    message = refused("launch.all_refused", ask(worker, endless, num_nodes=20))
    assert "above max_hourly_cost $5 with 20 machines" in message


def test_the_ceiling_applies_to_all_nodes_together(worker: SkyWorker) -> None:
    message = refused("launch.all_refused", ask(worker, T4, num_nodes=2))
    assert "above max_hourly_cost $1 with 2 machines" in message and "max_hourly_cost: 1.71 would allow it" in message
    assert "chosen" in ask(worker, T4 | {"max_hourly_cost": 1.71}, num_nodes=2)


def test_the_refusal_shows_price_parts_and_a_sufficient_ceiling(worker: SkyWorker) -> None:
    message = refused("launch.all_refused", ask(worker, A100 | {"max_hourly_cost": 3.0}))
    assert "A100 on-demand" in message and "us-central1-a" in message
    assert "3.701 = 0.739 host + 2.934 GPU + 0.027 disk" in message
    assert "max_hourly_cost: 3.71 would allow it" in message


@pytest.mark.parametrize(
    ("resources", "envs", "code", "says"),
    [
        (A100 | {"instance_type": "n1-highmem-8"}, ENVS, "cloud.machine_mismatch", "A100:1"),
        (T4 | {"max_hourly_cost": float("nan")}, ENVS, "launch.bad_value", "resources.max_hourly_cost"),
        (T4, ENVS | {"MAX_RUN_USD": "lots"}, "launch.bad_value",
         "envs.MAX_RUN_USD: expected a positive number of US dollars up to 1,000,000, found 'lots'"),
        (T4, ENVS | {"MAX_RUN_USD": "-3"}, "launch.bad_value", "envs.MAX_RUN_USD"),
        (T4, ENVS | {"MAX_RUN_USD": "nan"}, "launch.bad_value", "envs.MAX_RUN_USD"),
        (T4, ENVS | {"MAX_RUN_USD": ""}, "launch.bad_value", "envs.MAX_RUN_USD"),
        (T4, ENVS | {"CONFIG": "configs/none.yaml"}, "launch.not_copied", "configs/none.yaml"),
        (T4, ENVS | {"OVERRIDES": "lora.rank=8"}, "config.unknown_key", "lora.rank"),
        (T4, ENVS | {"OVERRIDES": "lora.r 8"}, "config.bad_overrides", "lora.r"),
        ({"infra": "gcp", "accelerators": "A10:1"}, ENVS, "cloud.gpu_not_offered", "A10"),
        ({"infra": "gcp", "accelerators": "T44:1"}, ENVS, "cloud.unknown_gpu", "T44"),
        (T4 | {"infra": "gcp/europe-north1"}, ENVS, "cloud.gpu_not_in_place", "europe-north1"),
        (T4 | {"disk_tier": "ultra", "max_hourly_cost": 0.1}, ENVS, "launch.all_refused", "max_hourly_cost"),
        ({"any_of": [T4, {"infra": "aws", "accelerators": "T4:1"}]}, ENVS, "launch.mixed_alternatives", "into two tasks"),
        ({"infra": "gcp", "accelerators": "L4:3"}, ENVS, "launch.no_machine", "the catalog has prices for L4:1, L4:2, L4:4"),
        ({"infra": "gcp", "accelerators": "T4:1", "cpus": "500+"}, ENVS, "launch.no_machine", "set instance_type to one of"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_a_clear_message(
    worker: SkyWorker, resources: Json, envs: Json, code: str, says: str
) -> None:
    message = refused(code, ask(worker, json.loads(json.dumps(resources)), envs))
    assert says in message and "Traceback" not in message


@pytest.mark.parametrize("ceiling", [-1, 0, "cheap"])
def test_skypilot_itself_refuses_some_ceilings(worker: SkyWorker, ceiling: Any) -> None:
    answer = ask(worker, T4 | {"max_hourly_cost": ceiling})
    assert "max_hourly_cost" in answer["message"] and "chosen" not in answer


def test_without_any_catalog_and_network_nothing_is_launched(tmp_path: Path) -> None:
    env = fake_gcloud_home(tmp_path)
    with SkyWorker(env, ROOT) as worker:
        answer = ask(worker, T4)
    assert answer["error"] and "chosen" not in answer
    assert "catalog" in answer["message"] or "vms.csv" in answer["message"]


def test_a_truncated_catalog_is_refused_with_its_line(tmp_path: Path) -> None:
    env = fake_gcloud_home(tmp_path)
    lay_out_catalog(tmp_path)
    table = tmp_path / ".sky" / "catalogs" / "v8" / "gcp" / "vms.csv"
    table.write_bytes(table.read_bytes()[:-30])
    with SkyWorker(env, ROOT) as worker:
        message = refused("catalog.corrupt", ask(worker, T4))
    assert "vms.csv" in message and "line" in message


def test_without_a_login_the_bucket_cannot_be_named(tmp_path: Path) -> None:
    env = fake_gcloud_home(tmp_path)
    lay_out_catalog(tmp_path)
    for name in ("configurations/config_default", "application_default_credentials.json"):
        (tmp_path / ".config" / "gcloud" / name).unlink()
    env.pop("GOOGLE_CLOUD_PROJECT")
    mount = {"/bucket": {"name": "${BUCKET}", "store": "gcs", "mode": "MOUNT"}}
    with SkyWorker(env, ROOT) as worker:
        message = refused("gcloud.missing_credentials", ask(worker, T4, ENVS | {"BUCKET": "auto"}, file_mounts=mount))
    assert "gcloud auth" in message


def test_a_bucket_created_on_another_computer_is_mounted_by_its_address(tmp_path: Path) -> None:
    """By name SkyPilot refuses a bucket that it did not create itself."""
    told = False
    with bucket_stand_in() as (buckets, variables):
        for computer, mounted in (("first", {"name": "finetune-text2sql-test-you"}),
                                  ("second", {"source": "gs://finetune-text2sql-test-you"})):  # fmt: skip
            home = tmp_path / computer
            home.mkdir()
            env = fake_gcloud_home(home) | variables
            lay_out_catalog(home)
            with SkyWorker(env, ROOT) as worker:
                for _ in range(2):
                    answer = worker.ask("launch", ROOT / "sky" / "train_t4.yaml", policy=POLICY, stocked_out=[])
                    assert answer["launched"], answer
                    assert answer["sent"]["file_mounts"]["/bucket"].items() >= mounted.items()
                    created = "bucket gs://finetune-text2sql-test-you, to be created\n" in answer["printed"]
                    assert created == (not told), "said once, of the bucket that is not there"
                    told = True
        assert list(buckets.made) == ["finetune-text2sql-test-you"]


def test_a_forbidden_bucket_is_refused_before_anything_starts(tmp_path: Path) -> None:
    env = fake_gcloud_home(tmp_path)
    lay_out_catalog(tmp_path)
    with bucket_stand_in() as (buckets, variables):
        buckets.forbidden.add("finetune-text2sql-test-you")
        with SkyWorker(env | variables, ROOT) as worker:
            message = refused("bucket.forbidden", worker.ask("launch", ROOT / "sky" / "train_t4.yaml", policy=POLICY))
    assert "this account may not access it" in message and "--env BUCKET=NAME" in message


def test_an_expired_login_is_reported_before_anything_starts(tmp_path: Path) -> None:
    """Google's token service answers as for an expired login."""
    env = fake_gcloud_home(tmp_path)
    lay_out_catalog(tmp_path)
    with token_service_that_refuses() as address:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        login = {
            "type": "service_account",
            "client_email": "you@text2sql-test.iam.gserviceaccount.com",
            "token_uri": address,
        }
        file = tmp_path / "login.json"
        file.write_text(json.dumps(login | {"project_id": "text2sql-test", "private_key": pem, "private_key_id": "1"}))
        with SkyWorker(env | {"GOOGLE_APPLICATION_CREDENTIALS": str(file)}, ROOT) as worker:
            message = refused(
                "gcloud.login_expired", worker.ask("launch", ROOT / "sky" / "train_t4.yaml", policy=POLICY)
            )
    assert "expired" in message and "`gcloud auth application-default login`" in message


@contextmanager
def token_service_that_refuses() -> Iterator[str]:
    class Handler(JsonHandler):
        def answer(self) -> tuple[int, Json]:
            return 400, {"error": "invalid_grant", "error_description": "Token has been expired or revoked."}

    with serving(Handler) as address:
        yield f"{address}/token"
