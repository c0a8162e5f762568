"""Which attempt is killed where, and what is done to its checkpoints afterwards: all drawn from one seed."""

from __future__ import annotations

import random

from chaos.attempt import How, Kill
from chaos.damage import TARGETS, Target
from chaos.environment import Kind
from finetune.runtime.fault_injection import PLACES

KILLS_PER_RUN = 8
FILES = 18
"""Of a checkpoint, about: up to which `copy` and its like are counted."""
START_SECONDS = 7.0
"""An attempt takes about as long until its first step."""
SHARE_DAMAGED = 0.3
"""Of the kills after which checkpoints are damaged."""
SHARE_NEW_MACHINE = 0.5
"""Of the kills after which the run goes on elsewhere: nothing is left of the local disk."""
SPARE = 2
"""Of the last kills, how many may come before a run has a checkpoint: the damages that are still due begin so much earlier."""
OTHER_WAYS: tuple[How, ...] = ("notice", "step", "start")
"""To die, than at a place."""
LAST_PLACE = "adapter"
"""Only a run that has made all its steps comes there."""


class Plan:
    """Draws kills until `kills` have come about, over at least `runs` runs. Each place comes first, once, where there are as
    many kills as places; what is left of them goes to the other ways to die, once each, before chance has its say. Then each
    kind of damage comes at least once, too, where there is a checkpoint to damage."""

    def __init__(self, kills: int, seed: int, runs: int) -> None:
        self.wanted, self.left = kills, kills
        self._runs = max(min(runs, kills), -(-kills // KILLS_PER_RUN))
        self.draws = random.Random(seed)
        enough = kills >= len(PLACES)
        self._places = [place for place in PLACES if place != LAST_PLACE and enough]
        self.draws.shuffle(self._places)
        self._last_place_due = enough
        self._ways: list[How] = list(OTHER_WAYS[: max(0, kills - len(PLACES))])
        self._targets: list[Target] = list(TARGETS) if enough else []

    def quota(self) -> int:
        """Kills of the next run."""
        return min(self.left, -(-self.wanted // self._runs))

    def kill(self, kind: Kind, begins_at: int, *, first: bool, last: bool) -> Kill:
        """For an attempt that goes on from step begins_at. first: there was none before; last: no other kill follows."""
        steps = kind.steps - begins_at
        if last and self._last_place_due:
            return Kill("place", LAST_PLACE)
        if first and "ledger" in self._places:  # the very first line, before which a folder holds next to nothing
            return Kill("place", "ledger")
        if steps == 0:
            return self.draws.choice([self._at_start(), Kill("place", "ledger", self.draws.randint(1, 12))])
        if self._places:
            return self._at(self._places[0], kind, steps)
        how = self._ways[0] if self._ways else self.draws.choices(("place", *OTHER_WAYS), weights=[5, 1, 4, 1])[0]
        if how == "place":
            return self._at(self.draws.choice([place for place in PLACES if place != LAST_PLACE]), kind, steps)
        if how == "start":
            return self._at_start()
        at = begins_at + self.draws.randint(1, max(1, min(2 * kind.interval + 2, steps - 1)))
        return Kill("notice" if how == "notice" else "step", count=at, delay=self.draws.uniform(0, 0.15))

    def came_about(self, kill: Kill) -> None:
        self.left -= 1
        if kill.place == LAST_PLACE:
            self._last_place_due = False
        elif kill.place in self._places:
            self._places.remove(kill.place)
        elif kill.how in self._ways:
            self._ways.remove(kill.how)

    def missed(self, kill: Kill) -> None:
        """The attempt ended before: another place comes first the next time."""
        if kill.place in self._places:
            self._places.remove(kill.place)
            self._places.append(kill.place)
        elif kill.how in self._ways:
            self._ways.append(self._ways.pop(self._ways.index(kill.how)))

    def damage(self, anything: bool = True) -> Target | None:
        """What is damaged after the last kill. anything: whether there is a checkpoint."""
        due = bool(self._targets) and len(self._targets) + SPARE > self.left
        if (self.draws.random() >= SHARE_DAMAGED and not due) or not anything:
            return None
        return self._targets.pop(0) if self._targets else self.draws.choices(TARGETS, weights=[5, 3, 1])[0]

    def new_machine(self) -> bool:
        return self.draws.random() < SHARE_NEW_MACHINE

    def not_reached(self) -> list[str]:
        """Places at which no attempt has died yet though there were kills enough."""
        return [*self._places, *([LAST_PLACE] if self._last_place_due else [])]

    def _at(self, place: str, kind: Kind, steps: int) -> Kill:
        saves = min(3, -(-steps // kind.interval))
        most = {"step": min(steps, 2 * kind.interval), "copy": FILES * saves, "half-copy": FILES * saves, "ledger": 12,
                "prune": 2}.get(place, saves)  # fmt: skip
        return Kill("place", place, self.draws.randint(1, most))

    def _at_start(self) -> Kill:
        return Kill("start", delay=self.draws.uniform(0.05, START_SECONDS))
