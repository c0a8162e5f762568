"""What the real SkyPilot does without our policy. If one of these tests fails, SkyPilot has changed: review
finetune/cloud/launch/policy.py, which exists because of this behaviour."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.catalog_fixture import lay_out_catalog, needs_skypilot
from tests.helpers.sky_home import Buckets, SkyWorker, bucket_stand_in, fake_gcloud_home, run_sky, sky_server

pytestmark = needs_skypilot

Json = dict[str, Any]
POLICIES = '''
import sky


class Talks(sky.AdminPolicy):
    """Prints where it is applied, and accepts everything."""

    @classmethod
    def validate_and_mutate(cls, request):
        print("policy at", "the client" if request.at_client_side else "the server", request.request_name)
        return sky.MutatedUserRequest(request.task, request.skypilot_config)


class Refuses(sky.AdminPolicy):
    @classmethod
    def validate_and_mutate(cls, request):
        raise sky.exceptions.UserRequestRejectedByPolicy("not for $3.67\\nand this is why")
'''


def task(**resources: Any) -> Json:
    return {"name": "plain", "run": "true", "resources": {"infra": "gcp"} | resources}


def places(machines: list[Json]) -> list[tuple[str, str, bool]]:
    return [(machine["zone"], machine["gpu"], machine["spot"]) for machine in machines]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sky")
    (folder / "modules").mkdir()
    (folder / "modules" / "policies.py").write_text(POLICIES)
    lay_out_catalog(folder)
    return folder


@pytest.fixture(scope="module")
def env(home: Path) -> dict[str, str]:
    return fake_gcloud_home(home, pythonpath=home / "modules")


@pytest.fixture(scope="module")
def sky(env: dict[str, str]) -> Iterator[SkyWorker]:
    with SkyWorker(env) as worker:
        yield worker


@pytest.mark.parametrize(
    ("ceiling", "gpu", "infra", "price"), [(3.0, "A100", "gcp/us-central1", 3.67339), (0.01, "T4", "gcp", None)]
)
def test_a_ceiling_is_exceeded(sky: SkyWorker, ceiling: float, gpu: str, infra: str, price: float | None) -> None:
    wanted = task(infra=infra, accelerators=f"{gpu}:1", max_hourly_cost=ceiling)
    answer = sky.ask("optimize", wanted)
    fixed = f"SkyPilot now holds max_hourly_cost ${ceiling} for {gpu}: is CostPolicy still needed for it?"
    assert "error" not in answer, fixed
    chosen = answer["chosen"]
    assert chosen["usd_per_hour"] > ceiling, fixed
    assert places([sky.ask("launch", wanted, stocked_out=[])["launched"]]) == places([chosen])
    assert price is None or chosen["usd_per_hour"] == pytest.approx(price)


def test_a_fail_over_exceeds_the_ceiling_that_the_first_choice_met(sky: SkyWorker) -> None:
    wanted = task(accelerators="A100:1", max_hourly_cost=3.0)
    first = sky.ask("optimize", wanted)["chosen"]
    prices = {machine["zone"]: machine["usd_per_hour"] for machine in sky.ask("reachable", wanted)["reachable"]}
    tried = [prices[machine["zone"]] for machine in sky.ask("launch", wanted)["tried"]]
    assert first["usd_per_hour"] == tried[0] < 3.0
    assert max(tried) > 3.0, "SkyPilot's fail-over now holds max_hourly_cost: is CostPolicy's list still needed for it?"


def test_the_disk_is_not_priced(sky: SkyWorker) -> None:
    small, large = (
        sky.ask("optimize", task(accelerators="L4:1", cpus=8, disk_size=size))["chosen"] for size in (100, 4000)
    )
    assert small == large, "SkyPilot's prices now hold the disk: CostPolicy counts it twice"


@pytest.mark.parametrize(("spot", "gpus"), [(True, ["T4", "V100"]), (False, ["V100"])])
def test_everything_reachable_is_tried_and_nothing_else(sky: SkyWorker, spot: bool, gpus: list[str]) -> None:
    """The policy's tests rely on `reachable`: it has to be the same as a real fail-over over all zones."""
    wanted = task(accelerators=dict.fromkeys(gpus, 1), use_spot=spot)
    reachable = places(sky.ask("reachable", wanted)["reachable"])
    answer = sky.ask("launch", wanted)
    tried = places(answer["tried"])
    assert len(tried) == len(set(tried)) >= 10 * len(gpus)
    assert sorted(tried) == sorted(reachable)
    assert {machine["spot"] for machine in answer["tried"]} == {spot}
    assert answer["launched"] is None
    assert "Failed to provision all possible launchable resources" in answer["message"]


