"""A corrupt price list is refused with file and line, and a valid one has its age."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from finetune.cloud.catalog.csv_file import VMS, Row, read_clouds, read_prices, skypilot_folder
from tests.helpers.catalog_fixture import CATALOG, HEADER, gpu, host, lay_out_catalog, write_prices
from tests.helpers.errors import raises

ZONE = "us-east1-b"
WHOLE = [host(ZONE), gpu(ZONE)]


def refused(path: Path, code: str = "catalog.corrupt") -> str:
    with raises(code) as caught:
        read_prices(path.parents[1])
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "delete the file" in message
    return message.removeprefix(f"{path}: ")


def test_hosts_and_gpus_are_separated_and_stored_by_zone(tmp_path: Path) -> None:
    rows, fetched = read_prices(write_prices(tmp_path, [*WHOLE, gpu("us-west1-a", "", 0.9, "T4", 2)]).parents[1])
    assert rows.hosts == {"a2-highgpu-1g": {ZONE: Row("us-east1", ZONE, 0.5, 0.2, 12.0, 85.0)}}
    assert rows.gpus == {
        ("A100", 1): {ZONE: Row("us-east1", ZONE, 3.0, 1.0, 0.0, 0.0)},
        ("T4", 2): {"us-west1-a": Row("us-west1", "us-west1-a", None, 0.9, 0.0, 0.0)},
    }
    assert fetched is None


@pytest.mark.parametrize("price", ["-0.1", "nan", "NaN", "inf", "-inf", "cheap", "1,5", "$3", " "])
@pytest.mark.parametrize("column", ["usd", "spot"])
def test_an_invalid_price_is_refused_with_its_line(tmp_path: Path, price: str, column: str) -> None:
    quoted: dict[str, Any] = {column: f'"{price}"'}
    path = write_prices(tmp_path, [*WHOLE, gpu("us-west1-a", **quoted)])
    name = "Price" if column == "usd" else "SpotPrice"
    assert refused(path).startswith(f"line 4: {name} is {price!r}, expected a number of zero or more")


@pytest.mark.parametrize("count", ["", "0", "1.5", "one"])
def test_a_count_of_gpus_that_is_not_whole_is_refused(tmp_path: Path, count: str) -> None:
    line = gpu(ZONE).replace(",A100,1,", f",A100,{count},")
    assert refused(write_prices(tmp_path, [line])).startswith(f"line 2: AcceleratorCount is {count!r}")


def test_a_count_may_be_written_as_pandas_writes_it(tmp_path: Path) -> None:
    path = write_prices(tmp_path, [gpu(ZONE).replace(",A100,1,", ",A100,1.0,")])
    assert list(read_prices(path.parents[1])[0].gpus) == [("A100", 1)]


def test_a_size_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    assert refused(write_prices(tmp_path, [host(ZONE).replace("12.0", "many")])).startswith("line 2: vCPUs is 'many'")


def test_a_row_without_a_place_is_refused(tmp_path: Path) -> None:
    assert refused(write_prices(tmp_path, [*WHOLE, host("")])).startswith("line 4: no Region")


def test_every_truncation_of_the_last_line_is_detected(tmp_path: Path) -> None:
    path = write_prices(tmp_path, WHOLE)
    whole = path.read_bytes()
    for length in range(len(whole) - len(WHOLE[1]), len(whole)):
        path.write_bytes(whole[:length])
        assert refused(path).startswith("line 3: ")


def test_a_file_truncated_in_a_quoted_field_is_refused(tmp_path: Path) -> None:
    path = write_prices(tmp_path, [host(ZONE), ',,,A100,1,"{Gpus: [40960,'])
    assert "unexpected end" in refused(path)


def test_a_line_with_too_few_or_too_many_values_is_refused(tmp_path: Path) -> None:
    short = write_prices(tmp_path, [host(ZONE)[:-4], gpu(ZONE)])
    assert refused(short).startswith("line 2: 9 values for 10 columns")
    long = write_prices(tmp_path, [host(ZONE), gpu(ZONE) + ",1"])
    assert refused(long).startswith("line 3: 11 values for 10 columns")


@pytest.mark.parametrize("column", [name for name in HEADER.split(",") if name != "GpuInfo"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    path = write_prices(tmp_path, WHOLE)
    path.write_text(path.read_text().replace(column, "Renamed", 1))
    assert refused(path).startswith(f"line 1: no column {column};")


def test_columns_may_come_in_another_order(tmp_path: Path) -> None:
    path = write_prices(tmp_path, [])
    swapped = [",".join(reversed(line.split(","))) for line in [HEADER, *WHOLE]]
    path.write_text("\n".join([*swapped, "", ""]))
    assert read_prices(path.parents[1])[0].gpus["A100", 1][ZONE].usd == 3.0


def test_an_empty_file_and_one_without_rows_are_refused(tmp_path: Path) -> None:
    path = write_prices(tmp_path, [])
    assert refused(path).startswith("holds no prices")
    path.write_text("")
    assert refused(path).startswith("empty")


def test_a_binary_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write_prices(tmp_path, WHOLE)
    path.write_bytes(path.read_bytes().replace(b"us-east1-b", b"us-east\xff", 1))
    assert refused(path).startswith("line 2: not UTF-8")
    write_prices(tmp_path, WHOLE)
    path.write_bytes(path.read_bytes() + bytes(100))  # as after a crash on some file systems
    assert "truncated" in refused(path)


def test_a_file_that_cannot_be_read_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / CATALOG / VMS
    path.mkdir(parents=True)
    assert refused(path, "file.unreadable").startswith("not readable (is a folder, not a file)")
    path.rmdir()
    path.symlink_to(path)
    assert refused(path, "file.unreadable").startswith("not readable (Too many levels")


def test_a_missing_file_is_distinguished_from_a_corrupt_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_prices(tmp_path)


@pytest.mark.parametrize("first", [0, 1])
def test_of_duplicate_rows_the_higher_prices_are_used(tmp_path: Path, first: int) -> None:
    lines = [gpu(ZONE, 3.0, 1.0), gpu(ZONE, 2.0, 1.5), gpu(ZONE, "", "")]
    lines = lines[first:] + lines[:first]
    row = read_prices(write_prices(tmp_path, lines).parents[1])[0].gpus["A100", 1][ZONE]
    assert (row.usd, row.spot_usd) == (3.0, 1.5)


def test_the_age_is_that_of_the_download_not_of_the_file(tmp_path: Path) -> None:
    then = datetime.now(UTC).replace(microsecond=0) - timedelta(days=40)
    lay_out_catalog(tmp_path, fetched=then)
    os.utime(tmp_path / CATALOG / VMS)  # as SkyPilot does when a refresh fails
    assert read_prices(tmp_path / CATALOG)[1] == then


def test_a_file_that_was_changed_after_the_download_has_no_age(tmp_path: Path) -> None:
    lay_out_catalog(tmp_path, fetched=datetime.now(UTC))
    with (tmp_path / CATALOG / VMS).open("a") as file:
        file.write(gpu(ZONE, name="NEW") + "\n")
    assert read_prices(tmp_path / CATALOG)[1] is None


def test_the_folder_follows_skypilots_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SKY_RUNTIME_DIR", raising=False)
    assert skypilot_folder() == tmp_path / "home" / CATALOG
    monkeypatch.setenv("SKY_RUNTIME_DIR", "~/elsewhere")
    assert skypilot_folder() == tmp_path / "home" / "elsewhere" / CATALOG


def test_the_clouds_of_a_gpu_are_read_if_the_file_exists(tmp_path: Path) -> None:
    lay_out_catalog(tmp_path)
    clouds = read_clouds(tmp_path / CATALOG)
    assert clouds["A10"] == ["Azure", "Lambda", "OCI"] and "GCP" in clouds["L4"]
    assert read_clouds(tmp_path) == {}
