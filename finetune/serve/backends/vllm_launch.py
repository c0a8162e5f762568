"""`python -m finetune.serve.backends.vllm_launch TARGET FOLDER`: writes the weights that vLLM loads, and becomes vLLM's server.

The weights are those of `finetune evaluate` with vLLM: the values that the adapter was trained on, with the adapter merged in
(evaluation/generators/vllm_weights.py). Writing them takes the GPU; becoming another program gives all of it back.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from finetune.errors import UserError
from finetune.evaluation.generators.vllm_place import engine_options, find_vllm
from finetune.evaluation.generators.vllm_weights import Weights
from finetune.models.adapter import check_folder
from finetune.models.answering import answering_device
from finetune.models.load import load_model_config, load_tokenizer
from finetune.runtime.files import disk_error, write_json
from finetune.serve.backends.vllm import SOCKET, WRITTEN, command, is_apart, server_environment
from finetune.serve.target import open_target

MOST_MEMORY = 0.92
"""Of the GPU's memory that vLLM takes at most; its own default."""
RESERVED_BYTES = 1 << 30


def main(path: str, folder: str) -> None:
    """Does not return. Raises UserError if vLLM or the weights are missing, or if the disk is full."""
    target, private = open_target(Path(path), verify=False), Path(folder)
    config, adapter = target.config, target.adapter
    found = find_vllm()
    if found is None:
        raise UserError("vLLM is not installed", code="serve.no_vllm")
    device = answering_device(config)
    apart = is_apart(config, adapter)
    weights = Weights(config, adapter, device)
    print("writing the weights for vLLM", flush=True)
    tokenizer = private / "tokenizer"
    try:
        load_tokenizer(config.model).save_pretrained(tokenizer)
        load_model_config(config.model).save_pretrained(tokenizer)  # vLLM looks for the kind of model there, too
    except OSError as error:
        raise disk_error(error, tokenizer) from error
    model = weights.folder(tuned=not apart)
    if weights.log.parent in model.parents:  # not the model's own folder
        write_json(private / WRITTEN, {"root": str(weights.log.parent), "folder": str(model.parent)})
    rank = (adapter, int(check_folder(adapter)["r"])) if apart and adapter is not None else None
    words = command(
        python=found.python, model=model, tokenizer=tokenizer, socket=private / SOCKET, dtype=device.dtype_name,
        config=config, memory=_memory(), adapter=rank, options=engine_options(),
    )  # fmt: skip
    print(f"starting vLLM {found.version}", flush=True)
    os.chdir(private)  # `python -m` looks for modules in its folder first
    os.execve(found.python, words, server_environment())


def _memory() -> float | None:
    """The part of the GPU that is free, without a reserve; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return round(max(0.05, min(MOST_MEMORY, (free - RESERVED_BYTES) / total)), 3)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"finetune: {error}")
