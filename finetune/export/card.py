"""README.md of an export: a model card from run.json, eval.json and the export's own score. Nothing in it is a guess: what is not
known is said to be unknown. It names no path of this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.prepared import manifest_if_same, trained_databases
from finetune.data.prompts import PromptTemplate
from finetune.evaluation.statistics import enough_databases
from finetune.export.model_files import Made, Model
from finetune.export.rescore import Score
from finetune.models.weight_files import model_folder
from finetune.run_record import RunRecord
from finetune.runtime.console import one_line
from finetune.runtime.files import load_json, read_text
from finetune.runtime.quantities import usd_text

_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md", "COPYING")
_BASE_WORDS = {
    "dequantized": "the 4-bit weights that the adapter was trained on, de-quantised",
    "original": "the base model's original weights",
    "apart": "none: the adapter stands apart from its base model",
}
_EXAMPLE = {
    "schema": "CREATE TABLE singer (singer_id INTEGER, name TEXT, born INTEGER)",
    "question": "Which singers were born before 1960?",
}


def write_card(model: Model, made: Made, kind: str, scores: Sequence[Score], *, accepted: bool) -> str:
    """The text of README.md."""
    record = model.run.record() if model.run.run_json.is_file() else RunRecord()
    name = _public(model.config.model.name)
    method = "QLoRA" if model.config.quantization.load_in_4bit else "LoRA"
    parts = [
        _front_matter(model, kind, name),
        f"# {one_line(model.run.path.resolve().name)}",
        f"{name} fine-tuned for text-to-SQL with {method}: it answers a question about a database with SQL.",
        "## How to ask it",
        _how_to_ask(model.template, kind, made),
        "## Score",
        *_scored(model),
        *_exported(scores, accepted),
        "## What it is",
        _facts(model, record, made, name),
        "## Limits",
        _limits(model, record, kind),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(model: Model, kind: str, name: str) -> str:
    licence = _licence(model_folder(model.config.model))
    library = {"merged": "transformers", "adapter": "peft", "gguf": "gguf"}[kind]
    lines = ["---"]
    if "/" in name:
        lines += [f"base_model: {name}"]
    lines += [f"library_name: {library}", "pipeline_tag: text-generation", "tags:", "- text-to-sql", "- sql"]
    if licence and " " not in licence:
        lines.append(f"license: {licence}")
    return "\n".join([*lines, "---"])


def _how_to_ask(template: PromptTemplate, kind: str, made: Made) -> str:
    dialect = template.dialects[0] if template.dialects else "sqlite"
    prompt = template.render(**_EXAMPLE, dialect=dialect)
    text = f"The prompt, to the letter (the answer follows its last line):\n\n```\n{prompt}```"
    if template.schema_format == "compact":
        text += (
            "\n\nThe schema is shown in a short form (data.schema_format: compact), which `finetune serve` and `finetune ask` "
            "make of CREATE TABLE statements."
        )
    files = ", ".join(made.gguf.values())
    ways = {
        "merged": "Load this folder with transformers or vLLM. Its chat template takes the schema as the system message and the "
        "question as the user's.",
        "adapter": "Load it with PEFT or as a LoRA module of vLLM, on the base model named below.",
        "gguf": f"Load {files} with llama.cpp, llama-cpp-python or Ollama (`ollama create NAME -f Modelfile`); the schema is the "
        "system message, the question the prompt.",
    }
    return f"{text}\n\n{ways[kind]} Decode greedily."


def _scored(model: Model) -> list[str]:
    """The run's own score, from eval.json."""
    try:
        scored = load_json(model.run.eval_json)
        tuned, base = scored["models"]["tuned"], scored["models"].get("base")
        lines = [_line("the fine-tuned model", tuned), *([_line("the base model", base)] if base else [])]
        asked = f"{tuned['questions']} questions of the {scored['split']} split, rule {scored['rule']}"
        seconds = f"; answers took {tuned['seconds']:.0f} s (measured)" if tuned.get("seconds") else ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ["The run was not scored."]
    head = "| | right | 95% interval over questions | over databases |\n|---|---|---|---|"
    return [f"Execution accuracy of the run before this export, on {asked}{seconds}.", "\n".join([head, *lines])]


