"""Unsloth considers FlashAttention-2 available if this module exists."""

from __future__ import annotations

import torch

from flash_attn import flash_attn_func, flash_attn_varlen_func

__all__ = ["flash_attn_func", "flash_attn_gpu", "flash_attn_varlen_func"]

flash_attn_gpu = torch.ops.aten
