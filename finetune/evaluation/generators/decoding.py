"""Continuous batching: a row whose answer has ended gets the next prompt, so that no row waits for the slowest.

- Prompts of one database share the keys and values of its schema, which is computed once (prefixes.py).
- On a GPU the next step is launched before the tokens of the last are read, so that it never waits for the rule that ends
  answers. A row computes one token more than needed; it is dropped.
- On a CPU a step computes only the rows that are in use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from finetune.evaluation.generators.asked import Asked, Finished, is_out_of_memory
from finetune.evaluation.generators.packed_head import packed_head
from finetune.evaluation.generators.passes import Passes, Text
from finetune.evaluation.generators.prefixes import groups
from finetune.evaluation.generators.row_cache import Kept, RowCache
from finetune.evaluation.generators.rows_attention import using
from finetune.evaluation.generators.sampling import chosen
from finetune.evaluation.generators.steps import Steps
from finetune.evaluation.generators.stopping import EndOfAnswers, GrowingAnswer
from finetune.runtime.console import say
from finetune.tokens import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
PASS_TOKENS = {"cuda": 8192, "cpu": 2048}
"""Prompt tokens, with padding, of one forward pass: more are not faster and need more memory."""
PADDING = {"cuda": float("inf"), "cpu": 1.15}
"""Texts share a pass if it has at most so many times their tokens. Padding costs a GPU little, compared with another pass."""
CPU_ROWS, CPU_CACHE_BYTES = 64, 2**30
"""Rows at once on a CPU, whatever the batch size, if the cache needs no more than these bytes: matrix products of 64 rows reach
1.4 times the rate of 25 (two cores, float32, SmolLM2-135M: 50 and 37 GFLOP/s a core)."""
COLUMNS = {"cuda": 128, "cpu": 8}
"""A step attends to a multiple of so many columns: on a GPU each number of columns is a graph of its own."""


@dataclass
class Prefix:
    """The beginning that some prompts share. left: prompts that still wait for it. kept: None until it is computed."""

    ids: list[int]
    left: int
    kept: Kept | None = None


@dataclass(eq=False)
class Row:
    """An answer in progress. length: tokens in the cache. launched: of the answer, of which some may not be read yet."""

    asked: Asked
    answer: GrowingAnswer
    slot: int
    length: int
    launched: int = 1
    read: int = 0
    ended: bool = False


@dataclass
class Flight:
    """Tokens on their way from the GPU. rows: with their places in `tokens`."""

    rows: list[tuple[int, Row]]
    tokens: Tensor
    arrived: Any


@dataclass
class Decoder:
    """Answers prompts, up to `batch_size` at once. temperature: None for greedy answers. finished: told of each answer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    temperature: float | None
    finished: Finished
    _queue: deque[Asked] = field(default_factory=deque)
    _taking: list[Asked] = field(default_factory=list)
    _prefixes: dict[int, Prefix] = field(default_factory=dict)
    _slots: list[Row | None] = field(default_factory=list)
    _flights: deque[Flight] = field(default_factory=deque)
    _cache: RowCache | None = None
    _most_cells: float = float("inf")

    def __post_init__(self) -> None:
        self._passes = Passes(self.model)
        device = self._passes.device
        self._kind = "cuda" if device.type == "cuda" else "cpu"
        self._common = EndOfAnswers(self.tokenizer, stop_ids(self.tokenizer, self.model))
        self._tokens, self._lengths, self._drawn, self._seeds = (
            torch.zeros(max(self.batch_size, CPU_ROWS), dtype=torch.long, device=device) for _ in range(4)
        )

    def answer(self, asked: Sequence[Asked]) -> None:
        """Whatever order the prompts have, those that begin alike and those of similar length come together, longest first.

        If memory runs out, the answers in progress begin again, half as many at once. A prompt for which it does not suffice
        alone has the problem out_of_memory.
        """
        for group in groups([one.ids for one in asked]):
            members = [asked[place] for place in group.members]
            self._queue.extend(members)
            if group.prefix:
                prefix = Prefix(members[0].ids[: group.prefix], len(members))
                self._prefixes |= {one.number: prefix for one in members}
        while self._queue or any(self._slots):
            failed = False
            try:
                causal, attention = self._passes.causal, str(self._passes.attention)
                with torch.inference_mode(), using(causal, attention), packed_head(causal):
                    self._work()
            except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
                if not is_out_of_memory(error):
                    raise
                failed = True
            if failed:  # after the except clause, whose traceback keeps the tensors
                self._with_less_memory()

    def _work(self) -> None:
        while self._queue or any(self._slots) or self._flights:
            self._refill()
            self._advance()
            self._read(keep=1 if self._kind == "cuda" and any(self._slots) else 0)

    # new rows

    def _refill(self) -> None:
        """Give free rows to the next prompts; on a GPU several at once, since a pass takes the same time for a few as for one."""
        patience = max(1, len(self._slots) // (4 if self._kind == "cuda" else 8))
        live = [row for row in self._slots if row]
        if not self._queue:
            return
        if self._cache is None or len(live) + min(patience, len(self._queue)) <= len(self._slots) or not live:
            self._make_room(live)
            free = [slot for slot, row in enumerate(self._slots) if row is None]
            self._taking = [self._queue.popleft() for _ in range(min(len(free), len(self._queue)))]
            self._compute_prefixes(self._taking)
            for part in self._parts(self._taking, [len(one.ids) - self._start(one) for one in self._taking]):
                self._begin(part, [free.pop(0) for _ in part])
            self._taking = []

    def _start(self, one: Asked) -> int:
        prefix = self._prefixes.get(one.number)
        return len(prefix.ids) if prefix else 0

    def _make_room(self, live: Sequence[Row]) -> None:
        """A cache for the longest of the prompts left, smaller than before where half of it suffices."""
        longest = max(one.total for one in (*(row.asked for row in live), *self._queue))
        columns = _multiple(longest, COLUMNS[self._kind])
        if self._cache is not None and 2 * columns > self._cache.columns:
            return
        most = min(self._rows_for(columns), len(live) + len(self._queue), self._most_cells / columns)
        rows = max(1, len(live), int(most))
        if self._cache is None:
            self._cache = self._passes.cache(rows, columns)
        else:
            self._compact(live, len(live))
            self._cache = self._cache.resized(rows, columns)
        self._last_position = longest - 1
        self._slots = [*(self._slots[: len(live)]), *[None] * (rows - len(live))]
        state = (self._tokens, self._lengths, self._drawn)
        self._steps = Steps(self._step, state, graphs=self._kind == "cuda")

    def _parts(self, items: Sequence[T], widths: Sequence[int]) -> list[list[T]]:
        """Items with these numbers of tokens in the parts that each go through one forward pass, the longest first."""
        parts: list[list[T]] = []
        widest = tokens = 0
        for width, place in sorted(((width, place) for place, width in enumerate(widths)), key=lambda pair: -pair[0]):
            padded = (len(parts[-1]) + 1) * widest if parts else 0
            if not parts or padded > min(PASS_TOKENS[self._kind], PADDING[self._kind] * (tokens + width)):
                parts.append([])
                widest, tokens = width, 0
            parts[-1].append(items[place])
            tokens += width
        return parts

    def _begin(self, part: Sequence[Asked], slots: Sequence[int]) -> None:
        """Compute the prompts and the first token of each answer."""
        assert self._cache is not None
        part = sorted(
            part, key=lambda one: id(self._prefixes.get(one.number))
        )  # rows with the same beginning side by side
        texts = []
        for one in part:
            prefix, start = self._prefixes.get(one.number), self._start(one)
            texts.append(Text(one.ids[start:], start, prefix.kept if prefix else None))
        begun, logits = self._passes.begin(texts)
        self._cache.take(slots, begun, begun.columns)
        index, lengths, seeds = map(
            self._passes.on_device, (slots, [len(one.ids) for one in part], [one.seed for one in part])
        )
        tokens = chosen(logits, self.temperature, seeds, torch.zeros_like(seeds))
        self._tokens[index], self._lengths[index], self._drawn[index], self._seeds[index] = tokens, lengths, 1, seeds
        rows = [
            Row(one, self._common.answer(one.dialect), slot, len(one.ids))
            for one, slot in zip(part, slots, strict=True)
        ]
        for row in rows:
            self._slots[row.slot] = row if row.asked.room > 1 else None
            if prefix := self._prefixes.pop(row.asked.number, None):
                prefix.left -= 1
                prefix.kept = prefix.kept if prefix.left else None
        self._send(tokens, list(enumerate(rows)))

    def _compute_prefixes(self, asked: Sequence[Asked]) -> None:
        needed = {id(p): p for one in asked if (p := self._prefixes.get(one.number)) and p.kept is None}
        missing = list(needed.values())
        for part in self._parts(missing, [len(prefix.ids) for prefix in missing]):
            cache, _ = self._passes.begin([Text(prefix.ids) for prefix in part])
            for row, prefix in enumerate(part):
                prefix.kept = cache.text(row, len(prefix.ids))

    def _rows_for(self, columns: int) -> int:
        if self._kind == "cuda":
            return self.batch_size
        return max(self.batch_size, min(CPU_ROWS, CPU_CACHE_BYTES // (columns * self._passes.column_bytes)))

    # one step

    def _advance(self) -> None:
        """Launch one more token of every row."""
        live = [row for row in self._slots if row]
        if not live:
            return
        rows = len(live)
        if self._kind == "cuda":  # a graph for each number of rows: all of them, a quarter, ...
            rows = len(self._slots)
            while rows >= 4 and len(live) <= rows // 4 and not self._queue:
                rows //= 4
        self._compact(live, rows)
        assert self._cache is not None
        columns = _multiple(max(row.length for row in live) + 1, COLUMNS[self._kind])
        self._steps.run(rows, min(columns, self._cache.columns))
        for row in live:
            row.length += 1
            row.launched += 1
            if row.launched == row.asked.room:
                self._slots[row.slot] = None
        self._send(self._tokens[:rows], [(row.slot, row) for row in live])

    def _step(self, rows: int, columns: int) -> None:
        assert self._cache is not None
        lengths = self._lengths[:rows]  # those of free rows grow on, into the column that nobody reads
        places = lengths.clamp(max=self._cache.columns)[:, None]
        positions = lengths.clamp(max=self._last_position)[:, None]
        logits = self._passes.forward(self._cache, self._tokens[:rows, None], positions, places, columns)
        self._tokens[:rows] = chosen(logits, self.temperature, self._seeds[:rows], self._drawn[:rows])
        self._lengths[:rows] += 1
        self._drawn[:rows] += 1

    def _compact(self, live: Sequence[Row], rows: int) -> None:
        """Move what is in progress into the first `rows` rows."""
        moving = [row for row in live if row.slot >= rows]
        if not moving:
            return
        assert self._cache is not None
        free = [slot for slot in range(rows) if self._slots[slot] is None][: len(moving)]
        sources, targets = self._passes.on_device([row.slot for row in moving]), self._passes.on_device(free)
        self._cache.move(sources, targets, max(row.length for row in moving))
        for state in (self._tokens, self._lengths, self._drawn, self._seeds):
            state[targets] = state[sources]
        for row, slot in zip(moving, free, strict=True):
            self._slots[row.slot], self._slots[slot] = None, row
            row.slot = slot

    # tokens

    def _send(self, tokens: Tensor, rows: list[tuple[int, Row]]) -> None:
        """Begin to copy new tokens to where the rule that ends answers can read them."""
        if self._kind == "cpu":
            self._flights.append(Flight(rows, tokens.clone(), None))
            return
        here = torch.empty(len(tokens), dtype=tokens.dtype, pin_memory=True)
        here.copy_(tokens, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._flights.append(Flight(rows, here, arrived))

    def _read(self, keep: int) -> None:
        """Add all tokens but those of the last `keep` passes to their answers."""
        while len(self._flights) > keep:
            flight = self._flights.popleft()
            if flight.arrived is not None:
                flight.arrived.synchronize()
            tokens = flight.tokens.tolist()
            for place, row in flight.rows:
                if row.ended:
                    continue
                row.read += 1
                row.ended = row.answer.add(tokens[place]) or row.read == row.asked.room
                if row.ended:
                    if self._slots[row.slot] is row:
                        self._slots[row.slot] = None
                    self.finished(row.asked, row.answer.ids, None)

    # memory

    def _with_less_memory(self) -> None:
        """Drop the cache and the answers in progress; the next attempt has half as many at once."""
        rows, columns = (self._cache.rows, self._cache.columns) if self._cache else (1, 0)
        begun = {row.asked.number: row.asked for row in self._slots if row}
        begun |= {row.asked.number: row.asked for flight in self._flights for _, row in flight.rows if not row.ended}
        begun |= {one.number: one for one in self._taking}
        again = sorted(begun.values(), key=lambda one: -len(one.ids))
        self._cache, self._slots, self._taking = None, [], []
        self._steps = Steps(self._step, (), graphs=False)
        self._flights.clear()
        for prefix in {id(one): one for one in self._prefixes.values()}.values():
            prefix.kept = None
        if self._kind == "cuda":
            torch.cuda.empty_cache()
        longest = max((len(one.ids) for one in (*again, *self._queue)), default=0)
        if rows > 1:
            say(f"out of memory with prompts of up to {longest} tokens, {rows} at once: going on with {rows // 2}")
            self._most_cells = (rows // 2) * columns
            self._queue.extendleft(reversed(again))
            return
        first, *others = again or [self._queue.popleft()]
        self._queue.extendleft(reversed(others))
        self._prefixes.pop(first.number, None)
        say(f"out of memory with a prompt of {len(first.ids)} tokens alone; it counts as out_of_memory")
        self.finished(first, [], "out_of_memory")


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
