"""`evaluation.samples`: the vote, pass@k, what is kept of the samples, and what eval.json says about them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main as cli
from finetune.data.prepared import load_prepared
from finetune.data.prompts import PromptTemplate
from finetune.data.records import Record
from finetune.errors import Interrupted
from finetune.evaluation import samples
from finetune.evaluation.generators.registry import GENERATORS
from finetune.evaluation.run import evaluate_run
from finetune.evaluation.samples import Vote, pass_at, sizes, vote
from finetune.evaluation.score import Row
from finetune.evaluation.statistics import mcnemar_exact
from finetune.run_folder import RunFolder
from tests.helpers.data_examples import read_jsonl
from tests.helpers.dict_generator import DictGenerator
from tests.helpers.run_examples import copy_run

# the vote


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        (["a", "b", "b"], Vote(sample=1, votes=2, counted=3, results=2)),
        (["a", "b", "b", "a"], Vote(0, 2, 4, 2)),  # as frequent: the one that came first
        (["b", "a", "a", "b"], Vote(0, 2, 4, 2)),
        ([None, None, "a"], Vote(2, 1, 1, 1)),  # errors do not vote, however many
        ([None, "b", None, "a", "a"], Vote(3, 2, 3, 2)),
        ([None, None, None], Vote(0, 0, 0, 0)),  # nothing ran: the first answer
        (["a"], Vote(0, 1, 1, 1)),
    ],
)
def test_the_most_frequent_result_wins(results: list[str | None], expected: Vote) -> None:
    assert vote(results, [f"query {number}" for number in range(len(results))]) == expected


def test_of_the_winning_result_the_most_frequent_query_is_taken() -> None:
    queries = ["SELECT 1", "SELECT 2", "SELECT a", "SELECT a", "SELECT 2 -- again"]
    assert vote(["x", "y", "y", "y", "x"], queries).sample == 2
    assert vote(["y", "y", "y", "x", "x"], ["q", "r", "s", "t", "t"]).sample == 0, "texts of other results do not count"


def test_the_vote_is_the_same_for_the_same_samples_and_follows_their_order() -> None:
    for results in itertools.product(["a", "b", None], repeat=4):
        queries = [f"q{number}" for number in range(4)]
        found = vote(results, queries)
        assert found == vote(results, queries)
        frequency = [results.count(result) if result else 0 for result in results]
        assert frequency[found.sample] == max(frequency) and found.sample == frequency.index(max(frequency))


# pass@k


@pytest.mark.parametrize(
    ("n", "c", "k"), [(n, c, k) for n in (1, 2, 4, 8) for c in range(n + 1) for k in (1, 2, 4, 8) if k <= n]
)
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_with_a_right_one(n: int, c: int, k: int) -> None:
    right = [True] * c + [False] * (n - c)
    choices = list(itertools.combinations(right, k))
    assert pass_at(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_is_given_for_1_2_4_and_all() -> None:
    assert [sizes(n) for n in (2, 3, 4, 8)] == [[1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 8]]
    assert pass_at(1000, 1, 999) == pytest.approx(0.999)


# end to end, with a model whose samples are known


Answer = Callable[[Record, int], str]


class Toy:
    """A run whose tuned model answers greedily with `greedy`, and with `drawn` as the sample of a number."""

    def __init__(self, run: RunFolder, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self._monkeypatch = run, monkeypatch
        self.records = load_prepared(data, progress=False).records("test")
        self.prompts = {PromptTemplate().render_record(record): record for record in self.records}
        self.generator = DictGenerator({})

    def speaks(self, greedy: Answer, drawn: Answer, stop_before: int | None = None) -> None:
        def sampled(prompt: str, seed: int) -> str:
            record = self.prompts[prompt]
            numbers = {samples._seed(self._seed, record.id, number): number for number in range(16)}
            return drawn(record, numbers[seed])

        tuned = {prompt: greedy(record, 0) for prompt, record in self.prompts.items()}
        self.generator = DictGenerator({}, tuned, sampled=sampled, stop_before=stop_before)
        self._monkeypatch.setitem(GENERATORS, "dict", self.generator)

    def evaluate(self, **keys: Any) -> dict[str, Any]:
        evaluation = self.run.config().evaluation
        evaluation.max_new_tokens = 100
        for key, value in {"samples": 4, **keys}.items():
            setattr(evaluation, key, value)
        self._seed = evaluation.seed
        return evaluate_run(self.run, base=False, generator="dict", evaluation=evaluation, progress=False)

    @property
    def drawn(self) -> list[tuple[str, tuple[float, int]]]:
        """The samples that were asked for since the model was loaded."""
        return [(prompt, drawn) for prompt, drawn in self.generator.model.asked if drawn]


@pytest.fixture
def toy(tiny_run: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    return Toy(copy_run(tiny_run, tmp_path / "runs"), tiny_data, monkeypatch)


def of_sample(*answers: str) -> Answer:
    """GOLD in an answer is the gold query."""
    return lambda record, number: answers[number].replace("GOLD", record.sql)


WRONG, BROKEN, PROSE = "SELECT 'wrong'", "SELECT nothing FROM nowhere", "I do not know."


@pytest.mark.parametrize(
    ("drawn", "right", "votes"),
    [
        ((WRONG, "GOLD", "GOLD;", BROKEN), True, 2),  # by their results: the texts differ
        (("GOLD", WRONG, WRONG, "GOLD"), True, 2),
        ((WRONG, "GOLD", "GOLD", WRONG), False, 2),
        ((BROKEN, BROKEN, PROSE, "GOLD"), True, 1),
        (("GOLD", WRONG, WRONG, WRONG), False, 3),
        ((BROKEN, PROSE, BROKEN, BROKEN), False, 0),
    ],
)
def test_the_vote_is_over_results_and_errors_do_not_vote(
    toy: Toy, drawn: Sequence[str], right: bool, votes: int
) -> None:
    toy.speaks(of_sample(WRONG), of_sample(*drawn))
    found = toy.evaluate()["models"]["tuned"]["samples"]
    assert found["vote"]["correct"] == (6 if right else 0)
    assert found["pass_at"]["correct"] == (6 if "GOLD" in " ".join(drawn) else 0)
    lines = read_jsonl(toy.run.path / found["vote"]["rows"])
    assert [line["votes"] for line in lines] == [votes] * 6
    assert found["no_result"] == (0 if votes else 6)
    if not votes:
        assert {line["prediction"] for line in lines} == {BROKEN}, "the first answer"
    assert lines[0]["samples"][0] == {WRONG: "wrong_rows", BROKEN: "sql_error", "GOLD": "correct"}[drawn[0]]


def test_greedy_vote_and_pass_stand_side_by_side_with_gains_and_costs(toy: Toy) -> None:
    ids = [record.id for record in toy.records]

    def greedy(record: Record, _: int) -> str:
        return record.sql if record.id in ids[:3] else WRONG

    def drawn(record: Record, number: int) -> str:
        right = {ids[0]: 4, ids[1]: 1, ids[2]: 3, ids[3]: 3, ids[4]: 1}.get(record.id, 0)
        return record.sql if number < right else f"SELECT 'wrong', {number if right == 1 else 0}"

    toy.speaks(greedy, drawn)
    result = toy.evaluate(temperature=0.7, seed=5)
    tuned = result["models"]["tuned"]
    found = tuned["samples"]
    assert json.loads(toy.run.eval_json.read_text()) == json.loads(json.dumps(result))
    assert (found["n"], found["temperature"], found["seed"]) == (4, 0.7, 5)
    # the vote: r1 and r4 have four results, once each, and the first one is right
    assert (tuned["correct"], found["vote"]["correct"], found["pass_at"]["correct"]) == (3, 5, 5)
    rates = [4 / 4, 1 / 4, 3 / 4, 3 / 4, 1 / 4, 0]
    assert found["pass_at_k"]["1"] == pytest.approx(sum(rates) / 6)
    assert found["pass_at_k"]["4"] == pytest.approx(found["pass_at"]["execution_accuracy"]) == pytest.approx(5 / 6)
    assert list(found["pass_at_k"]) == ["1", "2", "4"]
    gain = found["gain"]["vote"]
    assert gain["gain"] == {"won": 2, "lost": 0, "both": 3, "neither": 1}
    assert gain["exact_p"] == mcnemar_exact(2, 0) == 0.5
    assert set(gain["gain_interval95"]) == {"questions", "databases"}
    cost = found["cost"]
    (file,) = [
        path for path in (toy.run.path / "eval" / "answers").glob("tuned-samples-*") if "attempts" not in path.name
    ]
    rows = read_jsonl(file)[1:]
    assert len(rows) == 24
    assert cost["new_tokens"] == found["vote"]["new_tokens"] == sum(row["new_tokens"] for row in rows) > 4 * 6
    assert cost["usd_basis"] == "budget.usd_per_hour of the config" and cost["usd"] is not None
    assert tuned["new_tokens"] == sum(row["new_tokens"] for row in read_jsonl(toy.run.eval_rows("tuned")))
    assert found["unanimous"] == 2, "r0, and r5 where all are wrong alike"
    chosen = [
        Row(**{key: line[key] for key in Row.__dataclass_fields__})
        for line in read_jsonl(toy.run.eval_rows("tuned-vote"))
    ]
    assert [row.id for row in chosen] == ids and sum(row.verdict == "correct" for row in chosen) == 5


def test_without_the_key_nothing_is_sampled(toy: Toy) -> None:
    toy.speaks(of_sample("GOLD"), of_sample())
    assert "samples" not in toy.evaluate(samples=1)["models"]["tuned"]
    assert not toy.run.eval_rows("tuned-vote").exists()


# seeds, and what is kept


def test_each_sample_has_a_seed_of_its_own_that_does_not_depend_on_the_others(toy: Toy) -> None:
    toy.speaks(of_sample("GOLD"), lambda record, number: "GOLD")
    asked = {}
    for key, keys in {"four": {}, "two": {"samples": 2}, "sample": {"max_questions": 3}, "other": {"seed": 7}}.items():
        toy.evaluate(**keys)
        asked[key] = toy.drawn
    seeds = [seed for _, (_, seed) in asked["four"]]
    assert len(seeds) == 24 == len(set(seeds)) and all(0 <= seed < 2**31 for seed in seeds)
    assert set(asked["two"]) < set(asked["four"]) and set(asked["sample"]) < set(asked["four"])
    assert not {seed for _, (_, seed) in asked["other"]} & set(seeds)


def test_samples_are_kept_and_another_temperature_seed_or_number_finds_nothing(toy: Toy) -> None:
    toy.speaks(of_sample("GOLD"), lambda record, number: record.sql)
    first = toy.evaluate()
    toy.generator.model.asked.clear()
    again = toy.evaluate()
    for result in (first, again):
        result["models"]["tuned"].pop("judging")  # its seconds
    assert toy.generator.model.asked == [] and again["models"] == first["models"]
    assert toy.evaluate(rule="strict")["models"]["tuned"]["samples"]["vote"]["correct"] == 6
    assert toy.generator.model.asked == [] and len(toy.generator.adapters) == 1, "another rule only judges again"
    for keys in ({"temperature": 0.5}, {"seed": 1}, {"samples": 3}):
        toy.evaluate(**keys)
        assert len(toy.drawn) == 6 * keys.get("samples", 4), keys
        assert {temperature for _, (temperature, _) in toy.drawn} == {keys.get("temperature", 0.8)}
        assert len(toy.generator.model.asked) == len(toy.drawn), "the greedy answers are kept"


@pytest.mark.parametrize("stop_before", [7, 6 + 13, 6 + 23])
def test_an_evaluation_killed_among_the_samples_ends_as_one_that_was_not(
    toy: Toy, tiny_run: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_before: int
) -> None:
    def drawn(record: Record, number: int) -> str:
        return [record.sql, WRONG, f"SELECT '{record.id}'", BROKEN][(number + int(record.id[1:])) % 4]

    toy.speaks(of_sample(WRONG), drawn, stop_before)
    with pytest.raises(Interrupted, match=rf"{stop_before - 6} of 24 answers of the tuned model \(samples\)") as told:
        toy.evaluate()
    assert told.value.resumable and not toy.run.eval_json.exists()
    toy.speaks(of_sample(WRONG), drawn)
    resumed = toy.evaluate()
    assert len(toy.generator.model.asked) == 24 - (stop_before - 6)

    other = Toy(copy_run(tiny_run, tmp_path / "others"), tiny_data, monkeypatch)
    other.speaks(of_sample(WRONG), drawn)
    whole = other.evaluate()
    for key in ("vote", "pass_at", "pass_at_k", "gain"):
        assert resumed["models"]["tuned"]["samples"][key] == whole["models"]["tuned"]["samples"][key]
    assert (
        read_jsonl(toy.run.eval_rows("tuned-vote"))[3]["samples"]
        == read_jsonl(other.run.eval_rows("tuned-vote"))[3]["samples"]
    )


def test_a_temperature_of_zero_is_refused_with_the_reason(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("0", "-1", ".nan", ".inf", "11"):
        assert cli.main(["evaluate", str(tiny_run), "evaluation.samples=8", f"evaluation.temperature={value}"]) == 2
        assert "evaluation.temperature: expected 0.01 to 10" in capsys.readouterr().err
    for key in ("samples=0", "retries=-1", "retries=11", "seed=-1", "samples=1025"):
        assert cli.main(["evaluate", str(tiny_run), f"evaluation.{key}"]) == 2
        assert f"evaluation.{key.partition('=')[0]}: expected" in capsys.readouterr().err