def _line(name: str, scores: Mapping[str, Any]) -> str:
    over, number = scores.get("execution_accuracy_interval95_by_database"), len(scores.get("by_database") or {})
    few = f"{number} databases: too few" if number > 1 else "one database: nothing can be said" if number else "unknown"
    databases = _interval(over) if over and enough_databases(scores) else few
    right = f"{scores['correct']} of {scores['questions']} ({scores['execution_accuracy']:.1%})"
    return f"| {name} | {right} | {_interval(scores['execution_accuracy_interval95'])} | {databases} |"


def _interval(values: Sequence[float]) -> str:
    return f"{values[0]:.1%} to {values[1]:.1%}"


def _exported(scores: Sequence[Score], accepted: bool) -> list[str]:
    if not scores:
        return ["**This export was not scored.**"]
    head = (
        "| export | right | 95% interval | the run on the same questions | won | lost | p (exact, paired) |\n"
        "|---|---|---|---|---|---|---|"
    )
    lines = []
    for score in scores:
        facts = score.as_dict()
        right = f"{score.correct} of {score.questions} ({facts['execution_accuracy']:.1%})"
        interval = _interval(facts["execution_accuracy_interval95"])
        row = [
            score.name,
            right,
            interval,
            f"{score.run_correct}",
            score.counts["won"],
            score.counts["lost"],
            f"{score.p:.2g}",
        ]
        lines.append(f"| {' | '.join(map(str, row))} |")
    generators = ", ".join(dict.fromkeys(f"{s.generator['name']} ({s.generator['version']})" for s in scores))
    text = [f"Exactly these files, asked again through {generators}:", "\n".join([head, *lines])]
    if lost := [score.name for score in scores if score.lost_significantly]:
        chosen = "; it was exported all the same (--accept-loss)" if accepted else ""
        text.append(f"**{', '.join(lost)} answers significantly worse than the run{chosen}.**")
    return text


def _facts(model: Model, record: RunRecord, made: Made, name: str) -> str:
    revision = f" at {model.config.model.revision}" if model.config.model.revision else ""
    licence = _licence(model_folder(model.config.model)) or "unknown: look it up before you publish"
    lines = [
        f"base model: {name}{revision}; licence: {licence}",
        f"merged into: {_BASE_WORDS[made.base]}",
        f"weights: {made.dtype or ', '.join(made.gguf) or 'the adapter as training wrote it'}",
        f"adapter: LoRA r={model.config.lora.r}, alpha={model.config.lora.lora_alpha}, on "
        f"{', '.join(model.config.lora.target_modules)}",
        f"training data: {_data(_sources(model, record))}{_used(record)}",
        f"training: {_training(record)}",
        f"cost: {_cost(record)}",
        f"prompt: {model.template.identity()}; dialects: {', '.join(model.template.dialects) or 'sqlite'}",
    ]
    if record.git_commit:
        lines.append(f"trained by finetune at commit {record.git_commit[:12]}")
    return "\n".join(f"- {line}" for line in lines)


def _sources(model: Model, record: RunRecord) -> list[str]:
    """The paths of the training data's sources: by their manifest, since they may have been typed when the data were prepared,
    else by the config."""
    manifest = manifest_if_same(record.data.path, record.data.manifest_sha256) if record.data else None
    prepared = (manifest or {}).get("sources")
    listed = prepared if isinstance(prepared, list) else []
    paths = [str(source["path"]) for source in listed if isinstance(source, dict) and source.get("path")]
    return paths or [source.path for source in model.config.data.sources]


def _data(sources: Sequence[str]) -> str:
    found = []
    for source in sources:
        local = Path(source)
        where = local if local.is_dir() else local.parent
        licence = _licence(where) if local.exists() else ""
        found.append(f"{_public(source)} (licence: {licence or 'unknown'})")
    return ", ".join(dict.fromkeys(found)) or "unknown"


