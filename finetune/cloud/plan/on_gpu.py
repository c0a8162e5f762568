"""A run on one type of machine, without prices: whether it fits, how fast it is, how many hours it works.

Hours are those of training and validation; `plan.py` adds boot, set-up, the score and what preemptions cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune.cloud.plan.workload import EvaluationSize, RunSize, size_on
from finetune.config.load import examples_per_step
from finetune.config.schema import CheckpointSection, RunConfig
from finetune.errors import NotEstimated, UserError
from finetune.estimate.fit import Fitted, MicroBatchConfig, fit_on, usual_step_tokens
from finetune.estimate.generation import GenerationSpeed, answering_speed
from finetune.estimate.speed import Speed, data_parallel, micro_batch_seconds, training_speed
from finetune.estimate.speed_fused import FusedStep, fused_speed, fused_step_seconds
from finetune.machine.gpus import GpuSpec, machine_name
from finetune.models.architectures import SHAPES, ModelShape, shape_of

VALIDATION_COST = 1 / 3
"""Cost of a validation token relative to a training token: the forward pass alone, of a forward pass and two backward products
(one with a 4-bit base), so 1/3 is on the safe side. Estimated."""


@dataclass(frozen=True)
class Scoring:
    """The score of a run on one type of GPU: base and tuned model. hours: with loading."""

    speed: GenerationSpeed
    hours: float


@dataclass(frozen=True)
class OnGpu:
    """A run on one type of GPU, without prices. Memory in GiB; hours of training and validation only. scoring: None if the run is
    not scored, or if it is unknown how many questions there are.

    micro_batch_config: how the fused backend computes a step on this GPU; None with the Hugging Face backend. available_gib: GPU
    memory that the run may use, None for all of it. batch_size: examples in a step, over all GPUs. conflict: why no run begins on
    so many GPUs, whose figures are then those with training.effective_batch_size alone; "" if one does.
    """

    gpu: GpuSpec
    needed_gib: float
    fits: bool
    speed: Speed
    work_hours: float
    save_hours: float  # work between two checkpoints
    save_key: str = "checkpoint.every_minutes"  # the config key that determines save_hours
    count: int = 1  # GPUs in the machine, each of which needs needed_gib; speed is that of all
    micro_batch_config: MicroBatchConfig | None = None
    available_gib: float | None = None
    scoring: Scoring | None = None
    batch_size: int = 0
    conflict: str = ""

    @property
    def possible(self) -> bool:
        """Whether the run fits, and begins."""
        return self.fits and not self.conflict

    @property
    def name(self) -> str:
        return machine_name(self.gpu.name, self.count)


def run_on(
    config: RunConfig,
    size: RunSize,
    gpu: GpuSpec,
    evaluation: EvaluationSize | None = None,
    count: int = 1,
    nodes: int = 1,
) -> OnGpu:
    """Memory, speed and hours of the run on one GPU, or on `count` in one machine, of which one answers when it is scored.

    size: on any number of GPUs. evaluation: of the score with which it ends. nodes: such machines that train together; how much
    faster that is, is not estimated. Raises NotEstimated if the model's shape is unknown.
    """
    shape = shape_of(config.model.name)
    if shape is None:
        raise NotEstimated(
            f"model.name: the shape of {config.model.name} is not known here, so its memory and time cannot be estimated; "
            f"known: {', '.join(SHAPES)}, and every local folder with a config.json",
            code="model.unknown_shape",
        )
    gpus = count * nodes
    conflict = _conflict(config, gpus)
    if conflict:
        config = replace(config, training=replace(config.training, gradient_accumulation_steps=None))
    size, batch_size = size_on(size, config.training, gpus), examples_per_step(config.training, gpus)
    fitted = fit_on(config, shape, gpu, usual_step=usual_step_tokens(batch_size, size.mean_tokens), gpus=gpus)
    speed = _speed(config, size, gpu, shape, fitted, count, batch_size)
    seconds = (size.tokens + size.validation_tokens * VALIDATION_COST) / speed.tokens_per_second
    work_hours = seconds / 3600
    save_hours, save_key = save_interval(config.checkpoint, work_hours, size.steps)
    return OnGpu(
        gpu=gpu,
        needed_gib=fitted.needed_gib,
        fits=fitted.fits,
        speed=speed,
        work_hours=work_hours,
        save_hours=save_hours,
        save_key=save_key,
        count=count,
        micro_batch_config=fitted.limits,
        available_gib=fitted.memory_gib,
        scoring=_scoring(config, gpu, shape, evaluation) if evaluation else None,
        batch_size=batch_size,
        conflict=conflict,
    )


def _conflict(config: RunConfig, gpus: int) -> str:
    """Why no run of this config begins on so many GPUs; "" if one does."""
    try:
        examples_per_step(config.training, gpus)
    except UserError as error:
        return f"no run begins on {gpus} GPUs with these batch sizes: {error}"
    return ""


def _scoring(config: RunConfig, gpu: GpuSpec, shape: ModelShape, size: EvaluationSize) -> Scoring:
    """Judging is left out: it runs beside generating, on the CPU."""
    speed = answering_speed(config, gpu, shape, size.questions)
    return Scoring(speed, (speed.loading_seconds + size.new_tokens / speed.tokens_per_second) / 3600)


def save_interval(section: CheckpointSection, work_hours: float, steps: int) -> tuple[float, str]:
    """Hours of work between two checkpoints, and the config key that determines them: the shorter interval of the two.

    A checkpoint is saved at the end of a step, so the interval is at least one step. It is at most the whole run, which is
    also the interval if neither key is set.
    """
    step_hours = work_hours / steps
    found = [(work_hours, "checkpoint.every_minutes")]
    if section.save_steps is not None:
        found.insert(0, (section.save_steps * step_hours, "checkpoint.save_steps"))
    if section.every_minutes is not None:
        found.insert(0, (max(section.every_minutes / 60, step_hours), "checkpoint.every_minutes"))
    hours, key = min(found[:-1] or found, key=lambda each: each[0])
    return min(hours, work_hours), key


def _speed(
    config: RunConfig, size: RunSize, gpu: GpuSpec, shape: ModelShape, fitted: Fitted, count: int, batch_size: int
) -> Speed:
    """Of `count` GPUs together; a step takes at least as long as the host needs for one example."""
    if fitted.limits is None:
        assert fitted.micro_batch_size is not None
        one = training_speed(
            gpu,
            shape,
            micro_batch_size=fitted.micro_batch_size,
            mean_tokens=size.mean_tokens,
            checkpointing=fitted.checkpointing,
        )
        least = micro_batch_seconds(gpu, shape, size.mean_tokens, checkpointing=fitted.checkpointing)
        return data_parallel(one, count, batch_size, batch_size * size.mean_tokens, least)
    step = FusedStep(
        batch_size=batch_size,
        mean_tokens=size.mean_tokens,
        tokens=fitted.limits.tokens,
        uncheckpointed_layers=fitted.limits.uncheckpointed_layers,
        dequantized_layers=fitted.limits.dequantized_layers,
        micro_batch_size=fitted.micro_batch_size,
        dropout=config.lora.lora_dropout > 0,
        four_bit=config.quantization.load_in_4bit,
    )
    least = fused_step_seconds(gpu, shape, size.mean_tokens, replace(step, batch_size=1))
    return data_parallel(fused_speed(gpu, shape, step), count, batch_size, batch_size * size.mean_tokens, least)
