"""Whether two answer generators give a trained run the same verdicts, and why not where they do not.

    python -m benchmarks.generation_agreement runs/HF runs/VLLM     # two scored copies of a run: nothing is asked again
    python -m benchmarks.generation FOLDER --run runs/RUN           # scores the run with each generator, in copies in FOLDER

Greedy decoding takes the likeliest token; two programs that add the same numbers in another order differ where the two likeliest
are as likely as each other, as far as the dtype can tell. For each answer that differs, the model computes both once more in
float32, up to the first token that differs: `distance` is that of the logits of the two tokens, `ulps` the same in units in the
last place of a logit in the dtype of the answers (the coarser of the two). `tie`: the two are the best two there, and their
distance is what rounding makes (TIE_ULPS). Where one answer goes on after the end of the other, that one's token is the end.

What was answered is read from eval/*.jsonl as text and cut into tokens again, which need not be the tokens that were generated.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.data.prompts import load_template
from finetune.errors import EXIT_USER_ERROR, UserError
from finetune.evaluation.generators.registry import generator_named
from finetune.evaluation.questions import evaluation_set
from finetune.evaluation.run import evaluate_run
from finetune.models.answering import answering_device
from finetune.models.load import load_adapter, load_base, load_tokenizer
from finetune.run_folder import RunFolder
from finetune.runtime.console import escape_unprintable
from finetune.tokens import encode_prompts, stop_ids

BITS = {"bfloat16": 8, "float16": 11, "float32": 24}
"""Of a significand."""
TIE_ULPS = {"bfloat16": 6.0, "float16": 6.0, "float32": 64.0}
"""Measured on a CPU with SmolLM2-135M at 3,495 places of text: the distance of the two best logits is off by 0.4 units in the
median and 5.4 at most in bfloat16 (against float32), by 2.5 and 20.5 in float32 (against float64). There what answers is off and
what explains, too. float16: as bfloat16, not measured."""
MOST_SHOWN = 20
SHOWN_CHARACTERS = 300
KINDS = ("base", "tuned")


def main() -> int:
    escape_unprintable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="a scored run; the model that explains is this one's")
    parser.add_argument("second", type=Path, help="the same run, scored otherwise")
    arguments = parser.parse_args()
    try:
        found = compared(RunFolder(arguments.first), RunFolder(arguments.second))
    except UserError as error:
        print(f"error: {error}")
        return EXIT_USER_ERROR
    print(json.dumps(found, indent=1))
    return 0


def agreement(run: Path, folder: Path, generators: list[str]) -> dict[str, Any]:
    """Scores and seconds of each generator, the share of equal verdicts of the last with the first, and each difference."""
    if len(generators) != 2:
        raise SystemExit("--generators: expected two, such as vllm,hf")
    found: dict[str, Any] = {}
    copies = []
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
        copies.append(copy)
    return found | compared(*copies)


def compared(first: RunFolder, second: RunFolder) -> dict[str, Any]:
    """For each model that both have scored: the shares of equal answers and verdicts, and every differing verdict explained.

    Raises SystemExit if a run is not scored, or if the two were asked other questions.
    """
    scores = [_scores(run) for run in (first, second)]
    explained: _Explained | None = None
    found: dict[str, Any] = {}
    for kind in KINDS:
        if not all(kind in score for score in scores):
            continue
        mine, theirs = (_rows(run.eval_rows(kind)) for run in (first, second))
        if [row["id"] for row in mine] != [row["id"] for row in theirs]:
            raise SystemExit(f"{first.path} and {second.path} have rows of other questions ({kind}); score both again")
        pairs = list(zip(mine, theirs, strict=True))
        other = [pair for pair in pairs if pair[0]["answer"] != pair[1]["answer"]]
        dtypes = [score[kind]["dtype"] for score in scores]
        explained = explained or (_Explained(first) if other else None)
        differences = [explained.difference(*pair, kind, dtypes) for pair in other] if explained else []
        verdicts = [entry for entry in differences if len(set(entry["verdicts"])) == 2]
        found[kind] = {
            "questions": len(pairs),
            "dtypes": dtypes,
            "same_answer": round(1 - len(other) / len(pairs), 4),
            "same_verdict": round(1 - len(verdicts) / len(pairs), 4),
            "differing_answers": len(other),
            "ties_of_them": sum(entry["tie"] for entry in differences),
            "ulps_of_differing_answers": [entry["ulps"] for entry in differences],
            "ties_of_differing_verdicts": f"{sum(entry['tie'] for entry in verdicts)} of {len(verdicts)}",
            "differing_verdicts": verdicts[:MOST_SHOWN],
        }
    return found


class _Explained:
    """What a run's own model says, in float32, about two answers to one prompt."""

    def __init__(self, run: RunFolder) -> None:
        config = run.config()
        config.evaluation.dtype = "float32"
        questions = evaluation_set(config, lambda _: generator_named("hf"), load_template(run.adapter))
        self._prompts = {record.id: prompt for record, prompt in zip(questions.records, questions.prompts, strict=True)}
        self._tokenizer: Any = load_tokenizer(config.model)
        device = answering_device(config)
        base = load_base(config.model, config.quantization, device, dequantize=True)
        self._model: Any = load_adapter(base, run.adapter, config.lora, config.model).eval()
        self._ends = stop_ids(self._tokenizer, self._model)

    def difference(
        self, mine: dict[str, Any], theirs: dict[str, Any], kind: str, dtypes: Sequence[str]
    ) -> dict[str, Any]:
        """The first token that differs, the two best there, and whether rounding in `dtypes` decides between the two answers."""
        rows = (mine, theirs)
        first, second = (self._tokenizer(row["answer"], add_special_tokens=False)["input_ids"] for row in rows)
        shared = zip(first, second, strict=False)
        place = next((n for n, (a, b) in enumerate(shared) if a != b), min(len(first), len(second)))
        logits = self._logits(mine["id"], first[:place], kind)
        tokens = [self._token(ids, place, logits) for ids in (first, second)]
        return {
            "id": mine["id"],
            "verdicts": [row["verdict"] for row in rows],
            "answers": [row["answer"][:SHOWN_CHARACTERS] for row in rows],
            "token": place,
            "tokens": [self._tokenizer.decode([token]) for token in tokens],
            "best": [[self._tokenizer.decode([token]), round(float(logits[token]), 6)] for token in best_two(logits)],
            **closeness(logits, tokens, dtypes),
        }

    @torch.inference_mode()
    def _logits(self, question: str, answer: list[int], kind: str) -> torch.Tensor:
        """Those after the prompt and the beginning of an answer: (vocabulary,), float32."""
        [prompt] = encode_prompts(self._tokenizer, [self._prompts[question]])
        ids = torch.tensor([[*prompt, *answer]], device=self._model.device)
        if kind == "base":
            with self._model.disable_adapter():
                logits: torch.Tensor = self._model(ids).logits[0, -1]
        else:
            logits = self._model(ids).logits[0, -1]
        return logits.float().cpu()

    def _token(self, ids: list[int], place: int, logits: torch.Tensor) -> int:
        """The token at a place of an answer; where it has ended, the likeliest of those that end it."""
        return ids[place] if place < len(ids) else max(self._ends, key=lambda end: float(logits[end]))


