"""A key whose type is a text keeps it as written, a number reads as YAML 1.2 has it, and what is written reads back equal."""

from __future__ import annotations

import json
import string
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.load import from_dict, load_config, to_yaml
from finetune.config.schema import RunConfig
from finetune.errors import UserError
from finetune.run_name import fault_of_name
from tests.helpers.errors import raises

HEAD = "model: {name: some/model}\ndata: {output_dir: out, sources: [{kind: jsonl, path: data.jsonl}]}\n"
LOOKS_LIKE_SOMETHING_ELSE = [
    *(
        "12e4567",
        "0012345",
        "0" * 40,
        "1.10",
        "12:30",
        "0x1F",
        "1_000",
        "0o17",
        "017",
        "1e5",
        "1E5",
        ".5",
        "5.",
        "+1",
        "-1",
    ),
    *(
        "yes",
        "no",
        "on",
        "off",
        "Yes",
        "NO",
        "true",
        "False",
        "y",
        "n",
        "2026-01-01",
        "2026-01-01T10:00:00",
        "190:20:30",
    ),
    *(
        ".inf",
        "-.inf",
        ".nan",
        "inf",
        "nan",
        "1,000",
        "1_0.5",
        "=",
        "<<",
        "0b11",
        "1e400",
        "9" * 30,
        "0.1e-5",
        "-0",
        "1.",
    ),
]


def load(folder: Path, text: str, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, list(overrides))


@pytest.mark.parametrize("text", LOOKS_LIKE_SOMETHING_ELSE)
def test_a_text_that_looks_like_something_else_stays_as_written(text: str, tmp_path: Path) -> None:
    name = text if fault_of_name(text) is None else "plain"
    config = load(
        tmp_path,
        f"""
model:
  name: some/model
  revision: {text}
training:
  run_name: {name}
  output_dir: {text}
tracking:
  wandb_project: {text}
data:
  output_dir: {text}
  sources:
    - kind: huggingface
      path: {text}
      revision: {text}
      subset: {text}
      databases: {text}
      dialect: {text}
      files:
        - {text}
        - '{text}'
      columns:
        question: {text}
        sql: '{text}'
        {"'<<'" if text == "<<" else text}: x
""",
    )
    source = config.data.sources[0]
    assert config.training.run_name == name
    kept = [config.model.revision, config.training.output_dir, config.tracking.wandb_project]
    kept += [config.data.output_dir, source.path, source.revision, source.subset, source.databases, source.dialect]
    kept += [*source.files, source.columns["question"], source.columns["sql"], list(source.columns)[2]]
    assert kept == [text] * len(kept)
    assert load(tmp_path, to_yaml(config)) == config
    assert yaml.safe_load(to_yaml(config))["model"]["revision"] == text


@pytest.mark.parametrize(
    "text",
    [*LOOKS_LIKE_SOMETHING_ELSE, "a #b", "[x]", "{a", "it's", "a: b", "*x", "&x", "!x", "%x", "@x", "- x", "|", " a "],
)
def test_an_override_of_a_text_stays_as_typed(text: str, tmp_path: Path) -> None:
    name = text if fault_of_name(text) is None else "plain"
    config = load(
        tmp_path, HEAD, f"model.revision={text}", f"training.run_name={name}", f"tracking.wandb_project={text}"
    )
    assert (config.model.revision, config.training.run_name, config.tracking.wandb_project) == (text, name, text)
    assert load(tmp_path, to_yaml(config)) == config


def test_an_override_of_a_list_or_section_keeps_the_texts_in_it(tmp_path: Path) -> None:
    config = load(
        tmp_path, HEAD, "lora.target_modules=[0017,1e5,no]", "data.sources=[{kind: jsonl, path: 12:30, dialect: 1.10}]"
    )
    assert config.lora.target_modules == ["0017", "1e5", "no"]
    assert (config.data.sources[0].path, config.data.sources[0].dialect) == ("12:30", "1.10")


@pytest.mark.parametrize(
    ("written", "kept"), [("'1.10'", "1.10"), ('"a b"', "a b"), ("'null'", "null"), ("'", "'"), ("'a' b'", "'a' b'")]
)
def test_quotes_around_an_override_are_yaml(written: str, kept: str, tmp_path: Path) -> None:
    assert load(tmp_path, HEAD, f"tracking.wandb_project={written}").tracking.wandb_project == kept


