"""Small files of a bucket, copied by Google's own client from a server that answers as Google's storage does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from finetune.cli.main import main
from finetune.cloud.gcloud import bucket_files
from finetune.cloud.gcloud.bucket_files import copy_small_files
from tests.helpers.errors import raises
from tests.helpers.json_server import JsonHandler, serving
from tests.helpers.report_fixtures import Page
from tests.helpers.scored_runs import scored_run

BUCKET = "my-bucket"


class Storage:
    """One bucket. objects: name -> text. status: of every answer, if it is not 200."""

    def __init__(self) -> None:
        self.objects: dict[str, str] = {}
        self.generations: dict[str, int] = {}
        self.status = 200
        self.fetched: list[str] = []

    def put(self, name: str, text: str) -> None:
        self.objects[name] = text
        self.generations[name] = self.generations.get(name, 0) + 1


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    pytest.importorskip("google.cloud.storage")
    kept = Storage()

    class Handler(JsonHandler):
        def answer(self) -> tuple[int, Any]:
            url = urlsplit(self.path)
            if kept.status != 200:
                return kept.status, {"error": {"code": kept.status, "message": "refused"}}
            if "/o/" in url.path:
                name = unquote(url.path.partition("/o/")[2])
                kept.fetched.append(name)
                return 200, kept.objects[name].encode()
            if url.path.endswith(f"/b/{BUCKET}"):  # what nobody needs who only reads objects
                return 403, {"error": {"code": 403, "message": "does not have storage.buckets.get access"}}
            if f"/b/{BUCKET}/" not in url.path:
                return 404, {"error": {"code": 404, "message": "no bucket"}}
            prefix = parse_qs(url.query).get("prefix", [""])[0]
            return 200, {
                "items": [
                    {
                        "name": name,
                        "size": str(len(text)),
                        "generation": str(kept.generations[name]),
                        "bucket": BUCKET,
                        "updated": "2026-11-01T10:00:00.000Z",
                    }
                    for name, text in kept.objects.items()
                    if name.startswith(prefix)
                ]
            }

    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bucket_files, "SECONDS", 3.0)
    with serving(Handler) as address:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        yield kept


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")


def test_what_says_how_a_run_is_doing_is_copied_once(storage: Storage) -> None:
    for name in (
        "run.json",
        "eval.json",
        "ledger/attempt-001.jsonl",
        "adapter/adapter.safetensors",
        "checkpoints/a/run.json",
    ):
        storage.put(f"runs/one/{name}", "{}")
    storage.put("data/prepared/manifest.json", "{}")
    folder = copy_small_files(f"gs://{BUCKET}/runs")
    assert files(folder) == ["one/eval.json", "one/ledger/attempt-001.jsonl", "one/run.json"]
    assert json.loads((folder / "one/run.json").read_text()) == {}
    assert (folder / "one/run.json").stat().st_mtime == datetime(2026, 11, 1, 10, tzinfo=UTC).timestamp()
    storage.fetched.clear()
    storage.put("runs/one/run.json", '{"status": "done"}')
    del storage.objects["runs/one/eval.json"]
    assert copy_small_files(f"gs://{BUCKET}/runs/") == folder
    assert storage.fetched == ["runs/one/run.json"], "only what has changed"
    assert json.loads((folder / "one/run.json").read_text()) == {"status": "done"}
    assert files(folder) == ["one/ledger/attempt-001.jsonl", "one/run.json"], "what was deleted there is deleted here"


def test_the_root_of_a_bucket(storage: Storage) -> None:
    storage.put("one/run.json", "{}")
    assert files(copy_small_files(f"gs://{BUCKET}")) == ["one/run.json"]


def test_a_name_never_leaves_the_folder(storage: Storage, tmp_path: Path) -> None:
    for name in ("../run.json", "runs/../../x/run.json", "a\x1b/run.json", "runs/..//run.json"):
        storage.put(name, "{}")
    folder = copy_small_files(f"gs://{BUCKET}")
    assert files(folder) == []
    assert not (tmp_path / "run.json").exists()


def test_runs_of_a_bucket_are_shown(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    storage.put("runs/mine/run.json", '{"status": "done"}')
    assert main(["runs", f"gs://{BUCKET}/runs"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["mine", "done"]


def test_a_page_of_a_buckets_runs_leads_to_copied_reports_and_can_compare(
    storage: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, right in (("a", 0.3), ("b", 0.7)):
        run = scored_run(tmp_path / "there", name, right=right, questions=12)
        for path in sorted(path for path in run.rglob("*") if path.is_file()):
            storage.put(f"runs/{name}/{path.relative_to(run)}", path.read_text(encoding="utf-8"))
        storage.put(f"runs/{name}/config.yaml", "")
        storage.put(f"runs/{name}/report.html", "<p>report</p>")
        storage.put(f"runs/{name}/checkpoints/step-1/trainer.pt", "large")
    assert main(["runs", f"gs://{BUCKET}/runs", "--html", "--output", str(tmp_path / "all.html")]) == 0
    assert capsys.readouterr().out == f"page: {tmp_path / 'all.html'}\n"
    found = Page((tmp_path / "all.html").read_text(encoding="utf-8")).data["runs"]
    assert [(tmp_path / one["report"]).read_text() for one in found] == ["<p>report</p>"] * 2
    assert all(one["compared"]["bits"] for one in found) and found[0]["accuracy"] != found[1]["accuracy"]
    assert not any("checkpoints" in name for name in storage.fetched)
    assert main(["runs", f"gs://{BUCKET}/runs"]) == 0
    assert all((tmp_path / one["report"]).is_file() for one in found), "what the table does not need stays for the page"
    assert main(["runs", f"gs://{BUCKET}/runs", "--html"]) == 0
    [_, _, page] = capsys.readouterr().out.partition("page: ")
    assert Path(page.strip()).is_file() and Path(page.strip()).is_relative_to(tmp_path / "cache"), "in the copy"


def test_a_run_of_a_bucket_is_watched(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    storage.put("runs/mine/run.json", '{"status": "running", "steps": {"done": 3, "planned": 10}}')
    storage.put("runs/other/run.json", "{}")
    assert main(["watch", f"gs://{BUCKET}/runs/mine"]) == 0
    shown = capsys.readouterr().out
    assert "3 of 10" in shown and "it may be gone" in shown
    assert storage.fetched == ["runs/mine/run.json"]


def test_a_bucket_that_may_not_be_read(storage: Storage) -> None:
    storage.status = 403
    with raises("bucket.forbidden", match="may not read it"):
        copy_small_files(f"gs://{BUCKET}/runs")


def test_a_bucket_that_is_not_there(storage: Storage) -> None:
    with raises("bucket.not_found", match="no such bucket"):
        copy_small_files("gs://another-bucket/runs")


def test_a_storage_that_does_not_answer(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    with raises("bucket.no_answer", match="try again later"):
        copy_small_files(f"gs://{BUCKET}/runs")
    storage.status = 503
    with raises("bucket.no_answer", match="try again later"):
        copy_small_files(f"gs://{BUCKET}/runs")


def test_without_a_login(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with raises("gcloud.login_expired", match="gcloud auth application-default login"):
        copy_small_files(f"gs://{BUCKET}/runs")


@pytest.mark.parametrize(
    "address", ["gs://", "gs:///runs", "gs://UPPER/runs", "gs://b/../../x", "gs://my-bucket/a/../../.."]
)
def test_an_address_that_is_none(storage: Storage, address: str) -> None:
    with raises("bucket.bad_address", match="expected gs://BUCKET"):
        copy_small_files(address)


def test_an_index_that_is_damaged_fetches_everything_again(storage: Storage) -> None:
    storage.put("one/run.json", "{}")
    folder = copy_small_files(f"gs://{BUCKET}")
    for damage in ("{", "[]", '{"one/run.json": "x"}'):
        (folder / bucket_files.INDEX).write_text(damage)
        storage.fetched.clear()
        copy_small_files(f"gs://{BUCKET}")
        assert storage.fetched == ["one/run.json"]
    (folder / "one/run.json").unlink()
    copy_small_files(f"gs://{BUCKET}")
    assert files(folder) == ["one/run.json"]
