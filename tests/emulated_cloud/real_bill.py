"""What the machines of a session on a real project have cost, estimated from listing them regularly."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.emulated_cloud.gce_bill import Price, Stretch
from tests.emulated_cloud.real_gcloud import RealMachine

PAYING = ("RUNNING", "PENDING_STOP", "STOPPING", "SUSPENDING")
STOPPED = ("TERMINATED", "STOPPED", "SUSPENDED")


@dataclass
class RealBill:
    """stretches: of all machines seen, in the order of their start.

    They begin and end at Google's timestamps of a machine's last start and stop; for a deleted machine they end when it was first
    missing from a listing, which is late by up to the time between two listings.
    """

    stretches: list[Stretch] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def observe(self, machines: Iterable[RealMachine], at: float | None = None) -> None:
        """All machines of the session as they are now. at: seconds since the epoch."""
        at = time.time() if at is None else at
        with self.lock:
            here = {machine.name: machine for machine in machines}
            for stretch in self._open():
                machine = here.get(stretch.machine)
                if machine is None:
                    stretch.ended, stretch.end = at, "gone"
                elif stretch.running and machine.status in STOPPED:
                    stretch.ended, stretch.end = machine.ended or at, "stopped"
                elif not stretch.running and machine.status in PAYING:
                    stretch.ended, stretch.end = machine.began, "started"
            paid = {stretch.machine for stretch in self._open()}
            for machine in here.values():
                if machine.name not in paid and machine.status in (*PAYING, *STOPPED):
                    self.stretches.append(_stretch(machine, at))

    def usd(self, price: Price) -> float:
        """US dollars of all machines so far, estimated."""
        return sum(price(one) * one.seconds / 3600 for one in self.stretches)

    def table(self, price: Price) -> str:
        lines = [
            f"{one.machine}  {one.zone}  {one.gpu or one.machine_type}:{one.gpus}  {'spot' if one.spot else 'on demand'}  "
            f"{'running' if one.running else 'stopped'} {one.seconds:.0f} s  ${price(one) * one.seconds / 3600:.4f}  {one.end}"
            for one in self.stretches
        ]
        note = "estimated: seconds as seen, catalog prices; Google's bill has traffic, bucket and controller too"
        return "\n".join([*lines, f"total ${self.usd(price):.4f} ({note})"])

    def _open(self) -> list[Stretch]:
        return [stretch for stretch in self.stretches if stretch.ended is None]


def _stretch(machine: RealMachine, at: float) -> Stretch:
    request, running = machine.request, machine.status in PAYING
    began = machine.began if running else machine.ended or at
    return Stretch(
        machine.name,
        request.zone,
        request.machine_type,
        request.gpu,
        request.gpus,
        request.spot,
        machine.disk_gb,
        running,
        began,
    )