def best_two(logits: torch.Tensor) -> list[int]:
    found: list[int] = logits.topk(2).indices.tolist()
    return found


def closeness(logits: torch.Tensor, tokens: Sequence[int], dtypes: Sequence[str]) -> dict[str, Any]:
    """How near to each other two tokens are, and the best two, by logits of (vocabulary,) in float32. dtypes: of the answers."""
    (one, other), (first, second) = ([float(logits[token]) for token in pair] for pair in (tokens, best_two(logits)))
    dtype = min(dtypes, key=BITS.__getitem__)
    unit = 2.0 ** (math.floor(math.log2(max(abs(one), abs(other), 1e-6))) - BITS[dtype] + 1)
    ulps = abs(one - other) / unit
    return {
        "distance": round(abs(one - other), 6),
        "distance_of_best": round(first - second, 6),
        "ulps": round(ulps, 2),
        "tie": ulps <= TIE_ULPS[dtype] and min(one, other) >= second,
    }


def _scores(run: RunFolder) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(run.eval_json.read_text(encoding="utf-8"))["models"]
    except (OSError, ValueError, LookupError) as error:
        raise SystemExit(
            f"{run.eval_json}: not there, or not a score ({error}); run `finetune evaluate` first"
        ) from None
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    raise SystemExit(main())
