"""What an emulated machine looks like from inside, and what can happen to it, without SkyPilot."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.emulated_cloud import orphans
from tests.emulated_cloud.buckets import PORT, Buckets
from tests.emulated_cloud.gce import Cloud
from tests.emulated_cloud.gce_instances import parse_request
from tests.emulated_cloud.machine import Machine, Site, open_site
from tests.emulated_cloud.pace import patience

pytestmark = pytest.mark.cloud
HERE = Path(__file__).resolve().parent
API_PORT = 8080


@pytest.fixture
def site(bare_image: Path) -> Iterator[Site]:
    slot, folder = orphans.take_slot()
    site = Site(slot, folder / "machines", bare_image, api="", bucket="")
    site.bucket = f"http://{site.google}:{PORT}"
    open_site(site)
    yield site
    orphans.clean(slot)


@pytest.fixture
def cloud(site: Site) -> Iterator[Cloud]:
    with Cloud(
        (site.google, API_PORT), "p", ["us-central1-a"], site.machine_addresses(), lambda one: Machine(site, one)
    ) as cloud:
        yield cloud


def rent(cloud: Cloud) -> Machine:
    properties = {
        "machineType": "a2-highgpu-1g",
        "scheduling": {"preemptible": True, "instanceTerminationAction": "DELETE"},
    }
    instance = cloud.instances.create("one-compute", parse_request("us-central1-a", properties), properties)
    cloud.instances.power_on(instance)
    assert isinstance(instance.hardware, Machine)
    return instance.hardware


def inside(machine: Machine, script: str, timeout: float = 20) -> str:
    assert machine.booted
    env = {"HOME": "/home/gcpuser", "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    done = machine.booted.run(["bash", "-c", script], user="gcpuser", env=env, timeout=timeout)
    return (done.stdout + done.stderr).strip()


def test_a_machine_sees_itself_and_nothing_of_this_computer(cloud: Cloud) -> None:
    machine = rent(cloud)
    secret = Path(tempfile.gettempdir()) / "ft-secret"
    secret.write_text("x")
    try:
        assert inside(machine, f"ls {secret} {HERE}").count("No such file") == 2
    finally:
        secret.unlink()
    assert (
        inside(machine, "nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader") == "NVIDIA A100-SXM4-40GB, 8.0"
    )
    assert inside(machine, "nvidia-smi --list-gpus | grep -c '^GPU '") == "1"
    assert inside(machine, "sudo -n id -u; hostname; cat /proc/1/comm | head -c 6") == "0\none-compute\npython"
    assert inside(machine, "stat -c %a /dev/null /dev/fuse") == "666\n666", "also where this computer has no udev"
    inside(machine, "sudo rm -rf /usr/share/doc /etc/passwd-")
    assert Path("/usr/share/doc").is_dir()


def test_a_machine_that_comes_or_goes_is_not_noticed_by_the_others(cloud: Cloud, site: Site) -> None:
    """The others cache this computer's link address; if it changed they would use the old one for a while."""
    link = Path("/sys/class/net", site.bridge, "address")
    before = link.read_text()
    machine = rent(cloud)
    assert before.split()[0] in inside(
        machine, f"curl -s http://{site.google}:{API_PORT}/; ip neigh show {site.google}"
    )
    machine.power_off()
    assert link.read_text() == before


def test_the_metadata_server_tells_of_a_preemption(cloud: Cloud) -> None:
    machine = rent(cloud)
    ask = "curl -s -m 15 -H Metadata-Flavor:Google http://metadata.google.internal/computeMetadata/v1/instance/"
    assert (
        inside(machine, f"{ask}zone; echo; {ask}scheduling/preemptible")
        == "projects/123456789/zones/us-central1-a\nTRUE"
    )
    assert "403" in inside(machine, "curl -si http://169.254.169.254/computeMetadata/v1/instance/zone | head -1")
    url = "http://169.254.169.254/computeMetadata/v1/instance/preempted?wait_for_change=true"
    enter = ["nsenter", "--target", str(machine.booted.init), "--net", "--"] if machine.booted else []
    asked = subprocess.Popen(
        [*enter, "curl", "-s", "-H", "Metadata-Flavor:Google", url], stdout=subprocess.PIPE, text=True
    )
    time.sleep(patience(0.5))
    assert asked.poll() is None, "the answer is held back"
    began, notice = time.monotonic(), patience(1.0)
    ended = cloud.preempt(cloud.machine(), notice=notice)
    assert asked.communicate(timeout=patience(5))[0] == "TRUE" and time.monotonic() - began < 0.8 * notice
    ended.join()
    assert machine.booted is None and not cloud.machines(), "it is off, and a spot machine of SkyPilot's is deleted"


