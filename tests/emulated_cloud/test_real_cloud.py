"""The code for a real project, against stand-ins for its programs, and against the real gcloud where that is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import pytest

from tests.emulated_cloud import real_sky
from tests.emulated_cloud.gce_bill import Stretch
from tests.emulated_cloud.gce_market import MachineRequest
from tests.emulated_cloud.real import RealCloud
from tests.emulated_cloud.real_bill import RealBill
from tests.emulated_cloud.real_gcloud import Gcloud, RealBuckets, machine_of
from tests.emulated_cloud.real_sky import RealSky, take_down
from tests.emulated_cloud.real_stand_in import StandIn, instance
from tests.helpers.google_fixture import google_for_gcloud
from tests.helpers.json_server import JsonHandler

OURS, NINE_PM = "ftreal-1a2b-", 1795410000.0
"""NINE_PM: 2026-11-22 21:00 in California, in seconds since the epoch."""
MINE = instance(f"{OURS}look-0f0f0f0f-head-xyz-compute", "us-central1-a", "a2-highgpu-1g", gpu="nvidia-tesla-a100")
JOB = instance(f"{OURS}twice-7-0f0f0f0f-head-abc-compute", "us-east4-c", "g2-standard-8", gpu="nvidia-l4")
OTHERS = [
    instance("prod-database", "us-central1-a", "n1-highmem-8", spot=False),
    instance("ftreal-1a2c-look-0f0f0f0f-head-xyz-compute", "us-central1-a", "g2-standard-8"),
    instance(f"my-{OURS}look", "us-central1-a", "g2-standard-8"),
]


@pytest.fixture
def stand_in(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path / "stand-in").lay_out(machines=[*OTHERS, JOB, MINE])


@pytest.fixture
def gcloud(stand_in: StandIn) -> Gcloud:
    return Gcloud("p", stand_in.gcloud)


@pytest.fixture
def sky(stand_in: StandIn, tmp_path: Path) -> RealSky:
    return RealSky(OURS, tmp_path / "launched", tmp_path, stand_in.env())


def test_machines_are_read_from_googles_json(gcloud: Gcloud, stand_in: StandIn) -> None:
    look, job = sorted(gcloud.machines(OURS), key=lambda machine: machine.name)
    assert look.request == MachineRequest("us-central1-a", "a2-highgpu-1g", "A100", 1, True)
    assert job.request == MachineRequest("us-east4-c", "g2-standard-8", "L4", 1, True)
    assert (look.status, look.disk_gb, look.began, look.ended) == ("RUNNING", 200, NINE_PM, None)
    assert stand_in.calls() == [
        "gcloud --quiet compute instances list --format=json --filter=name~^ftreal-1a2b- --project=p"
    ]
    stopped = machine_of(instance("x", "us-east1-c", "n1-highmem-8", spot=False, status="TERMINATED"))
    assert (stopped.ended, stopped.request.spot, stopped.request.gpu) == (NINE_PM + 1800, False, "")
    with pytest.raises(AssertionError, match="not a prefix of this session"):
        gcloud.machines("")


def test_the_ways_in_which_a_machine_ends(gcloud: Gcloud, stand_in: StandIn) -> None:
    cloud = RealCloud(gcloud, OURS)
    first = cloud.machine(f"{OURS}twice")
    cloud.preempt(first)
    cloud.crash(cloud.machine(f"{OURS}look"))
    cloud.assert_empty(0)
    done = [call for call in stand_in.calls() if " list " not in call]
    assert done == [
        f"gcloud --quiet compute instances simulate-maintenance-event {JOB['name']} --zone=us-east4-c --async --project=p",
        f"gcloud --quiet compute instances delete {MINE['name']} --zone=us-central1-a --project=p",
    ]
    with pytest.raises(AssertionError, match="no machine"):
        cloud.wait_for_machine(f"{OURS}twice", 0, other_than=first)
    with pytest.raises(AttributeError, match="only the emulated cloud has it"):
        cloud.market.set_stock(0)  # type: ignore[attr-defined]


def test_a_new_machine_is_told_from_the_old_one(gcloud: Gcloud, stand_in: StandIn) -> None:
    cloud = RealCloud(gcloud, OURS)
    first = cloud.machine(f"{OURS}twice")
    again = JOB | {"name": f"{OURS}twice-7-0f0f0f0f-head-def-compute", "lastStartTimestamp": "2026-11-22T22:00:00Z"}
    stand_in.lay_out(machines=[JOB, again])
    assert cloud.wait_for_machine(f"{OURS}twice", 0, other_than=first).name == again["name"]


def test_a_failing_gcloud_is_reported(stand_in: StandIn) -> None:
    with pytest.raises(AssertionError, match=r"networks list: exit code 1\nERROR: \(gcloud\) not in the stand-in"):
        Gcloud("p", stand_in.gcloud).say("compute", "networks", "list")


def test_taking_down_touches_its_own_alone(sky: RealSky, gcloud: Gcloud, stand_in: StandIn) -> None:
    sky.run("launch", "-y", "-c", f"{OURS}look", "x.yaml").ok()
    sky.run("jobs", "launch", "-y", "-n", f"{OURS}twice", "x.yaml").ok()
    report = take_down(sky, gcloud, seconds=0)
    print(report)
    assert stand_in.machines() == [row["name"] for row in OTHERS]
    assert [call for call in stand_in.calls() if "list" not in call][2:] == [
        f"sky jobs cancel -y -n {OURS}twice",
        f"sky down -y {OURS}look",
        f"gcloud --quiet compute instances delete {JOB['name']} --zone=us-east4-c --project=p",
    ]
    assert report[-1] == f"no machine and no disk of {OURS}... is left"
    assert take_down(sky, gcloud, seconds=0) == report[-1:], "what is settled is left alone"
    assert len(take_down(RealSky(OURS, sky.launched, sky.home, sky.env), gcloud, 0)) == 3, (
        "another process does it again"
    )


def test_taking_down_goes_on_after_a_failure(sky: RealSky, gcloud: Gcloud, stand_in: StandIn) -> None:
    stand_in.lay_out(machines=[*OTHERS, MINE, JOB], stubborn=[f"{OURS}look"], disks=["a", f"{OURS}look-disk"])
    for name in ("look", "twice"):
        sky.run("launch", "-y", "-c", OURS + name, "x.yaml").ok()
    report = take_down(sky, gcloud, seconds=0)
    print(report)
    assert report[0] == f"sky down -y {OURS}look: exit code 1: ERROR: the API server does not answer"
    assert stand_in.machines() == [row["name"] for row in OTHERS]
    assert report[-1] == f"LEFT, AND COSTING MONEY: {OURS}look-disk"


def test_taking_down_asks_again(
    sky: RealSky, gcloud: Gcloud, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_sky, "PAUSE_SECONDS", 0.01)
    stand_in.lay_out(machines=[*OTHERS, MINE], stubborn=[f"{OURS}look"], silent=3)
    sky.run("launch", "-y", "-c", f"{OURS}look", "x.yaml").ok()
    assert take_down(sky, gcloud, seconds=0)[-1] == f"no machine and no disk of {OURS}... is left"
    assert stand_in.machines() == [row["name"] for row in OTHERS]
    monkeypatch.setattr(real_sky, "SILENT_SECONDS", 0.2)
    stand_in.lay_out(machines=[MINE], silent=10**6)
    sky.run("launch", "-y", "-c", f"{OURS}more", "x.yaml").ok()
    last = take_down(sky, gcloud, seconds=0)[-1]
    assert last.startswith("LEFT, PERHAPS, AND COSTING MONEY: gcloud ")
    assert last.endswith(f"exit code 1; look with `gcloud compute instances list --filter=name~^{OURS}`")
    assert sky.names()["cluster"] == [f"{OURS}more"], "it is not settled"


def test_taking_down_does_not_wait_for_ever(
    sky: RealSky, gcloud: Gcloud, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_sky, "COMMAND_SECONDS", 0.5)
    stand_in.lay_out(machines=[*OTHERS, MINE], down_seconds=30)
    sky.run("launch", "-y", "-c", f"{OURS}look", "x.yaml").ok()
    assert take_down(sky, gcloud, seconds=0)[0] == f"sky down -y {OURS}look: not done in 0 s"
    assert stand_in.machines() == [row["name"] for row in OTHERS]


@pytest.mark.parametrize(
    "words",
    [
        "launch -y sky/train_a100.yaml",
        "launch -y -c mine sky/train_a100.yaml",
        f"launch -y -c {OURS}a-very-long-name x.yaml",
        "jobs launch -y -n mine x.yaml",
        f"jobs launch -y -c {OURS}x x.yaml",
        "down -y mine",
        f"down -y {OURS}look mine",
        "down -y --all",
        f"down -y {OURS}look -a",
        "stop -y mine",
        "start -y -a",
        "jobs cancel -y -n mine",
        "jobs cancel -y --all",
    ],
)
def test_commands_that_could_touch_others_are_not_run(sky: RealSky, stand_in: StandIn, words: str) -> None:
    with pytest.raises(AssertionError):
        sky.run(*words.split())
    assert not stand_in.calls() and not sky.launched.exists()


def test_a_launch_is_written_down_before_it_is_made(sky: RealSky) -> None:
    for words in (f"launch -c {OURS}a x", "launch --dryrun x", f"jobs launch -n {OURS}b x", f"launch -c {OURS}a x"):
        sky.run(*words.split()).ok()
    assert sky.names() == {"cluster": [f"{OURS}a"], "job": [f"{OURS}b"]}


def test_the_bill_is_what_was_seen() -> None:
    bill, mine = RealBill(), machine_of(MINE)
    stopped = machine_of(MINE | {"status": "TERMINATED", "lastStopTimestamp": "2026-11-22T21:30:00.000-08:00"})
    restarted = machine_of(MINE | {"lastStartTimestamp": "2026-11-22T21:45:00.000-08:00"})
    starting = machine_of(JOB | {"status": "STAGING"})
    bill.observe([mine, starting], NINE_PM + 5)
    bill.observe([mine], NINE_PM + 900)
    bill.observe([stopped], NINE_PM + 1805)
    bill.observe([restarted], NINE_PM + 2710)
    bill.observe([], NINE_PM + 3600)

    def price(stretch: Stretch) -> float:
        return 2.0 if stretch.running else 0.1

    seen = [(one.running, one.seconds, one.end) for one in bill.stretches]
    assert seen == [(True, 1800, "stopped"), (False, 900, "started"), (True, 900, "gone")]
    assert bill.usd(price) == pytest.approx(1.0 + 0.025 + 0.5)
    assert "total $1.5250 (estimated" in bill.table(price)


def test_the_bucket_under_the_scenarios_name(gcloud: Gcloud, stand_in: StandIn) -> None:
    objects = {"gs://real/runs/a/run.json": "{}", "gs://real/runs/ab/run.json": "no", "gs://real/runs/a/x/y": "1"}
    stand_in.lay_out(objects=objects, buckets=["gs://real"])
    buckets = RealBuckets(gcloud, "real", "alias")
    assert buckets.names() == ["alias"]
    assert buckets.objects("alias", "runs/a/") == ["runs/a/run.json", "runs/a/x/y"]
    assert buckets.objects("alias", "runs/c/") == []
    assert buckets.read("alias", "runs/a/run.json") == b"{}"
    assert buckets.updated("alias", "runs/a/run.json") == NINE_PM + 1.5
    assert RealBuckets(gcloud, "other", "alias").names() == []


class Google(JsonHandler):
    """Compute and storage, as far as the real gcloud calls them here."""

    asked: ClassVar[list[str]] = []

    def answer(self) -> tuple[int, object]:
        parts = urlsplit(self.path)
        self.asked.append(f"{self.command} {parts.path}")
        answer: object = {"error": {"code": 404, "message": "not here"}}
        if parts.path.endswith("/aggregated/instances"):
            answer = {"items": {"zones/us-central1-a": {"instances": [*OTHERS, MINE]}}}
        elif parts.path.endswith("/aggregated/disks"):
            answer = {"items": {"zones/us-central1-a": {"disks": [{"name": "a"}, {"name": f"{OURS}d"}]}}}
        elif "/operations/" in parts.path or self.command in ("POST", "DELETE"):
            root = parts.path.partition("/instances/")[0].partition("/operations/")[0]
            link = f"http://{self.headers['Host']}{root}/operations/o"
            answer = {"kind": "compute#operation", "name": "o", "status": "DONE", "selfLink": link, "zone": root}
            answer |= {"operationType": "delete", "targetLink": link.replace("operations/o", "instances/gone")}
        elif parts.path.endswith("/storage/v1/b/real/o"):
            names = ["runs/a/run.json", "runs/a/x/y"]
            answer = {"kind": "storage#objects", "items": [_object(name) for name in names]}
        elif parts.path.endswith("/b/real/o/runs%2Fa%2Frun.json"):
            answer = _object("runs/a/run.json")
        elif parts.path.endswith("/b/real"):
            answer = {"kind": "storage#bucket", "name": "real"}
        return 404 if isinstance(answer, dict) and "error" in answer else 200, answer


def _object(name: str) -> dict[str, str]:
    moment = "2026-11-23T05:00:01.500Z"
    return {"kind": "storage#object", "bucket": "real", "name": name, "size": "2", "generation": "1", "updated": moment}


@pytest.fixture
def real_gcloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gcloud]:
    Google.asked.clear()
    with google_for_gcloud(Google, tmp_path, monkeypatch):
        yield Gcloud("p")


def test_the_real_gcloud_understands_what_is_asked(real_gcloud: Gcloud) -> None:
    (mine,) = real_gcloud.machines(OURS)
    assert mine == machine_of(MINE)
    assert real_gcloud.disks(OURS) == [f"{OURS}d"]
    real_gcloud.preempt(mine)
    real_gcloud.delete(mine)
    place = f"/compute/v1/projects/p/zones/us-central1-a/instances/{mine.name}"
    assert f"POST {place}/simulateMaintenanceEvent" in Google.asked and f"DELETE {place}" in Google.asked


def test_the_real_gcloud_reads_the_bucket(real_gcloud: Gcloud) -> None:
    buckets = RealBuckets(real_gcloud, "real", "alias")
    assert buckets.names() == ["alias"]
    assert buckets.objects("alias", "runs/a/") == ["runs/a/run.json", "runs/a/x/y"]
    assert buckets.updated("alias", "runs/a/run.json") == NINE_PM + 1.5
    assert RealBuckets(real_gcloud, "absent", "alias").names() == []
