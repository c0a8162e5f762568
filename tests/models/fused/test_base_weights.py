"""The frozen weights as the layers use them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from finetune.models.fused.base_weights import Scratch  # noqa: E402

CPU = torch.device("cpu")


def test_scratch_is_one_buffer_that_only_grows() -> None:
    scratch = Scratch(torch.float32, CPU)
    small = scratch.matrix(3, 4)
    large = scratch.matrix(10, 4)
    assert large.shape == (10, 4)
    assert scratch.matrix(2, 5).data_ptr() == large.data_ptr() != small.data_ptr()
    assert scratch.matrix(8, 5).is_contiguous()
