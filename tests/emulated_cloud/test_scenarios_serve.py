"""`sky launch sky/serve.yaml`: a run of the bucket behind a tunnel, until nobody asks any more."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from finetune.budget.ledger import Ledger
from tests.emulated_cloud.environment import CloudEnvironment
from tests.emulated_cloud.pace import PACE, wait_until
from tests.emulated_cloud.reconciliation import TOLERANCE, catalog_price, check_machine, check_nothing_left
from tests.emulated_cloud.table import record_metric
from tests.emulated_cloud.training import BUCKET, Run, launch
from tests.emulated_cloud.whole import NAME, Whole

pytestmark = pytest.mark.cloud
KEY = "a-key-for-this-test-only"
IDLE_MINUTES = 1
"""Scaled by pace.py."""


@pytest.mark.xdist_group("whole")
def test_a_run_is_served(environment: CloudEnvironment, project: Path, whole: Whole, tmp_path: Path) -> None:
    """The endpoint's answers are those of the evaluation; no port is open; what it costs stands in the bucket, by the day."""
    run = Run(environment, NAME)
    words = launch("serve", "-d", "-c", "serve", "-i", "1", "--down", RUN_NAME=NAME, EXECUTE=1,
                   IDLE_MINUTES=round(IDLE_MINUTES * PACE.factor, 1),
                   DATABASES="station=tiny/databases/station/station.sqlite")  # fmt: skip
    launched = environment.sky.run(*words, "--secret", f"FINETUNE_API_KEY={KEY}", cwd=project).ok()
    assert KEY not in launched.out
    machine, port = environment.cloud.machine("serve"), free_port()
    assert machine.request.gpu == "L4" and machine.request.spot
    with environment.sky.ssh("serve", "-N", "-o", "ExitOnForwardFailure=yes", "-L", f"{port}:localhost:8000") as tunnel:
        wait_until_ready(environment, port, 300)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(port, {"messages": [{"role": "user", "content": "x"}]}, key="another-key-that-is-wrong")
        rows = [json.loads(line) for line in run.read("eval/tuned.jsonl").decode().splitlines()]
        schema = json.loads((project / "tiny/records.jsonl").read_text(encoding="utf-8").splitlines()[0])["schema"]
        for row in rows[:3]:
            asked = {"messages": [{"role": "user", "content": row["question"]}], "schema": schema}
            answer = ask(port, asked)["choices"][0]["message"]["content"]
            assert answer == row["prediction"], row
        named = {"messages": [{"role": "user", "content": rows[0]["question"]}], "database": "station"}
        assert ask(port, named)["choices"][0]["message"]["content"]
        assert tunnel.poll() is None
    environment.cloud.assert_empty(360)
    (stretch,) = environment.cloud.bill.stretches
    folder = tmp_path / "serving"
    folder.mkdir()
    names = environment.buckets.objects(BUCKET, "serving/")
    for name in names:
        (folder / Path(name).name).write_bytes(environment.buckets.read(BUCKET, name))
    account = Ledger(folder).account()
    assert not account.problems and len(names) == len(account.attempts) == 1, (names, account)
    (attempt,) = account.attempts
    assert (attempt.work, attempt.reason) == ("serve", "ended")
    check_machine(stretch, attempt, catalog_price(environment.cloud.prices)(stretch))
    assert stretch.ended is not None
    tail = stretch.ended - environment.buckets.updated(BUCKET, names[0])
    difference = attempt.seconds / (stretch.seconds - tail) - 1
    record_metric(f"{stretch.seconds:.0f} s on the bill, {tail:.0f} s idle after its end, ledger {difference:+.2%}")
    assert abs(difference) < TOLERANCE
    check_nothing_left(environment)


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return int(any_port.getsockname()[1])


def wait_until_ready(environment: CloudEnvironment, port: int, seconds: float) -> None:
    last = ""

    def ready() -> bool:
        nonlocal last
        with suppress(OSError):
            last = str(get(port, "/health"))
            return True
        return False

    def failure(waited: float) -> str:
        log = environment.sky.run("logs", "serve", "--no-follow").out
        return f"no endpoint on localhost:{port} after {waited:.0f} s: {last}\n{log[-3000:]}"

    wait_until(ready, seconds, failure)


def get(port: int, place: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://localhost:{port}{place}", timeout=30) as answer:
        return json.load(answer)


def ask(port: int, body: dict[str, Any], key: str = KEY) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    address = f"http://localhost:{port}/v1/chat/completions"
    request = urllib.request.Request(address, json.dumps({"model": NAME} | body).encode(), head)
    with opener.open(request, timeout=120) as answer:
        return json.load(answer)
