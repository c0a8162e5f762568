"""Processes that judge answers while others are generated.

- They are started with a fresh interpreter, since this process may hold a GPU, and end with this process, whatever ends it.
- Answers to questions with one gold query go to one process, so that it is executed once. A process with nothing left to do takes
  from one that is held up by a slow query.
- A process that ends, or says nothing for a long time, is replaced and its answers are judged again. An answer at which that
  happens twice is `crashed`.
- Each process keeps the promises of the sandbox, in a child of its own (finetune/sql/engines/sqlite.py).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data.records import Record
from finetune.errors import UserError
from finetune.evaluation.generators.base import Answer
from finetune.evaluation.judge import Outcome
from finetune.evaluation.judge_process import END_SECONDS, Asked, Ended, JudgeProcess
from finetune.sql.compare import RULES, Rule
from finetune.sql.difficulty import difficulty
from finetune.sql.engines.base import Limits
from finetune.sql.gold import SOUND

STALLED_SECONDS, STALLED_QUERIES = 600.0, 40
"""A process that is silent for so long, or for so many times the time limit of a query, is replaced. A question takes a few
queries."""
BATCH = 16
"""Answers in one message. A larger batch is not faster, and leaves less for others to take."""
HELD_UP_SECONDS = 0.5
DEATHS_IN_A_ROW = 8
"""Processes that end without having judged anything: it is then the machine, not the answers."""

Key = Hashable
"""What the caller calls a set of answers, with one answer to each question at most."""


class NotStarted(Exception):
    """No process for judging can be started here."""


@dataclass
class _Task:
    key: Key
    number: int
    answer: Answer
    deaths: int = 0


@dataclass
class _Lane:
    """The answers that wait for one process, and how many it has. since: when it got them, or gave its last verdict."""

    waiting: deque[_Task] = field(default_factory=deque)
    busy: int = 0
    since: float = 0.0
    process: JudgeProcess | None = None


@dataclass
class _Busy:
    """For how long at least one answer of a key was being judged."""

    running: int = 0
    since: float = 0.0
    seconds: float = 0.0

    def change(self, by: int) -> None:
        now = time.monotonic()
        if self.running:
            self.seconds += now - self.since
        self.running, self.since = self.running + by, now


class _Told(NamedTuple):
    message: str
    code: str


class JudgePool:
    """Judges answers in processes of its own. Call it from one thread."""

    def __init__(
        self, asked: Sequence[Asked], workers: int, *, rule: Rule, timeout_seconds: float, limits: Limits, nice: int = 0
    ) -> None:
        """asked: what the number of an answer means. nice: by how much the processes give way to others."""
        self._asked = asked
        self._settings = {
            "parent": os.getpid(),
            "rule": rule,
            "timeout_seconds": timeout_seconds,
            "limits": asdict(limits),
        }
        self._stalled = max(STALLED_SECONDS, STALLED_QUERIES * timeout_seconds)
        self._changed = threading.Condition()
        self._lanes: list[_Lane] = []
        self._lane_of: dict[tuple[str, Path, str], _Lane] = {}
        self._outcomes: dict[tuple[Key, int], Outcome] = {}
        self._busy: defaultdict[Key, _Busy] = defaultdict(_Busy)
        self._unfinished = self._deaths_in_a_row = 0
        self._closed = False
        self._failure: BaseException | None = None
        self._folder = tempfile.mkdtemp(prefix="finetune-judge.")
        self._threads: list[threading.Thread] = []
        self.add_workers(workers, nice=nice)

    def add_workers(self, count: int, *, nice: int = 0) -> None:
        for _ in range(count):
            lane = _Lane()
            with self._changed:
                self._lanes.append(lane)
            thread = threading.Thread(target=self._work, args=(lane, nice), name="judge", daemon=True)
            self._threads.append(thread)
            thread.start()

    @property
    def workers(self) -> int:
        return len(self._lanes)

    @property
    def pids(self) -> list[int]:
        """Of the processes that run now."""
        with self._changed:
            return [lane.process.pid for lane in self._lanes if lane.process is not None]

    def submit(self, key: Key, number: int, answer: Answer) -> None:
        """Judge an answer to the question of this number; returns at once."""
        record, database = self._asked[number]
        group = (record.dialect, database, record.sql)
        with self._changed:
            lane = self._lane_of.get(group)
            if lane is None:
                lane = min(self._lanes, key=lambda lane: len(lane.waiting) + lane.busy)
                self._lane_of[group] = lane
            lane.waiting.append(_Task(key, number, answer))
            self._unfinished += 1
            self._changed.notify_all()

    def wait(self, told: Callable[[int], object] = lambda left: None) -> None:
        """Until every answer is judged. told: called now and then with how many are left. Raises what judging raised: UserError if
        a database cannot be read or processes keep ending, NotStarted if there are none."""
        with self._changed:
            while self._unfinished and self._failure is None:
                told(self._unfinished)
                self._changed.wait(HELD_UP_SECONDS)
                self._changed.notify_all()  # those with nothing to do see whether another is held up
            if self._failure is not None:
                raise self._failure

    def outcome(self, key: Key, number: int) -> Outcome | None:
        """None if the answer is not judged (yet)."""
        return self._outcomes.get((key, number))

    def seconds(self, key: Key) -> float:
        """For how long answers of this key were being judged."""
        with self._changed:
            return self._busy[key].seconds

    def close(self, *, at_once: bool = False) -> None:
        """End all processes. at_once: also those that are at work."""
        if os.getpid() != self._settings["parent"]:
            return  # in a process that was forked off: they are not ours
        with self._changed:
            self._closed = True
            if at_once:
                for lane in self._lanes:
                    if lane.process is not None:
                        lane.process.kill()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(2 * END_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)

    # In the thread of a lane ------------------------------------------------------------------------------------

    def _work(self, lane: _Lane, nice: int) -> None:
        try:
            self._start(lane, nice)
            while batch := self._next_batch(lane):
                self._judge(lane, batch, nice)
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()
        finally:
            if lane.process is not None:
                lane.process.finish()

    def _start(self, lane: _Lane, nice: int) -> None:
        for last in (False, True):
            try:
                process = JudgeProcess(self._settings, self._folder, nice, self._stalled)
                with self._changed:
                    lane.process = process
                    if self._closed:
                        process.kill()
                process.wait_until_ready()
                return
            except (Ended, OSError) as error:
                if last or self._closed:
                    raise NotStarted(str(error)) from None

    def _next_batch(self, lane: _Lane) -> list[_Task]:
        """The next answers for the process of this lane; none once the pool is closed or has failed."""
        with self._changed:
            while not self._closed and self._failure is None:
                if lane.waiting:
                    batch = [lane.waiting.popleft() for _ in range(min(BATCH, len(lane.waiting)))]
                elif other := self._held_up(lane):
                    batch = [other.waiting.pop() for _ in range(min(BATCH, -(-len(other.waiting) // 2)))]
                else:
                    self._changed.wait()
                    continue
                lane.busy, lane.since = len(batch), time.monotonic()
                for task in batch:
                    self._busy[task.key].change(1)
                return batch
        return []

    def _held_up(self, mine: _Lane) -> _Lane | None:
        """The lane with the most answers that wait, of those whose process has not given a verdict for a while."""
        before = time.monotonic() - HELD_UP_SECONDS
        held = [lane for lane in self._lanes if lane is not mine and lane.waiting and lane.since < before]
        return max(held, key=lambda lane: len(lane.waiting), default=None)

    def _judge(self, lane: _Lane, batch: list[_Task], nice: int) -> None:
        left = deque(batch)
        while left and not self._closed:
            assert lane.process is not None
            try:
                for reply in lane.process.ask([(task.number, task.answer) for task in left], self._asked):
                    self._done(lane, left.popleft(), self._outcome(reply))
            except Ended as ended:
                if not self._closed:
                    self._count_death(lane, left, ended)
                    self._start(lane, nice)

    def _outcome(self, reply: dict[str, Any]) -> Outcome:
        if "user_error" in reply:
            error = _Told(reply["user_error"], reply["code"])
            raise UserError(error.message, code=error.code)
        if "failed" in reply:
            raise RuntimeError(f"judging failed in its process:\n{reply['failed']}")
        self._deaths_in_a_row = 0
        return Outcome(**reply)

    def _count_death(self, lane: _Lane, left: deque[_Task], ended: Ended) -> None:
        """The answer that the process was at is judged again, or has had its two tries."""
        with self._changed:
            self._deaths_in_a_row += 1
            if self._deaths_in_a_row >= DEATHS_IN_A_ROW:
                raise UserError(
                    f"the processes that judge answers keep ending ({ended}); end other programs on this machine, or use one "
                    "with more memory; the same command goes on with the answers that are kept",
                    code="evaluation.judging_failed",
                )
        left[0].deaths += 1
        if left[0].deaths == 2:
            task = left.popleft()
            self._done(lane, task, _ended_twice(self._asked[task.number].record, str(ended)))

    def _done(self, lane: _Lane, task: _Task, outcome: Outcome) -> None:
        with self._changed:
            self._outcomes[task.key, task.number] = outcome
            self._busy[task.key].change(-1)
            lane.busy, lane.since = lane.busy - 1, time.monotonic()
            self._unfinished -= 1
            if not self._unfinished:
                self._changed.notify_all()


ENDED_TWICE = "the process that judged it ended twice"


def _ended_twice(record: Record, how: str) -> Outcome:
    return Outcome(
        difficulty=difficulty(record.sql, record.dialect),
        prediction="",
        verdict="crashed",
        error=f"{ENDED_TWICE} ({how})",
        seconds=0.0,
        double_quoted_text=False,
        gold_kind=SOUND,
        several_statements=False,
        verdicts=dict.fromkeys(RULES, "crashed"),
        result_sha256=None,
        error_class="crashed",
    )
