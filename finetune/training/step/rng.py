"""The random generators that a training step uses: Python's, NumPy's, torch's on the CPU and on this process's GPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

States = dict[str, Any]


def capture() -> States:
    """The states of all generators; takes about 0.1 ms and does not synchronise with the GPU."""
    name, keys, *rest = np.random.get_state()
    states: States = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: States) -> None:
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def file_of(folder: Path, rank: int) -> Path:
    return folder / f"rng-{rank}.pt"


def save(states: States, path: Path) -> None:
    torch.save(states, path)


def load(path: Path) -> States:
    """Raises FileNotFoundError."""
    states: States = torch.load(path, weights_only=True)
    return states
