"""Whether plain vLLM loads an exported adapter as a LoRA, and answers with it as the evaluation did.

    finetune export RUN --to adapter
    python -m benchmarks.vllm_lora RUN RUN/exports/adapter        (where vLLM can be imported; a GPU)

Nothing of ours is between vLLM and the folder: `vllm.LLM` gets the base model, and the adapter with every request. Asks the
questions of eval/tuned.jsonl, greedily. vLLM computes LoRA in 16 bits only, so in bfloat16 a few answers differ from those of an
evaluation in float32. Prints what benchmarks.endpoint prints, and how often the base model alone gives the same SQL.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.endpoint import compared
from finetune.data.answers import extract_sql
from finetune.data.prompts import load_template
from finetune.data.records import Record
from finetune.models.load import load_tokenizer
from finetune.models.weight_files import model_folder
from finetune.run_folder import RunFolder, open_run
from finetune.runtime.console import escape_unprintable
from finetune.tokens import decode_answer, encode_prompts


def main() -> int:
    escape_unprintable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("adapter", type=Path)
    arguments = parser.parse_args()
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    run = open_run(arguments.run)
    config = run.config()
    rank = json.loads((arguments.adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    engine = LLM(
        str(model_folder(config.model)), dtype="bfloat16", enable_lora=True, max_lora_rank=max(8, rank),
        max_model_len=config.model.max_seq_length + config.evaluation.max_new_tokens,
    )  # fmt: skip
    loaded = LoRARequest("adapter", 1, str(arguments.adapter.resolve()))
    adapted = compared(run, "vllm_lora", partial(sql_of, engine, run, loaded))
    plain = compared(run, "vllm_base", partial(sql_of, engine, run, None))
    print(json.dumps(adapted | {"same_sql_without_adapter": plain["same_sql"]}, indent=2))
    return 0


def sql_of(engine: Any, run: RunFolder, lora: Any, records: list[Record]) -> list[str]:
    from vllm import SamplingParams

    config, template = run.config(), load_template(run.adapter)
    tokenizer = load_tokenizer(config.model)
    prompts = encode_prompts(tokenizer, [template.render_record(record) for record in records])
    sampling = SamplingParams(temperature=0.0, max_tokens=config.evaluation.max_new_tokens, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, lora_request=lora)
    answers = [decode_answer(tokenizer, output.outputs[0].token_ids) for output in outputs]
    return [extract_sql(answer, record.dialect) for answer, record in zip(answers, records, strict=True)]


if __name__ == "__main__":
    raise SystemExit(main())