def _used(record: RunRecord) -> str:
    used = record.data.used if record.data else None
    return f"; {used['train']} records used" if used and "train" in used else ""


def _training(record: RunRecord) -> str:
    steps = f"{record.steps.done} steps" if record.steps else "steps unknown"
    tokens = f", {record.tokens.trained:,} tokens" if record.tokens and record.tokens.trained else ""
    gpu = record.hardware.gpu if record.hardware else None
    machine = f" on {gpu.count or 1} x {gpu.name}" if gpu else " on a CPU" if record.hardware else ""
    status = f" (status: {record.status})" if record.status != "done" else ""
    return f"{steps}{tokens}{machine}{status}"


def _cost(record: RunRecord) -> str:
    spent = record.spending
    if spent is None or spent.usd is None:
        return "unknown, since the machine had no price"
    hours = f" for {spent.hours:.2f} hours of all attempts" if spent.hours is not None else ""
    basis = f" ({spent.basis})" if spent.basis else ""
    return f"{usd_text(spent.usd)} of training{hours}{basis}"


def _limits(model: Model, record: RunRecord, kind: str) -> str:
    lines = [
        _reach(model, record),
        "It was trained on single questions: it knows no conversation.",
        "Its SQL may be wrong or slow. Run it read-only and with a time limit.",
    ]
    if limit := model.context_tokens:
        lines.append(f"Prompt and answer together have at most {limit:,} tokens.")
    if kind == "gguf":
        lines.append(
            "Ollama reads control tokens in a question (such as `<|im_end|>`) as control tokens; `finetune serve` does not."
        )
    return "\n".join(f"- {line}" for line in lines)


def _reach(model: Model, record: RunRecord) -> str:
    """What the score is about, by the number of its databases and by whether training has seen them."""
    try:
        scored = load_json(model.run.eval_json)
        tuned = scored["models"]["tuned"]
        asked, of_data = set(tuned["by_database"]), scored.get("data_manifest_sha256")
    except (OSError, ValueError, LookupError, TypeError):
        asked = set()
    if not asked:
        return "How well it answers was not measured for each database, so nothing can be said about other ones."
    these = f"about these {len(asked)} databases" if len(asked) > 1 else "about this database"
    holds = f"The score holds for questions like those it was measured on, {these}"
    data = record.data
    manifest = manifest_if_same(data.path, data.manifest_sha256) if data and of_data == data.manifest_sha256 else None
    trained = trained_databases(manifest)
    if trained is None and model.config.data.split_by == "question":
        return (
            f"{holds}: other questions about the same databases may have been trained on (data.split_by: question), so it says "
            "nothing about a database that the model has not seen."
        )
    if seen := len(asked & (trained or set())):
        every = "it" if len(asked) == 1 else "them"
        which, so = (every, "says nothing about") if seen == len(asked) else (f"{seen} of them", "may be too high for")
        return f"{holds}: other questions about {which} were trained on, so it {so} a database that the model has not seen."
    if not enough_databases(tuned):
        return f"{holds}; {'they are too few' if len(asked) > 1 else 'one is too few'} to say it of others."
    return f"{holds}; for other databases the interval over databases is the one to read."


def _licence(folder: Path) -> str:
    """What a folder says of its licence: the key of the README's front matter, else the first line of a licence file."""
    try:
        lines = read_text(folder / "README.md").splitlines()
        if lines and lines[0] == "---":
            for line in lines[1 : lines.index("---", 1)]:
                if line.startswith("license:"):
                    return one_line(line.partition(":")[2].strip())[:80]
    except (OSError, ValueError):
        pass
    for name in _LICENCE_FILES:
        try:
            return one_line(next(line for line in read_text(folder / name).splitlines() if line.strip()).strip())[:80]
        except (OSError, ValueError, StopIteration):
            continue
    return ""


def _public(name: str) -> str:
    """A model or data set as others know it: a hub id, else the last part of a path."""
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists():
        return name
    return one_line(Path(name).name or name)
