"""The printed plan: every figure names its source, and the JSON holds the same numbers as the table."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from finetune.cloud.catalog.csv_file import read_prices
from finetune.cloud.catalog.offers import Catalog, load_catalog
from finetune.cloud.plan.plan import Plan
from finetune.cloud.plan.table import HEADER, SHOWN, render, to_json
from finetune.estimate.speed import training_speed
from finetune.machine.gpus import GPUS, MACHINES
from finetune.machine.price import Ceilings
from finetune.models.architectures import SHAPES
from tests.helpers.catalog_fixture import CATALOG, lay_out_catalog
from tests.helpers.plan_examples import ALL, plan_of, priced, run_config, with_a_wrong_price, write_manifest

ROW = re.compile(
    r"(?P<place>\d+\.|-) +(?P<gpu>\S+) +(?P<kind>spot|on-demand) +(?:(?P<zone>[a-z]+-\S+) +)?"
    r"(?P<needed>[\d.]+) of (?P<there>[\d.]+) +(?P<speed>[\d,]+)(?P<estimated> est\.)?"
    r"(?: +(?P<hours>[\d.]+) +(?P<hourly>[\d.]+) +(?P<usd>[\d.]+)(?: +(?P<lost>[\d.]+))?)? +(?P<verdict>[a-z$\d].*)"
)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Five chosen rows, two rows that exceed a ceiling each, and T4 spot, which is not sold."""
    catalog = priced(tmp_path, **{**ALL, "T4": (0.4, "")})
    return plan_of(run_config(), catalog, Ceilings(run_usd=0.9, usd_per_hour=2.9))


def table_rows(text: str) -> list[dict[str, str | None]]:
    lines = text.split("\n\n")[1].splitlines()[1:]
    found = [ROW.fullmatch(line) for line in lines]
    assert all(found), lines
    return [match.groupdict() for match in found if match]