@pytest.mark.parametrize("null", ["null", "~", "", "Null", "NULL"])
def test_null_is_no_text_and_a_quoted_null_is_one(null: str, tmp_path: Path) -> None:
    assert load(tmp_path, f"{HEAD}training: {{run_name: {null}}}\n").training.run_name is None
    assert load(tmp_path, HEAD, f"training.run_name={null}").training.run_name is None
    with raises("config.bad_type", match=r"tracking\.wandb_project: expected str, found null"):
        load(tmp_path, f"{HEAD}tracking: {{wandb_project: {null}}}\n")
    again = load(tmp_path, f"{HEAD}tracking: {{wandb_project: '{null}'}}\n")
    assert again.tracking.wandb_project == null
    assert load(tmp_path, to_yaml(again)) == again


@pytest.mark.parametrize(
    ("text", "number"),
    [("2e-4", 2e-4), ("2E-4", 2e-4), (".5", 0.5), ("0.000_2", None), ("1e-05", 1e-5), ("+1e-3", 1e-3), ("'2e-4'", 2e-4),
     ("1", None), ("2e", None), ("12:30", None), ("0.1.2", None), ("1,5", None), ("2e-4f", None), ("٣", None)],
)  # fmt: skip
def test_a_learning_rate_is_read_as_people_write_it(text: str, number: float | None, tmp_path: Path) -> None:
    for yaml_text, overrides in (
        (f"{HEAD}training:\n  learning_rate: {text}\n", []),
        (HEAD, [f"training.learning_rate={text}"]),
    ):
        if number is not None:
            assert load(tmp_path, yaml_text, *overrides).training.learning_rate == number
        else:
            with raises("config.bad_value" if text == "1" else "config.bad_type", match=r"training\.learning_rate: "):
                load(tmp_path, yaml_text, *overrides)


@pytest.mark.parametrize(
    ("text", "number"), [("0x1F", 31), ("0o17", 15), ("017", 17), ("1_000", 1000), ("+7", 7), ("-0", 0), ("1e3", None)]
)
def test_a_whole_number_is_that_of_yaml_1_2(text: str, number: int | None, tmp_path: Path) -> None:
    if number is None:
        with raises("config.bad_type", match=r"training\.seed: expected int, found 1e3"):
            load(tmp_path, f"{HEAD}training: {{seed: {text}}}\n")
    else:
        assert load(tmp_path, f"{HEAD}training: {{seed: {text}}}\n").training.seed == number


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("no", False), ("On", True), ("'false'", False), ("maybe", None), ("2", None)]
)
def test_a_truth_value(text: str, value: bool | None, tmp_path: Path) -> None:
    yaml_text = f"{HEAD}quantization: {{load_in_4bit: {text}}}\n"
    if value is None:
        with raises("config.bad_type", match="quantization.load_in_4bit: expected bool"):
            load(tmp_path, yaml_text)
    else:
        assert load(tmp_path, yaml_text).quantization.load_in_4bit is value


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
model: {name: some/model}
data:
  output_dir: &place out/1e5
  sources:
    - &first {kind: spider, path: *place, dialect: sqlite}
    - {<<: *first, dialect: 1.0}
