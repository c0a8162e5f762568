"""The typed schema of a run's YAML: every section, key, type and default. `config.load` reads and checks it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from omegaconf import MISSING

from finetune.machine.gpus import MACHINES

PATH = "path"
PathText = Annotated[str, PATH]
"""A key that holds a path: `~` and variables in it are expanded when the config is loaded (`config.references`)."""
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
GPU_OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
"""The values of training.optim that no CPU has."""
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass
class ModelSection:
    name: PathText = MISSING  # a hub id, a local folder, or package://<module>/<file>.gguf
    revision: str | None = None  # commit of the hub id; without it the hub may serve other weights later
    max_seq_length: int = 2048  # tokens of prompt + answer; longer examples are dropped and counted, never truncated
    torch_dtype: Dtype = "auto"  # auto: bfloat16 from compute capability 8.0, float16 below, float32 on CPU
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    trust_remote_code: bool = False
    cpu_bf16_matmul: bool = False  # on a CPU with bfloat16 instructions: round the inputs of float32 matrix products


@dataclass
class QuantizationSection:
    load_in_4bit: bool = True
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True


@dataclass
class LoraSection:
    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@dataclass
class SourceSection:
    kind: Literal["jsonl", "spider", "huggingface"] = MISSING
    path: PathText = MISSING  # a file (jsonl), or a folder or hub id (spider, huggingface)
    revision: str | None = None  # required where path is a hub id
    files: list[PathText] = field(default_factory=list)  # spider: question files inside path, e.g. train_spider.json
    subset: str | None = None  # huggingface: which split of the dataset to read, e.g. train
    columns: dict[str, str] = field(default_factory=dict)  # huggingface: field of our records -> column of the dataset
    databases: PathText | None = None  # folder that holds <db_id>/<db_id>.sqlite; spider: <path>/database
    dialect: str = "sqlite"
    split: Literal["auto", "train", "val", "test"] = (
        "auto"  # auto: the record's own split if it has one, else by fraction
    )


@dataclass
class DataSection:
    sources: list[SourceSection] = field(default_factory=list)
    output_dir: PathText = MISSING  # where `data prepare` writes and every later stage reads
    val_fraction: float = 0.05  # of the records whose split is auto
    test_fraction: float = 0.1
    split_by: Literal["question", "database"] = "question"
    statements: Literal["all", "select"] = (
        "all"  # all: INSERT, DELETE ... as gold are faults; select: they are left out
    )
    schema_format: Literal["ddl", "compact"] = "ddl"  # how the prompt shows the schema; compact takes fewer tokens
    max_train_records: int | None = None
    seed: int = 13


@dataclass
class TrainingSection:
    output_dir: PathText = "runs"
    run_name: str | None = None  # null: a new folder, named after the config file and numbered
    seed: int = 42
    objective: str = "sft"  # a name of finetune/training/objectives/registry.py
    num_train_epochs: float = 3.0
    max_steps: int = -1  # -1: as many as the epochs take
    effective_batch_size: int | None = (
        None  # examples per optimizer step; null: 16, or the product of the two keys below
    )
    per_device_train_batch_size: int | Literal["auto"] = "auto"  # examples per micro-batch; auto: as many tokens as fit
    gradient_accumulation_steps: int | None = (
        None  # micro-batches per optimizer step and GPU, null: 1; not with auto above
    )
    per_device_eval_batch_size: int = 8
    learning_rate: float = 2e-4
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = 0.03  # of all optimizer steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = (
        "paged_adamw_8bit"
    )
    gradient_checkpointing: bool | Literal["auto"] = "auto"  # auto: for as few layers as memory allows
    max_memory_gib: float | None = None  # GPU memory that training may use; null: all of it
    kernels: Literal["auto", "fused", "hf"] = (
        "auto"  # fused: our layer (finetune/models/fused/layer.py); hf: transformers' and PEFT's
    )
    group_by_length: bool = True  # padded batches (Hugging Face backend): examples of similar length share a step
    logging_steps: int = 10
    eval_steps: int = 200  # optimizer steps between two validation losses; 0: none


@dataclass
class CheckpointSection:
    """A checkpoint is saved when the first of the two intervals is over, and at the end."""

    every_minutes: float | None = (
        10.0  # training time between checkpoints, lost at most by a preemption; null: by steps only
    )
    save_steps: int | None = None  # optimizer steps between checkpoints; null: by time only
    keep_last: int = 2
    keep_every: int | None = None  # every n-th checkpoint is never deleted; null: none


@dataclass
class BudgetSection:
    usd_per_hour: float | None = None  # price of the whole machine; machines launched by SkyPilot know their own
    max_run_usd: float | None = None  # US dollars, all attempts together, with the score; needs a price
    max_hours: float | None = None  # billed time of all attempts together, with boot and set-up of a cloud machine


@dataclass
class PlanSection:
    """Assumptions of `finetune plan`: values that are not measured."""

    gpus: list[str] = field(
        default_factory=lambda: list(MACHINES)
    )  # names of finetune/machine/gpus.py, such as L4 and L4:2
    disk_gib: int = 200  # boot disk of the machine, as in the task YAMLs
    setup_minutes: float | None = (
        None  # paid before the first step, from the boot on; null: the median of your launches, else 12
    )
    spot_preemptions_per_hour: float = 0.05  # one in 20 hours; Google publishes no rate for GPUs
    records: int | None = None  # training examples, if the data are not prepared; null: counted in local sources
    mean_tokens: float = 515.0  # of one example, if no tokenizer has counted them; 515: measured, Spider with ddl
    questions: int | None = (
        None  # that the run is scored on, if the data are not prepared; null: counted in local sources
    )
    answer_tokens: float = 64.0  # of one generated answer, if no tokenizer has counted the gold ones


@dataclass
class TrackingSection:
    to: list[str] | None = (
        None  # some of tensorboard, wandb, mlflow, trackio; []: none; null: tensorboard, W&B if it is on
    )
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online if a key is found
    wandb_project: str = "text2sql"
    project: str | None = None  # MLflow's experiment and Trackio's project; null: as wandb_project


FEW_QUESTIONS = 32
"""With evaluation.generator=auto fewer are answered by hf, because vLLM takes a minute or more to load (measured on an H200 with
a 7B model: 100 s)."""


@dataclass
class EvaluationSection:
    split: Literal["test", "val"] = "test"
    max_questions: int | None = None  # null: all; else a seeded sample of the split
    generator: Literal["auto", "vllm", "hf"] = (
        "auto"  # who generates answers; auto: vLLM where it is installed and runs
    )
    adapter: Literal["auto", "merged", "apart"] = (
        "auto"  # auto: merged into the weights where those have 16 bits or more
    )
    dtype: Dtype = (
        "auto"  # that answers are computed in; auto: float32 below 1 billion parameters, else that of training
    )
    batch_size: int = 16
    max_new_tokens: int = 256
    samples: int = 1  # answers drawn for each question besides the greedy one, and put to a vote; 1: none
    temperature: float = 0.8  # of the drawn answers; lower: more alike
    seed: int = 42  # of the drawn answers
    retries: int = 0  # how often a question whose SQL does not run is asked again, with the error message
    timeout_seconds: float = 10.0  # for one SQL query
    max_memory_mib: int = 512  # of the process that runs SQL queries
    max_temp_mib: int = 512  # for one temporary file of a query, as large sorts and groups need; 0: none, all in memory
    max_rows: int = 100_000  # of a query's result
    max_result_mib: int = 32  # of a query's result, and of any value in it
    large_database_mib: float | None = (
        128.0  # the five limits above are for smaller databases, and grow in proportion for larger ones; null: they do not
    )
    rule: Literal["test_suite", "test_suite_no_distinct", "bird_set", "strict"] = (
        "test_suite"  # when two results are considered equal; eval.json holds the scores under all of them
    )
    dequantize: bool | Literal["auto"] = (
        "auto"  # unpack 4-bit weights once, when they are loaded: same results, faster, more memory; auto: on a GPU with room
    )


@dataclass
class RunConfig:
    model: ModelSection = field(default_factory=ModelSection)
    quantization: QuantizationSection = field(default_factory=QuantizationSection)
    lora: LoraSection = field(default_factory=LoraSection)
    data: DataSection = field(default_factory=DataSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    budget: BudgetSection = field(default_factory=BudgetSection)
    plan: PlanSection = field(default_factory=PlanSection)
    tracking: TrackingSection = field(default_factory=TrackingSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
