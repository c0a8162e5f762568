"""W&B's server, as far as its real client asks it for a run: GraphQL, the stream of rows, and uploads, which are dropped."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tests.helpers.json_server import JsonHandler, serving

KEY = "k" * 40


@dataclass
class WandbRun:
    """history: rows in their order. summary: as last sent. exits: the exit codes of its attempts."""

    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exits: list[int] = field(default_factory=list)


class WandbHandler(JsonHandler):
    runs: ClassVar[dict[tuple[str, str], WandbRun]]

    def answer(self) -> tuple[int, Any]:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        if self.path.startswith("/graphql"):
            asked = json.loads(body)
            return 200, {"data": self.queried(asked["query"], asked.get("variables") or {})}
        if self.path.endswith("/file_stream"):
            _, _, _, project, name, _ = self.path.split("/")
            self.streamed(self.runs[project, name], json.loads(body))
            return 200, {"limits": {}}
        return (200, {}) if self.command in ("PUT", "GET") else (404, {})

    do_PUT = JsonHandler.do_GET

    def queried(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        if "RunResumeStatus" in query:
            run = self.runs.get((given["project"], given["name"]))
            return {
                "model": {
                    "id": "p",
                    "name": given["project"],
                    "entity": _me(),
                    "bucket": run and _bucket(given["name"], run),
                }
            }
        if "UpsertBucket" in query:
            run = self.runs.setdefault((given["project"], given["name"]), WandbRun())
            run.config |= json.loads(given.get("config") or "{}")
            run.summary |= json.loads(given.get("summaryMetrics") or "{}")
            bucket = _bucket(given["name"], run)
            bucket["project"] = {"id": "p", "name": given["project"], "entity": _me()}
            return {"upsertBucket": {"bucket": bucket, "inserted": not run.history}}
        if "CreateRunFiles" in query:
            address = f"http://{self.headers['Host']}/uploads"
            files = [{"name": name, "uploadUrl": f"{address}/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "Viewer" in query:
            return {
                "viewer": {"id": "u", "username": "me", "flags": "{}", "teams": {"edges": []}, "entity": "me"},
                "serverInfo": {},
            }
        return {}

    def streamed(self, run: WandbRun, sent: dict[str, Any]) -> None:
        for name, part in (sent.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                run.history[part["offset"] :] = [json.loads(line) for line in part["content"]]
            elif name == "wandb-summary.json":
                run.summary = json.loads(part["content"][-1])
        if sent.get("complete"):
            run.exits.append(sent["exitcode"])


def _me() -> dict[str, str]:
    return {"id": "u", "name": "me"}


def _bucket(name: str, run: WandbRun) -> dict[str, Any]:
    return {
        "id": "b", "name": name, "displayName": name, "config": json.dumps(run.config), "tags": [], "notes": "",
        "summaryMetrics": json.dumps(run.summary), "historyLineCount": len(run.history), "eventsLineCount": 0, "logLineCount": 0,
        "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]), "eventsTail": "[]", "wandbConfig": '{"t": 1}',
    }  # fmt: skip


@contextmanager
def wandb_server() -> Iterator[tuple[str, dict[tuple[str, str], WandbRun]]]:
    """Its address, and its runs by project and id."""

    class Handler(WandbHandler):
        runs: ClassVar[dict[tuple[str, str], WandbRun]] = {}

    with serving(Handler) as address:
        yield address, Handler.runs
