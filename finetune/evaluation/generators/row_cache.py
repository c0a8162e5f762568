"""The keys and values of the answers in progress: each row grows by itself, and may be replaced by another prompt's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class Shown:
    """What the next forward pass writes and reads, for all layers alike. places: (rows, tokens), the column of each new token.
    columns: attention sees the first so many."""

    places: Tensor
    columns: int


class RowLayer(CacheLayerMixin):
    """One layer: (rows, heads, columns + 1, head dimension). The last column takes what nobody reads, such as padding. Everything
    is zero at first, because what attention masks must still be a number."""

    def __init__(self, rows: int, columns: int, shown: Shown) -> None:
        super().__init__()
        self.rows, self.columns, self.shown = rows, columns, shown

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def buffer(like: Tensor) -> Tensor:
            return like.new_zeros(self.rows, like.shape[1], self.columns + 1, like.shape[3])

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        rows, places = len(key_states), self.shown.places[:, None, :, None]
        found = []
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[:rows].scatter_(2, places.expand(-1, new.shape[1], -1, new.shape[3]), new)
            found.append(buffer[:rows, :, : self.shown.columns])
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.shown.columns, 0

    def get_seq_length(self) -> int:
        return self.shown.columns - self.shown.places.shape[1]

    def get_max_length(self) -> int:
        return self.columns


Kept = list[tuple[Tensor, Tensor]]
"""Keys and values of one text, by layer: (heads, tokens, head dimension)."""


class RowCache(Cache):
    """A cache of `layers` layers for `rows` texts of at most `columns` tokens."""

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.shown = Shown(torch.empty(0, 0, dtype=torch.long), 0)
        super().__init__(layers=[RowLayer(rows, columns, self.shown) for _ in range(layers)])

    def show(self, places: Tensor, columns: int) -> None:
        self.shown.places, self.shown.columns = places, columns

    def put(self, first: int, last: int, kept: Kept) -> None:
        """Begin the rows first to last - 1 with the same text."""
        for layer, (keys, values) in zip(self.layers, kept, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            layer.keys[first:last, :, : keys.shape[1]] = keys
            layer.values[first:last, :, : values.shape[1]] = values

    def text(self, row: int, tokens: int) -> Kept:
        """A copy of the first tokens of a row."""
        return [(one.keys[row, :, :tokens].clone(), one.values[row, :, :tokens].clone()) for one in self.layers]

    def take(self, rows: Sequence[int], other: RowCache, columns: int) -> None:
        """Replace these rows by all of another cache, whose texts have at most `columns` tokens."""
        if not rows:
            return
        index = torch.tensor(rows, device=other.layers[0].keys.device)
        for layer, new in zip(self.layers, other.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(new.keys, new.values)
            layer.keys[index, :, :columns] = new.keys[:, :, :columns]
            layer.values[index, :, :columns] = new.values[:, :, :columns]

    def move(self, sources: Tensor, targets: Tensor, columns: int) -> None:
        """Copy rows over other rows, up to a column."""
        for layer in self.layers:
            layer.keys[targets, :, :columns] = layer.keys[sources, :, :columns]
            layer.values[targets, :, :columns] = layer.values[sources, :, :columns]

    def resized(self, rows: int, columns: int) -> RowCache:
        """One with other sizes and the same texts, which fit into it."""
        other = RowCache(len(self.layers), rows, columns)
        both, width = min(rows, self.rows), min(columns, self.columns)
        for layer, old in zip(other.layers, self.layers, strict=True):
            if old.is_initialized:
                layer.lazy_initialization(old.keys, old.values)
                layer.keys[:both, :, :width] = old.keys[:both, :, :width]
                layer.values[:both, :, :width] = old.values[:both, :, :width]
                old.keys = old.values = None
        return other
