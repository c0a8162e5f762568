"""Which entry of GPUS is that of a machine's GPU, or the most similar one."""

from __future__ import annotations

import pytest

from finetune.machine.gpus import known_gpu


@pytest.mark.parametrize(
    ("name", "capability", "memory_gib", "expected"),
    [
        ("Tesla T4", (7, 5), 14.6, "T4"),
        ("Tesla V100-SXM2-16GB", (7, 0), 15.8, "V100"),
        ("NVIDIA L4", (8, 9), 22.2, "L4"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 39.5, "A100"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 79.3, "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", (9, 0), 79.2, "H100"),
        ("NVIDIA H200", (9, 0), 139.8, "H200"),
        ("NVIDIA B200", (10, 0), 180.0, "B200"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0), 95.0, "RTXPRO6000"),
        ("NVIDIA GeForce RTX 5090", (12, 0), 31.4, "RTXPRO6000"),
        ("NVIDIA GB300", (10, 3), 270.0, "B200"),
        ("NVIDIA A10G", (8, 6), 22.1, "A100"),
        ("NVIDIA L40S", (8, 9), 44.5, "L4"),
        ("Quadro M4000", (5, 2), 8.0, "V100"),
    ],
)
def test_a_gpu_is_found_by_name_or_by_similarity(
    name: str, capability: tuple[int, int], memory_gib: float, expected: str
) -> None:
    assert known_gpu(name, capability, memory_gib).name == expected
