"""The inputs of a run: checked first, then loaded into memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.load import examples_per_step
from finetune.config.schema import GPU_OPTIMIZERS, BudgetSection, RunConfig
from finetune.data.prepared import Prepared, load_prepared
from finetune.data.prompts import PromptTemplate, dialects_of
from finetune.data.records import Split
from finetune.data.tokenize import Examples, tokenise
from finetune.errors import UserError
from finetune.machine.price import MachinePrice, machine_price
from finetune.machine.set_up import EXAMPLES, WEIGHTS
from finetune.models.device import Device, choose_device
from finetune.models.load import attach_lora, load_base, load_model_config, load_tokenizer
from finetune.models.target_modules import check_target_modules
from finetune.prepared_from import check_prepared_from
from finetune.runtime import distributed
from finetune.runtime.console import say
from finetune.training.objectives.registry import objective_named
from finetune.training.tracking.names import check_trackers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inputs:
    """The checked inputs of a run."""

    config: RunConfig
    device: Device
    data: Prepared
    template: PromptTemplate
    price: MachinePrice | None


@dataclass(frozen=True)
class Parts:
    """Tokenizer, examples and model, in memory."""

    tokenizer: PreTrainedTokenizerBase
    train: Examples
    validation: Examples
    model: PeftModel


def inputs_of(config: RunConfig, *, resumes: bool = False) -> Inputs:
    """Check the inputs of a run without loading a model. Raises UserError for inputs that no run can start with.

    resumes: a run whose data are known by their hash, so that they need not be compared with the config."""
    check_trackers(config.tracking)
    examples_per_step(config.training, distributed.world_size())
    objective_named(config.training.objective)
    price = price_of(config.budget)
    device = choose_device(config.model.torch_dtype)
    if device.place.type == "cpu" and config.training.optim in GPU_OPTIMIZERS:
        raise UserError(
            f"training.optim: {config.training.optim} needs a GPU; on a CPU use training.optim=adamw_torch",
            code="training.optim_needs_gpu",
        )
    data = load_prepared(Path(config.data.output_dir))
    template = PromptTemplate(config.data.schema_format)
    if data.manifest["prompt"] != template.identity():
        raise UserError(
            f"{data.folder}: was prepared for prompt {data.manifest['prompt']}, but this config uses "
            f"{template.identity()}; run `finetune data prepare CONFIG` again",
            code="prompt.mismatch",
        )
    if not resumes:
        check_prepared_from(data.folder, data.manifest, config.data)
    own = load_model_config(config.model)
    check_target_modules(own, config.lora, trust_remote_code=config.model.trust_remote_code)
    return Inputs(config, device, data, replace(template, dialects=dialects_of(data.records("train"))), price)


def load_parts(inputs: Inputs, done: Callable[[str], None] = lambda part: None) -> Parts:
    """done: called with the name of each part of the set-up (machine/set_up.py) when it ends."""
    from transformers import set_seed

    tokenizer = load_tokenizer(inputs.config.model)
    train, validation = _examples(inputs, tokenizer, "train"), _examples(inputs, tokenizer, "val")
    done(EXAMPLES)
    set_seed(inputs.config.training.seed)  # before the adapters are drawn
    base = load_base(inputs.config.model, inputs.config.quantization, inputs.device)
    base.config.use_cache = False
    model = attach_lora(base, inputs.config.lora)
    done(WEIGHTS)
    return Parts(tokenizer, train, validation, model)


def _examples(inputs: Inputs, tokenizer: PreTrainedTokenizerBase, split: Split) -> Examples:
    limit = inputs.config.model.max_seq_length
    encode = objective_named(inputs.config.training.objective).encode
    examples = tokenise(inputs.data.records(split), inputs.template, tokenizer, limit, encode)
    if examples.too_long:
        say(
            f"{split}: {examples.too_long} examples are longer than model.max_seq_length={limit} tokens and are left out"
        )
    if split == "train" and not len(examples):
        raise UserError(f"model.max_seq_length: no training example fits into {limit} tokens", code="data.too_long")
    return examples


def price_of(budget: BudgetSection) -> MachinePrice | None:
    """The price of the machine, from the launch policy's price table or else from the config. Raises UserError if the budget
    has a ceiling in US dollars and no price is known."""
    price = machine_price()
    if price is None and budget.usd_per_hour is not None:
        price = MachinePrice(budget.usd_per_hour, "budget.usd_per_hour of the config")
    if price is None and budget.max_run_usd is not None:
        raise UserError(
            "budget.max_run_usd: the price of this machine is unknown (no launch policy started it); set budget.usd_per_hour",
            code="price.unknown",
        )
    return price
