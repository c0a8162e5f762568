"""The operations of the compute API: work that continues after its call was answered."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

from tests.emulated_cloud.gce_http import ApiError, Json, not_found
from tests.emulated_cloud.gce_instances import now

WAIT_SECONDS = 20.0
"""How long `wait` delays its answer at most; Google's does up to two minutes."""


class Operations:
    """All operations by name. defects: errors in the emulation itself."""

    def __init__(self) -> None:
        self.found: dict[str, Json] = {}
        self.defects: list[str] = []
        self.changed = threading.Condition()
        self.numbers = itertools.count(1)

    def begin(self, kind: str, target: str, work: Callable[[], None] | None, zone: str = "") -> Json:
        """Starts `work` in a thread; an ApiError that it raises becomes the operation's error."""
        name = f"operation-{int(time.time() * 1000)}-{next(self.numbers)}"
        operation: Json = {
            "kind": "compute#operation",
            "name": name,
            "operationType": kind,
            "targetLink": target,
            "status": "RUNNING",
        }
        operation |= {"progress": 0, "insertTime": now(), "id": str(next(self.numbers))} | (
            {"zone": zone} if zone else {}
        )
        with self.changed:
            self.found[name] = operation
        if work is None:
            self._end(name, None)
        else:
            threading.Thread(target=self._work, args=(name, work), daemon=True).start()
        return self.get(name)

    def get(self, name: str) -> Json:
        with self.changed:
            if name not in self.found:
                raise not_found(f"operations/{name}")
            return dict(self.found[name])

    def wait(self, name: str) -> Json:
        with self.changed:
            self.changed.wait_for(lambda: self.found.get(name, {}).get("status") != "RUNNING", WAIT_SECONDS)
        return self.get(name)

    def _work(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
            self._end(name, None)
        except ApiError as error:
            self._end(name, {"code": error.reason, "message": error.message})
        except Exception as error:  # both SkyPilot and the test have to see it
            self.defects.append(f"{self.found[name]['operationType']} {self.found[name]['targetLink']}: {error!r}")
            self._end(name, {"code": "INTERNAL_ERROR", "message": f"emulated cloud: {type(error).__name__}: {error}"})

    def _end(self, name: str, error: Json | None) -> None:
        with self.changed:
            self.found[name] |= {"status": "DONE", "progress": 100, "endTime": now()}
            if error:
                self.found[name] |= {"error": {"errors": [error]}, "httpErrorStatusCode": 400}
            self.changed.notify_all()