def test_an_ordered_list_is_tried_as_listed_at_any_price(sky: SkyWorker) -> None:
    """The policy relies on this: a list with the most expensive first keeps its order, and only listed machines are tried."""
    listed = [
        {"infra": "gcp/us-central1/us-central1-b", "accelerators": "A100:1"},
        {"infra": "gcp/us-east1/us-east1-b", "accelerators": "L4:1", "cpus": 8},
        {"infra": "gcp/us-central1/us-central1-a", "accelerators": "T4:1", "cpus": 8, "memory": 52, "use_spot": True},
        {"infra": "gcp/us-central1/us-central1-a", "accelerators": "T4:1", "cpus": 8, "memory": 52},
    ]
    tried = sky.ask("launch", {"name": "t", "run": "true", "resources": {"ordered": listed}})["tried"]
    assert [(machine["zone"], machine["gpu"], machine["spot"], machine["machine"]) for machine in tried] == [
        ("us-central1-b", "A100", False, "a2-highgpu-1g"),
        ("us-east1-b", "L4", False, "g2-standard-8"),
        ("us-central1-a", "T4", True, "n1-highmem-8"),
        ("us-central1-a", "T4", False, "n1-highmem-8"),
    ]


def test_stock_outs_fail_over(sky: SkyWorker) -> None:
    wanted = task(infra="gcp/us-central1", accelerators="A100:1")
    order = places(sky.ask("launch", wanted)["tried"])
    answer = sky.ask("launch", wanted, stocked_out=[list(order[0]), [order[1][0], None, None]])
    assert places(answer["tried"]) == order[:3]
    assert places([answer["launched"]]) == order[2:3]
    assert places(sky.ask("launch", wanted, limit=2)["tried"]) == order[:2]


def test_an_exceeded_quota_gives_up_the_region_at_once(sky: SkyWorker) -> None:
    quota = {"code": "QUOTA_EXCEEDED", "message": "Quota 'NVIDIA_L4_GPUS' exceeded.  Limit: 0.0 in region us-east1."}
    regions = [machine["region"] for machine in sky.ask("launch", task(accelerators="L4:1", cpus=8), **quota)["tried"]]
    assert len(regions) == len(set(regions)) > 3


def test_a_quota_of_zero_is_seen_before_a_machine_is_requested(sky: SkyWorker, home: Path) -> None:
    quotas = home / "quotas"
    quotas.write_text("NVIDIA_A100_GPUS 0.0\nPREEMPTIBLE_NVIDIA_A100_GPUS 1.0\n")
    try:
        wanted = task(infra="gcp/us-central1", accelerators="A100:1")
        refused = sky.ask("launch", wanted)
        spot = sky.ask("launch", wanted | {"resources": wanted["resources"] | {"use_spot": True}})
    finally:
        quotas.unlink()
    assert "Found no quota for a2-highgpu-1g on-demand" in refused["message"]
    assert "tried" not in refused
    assert len(spot["tried"]) == 4


# The commands as typed, through the API server.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to type commands in, with a policy and a task that mounts a bucket."""
    place = tmp_path_factory.mktemp("typed")
    (place / ".sky.yaml").write_text("admin_policy: policies.Talks\n")
    mounts = {"/outputs": {"name": "text2sql-test-you", "store": "gcs", "mode": "MOUNT"}}
    (place / "t.yaml").write_text(
        yaml.safe_dump(task(accelerators="T4:1", max_hourly_cost=0.01) | {"file_mounts": mounts})
    )
    return place