""",
    )
    assert [(s.kind, s.path, s.dialect) for s in config.data.sources] == [
        ("spider", "out/1e5", "sqlite"),
        ("spider", "out/1e5", "1.0"),
    ]


def test_an_override_of_one_section_leaves_the_one_that_shares_its_anchor(tmp_path: Path) -> None:
    text = f"{HEAD}checkpoint: &a {{keep_last: 3}}\nplan: {{}}\n"
    assert load(tmp_path, text, "checkpoint.keep_last=4").checkpoint.keep_last == 4


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: !!python/object:os.system {}\n", "no values of the kind"),
        ("a: !!binary aGk=\n", "no values of the kind"),
        ("a: &x [*x]\n", "contains itself"),
        ("? [a]\n: b\n", "a key is a text"),
        ("<<: [1]\n", "<<: expected a section"),
        ("a: " + "[\n" * 1000, "nested too deeply"),
        ("a: " + "{a:\n" * 1000, "nested too deeply"),
        ("a: *nothing\n", "undefined alias"),
        ("a: 1\n---\nb: 2\n", "but found another document"),
        ('a: "\\U00110000"\n', "chr"),
        ("a: \tb: c: d\n", "not valid YAML"),
        ("a: \x00\n", "special characters are not allowed"),
    ],
    ids=lambda text: text[:12],
)
def test_what_is_no_config_is_one_line(text: str, part: str, tmp_path: Path) -> None:
    with raises("config.bad_yaml", match="run.yaml: not valid YAML: ") as caught:
        load(tmp_path, text)
    assert part in str(caught.value) and len(str(caught.value)) < 400


def test_aliases_of_aliases_take_no_time(tmp_path: Path) -> None:
    layers = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 30))
    merges = "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}], k{n}: 1}}\n" for n in range(1, 30))
    bomb = f"l0: &l0 [x]\n{layers}m0: &m0 {{k: 1}}\n{merges}{HEAD}lora: {{target_modules: *l29, r: *m29}}\n"
    with raises("config.several") as caught:
        load(tmp_path, bomb)
    assert len(str(caught.value)) < 10_500


def test_a_few_lines_that_stand_for_millions_of_values_are_refused(tmp_path: Path) -> None:
    lists = ", ".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 100)}]" for n in range(1, 5))
    with raises("config.too_large", match=r"data\.sources\[0\]\.columns: is far too large") as caught:
        load(tmp_path, HEAD.replace("data.jsonl", f"x, columns: {{k0: &k0 [x], {lists}}}"))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_with_a_byte_order_mark_is_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(f"{HEAD}training: {{run_name: für}}\n".encode(encoding))
    assert load_config(tmp_path / "run.yaml").training.run_name == "für"


# round trip

_CHARACTERS = st.characters(codec="utf-8", exclude_characters="\0")
_TEXTS = st.one_of(
    st.sampled_from(
        [*LOOKS_LIKE_SOMETHING_ELSE, "null", "~", "", "${a.b}", r"\${x}", "$HOME", r"\$A", "a\r\nb", " ", "#"]
    ),
    st.text(_CHARACTERS, max_size=20),
    st.text("$~{}\\/.: '\"#\n" + string.ascii_letters, max_size=12),
).filter(lambda text: text != "???")
_FLOATS = st.floats(min_value=1e-300, max_value=0.49)


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    config = from_dict(yaml.safe_load(HEAD), "")
    source = config.data.sources[0]
    columns = draw(st.dictionaries(_TEXTS, _TEXTS, max_size=3))
    source.columns = columns
    source.path, source.dialect, source.files = draw(_TEXTS), draw(_TEXTS), draw(st.lists(_TEXTS, max_size=2))
    source.revision, source.databases = draw(st.none() | _TEXTS), draw(st.none() | _TEXTS)
    config.model.name, config.model.revision = draw(_TEXTS), draw(st.none() | _TEXTS)
    names = _TEXTS.filter(lambda text: fault_of_name(text) is None)
    config.training.run_name, config.tracking.wandb_project = draw(st.none() | names), draw(_TEXTS)
    config.training.output_dir, config.data.output_dir = draw(_TEXTS), draw(_TEXTS)
    config.training.learning_rate, config.data.val_fraction = draw(_FLOATS), draw(_FLOATS)
    config.training.seed = draw(st.integers(0, 2**32 - 1))
    return config


@settings(max_examples=20, deadline=None)
@given(configs())
def test_any_config_reads_back_equal_as_written(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> None:
    written = to_yaml(config)
    assert load(tmp_path_factory.mktemp("config"), written) == config
    assert from_dict(json.loads(json.dumps(asdict(config))), "run.json") == config
    plain = yaml.safe_load(written)  # as other programs read it
    assert isinstance(plain["model"]["name"], str) and isinstance(plain["training"]["learning_rate"], float)
    assert type(plain["model"]["revision"]) is type(config.model.revision)


_ODD: st.SearchStrategy[Any] = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["[" * 400, "{a: " * 400, "1" * 5000, "1e999", "&a [*a]", "!!set {a}", "\ud800"]),
)


_KEYS = ["model.name", "training.seed", "training.learning_rate", "lora.target_modules", "data.sources", "x", ""]


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=60), _ODD), st.lists(st.tuples(st.sampled_from(_KEYS), _ODD), max_size=2))
def test_any_file_and_override_is_a_config_or_one_short_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes | str, pairs: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    raw = content if isinstance(content, bytes) else f"{HEAD}training: {content}\n".encode(errors="replace")
    path.write_bytes(raw)
    try:
        assert isinstance(load_config(path, [f"{key}={text}" for key, text in pairs]), RunConfig)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 2500
