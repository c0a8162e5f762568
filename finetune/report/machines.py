"""Which machines a run was trained and scored on, in words."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from finetune.budget.ledger import Ledger
from finetune.errors import UserError
from finetune.run_record import HardwareRecord, RunRecord

NO_CLOUD = "not a cloud machine, or its type and zone were not recorded"


def machines(run: RunRecord, folder: Path) -> list[tuple[str, str]]:
    """(label, text): what trained, on which machines in which zones, and what scored, as far as it was recorded."""
    found = [("Trained on", trained_on(run))] if trained_on(run) else []
    scored = _scored_on(folder)
    return [*found, ("Scored on", scored)] if scored else found


def trained_on(run: RunRecord) -> str:
    """The processor that trained, and the machines of all attempts; "" if run.json does not say."""
    processor = _processor(run.hardware or HardwareRecord())
    attempts = [_place(each.gpu, each.machine, each.spot, each.zone) for each in run.attempt_log or ()]
    places = _distinct(attempts)
    if not processor and not places:
        return ""
    return f"{processor or 'unknown processor'} ({places or NO_CLOUD})"


def capability(numbers: Iterable[int] | None) -> str | None:
    """A GPU's compute capability as NVIDIA writes it: 9.0."""
    return None if numbers is None else ".".join(map(str, numbers))


def _processor(hardware: HardwareRecord) -> str:
    memory = f", {hardware.ram_gib:g} GiB of memory" if hardware.ram_gib else ""
    gpu = hardware.gpu
    if gpu and gpu.name:
        count = f"{gpu.count} x " if gpu.count and gpu.count > 1 else ""
        each = f", {gpu.memory_gib:g} GiB" if gpu.memory_gib else ""
        return f"{count}{gpu.name}{each}"
    cores = f", {hardware.cores} cores" if hardware.cores else ""
    return f"{hardware.cpu}{cores}{memory}, no GPU" if hardware.cpu else ""


def _scored_on(folder: Path) -> str:
    """The machines of the scoring attempts in the ledger, which only a cloud machine's job writes."""
    try:
        attempts = Ledger(folder / "ledger").account().of("evaluate").attempts
    except UserError:
        return ""
    known = (attempt.machine for attempt in attempts)
    return _distinct(_place(each.get("gpu"), each.get("machine"), each.get("spot"), each.get("zone")) for each in known)


def _place(gpu: str | None, machine: str | None, spot: bool | None, zone: str | None) -> str:
    if not machine and not zone:
        return ""
    kind = None if spot is None else "spot" if spot else "on-demand"
    return ", ".join(part for part in (gpu, machine, kind, zone) if part)


def _distinct(places: Iterable[str]) -> str:
    return "; then ".join(dict.fromkeys(filter(None, places)))
