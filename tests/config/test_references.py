"""What a value of a config may refer to: other keys, and in paths the home folder and some variables. No secret gets in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.cli.main import main
from finetune.config.load import load_config, to_dict, to_yaml
from finetune.config.schema import RunConfig
from tests.helpers.errors import raises, reported

HEAD = "model: {name: some/model}\ndata: {output_dir: out, sources: [{kind: jsonl, path: data.jsonl}]}\n"
SECRET = "hf_thisMustNotAppearAnywhere"


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "MY_VARIABLE",
        "TOKEN_DIR",
        "MYTOKEN_DIR",
        "APIKEY_DIR",
        "PGPASSWORD_PATH",
        "XDG_APIKEY",
        "DATABASE_PASSWORD_PATH",
    ):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA_DIR", "/mnt/data")
    monkeypatch.setenv("USER", "me")
    monkeypatch.delenv("NOT_SET_DIR", raising=False)
    monkeypatch.chdir(tmp_path)


def load(folder: Path, text: str, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, list(overrides))


PATHS = {
    "~": "/home/me",
    "~/runs": "/home/me/runs",
    "$HOME/runs": "/home/me/runs",
    "${HOME}/runs": "/home/me/runs",
    "${oc.env:HOME}/runs": "/home/me/runs",
    "${NOT_SET_DIR,there}/x": "there/x",
    "/mnt/$USER/x": "/mnt/me/x",
    "${DATA_DIR}/${USER}": "/mnt/data/me",
    "~root/x": "/root/x",
    "a~b": "a~b",
    "dir/~/x": "dir/~/x",
    "dir/~me": "dir/~me",
    "./~": "./~",
    r"\~/x": "~/x",
    "cost$": "cost$",
    "5$/x": "5$/x",
    "a$5": "a$5",
    r"a\$HOME": "a$HOME",
    r"\${HOME}": "${HOME}",
    "some/model": "some/model",
}


@pytest.mark.parametrize(("written", "meant"), PATHS.items())
def test_a_path_is_expanded_in_every_key_that_holds_one(written: str, meant: str, tmp_path: Path) -> None:
    source = f"{{kind: spider, path: '{written}', databases: '{written}', files: ['{written}']}}"
    data = f"data: {{output_dir: '{written}', sources: [{source}]}}\n"
    for config in (
        load(tmp_path, f"model: {{name: '{written}'}}\ntraining: {{output_dir: '{written}'}}\n{data}"),
        load(tmp_path, HEAD, f"data.output_dir={written}", f"training.output_dir={written}", f"data.sources=[{source}]",
             f"model.name={written}"),
    ):  # fmt: skip
        first = config.data.sources[0]
        found = [config.model.name, config.training.output_dir, config.data.output_dir, first.path, first.databases]
        assert [*found, *first.files] == [meant] * 6
        assert load(tmp_path, to_yaml(config)) == config


def test_other_texts_are_not_expanded(tmp_path: Path) -> None:
    config = load(tmp_path, HEAD, "training.run_name=~x$HOME", "tracking.wandb_project=$USER", "model.revision=~")
    assert (config.training.run_name, config.tracking.wandb_project) == ("~x$HOME", "$USER")
    assert config.model.revision is None


def test_a_file_of_just_that_name_is_meant(tmp_path: Path) -> None:
    for name in ("a$UNKNOWN", "~nobody-of-this-name"):
        (tmp_path / name).touch()
        assert load(tmp_path, HEAD, f"data.output_dir={name}").data.output_dir == name


def test_an_empty_home_is_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "")
    with raises("path.no_home", match=r"data\.output_dir: '~/x': this user has no home folder"):
        load(tmp_path, HEAD, "data.output_dir=~/x")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("$NOT_SET_DIR/x", "path.variable_unset"),
        ("${NOT_SET_DIR}", "path.variable_unset"),
        ("~nobody-of-this-name/x", "path.no_home"),
        ("$HF_TOKEN", "path.variable_refused"),
        ("x/${HF_TOKEN}", "path.variable_refused"),
        ("${oc.env:HF_TOKEN}", "path.variable_refused"),
        ("${oc.env:HF_TOKEN,x}", "path.variable_refused"),
        ("$WANDB_API_KEY", "path.variable_refused"),
        ("${AWS_SECRET_ACCESS_KEY}", "path.variable_refused"),
        ("$MY_VARIABLE", "path.variable_refused"),
        ("$TOKEN_DIR", "path.variable_refused"),
        ("$MYTOKEN_DIR", "path.variable_refused"),
        ("$APIKEY_DIR", "path.variable_refused"),
        ("$PGPASSWORD_PATH", "path.variable_refused"),
        ("$XDG_APIKEY", "path.variable_refused"),
        ("$DATABASE_PASSWORD_PATH", "path.variable_refused"),
        ("${oc.decode:HF_TOKEN}", "path.bad_reference"),
        ("${oc.select:model.name}", "path.bad_reference"),
        ("${oc.create:x}", "path.bad_reference"),
        ("${oc.env:${model.name}}", "config.bad_reference"),
        ("${HOME", "config.bad_reference"),
        ("${}", "path.bad_reference"),
        ("x" * 300, "path.impossible"),
        ("a/" * 3000, "path.impossible"),
    ],
)
def test_a_path_that_cannot_be_expanded_is_one_line_without_any_value(path: str, code: str, tmp_path: Path) -> None:
    for key in ("data.output_dir", "training.output_dir", "model.name"):
        with raises(code, match=rf"run\.yaml: {key}: ") as caught:
            load(tmp_path, HEAD, f"{key}={path}")
        assert SECRET not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["HF_TOKEN", "HOME"])
@pytest.mark.parametrize(
    "form", ["${oc.env:%s}", "${%s}", "${oc.decode:${oc.env:%s}}", "${oc.env:%s,null}", "a-${oc.env:%s}"]
)
@pytest.mark.parametrize(
    "key", ["training.run_name", "model.revision", "training.seed", "lora.target_modules", "model.torch_dtype"]
)
def test_no_variable_gets_into_another_key(key: str, form: str, name: str, tmp_path: Path) -> None:
    value = form % name
    overrides = [f"{key}=[{value}]" if key == "lora.target_modules" else f"{key}={value}"]
    if key == "lora.target_modules":
        overrides = [f"{key}=['{value}']"]
    with raises("config.bad_reference", match=key) as caught:
        load(tmp_path, HEAD, *overrides)
    assert SECRET not in str(caught.value)


def test_the_command_shows_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(f"{HEAD}tracking: {{wandb_project: '${{oc.env:HF_TOKEN}}'}}\n")
    with reported("config.bad_reference"):
        assert main(["config", "run.yaml"]) == 2
    assert SECRET not in "".join(capsys.readouterr())


def test_a_key_refers_to_another_one_with_its_type(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
model: {name: some/model, revision: 0012}
lora: {r: 8, lora_alpha: '${.r}', target_modules: [q_proj]}
data:
  output_dir: ~/data
  seed: ${training.seed}
  sources:
    - {kind: jsonl, path: '${data.output_dir}/a.jsonl', databases: '${.path}.d'}
    - {kind: jsonl, path: '${data.sources[0].path}', dialect: '${data.sources.0.dialect}'}
training: {run_name: 'r${lora.r}-${model.revision}-${training.learning_rate}', output_dir: '${data.output_dir}/runs'}
""",
        "training.seed=7",
    )
    assert (config.lora.lora_alpha, config.data.seed) == (8, 7)
    assert [source.path for source in config.data.sources] == ["/home/me/data/a.jsonl"] * 2
    assert (config.data.sources[0].databases, config.data.sources[1].dialect) == ("/home/me/data/a.jsonl.d", "sqlite")
    assert config.training.run_name == "r8-0012-0.0002"
    assert config.training.output_dir == "/home/me/data/runs"
    assert load(tmp_path, to_yaml(config)) == config
    json.dumps(to_dict(config))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("training.run_name=${training.run_name}", "refers to itself"),
        ("training.run_name=x${training.run_name}", "refers to itself"),
        ("training.run_name=${lora.nothing}", "there is no such key"),
        ("training.run_name=${data.sources[7].path}", "there is no such key"),
        ("training.run_name=x${model.revision}", "is not a text or a number"),
        ("training.run_name=x${data.sources}", "is not a text or a number"),
        ("training.run_name=x${training}", "expected the name of another key"),
        ("training.run_name=x${......seed}", "there is no such key"),
        ("training.run_name=${data.sources.0.subset.x}", "there is no such key"),
        ("training.run_name=x${a", "expected one name between"),
        ("training.run_name=x${" + "y" * 5000 + "}", "expected the name of another key"),
    ],
)
def test_a_reference_that_leads_nowhere_is_one_line(override: str, part: str, tmp_path: Path) -> None:
    with raises("config.bad_reference", match=r"training\.run_name: ") as caught:
        load(tmp_path, HEAD, override)
    assert part in str(caught.value) and len(str(caught.value)) < 500


def test_loops_and_texts_that_grow_are_refused(tmp_path: Path) -> None:
    with raises("config.bad_reference", match="refers to itself"):
        load(
            tmp_path, HEAD, "training.run_name=${tracking.wandb_project}", "tracking.wandb_project=${training.run_name}"
        )
    grows = ", ".join(f"c{n}: '{'${.c' + str(n - 1) + '}' + ('${.c' + str(n - 1) + '}') * 8}'" for n in range(1, 20))
    keys = [f"data.sources=[{{kind: jsonl, path: x, columns: {{c0: {'x' * 100}, {grows}}}}}]"]
    with raises("config.bad_reference", match="far too long"):
        load(tmp_path, HEAD, *keys)
