"""vLLM's environment on a cloud machine, which on_machine/setup.sh builds beside training: waits for it where it is needed.

~/finetune-vllm             the environment; it gets this name when it is complete
~/.finetune/vllm.lock       locked while it is built
~/.finetune/vllm.missing    why there is none, in one line
"""

from __future__ import annotations

import time
from pathlib import Path

from finetune.job.programs import say
from finetune.job.settings import JobSettings
from finetune.runtime.locks import is_locked

ENVIRONMENT = Path("finetune-vllm")
"""In the home folder, where the answer generator looks for it."""
LOCK, MISSING = "vllm.lock", "vllm.missing"
VARIABLE = "FINETUNE_VLLM"
"""Another environment's Python, which nobody builds."""
POLL_SECONDS = 1.0


def wait_for_vllm(settings: JobSettings, seconds: float) -> bool:
    """Wait until the environment is there or will not come, for at most VLLM_MINUTES and `seconds`. Returns whether it is there;
    if it is not, one line says why."""
    if settings.environment.get(VARIABLE):
        return True
    python = settings.state.parent / ENVIRONMENT / "bin" / "python"
    limit = min(60 * float(settings.vllm_minutes), seconds)
    began, told = time.monotonic(), False
    while not python.exists() and is_locked(settings.state / LOCK):
        waited = time.monotonic() - began
        if waited >= limit:
            say(
                f"vLLM's environment is not complete after {waited / 60:.1f} minutes (VLLM_MINUTES); going on without it"
            )
            return False
        if not told:
            told = True
            say(f"waiting up to {limit / 60:.1f} minutes for vLLM's environment (VLLM_MINUTES)")
        time.sleep(min(POLL_SECONDS, limit))
    if python.exists():
        if told:
            say(f"vLLM's environment came after {time.monotonic() - began:.0f} s")
        return True
    if why := _text(settings.state / MISSING):
        say(f"without vLLM: {why}")
    return False


def _text(path: Path) -> str:
    try:
        return " ".join(path.read_text(encoding="utf-8", errors="replace").split())[:300]
    except OSError:
        return ""