def as_json(plan: Plan) -> dict[str, Any]:
    """The JSON, serialised and parsed strictly."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    value: dict[str, Any] = json.loads(json.dumps(to_json(plan)), parse_constant=refuse)
    return value


def test_table_and_json_hold_the_same_numbers_in_the_same_order(plan: Plan) -> None:
    printed, values = table_rows(render(plan, "c.yaml")), as_json(plan)["rows"]
    assert len(printed) == len(values) == 8
    assert [line["place"] for line in printed] == ["1.", "2.", "3.", "4.", "5.", *"---"]
    for line, value, row in zip(printed, values, plan.rows, strict=True):
        assert (line["gpu"], line["kind"] == "spot", line["zone"]) == (value["gpu"], value["spot"], value["zone"])
        assert float(line["needed"] or 0) == pytest.approx(value["memory_gib"]["needed"], abs=0.056)
        assert float(line["there"] or 0) == value["memory_gib"]["there"] == row.on_gpu.gpu.memory_gib
        assert float((line["speed"] or "").replace(",", "")) == pytest.approx(value["tokens_per_second"], abs=0.56)
        assert bool(line["estimated"]) == (value["tokens_per_second_basis"] == "estimated")
        assert value["chosen"] == row.chosen == (line["verdict"] == "ok") == (line["place"] != "-")
        assert line["verdict"] == ("; ".join(value["refusals"]) or "ok")
        assert value["machine"] == MACHINES[row.on_gpu.name].machine
        if row.cost is None:
            assert {value[name] for name in ("zone", "usd_per_hour", "hours", "usd", "lost_usd")} == {None}
            assert line["hours"] is line["hourly"] is line["usd"] is None
            continue
        for name, digits, key in (("hours", 1, "hours"), ("hourly", 3, "usd_per_hour"), ("usd", 2, "usd")):
            assert float(line[name] or "nan") == pytest.approx(value[key], abs=0.501 * 10**-digits)
        assert value["usd"] == pytest.approx(row.cost.usd, abs=0.0006)
        assert sum(value["usd_per_hour_parts"].values()) == pytest.approx(value["usd_per_hour"], abs=2e-5)
        assert (line["lost"] is not None) == row.spot
        assert float(line["lost"] or 0) == pytest.approx(value["lost_usd"], abs=0.006)


def test_columns_are_aligned_with_their_headers(plan: Plan) -> None:
    header, *lines = render(plan, "c.yaml").split("\n\n")[1].splitlines()
    for name in filter(None, HEADER):
        start = header.index(name)
        left, right = ({line[at : at + 1] or " " for line in lines} for at in (start - 1, start + len(name)))
        assert (left if name in ("GPU", "bought as", "best zone") else right) == {" "}, name


def test_the_order_ceilings_and_assumptions_are_printed(plan: Plan) -> None:
    text = render(plan, "configs/c.yaml")
    chosen = [f"{row.on_gpu.gpu.name} {'spot' if row.spot else 'on-demand'}" for row in plan.rows if row.chosen]
    assert f"\norder: {', then '.join(chosen)}\n" in text
    assert "\nceilings: $2.9 an hour, $0.9 for the run\n" in text
    assert text.startswith("configs/c.yaml: 4,000 examples x 300 tokens, 250 optimizer steps, 1.20 M training tokens\n")
    assert (
        "with 12 min of boot and set-up (assumed" in text
        and "assumed 0.05 an hour (plan.spot_preemptions_per_hour)" in text
    )
    values = as_json(plan)
    assert values["ceilings"] == {"usd_per_hour": 2.9, "run_usd": 0.9, "hours": None}
    assert values["assumptions"]["spot_preemptions_per_hour"] == 0.05
    assert values["run"] | {"basis": ""} == {
        "records": 4000, "mean_tokens": 300.0, "steps": 250, "tokens": 1_200_000, "basis": ""
    }  # fmt: skip


def test_a_plan_that_refuses_every_machine_says_so(tmp_path: Path) -> None:
    plan = plan_of(run_config(), priced(tmp_path, **ALL), Ceilings(hours=0.001))
    text = render(plan, "c.yaml")
    assert "\norder: none; every machine is refused, for the reason in its row\n" in text
    assert "\nceilings: 0.001 hours\n" in text
    assert [line["place"] for line in table_rows(text)] == ["-"] * 8
    assert not any(row["chosen"] for row in as_json(plan)["rows"])


def test_without_ceilings_none_are_printed(tmp_path: Path) -> None:
    text = render(plan_of(run_config(), priced(tmp_path, **ALL)), "c.yaml")
    assert "\nceilings: none (those of a task hold at its launch)\n" in text


# where each figure comes from


def test_memory_hours_and_dollars_are_labelled_estimated(plan: Plan) -> None:
    notes = render(plan, "c.yaml").split("\n\n")[2]
    assert re.search(r"^memory: estimated, with the settings that the run will choose \(.*--memory.*\):$", notes, re.M)
    assert re.search(r"^hours and dollars: estimated, expected values,$", notes, re.M)


def test_the_chosen_settings_of_each_gpu_are_printed_once(plan: Plan, tmp_path: Path) -> None:
    lines = [line for line in render(plan, "c.yaml").splitlines() if "micro-batches of up to" in line]
    assert [line.split(":")[0].strip() for line in lines] == list(
        dict.fromkeys(row.on_gpu.gpu.name for row in plan.rows)
    )
    for row, value in zip(plan.rows, as_json(plan)["rows"], strict=True):
        chosen = row.on_gpu.micro_batch_config
        assert chosen and value["step"] == {
            "layers": "fused", "tokens": chosen.tokens, "uncheckpointed_layers": chosen.uncheckpointed_layers,
            "dequantized_layers": chosen.dequantized_layers,
        }  # fmt: skip
        said = f"{row.on_gpu.gpu.name}: micro-batches of up to {chosen.tokens:,} tokens; {chosen.uncheckpointed_layers} layers "
        said += "not recomputed, "
        assert any(line.startswith(f"  {said}{chosen.dequantized_layers} dequantized") for line in lines)
    hf = plan_of(run_config(training={"kernels": "hf"}), priced(tmp_path / "other", **ALL))
    assert "  T4: Hugging Face layers, padded micro-batches" in render(hf, "c.yaml").splitlines()
    assert as_json(hf)["rows"][0]["step"] == {"layers": "hf"}


def test_each_speed_says_whether_it_is_measured_or_estimated_and_from_what(plan: Plan) -> None:
    h100 = GPUS["H100"]
    speed = training_speed(
        h100, SHAPES["mistralai/Mistral-7B-v0.1"], micro_batch_size=4, mean_tokens=300, checkpointing=True
    )
    assert speed.basis == "measured"
    first = plan.rows[0]
    measured = replace(first, on_gpu=replace(first.on_gpu, gpu=h100, speed=speed))
    text = render(replace(plan, rows=(measured, *plan.rows[1:])), "c.yaml")
    lines = table_rows(text)
    assert [bool(line["estimated"]) for line in lines] == [False] + [True] * 7
    assert lines[0]["speed"] == "1,497"
    sources = text.split("tokens/s:\n")[1].splitlines()
    assert sources[0] == f"  H100: {speed.source}" and re.search(r"\b20\d\d-\d\d\b", sources[0])
    others = dict.fromkeys(row.on_gpu.gpu.name for row in plan.rows[1:])
    assert [source.split(":")[0].strip() for source in sources[1:]] == list(others)
    assert all(": estimated from " in source and re.search(r"\b20\d\d-\d\d\b", source) for source in sources[1:])
    assert as_json(replace(plan, rows=(measured,)))["rows"][0]["tokens_per_second_basis"] == "measured"


def test_tokens_are_labelled_counted_or_assumed(tmp_path: Path) -> None:
    catalog = priced(tmp_path, **ALL)
    assert re.search(r"^tokens: .*\(plan\.records\), 300 tokens each \(plan\.mean_tokens\); not counted, because no/such/folder",
                     render(plan_of(run_config(), catalog), "c.yaml"), re.M)  # fmt: skip
    manifest = write_manifest(tmp_path / "prepared")
    counted = plan_of(run_config(data={"output_dir": str(tmp_path / "prepared")}), catalog)
    assert f"\ntokens: counted in {manifest}\n" in render(counted, "c.yaml")
    assert as_json(counted)["run"]["basis"] == f"counted in {manifest}"


def test_prices_are_printed_with_the_dates_of_the_catalog_and_the_disk_price(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKY_RUNTIME_DIR", str(tmp_path))
    fetched = datetime.now(UTC) - timedelta(days=3)
    lay_out_catalog(tmp_path, fetched=fetched)
    plan = plan_of(run_config(plan={"disk_gib": 123}), load_catalog())
    [line] = [line for line in render(plan, "c.yaml").splitlines() if line.startswith("prices: ")]
    assert (
        f"SkyPilot's catalog, fetched {fetched.astimezone():%Y-%m-%d} (3 days ago); host + GPU + 123 GiB disk" in line
    )
    assert re.search(r"disk .*list price of 20\d\d-\d\d-\d\d", line)
    assert as_json(plan)["prices"] == {"source": plan.catalog.source, "snapshot": False}


def test_without_a_catalog_the_plan_warns_of_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKY_RUNTIME_DIR", str(tmp_path))
    plan = plan_of(run_config(), load_catalog())
    [line] = [line for line in render(plan, "c.yaml").splitlines() if line.startswith("prices: ")]
    assert line.startswith("prices: OUR OLD SNAPSHOT of SkyPilot's catalog") and "PRICES MAY HAVE CHANGED" in line
    assert re.search(r"\b20\d\d-\d\d-\d\d\b", line) and "`sky gpus list --cloud gcp`" in line
    assert as_json(plan)["prices"]["snapshot"] is True


# price anomalies


def test_a_passed_over_offer_is_shown_with_its_anomaly(tmp_path: Path) -> None:
    plan = plan_of(run_config(plan={"gpus": ["L4", "T4"]}), with_a_wrong_price(tmp_path))
    text = render(plan, "c.yaml")
    heading, note = text.split("cheaper, but ")[1].splitlines()[:2]
    assert heading == "with a price anomaly (--trust-prices accepts it):"
    anomaly = r"GPU at \$0\.2000/h is 29% of the median \$0\.7000 .*"
    assert re.fullmatch(rf"  L4 on-demand in us-east1-a at \$0\.\d{{3}}/h: {anomaly}", note)
    by_name = {(row["gpu"], row["spot"]): row for row in as_json(plan)["rows"]}
    assert by_name["L4", False]["passed_over"] == note.strip()
    assert by_name["L4", True]["passed_over"] is None and by_name["L4", True]["price_anomalies"] == []
    assert len(by_name["T4", True]["price_anomalies"]) == 1


def test_a_trusted_price_still_shows_its_anomaly(tmp_path: Path) -> None:
    plan = plan_of(run_config(plan={"gpus": ["L4"]}), with_a_wrong_price(tmp_path), trust_prices=True)
    text = render(plan, "c.yaml")
    verdicts = {line["kind"]: line["verdict"] for line in table_rows(text)}
    assert verdicts["spot"] == "ok"
    assert str(verdicts["on-demand"]).startswith("ok, despite a price anomaly: GPU at $0.2000/h is 29% of the median")
    assert "cheaper, but" not in text


def test_without_price_anomalies_none_is_mentioned(plan: Plan) -> None:
    assert "trust" not in render(plan, "c.yaml")


# more machines than the table has rows


def test_the_best_ten_are_in_the_table_and_the_others_below_it_with_their_reason(tmp_path: Path) -> None:
    lay_out_catalog(tmp_path)
    plan = plan_of(run_config(plan={"gpus": list(MACHINES)}), catalog_in(tmp_path), Ceilings(run_usd=0.9))
    text = render(plan, "c.yaml")
    best, others = text.split("\n\n")[1].split("not among the best:\n")
    assert len(best.splitlines()) == 11 and len(plan.rows) == 2 * len(MACHINES)
    said = dict(line.strip().split(": ", 1) for line in others.splitlines())
    assert list(said) == [f"{row.on_gpu.name} {'spot' if row.spot else 'on-demand'}" for row in plan.rows[SHOWN:]]
    assert said["H100 on-demand"] == "not sold on demand; spot or flex-start (--flex)"
    assert said["RTXPRO6000 spot"] == "not sold: the catalog has no price for it"
    assert "above the ceiling of $0.90 for the run" in said["H200:8 spot"]
    assert "B200:8" not in text.split("\n\n")[2], "notes are on the rows of the table"


def test_a_chosen_machine_below_the_table_has_its_dollars_there(tmp_path: Path) -> None:
    lay_out_catalog(tmp_path)
    plan = plan_of(run_config(plan={"gpus": list(MACHINES)}), catalog_in(tmp_path))
    chosen = [row for row in plan.rows if row.chosen]
    assert len(chosen) > SHOWN
    text = render(plan, "c.yaml")
    for row in chosen[SHOWN:]:
        assert row.cost and f"  {row.on_gpu.name} {'spot' if row.spot else 'on-demand'}: ${row.cost.usd:.2f}\n" in text
    assert f", and {len(chosen) - SHOWN} more\nceilings" in text


def catalog_in(home: Path) -> Catalog:
    rows, _ = read_prices(home / CATALOG)
    return Catalog("a test's catalog", False, None, rows, {})
