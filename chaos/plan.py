"""Decides where each attempt is killed and how its checkpoints are damaged afterwards, all drawn from one seed."""

from __future__ import annotations

import random

from chaos.attempt import How, Kill
from chaos.damage import TARGETS, Target
from chaos.environment import Kind
from finetune.runtime.fault_injection import PLACES

KILLS_PER_RUN = 8
FILES = 18
"""About the number of files of a checkpoint; the upper limit of `count` for kills at `copy` and `half-copy`."""
START_SECONDS = 7.0
"""About the time an attempt takes until its first step."""
SHARE_DAMAGED = 0.3
"""Fraction of kills after which checkpoints are damaged."""
SHARE_NEW_MACHINE = 0.5
"""Fraction of kills after which the run resumes on another machine, with an empty local disk."""
EARLY_KILLS = 2
"""How many of the last kills may come before a run has a checkpoint; outstanding damage is started that many kills earlier."""
OTHER_KILLS: tuple[How, ...] = ("notice", "step", "start")
"""Kinds of kill other than at a place."""
LAST_PLACE = "adapter"
"""Reached only by a run that has completed all its steps."""


class Plan:
    """Draws kills until `kills` have happened, over at least `runs` runs. If there are at least as many kills as places, each
    place comes once, then each other kind of kill once as far as the number allows, and the rest is random. Each kind of damage
    then happens at least once too, if there is a checkpoint to damage."""

    def __init__(self, kills: int, seed: int, runs: int) -> None:
        self.requested, self.left = kills, kills
        self._runs = max(min(runs, kills), -(-kills // KILLS_PER_RUN))
        self.draws = random.Random(seed)
        enough = kills >= len(PLACES)
        self._places = [place for place in PLACES if place != LAST_PLACE and enough]
        self.draws.shuffle(self._places)
        self._last_place_due = enough
        self._other_kills: list[How] = list(OTHER_KILLS[: max(0, kills - len(PLACES))])
        self._targets: list[Target] = list(TARGETS) if enough else []

    def quota(self) -> int:
        """Kills of the next run."""
        return min(self.left, -(-self.requested // self._runs))

    def kill(self, kind: Kind, begins_at: int, *, first: bool, last: bool) -> Kill:
        """The kill of an attempt that resumes from step begins_at. first: of the run; last: no other kill follows."""
        steps = kind.steps - begins_at
        if last and self._last_place_due:
            return Kill("place", LAST_PLACE)
        if first and "ledger" in self._places:  # the first ledger line, before which the folder is almost empty
            return Kill("place", "ledger")
        if steps == 0:
            return self.draws.choice([self._at_start(), Kill("place", "ledger", self.draws.randint(1, 12))])
        if self._places:
            return self._at(self._places[0], kind, steps)
        how = (
            self._other_kills[0]
            if self._other_kills
            else self.draws.choices(("place", *OTHER_KILLS), weights=[5, 1, 4, 1])[0]
        )
        if how == "place":
            return self._at(self.draws.choice([place for place in PLACES if place != LAST_PLACE]), kind, steps)
        if how == "start":
            return self._at_start()
        at = begins_at + self.draws.randint(1, max(1, min(2 * kind.interval + 2, steps - 1)))
        return Kill("notice" if how == "notice" else "step", count=at, delay=self.draws.uniform(0, 0.15))

    def happened(self, kill: Kill) -> None:
        self.left -= 1
        if kill.place == LAST_PLACE:
            self._last_place_due = False
        elif kill.place in self._places:
            self._places.remove(kill.place)
        elif kill.how in self._other_kills:
            self._other_kills.remove(kill.how)

    def missed(self, kill: Kill) -> None:
        """The attempt ended before its kill: try another place or kind first next time."""
        if kill.place in self._places:
            self._places.remove(kill.place)
            self._places.append(kill.place)
        elif kill.how in self._other_kills:
            self._other_kills.append(self._other_kills.pop(self._other_kills.index(kill.how)))

    def damage(self, anything: bool = True) -> Target | None:
        """What to damage after the last kill; None for nothing. anything: whether there is a checkpoint."""
        due = bool(self._targets) and len(self._targets) + EARLY_KILLS > self.left
        if (self.draws.random() >= SHARE_DAMAGED and not due) or not anything:
            return None
        return self._targets.pop(0) if self._targets else self.draws.choices(TARGETS, weights=[5, 3, 1])[0]

    def new_machine(self) -> bool:
        return self.draws.random() < SHARE_NEW_MACHINE

    def not_reached(self) -> list[str]:
        """Places at which no attempt was killed although there were enough kills."""
        return [*self._places, *([LAST_PLACE] if self._last_place_due else [])]

    def _at(self, place: str, kind: Kind, steps: int) -> Kill:
        saves = min(3, -(-steps // kind.interval))
        most = {"step": min(steps, 2 * kind.interval), "copy": FILES * saves, "half-copy": FILES * saves, "ledger": 12,
                "prune": 2}.get(place, saves)  # fmt: skip
        return Kill("place", place, self.draws.randint(1, most))

    def _at_start(self) -> Kill:
        return Kill("start", delay=self.draws.uniform(0.05, START_SECONDS))
