"""Whether two answer generators give a trained run the same verdicts, and why not where they do not.

    python -m benchmarks.generation FOLDER --run runs/RUN

Scores the run with each generator, in copies in FOLDER, and compares question by question. Greedy decoding takes the likeliest
token; two programs that add the same numbers in another order differ where the two likeliest are as likely as each other, as far
as the dtype can tell. For each answer that differs, the model computes both once more, up to the first token that differs: the
distance of their logits is given in units in the last place of a logit in the dtype (`ulps`). A handful is rounding; more is not.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from finetune.data.prompts import load_template
from finetune.evaluation.generators.registry import generator_named
from finetune.evaluation.questions import evaluation_set
from finetune.evaluation.run import evaluate_run
from finetune.models.device import choose_device
from finetune.models.load import load_adapter, load_base, load_tokenizer
from finetune.run_folder import RunFolder
from finetune.tokens import encode_prompts

BITS = {"bfloat16": 8, "float16": 11, "float32": 24}
"""Of a significand."""
MOST_SHOWN = 20


def agreement(run: Path, folder: Path, generators: list[str]) -> dict[str, Any]:
    """Scores and seconds of each generator, the share of equal verdicts of the last with the first, and each difference."""
    if len(generators) != 2:
        raise SystemExit("--generators: expected two, such as vllm,hf")
    found: dict[str, Any] = {}
    rows: list[dict[str, list[dict[str, Any]]]] = []
    for name in generators:
        copy = RunFolder(folder / "agreement" / name / run.name)
        if not copy.path.is_dir():
            shutil.copytree(run, copy.path, ignore=shutil.ignore_patterns("checkpoints", "eval*", "tensorboard"))
        started = time.monotonic()
        result = evaluate_run(copy, generator=name, progress=False)
        found[name] = {"seconds_all": round(time.monotonic() - started, 1)} | {
            kind: {"execution_accuracy": score["execution_accuracy"], "seconds": score["seconds"]}
            for kind, score in result["models"].items()
        }
        rows.append({kind: _rows(copy.eval_rows(kind)) for kind in result["models"]})
    first, second = rows
    explained = _Explained(RunFolder(run))
    for kind in first:
        pairs = list(zip(first[kind], second[kind], strict=True))
        other = [(mine, theirs) for mine, theirs in pairs if mine["answer"] != theirs["answer"]]
        verdicts = [pair for pair in other if pair[0]["verdict"] != pair[1]["verdict"]]
        found[kind] = {
            "questions": len(pairs),
            "same_answer": round(1 - len(other) / len(pairs), 4),
            "same_verdict": round(1 - len(verdicts) / len(pairs), 4),
            "ulps_of_differing_answers": [explained.ulps(*pair, kind) for pair in other],
            "differing_verdicts": [explained.shown(*pair, kind) for pair in verdicts[:MOST_SHOWN]],
        }
    return found


class _Explained:
    """What the model itself says about two answers to one prompt."""

    def __init__(self, run: RunFolder) -> None:
        config = run.config()
        questions = evaluation_set(config, lambda _: generator_named("hf"), load_template(run.adapter))
        self._prompts = {record.id: prompt for record, prompt in zip(questions.records, questions.prompts, strict=True)}
        self._tokenizer: Any = load_tokenizer(config.model)
        device = choose_device(config.model.torch_dtype)
        base = load_base(config.model, config.quantization, device, dequantize=True)
        self._model: Any = load_adapter(base, run.adapter, config.lora, config.model).eval()
        self._bits = BITS[device.dtype_name]

    @torch.inference_mode()
    def ulps(self, mine: dict[str, Any], theirs: dict[str, Any], kind: str) -> float | None:
        """The distance of the logits of the first tokens that differ; None if one answer begins with the other."""
        first, second = (
            self._tokenizer(row["answer"], add_special_tokens=False)["input_ids"] for row in (mine, theirs)
        )
        place = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        if place is None:
            return None
        [prompt] = encode_prompts(self._tokenizer, [self._prompts[mine["id"]]])
        ids = torch.tensor([[*prompt, *first[:place]]], device=self._model.device)
        if kind == "base":
            with self._model.disable_adapter():
                logits = self._model(ids).logits[0, -1].float()
        else:
            logits = self._model(ids).logits[0, -1].float()
        one, other = float(logits[first[place]]), float(logits[second[place]])
        unit = 2.0 ** (math.floor(math.log2(max(abs(one), abs(other), 1e-6))) - self._bits + 1)
        return round(abs(one - other) / unit, 2)

    def shown(self, mine: dict[str, Any], theirs: dict[str, Any], kind: str) -> dict[str, Any]:
        return {
            "id": mine["id"], "verdicts": [mine["verdict"], theirs["verdict"]], "ulps": self.ulps(mine, theirs, kind),
            "answers": [mine["answer"][:300], theirs["answer"][:300]],
        }  # fmt: skip


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