@pytest.fixture(scope="module")
def stand_in() -> Iterator[tuple[Buckets, dict[str, str]]]:
    with bucket_stand_in() as (buckets, variables):
        yield buckets, variables


@pytest.fixture(scope="module")
def typed(env: dict[str, str], stand_in: tuple[Buckets, dict[str, str]], folder: Path) -> Iterator[dict[str, str]]:
    with sky_server(env | stand_in[1], folder) as with_server:
        yield with_server
    mark = f"SKYPILOT_API_SERVER_LOCAL_PORT={with_server['SKYPILOT_API_SERVER_LOCAL_PORT']}".encode()
    assert not [path for path in Path("/proc").glob("[0-9]*/environ") if mark in read(path)], "processes are left"


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # ended meanwhile, or another user's
        return b""


@pytest.mark.repeat
def test_a_dry_run_applies_the_clients_policy_once_and_exceeds_the_ceiling(
    typed: dict[str, str], folder: Path, home: Path
) -> None:
    done = run_sky(typed, folder, "launch", "--dryrun", "-y", "t.yaml")
    assert done.returncode == 0, done.stderr
    assert "Dryrun finished." in done.stdout
    assert "T4:1" in done.stdout
    assert done.stdout.count("policy at") == 1
    assert "policy at the client launch" in done.stdout, "what a policy prints is for the user, on standard output"
    assert "policy at" not in (home / "server.log").read_text(), "the server, started here, reads no .sky.yaml"


@pytest.mark.repeat
def test_even_a_dry_run_creates_the_bucket(
    typed: dict[str, str], folder: Path, stand_in: tuple[Buckets, dict[str, str]]
) -> None:
    for _ in range(2):
        assert run_sky(typed, folder, "launch", "--dryrun", "-y", "t.yaml").returncode == 0
    assert list(stand_in[0].made) == ["text2sql-test-you"]
    assert len([call for call in stand_in[0].asked if call.startswith("POST")]) == 1


@pytest.mark.repeat
def test_a_refusal_ends_the_command_without_a_request(
    typed: dict[str, str], folder: Path, tmp_path: Path, stand_in: tuple[Buckets, dict[str, str]]
) -> None:
    (tmp_path / ".sky.yaml").write_text("admin_policy: policies.Refuses\n")
    (tmp_path / "t.yaml").write_text((folder / "t.yaml").read_text().replace("text2sql-test-you", "text2sql-never"))
    for command in (
        ["launch", "--dryrun", "-y", "t.yaml"],
        ["launch", "-y", "t.yaml"],
        ["jobs", "launch", "-y", "t.yaml"],
    ):
        done = run_sky(typed, tmp_path, *command)
        assert done.returncode == 1
        assert "UserRequestRejectedByPolicy: not for $3.67\nand this is why\n" in done.stderr
        assert "Considered resources" not in done.stdout
    assert "text2sql-never" not in stand_in[0].made


@pytest.mark.repeat
def test_the_prompt_shows_what_was_chosen_after_the_policy(typed: dict[str, str], folder: Path) -> None:
    for command, name in (["launch"], "launch"), (["jobs", "launch"], "jobs.launch"):
        done = run_sky(typed, folder, *command, "t.yaml", typed="n\n")
        assert done.returncode == 1
        assert f"policy at the client {name}" in done.stdout
        assert (
            done.stdout.index("policy at") < done.stdout.index("Considered resources") < done.stdout.index("Proceed?")
        )


@pytest.mark.repeat
def test_exec_applies_no_client_policy(typed: dict[str, str], tmp_path: Path, folder: Path) -> None:
    (tmp_path / ".sky.yaml").write_text("admin_policy: policies.Refuses\n")
    (tmp_path / "t.yaml").write_text((folder / "t.yaml").read_text())
    done = run_sky(typed, tmp_path, "exec", "no-such-cluster", "t.yaml")
    assert done.returncode == 1
    assert "'no-such-cluster' does not exist" in done.stderr
    assert "Rejected" not in done.stderr, "sky exec now applies .sky.yaml's policy: docs/cloud.md says that it does not"
