"""Makes the stand-in for vLLM the one that is found."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from finetune.evaluation.generators import vllm_place

HERE = Path(__file__).resolve().parent


def fake_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str = "0.24.0+cpu") -> None:
    """FINETUNE_VLLM names this Python, whose child processes find the stand-in. folder: for its metadata."""
    metadata = folder / f"vllm-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
    path = [str(HERE), str(folder), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    monkeypatch.setenv(vllm_place.VARIABLE, sys.executable)
    monkeypatch.setenv("FINETUNE_CACHE", str(folder / "cache"))
    vllm_place._probed.cache_clear()
