"""The sentences on how certain a score is, and the figures in them."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from finetune.evaluation import statistics
from finetune.report.certainty import certainty
from finetune.report.render import headline
from finetune.report.source import read_run
from tests.helpers.errors import raises
from tests.helpers.report_fixtures import build_run, change, rows, write_evaluation
from tests.helpers.scored_runs import scored_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return build_run(tmp_path / "runs" / "demo")


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (3, 3), (9, 1), (2, 10), (7, 4)])
def test_mcnemar_p_is_the_share_of_coin_tosses_at_least_as_uneven(won: int, lost: int) -> None:
    tosses = list(product((0, 1), repeat=won + lost))
    as_uneven = [toss for toss in tosses if abs(2 * sum(toss) - won - lost) >= abs(won - lost)]
    assert statistics.mcnemar_exact(won, lost) == pytest.approx(len(as_uneven) / len(tosses))
    assert 0 <= statistics.mcnemar_exact(1000 * won, 1000 * lost) <= 1


def test_the_paired_interval_is_that_of_agresti_and_min() -> None:
    low, high = statistics.paired_interval(won=41, lost=0, questions=150)
    # by hand: (42 - 1) / 152 -+ 1.96 * sqrt(42 - 41^2 / 152) / 152
    assert (round(low, 4), round(high, 4)) == (0.198, 0.3415)
    assert statistics.paired_interval(0, 41, 150) == pytest.approx((-high, -low))


def test_no_interval_goes_beyond_what_a_gain_can_be() -> None:
    low, high = statistics.paired_interval(40, 0, 40)
    assert 0.8 < low < high == 1.0
    assert statistics.paired_interval(0, 40, 40) == (-1.0, -low)


def test_a_gain_that_chance_may_explain_is_reported_as_such(run_dir: Path) -> None:
    assert "Chance alone hardly explains" in " ".join(certainty(read_run(run_dir)))
    change(run_dir / "eval.json", gain={"won": 6, "lost": 3, "both": 40, "neither": 101})
    said = " ".join(certainty(read_run(run_dir)))
    assert "won 6 questions and lost 3; 40 were right and 101 wrong" in said
    assert "+2.0 points, 95% interval -2.1 to +6.0 over questions (paired, Agresti-Min), +14.0 to +42.0 over" in said
    assert "probability 0.51" in said and "Chance alone may explain" in said


def test_the_bootstrap_draws_whole_databases() -> None:
    """Two databases, one always right and one always wrong: of the four draws one is all wrong and one all right."""
    assert statistics.bootstrap_by_database([(0, 10), (10, 10)]) == (0.0, 1.0)
    assert statistics.bootstrap_by_database([(5, 10)] * 7) == (0.5, 0.5), "equal databases leave nothing to chance"
    assert statistics.bootstrap_by_database([(3, 10)]) is None is statistics.bootstrap_by_database([])
    spread = [(correct, 50) for correct in (5, 10, 12, 15, 18, 20, 24, 30, 40)]
    low, high = statistics.bootstrap_by_database(spread) or (0, 0)
    assert (low, high) == statistics.bootstrap_by_database(spread), "seeded"
    wilson = statistics.wilson_interval(sum(correct for correct, _ in spread), 450)
    assert low < wilson[0] < wilson[1] < high


def test_its_quantiles_are_those_of_every_possible_draw() -> None:
    databases = [(1, 4), (3, 5), (6, 6), (0, 3)]
    draws = sorted(
        sum(points for points, _ in drawn) / sum(questions for _, questions in drawn)
        for drawn in product(databases, repeat=len(databases))
    )
    exact = draws[round(0.025 * len(draws))], draws[-1 - round(0.025 * len(draws))]
    assert statistics.bootstrap_by_database(databases) == pytest.approx(exact, abs=0.03)


def test_both_intervals_are_given_with_what_each_supports(run_dir: Path) -> None:
    source = read_run(run_dir)
    said = certainty(source)
    assert (
        "over questions (Wilson): this supports a claim about more questions of this kind on these 6 databases."
        in said[0]
    )
    assert "bootstrap of the 6 databases): this supports a claim about other databases" in said[1]
    assert "with so few of them the interval is too narrow" in said[1]
    change_of = next(sentence for sentence in said if sentence.startswith("The change is"))
    assert "over questions (paired, Agresti-Min), " in change_of and " over databases (bootstrap" in change_of


@pytest.mark.parametrize(("databases", "narrow"), [(9, True), (10, False)])
def test_the_headline_leaves_out_an_interval_over_databases_that_is_too_narrow(
    tmp_path: Path, databases: int, narrow: bool
) -> None:
    """And only where the sentence below says that it is."""
    source = read_run(scored_run(tmp_path, "demo", right=0.5, databases=databases))
    assert ("with so few of them the interval is too narrow" in certainty(source)[1]) == narrow
    assert " over questions" in headline(source) and (" over databases" in headline(source)) != narrow
    assert f"bootstrap of the {databases} databases" in certainty(source)[1], "it stands there, with its reserve"


def test_a_very_small_probability_is_not_zero(run_dir: Path) -> None:
    change(run_dir / "eval.json", gain={"won": 9, "lost": 0, "both": 100, "neither": 41})
    assert any("would occur with probability 0.0039 (" in said for said in certainty(read_run(run_dir)))
    change(run_dir / "eval.json", gain={"won": 3332, "lost": 0, "both": 0, "neither": 1668})
    assert any("would occur with probability < 0.0001 (" in said for said in certainty(read_run(run_dir)))


def test_databases_that_training_had_seen_weaken_the_claim(run_dir: Path) -> None:
    change(run_dir / "run.json", config={"data": {"split_by": "question"}})
    assert "were trained on (data.split_by: question)" in certainty(read_run(run_dir))[1]
    change(run_dir / "run.json", config={"data": {"split_by": "database"}})
    assert "trained on" not in certainty(read_run(run_dir))[1]


def test_an_interval_over_databases_that_includes_no_gain_says_so(run_dir: Path) -> None:
    change(run_dir / "eval.json", gain_interval95={"databases": [-0.02, 0.3]})
    assert any(
        "-2.0 to +30.0 over databases (bootstrap; it includes 0)" in said for said in certainty(read_run(run_dir))
    )
    change(run_dir / "eval.json", gain_interval95={"databases": None})
    assert not any("+30.0" in said for said in certainty(read_run(run_dir)))
    change(run_dir / "eval.json", gain_interval95={"databases": [1, "x"]})
    with raises("report.bad_input", match="gain_interval95.databases is not a pair of numbers"):
        read_run(run_dir)


def test_one_database_says_nothing_about_others(run_dir: Path) -> None:
    base, tuned = rows(40)
    for row in base + tuned:
        row["db_id"] = "only"
    write_evaluation(run_dir, base=base, tuned=tuned)
    said = certainty(read_run(run_dir))
    assert "on this database." in said[0] and "nothing can be said about another one" in said[1]
    assert not any("bootstrap of the" in sentence for sentence in said)


def test_questions_that_share_their_gold_query_are_counted(run_dir: Path) -> None:
    for path in (run_dir / "eval").iterdir():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(json.dumps(line | {"gold_sha256": str(number % 60)}) + "\n" for number, line in enumerate(lines))
        )
    assert any("150 questions have 60 different gold queries" in sentence for sentence in certainty(read_run(run_dir)))


def test_without_the_base_model_only_the_accuracy_is_judged(run_dir: Path) -> None:
    write_evaluation(run_dir, base=None, tuned=rows(150)[1])
    said = certainty(read_run(run_dir))
    assert said and not any("Tuning won" in sentence for sentence in said)