def test_a_preempted_machine_terminates_its_processes_first(cloud: Cloud) -> None:
    machine = rent(cloud)
    inside(
        machine,
        "nohup bash -c 'trap \"echo caught > ~/caught; exit\" TERM; while :; do sleep 0.1; done' >/dev/null 2>&1 & "
        f"sleep {patience(0.5)}",
    )
    instance = cloud.machine()
    instance.spot_action = "STOP"
    cloud.preempt(instance, notice=patience(1.0)).join()
    assert (machine.upper / "home" / "gcpuser" / "caught").read_text() == "caught\n"
    cloud.instances.power_on(instance)
    assert inside(machine, "cat ~/caught") == "caught", "its disk outlives a stop"


def test_a_cut_line_is_cut_on_one_side(cloud: Cloud, site: Site) -> None:
    machine = rent(cloud)
    knock = ["nc", "-z", "-w", "2", machine.instance.address, "22"]
    api = f"curl -s -o /dev/null -m 2 -w '%{{http_code}}' {cloud.url}/network"

    def both() -> tuple[bool, bool]:
        return subprocess.run(knock, capture_output=True, check=False).returncode == 0, inside(machine, api) == "200"

    deadline = time.monotonic() + patience(5)
    while both() != (True, True):
        assert time.monotonic() < deadline, "sshd does not listen"
    for what, expected in (("laptop", (False, True)), ("google", (True, False)), ("all", (False, False))):
        cloud.cut_off(cloud.machine(), what)
        assert both() == expected, what
        cloud.reconnect(cloud.machine())
        assert both() == (True, True), f"after {what}"


@pytest.fixture
def buckets(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buckets]:
    buckets = Buckets(site.google, site.folder.parent / "bucket", tmp_path_factory.getbasetemp() / "packages")
    yield buckets
    buckets.stop()


def mount(buckets: Buckets, machine: Machine) -> None:
    """Mounts a bucket as SkyPilot's mounting script does."""
    buckets.make("ft-bucket")
    inside(machine, "sudo mkdir -p /bucket && sudo chmod 777 /bucket")
    words = "--log-file /tmp/log --debug_fuse_errors -o allow_other --implicit-dirs --stat-cache-ttl 5s --rename-dir-limit 10000"
    assert inside(machine, f"gcsfuse {words} ft-bucket /bucket; echo $?") == "0"


def test_a_closed_file_is_in_the_bucket(cloud: Cloud, buckets: Buckets) -> None:
    machine = rent(cloud)
    mount(buckets, machine)
    inside(machine, "mkdir /bucket/run && echo text > /bucket/run/part && mv /bucket/run/part /bucket/run/whole")
    cloud.crash(cloud.machine())
    assert buckets.objects("ft-bucket", "run/whole") == ["run/whole"] and "run/part" not in buckets.objects("ft-bucket")
    assert buckets.read("ft-bucket", "run/whole") == b"text\n"


def test_what_was_not_uploaded_is_lost_with_the_machine(cloud: Cloud, buckets: Buckets, site: Site) -> None:
    site.write_back = patience(3)
    machine = rent(cloud)
    mount(buckets, machine)
    inside(machine, f"echo early > /bucket/early; sleep {patience(6)}; echo late > /bucket/late")
    assert inside(machine, "cat /bucket/early /bucket/late") == "early\nlate"
    cloud.crash(cloud.machine())
    assert buckets.objects("ft-bucket") == ["early"]


def test_a_close_waits_for_its_upload(cloud: Cloud, buckets: Buckets, site: Site) -> None:
    """So a file whose close has returned is complete in the bucket after the machine is gone, and a partial upload is no
    object."""
    site.upload_bytes_per_second = 1_000_000
    machine = rent(cloud)
    mount(buckets, machine)
    began = time.monotonic()
    inside(machine, "head -c 2000000 /dev/zero > /bucket/first")
    assert time.monotonic() - began > 2
    inside(machine, "nohup sh -c 'head -c 9000000 /dev/zero > /bucket/second' >/dev/null 2>&1 & sleep 2")
    cloud.crash(cloud.machine())
    sizes = {name: len(buckets.read("ft-bucket", name)) for name in buckets.objects("ft-bucket")}
    assert sizes == {"first": 2_000_000, "second": 0}, (
        "sh closes a copy of its descriptor, which uploads what was there: nothing"
    )


