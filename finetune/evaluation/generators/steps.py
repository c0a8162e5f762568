"""Runs one decoding step: on a CUDA GPU by replaying a graph, because launching the kernels of a step one by one takes the
processor several times as long as the GPU needs to compute them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.errors import first_line
from finetune.evaluation.generators.asked import is_out_of_memory
from finetune.runtime.console import say


class Steps:
    """step(rows, columns): the work, which reads and writes tensors that stay where they are. state: those of them that it
    changes and that a trial run must leave as they are."""

    def __init__(self, step: Callable[[int, int], None], state: Sequence[Tensor], *, graphs: bool) -> None:
        self._step, self._state = step, state
        self.graphs = graphs
        self._captured: dict[tuple[int, int], Any] = {}
        self._pool: Any = None

    def run(self, rows: int, columns: int) -> None:
        if not self.graphs:
            self._step(rows, columns)
            return
        graph = self._captured.get((rows, columns))
        if graph is None:
            graph = self._try_capture(rows, columns)
        if graph is None:
            self._step(rows, columns)
        else:
            graph.replay()

    def _try_capture(self, rows: int, columns: int) -> Any:
        try:
            graph = self._captured[rows, columns] = self._capture(rows, columns)
            return graph
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.graphs = False
            self._captured.clear()
            say(f"decoding without CUDA graphs, which this model does not allow: {first_line(error)}")
            return None

    def _capture(self, rows: int, columns: int) -> Any:
        kept = [tensor.clone() for tensor in self._state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            stream
        ):  # libraries allocate what they need at their first call, which a graph must not hold
            self._step(rows, columns)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(self._state, kept, strict=True):
            tensor.copy_(value)
        torch.cuda.synchronize()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._step(rows, columns)
        return graph