def test_the_bucket_is_a_folder(cloud: Cloud, buckets: Buckets) -> None:
    machine = rent(cloud)
    mount(buckets, machine)
    script = """
set -e
mkdir -p /bucket/a/b; : > /bucket/empty; cp /bucket/empty /bucket/a/none; cat /bucket/empty; rm /bucket/empty
echo 1 > /bucket/a/b/x; echo 2 >> /bucket/a/b/x; echo 3 > /bucket/a/y
mv /bucket/a /bucket/moved
printf 'zz' | dd of=/bucket/moved/b/x bs=1 seek=1 conv=notrunc status=none
cat /bucket/moved/b/x; ls -R /bucket; test -e /bucket/moved/none; rm /bucket/moved/y /bucket/moved/none; rm -r /bucket/moved/b
python3 - <<'END'
import os, sqlite3
with open("/bucket/f", "w+b") as file:
    file.write(b"0123456789"); file.seek(3); file.write(b"x"); file.truncate(6); file.seek(0); print(file.read())
os.replace("/bucket/f", "/bucket/g")
print(os.path.exists("/bucket/f"), os.path.getsize("/bucket/g"), sorted(os.listdir("/bucket")))
END
cat /bucket/none 2>&1 || true
"""
    output = inside(machine, script)
    print(output)
    assert output.startswith("1zz\n")
    assert "b'012x45'" in output and "False 6 ['g', 'moved']" in output and output.endswith("No such file or directory")
    assert buckets.objects("ft-bucket") == ["g"] and buckets.read("ft-bucket", "g") == b"012x45"


def test_gsutil_copies_both_ways(cloud: Cloud, buckets: Buckets) -> None:
    """The calls that SkyPilot makes for a local source, and for a bucket that it copies to a machine."""
    machine = rent(cloud)
    buckets.make("ft-bucket")
    script = r"""
mkdir -p t/sub; echo 1 > t/a; echo 2 > t/sub/b; echo 3 > t/c.log
gsutil -m rsync -e -r -x '(.*\.log$|^\.git/.*$)' t gs://ft-bucket/p
gsutil ls -d gs://ft-bucket/p; gsutil ls -d gs://ft-bucket/p/a; gsutil ls -d gs://ft-bucket/none
mkdir back; gsutil -m rsync -e -r gs://ft-bucket/p back; cat back/sub/b
echo t/a | gsutil -m cp -e -n -r -I gs://ft-bucket
"""
    output = inside(machine, f"cd ~; {script}").splitlines()
    assert output == [
        "gs://ft-bucket/p/",
        "gs://ft-bucket/p/a",
        "2",
        "CommandException: One or more URLs matched no objects.",
    ]
    assert buckets.objects("ft-bucket") == ["a", "p/a", "p/sub/b"]
    inside(machine, "gsutil -m rm -r gs://ft-bucket/p")
    assert buckets.objects("ft-bucket") == ["a"]


def test_a_forbidden_bucket_on_a_machine(cloud: Cloud, buckets: Buckets) -> None:
    machine = rent(cloud)
    buckets.forbid("ft-bucket", "storage.objects.create")
    mount(buckets, machine)
    assert "failed to close '/bucket/file': Permission denied" in inside(machine, "cp /etc/hostname /bucket/file")
    buckets.allow("ft-bucket")
    inside(machine, "echo text > /bucket/other")
    assert buckets.objects("ft-bucket") == ["other"]
    buckets.forbid("ft-bucket")
    output = inside(machine, "mkdir /tmp/again; gcsfuse ft-bucket /tmp/again; echo $?")
    assert (
        "does not have storage.buckets.get access to the Google Cloud Storage bucket" in output
        and output.startswith("1\n")
    )
    assert buckets.objects("ft-bucket") == ["other"], "a test's own look is always allowed"


def test_a_disk_of_a_size(cloud: Cloud, site: Site) -> None:
    site.disk_bytes = 64 << 20
    machine = rent(cloud)
    assert inside(machine, "df --output=size -BM / /home /tmp /var | sort -u") == "64M\n1M-blocks"
    machine.fill_disk()
    assert "No space left on device" in inside(machine, "echo x > ~/file")
    machine.free_disk()
    assert inside(machine, "echo x > ~/file; cat ~/file") == "x"
