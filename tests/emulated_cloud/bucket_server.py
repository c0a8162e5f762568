"""The process of the storage emulator: PyPI's gcp-storage-emulator, extended by buckets without access, refused as Google does.

FORBIDDEN in the environment is the path of a JSON file, read at every request: bucket -> the permissions that are denied ([] is
all of them). Requests with the header TESTS_OWN come from the test itself and are always allowed.
"""

from __future__ import annotations

import json
import os
import re
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

FORBIDDEN, ACCOUNT = "FT_FORBIDDEN_BUCKETS", "FT_CLOUD_ACCOUNT"
TESTS_OWN = "X-Ft-Test"
PLACE = re.compile(r"^(?P<upload>/upload)?(/download)?(/storage/v1)?/b/(?P<bucket>[^/]+)(?P<rest>/.*)?$")
BUCKET_VERBS = {"GET": "get", "PATCH": "update", "DELETE": "delete"}
OBJECT_VERBS = {"GET": "get", "POST": "create", "PUT": "create", "PATCH": "update", "DELETE": "delete"}
TAKEN = (
    "The requested bucket name is not available. The bucket namespace is shared by all users of the system. Please select a "
    "different name and try again."
)


def permission(method: str, upload: bool, rest: str) -> str:
    """The permission that a request needs. rest: the part of the path after the bucket's name."""
    if rest in ("", "/"):
        return f"storage.buckets.{BUCKET_VERBS.get(method, 'get')}"
    if not rest.startswith("/o"):
        return "storage.buckets.getIamPolicy"
    if rest == "/o" and method == "GET" and not upload:
        return "storage.objects.list"
    return f"storage.objects.{OBJECT_VERBS.get(method, 'get')}"


def refusal(method: str, path: str, forbidden: dict[str, list[str]], account: str) -> tuple[HTTPStatus, str] | None:
    """Google's answer to a request that is not allowed; None for one that is."""
    found = PLACE.match(path)
    if not found or found["bucket"] not in forbidden:
        return None
    needed = permission(method, bool(found["upload"]), found["rest"] or "")
    denied = forbidden[found["bucket"]]
    if denied and needed not in denied:
        return None
    what = "object" if needed.startswith("storage.objects.") and needed != "storage.objects.list" else "bucket"
    return HTTPStatus.FORBIDDEN, (
        f"{account} does not have {needed} access to the Google Cloud Storage {what}. Permission '{needed}' denied on resource "
        f"(or it may not exist)."
    )


def error_body(status: HTTPStatus, message: str) -> bytes:
    reason = "forbidden" if status == HTTPStatus.FORBIDDEN else "conflict"
    detail = {"message": message, "domain": "global", "reason": reason}
    return json.dumps({"error": {"code": status.value, "message": message, "errors": [detail]}}).encode()


def permissions_left(path: str, forbidden: dict[str, list[str]]) -> bytes | None:
    """The answer to testIamPermissions for a bucket with denied permissions; None for any other request."""
    parts = urlsplit(path)
    found = PLACE.match(parts.path)
    denied = forbidden.get(found["bucket"]) if found and found["rest"] == "/iam/testPermissions" else None
    if not denied:
        return None
    left = [one for one in parse_qs(parts.query).get("permissions", []) if one not in denied]
    return json.dumps({"kind": "storage#testIamPermissionsResponse", "permissions": left}).encode()


def send(request: Any, status: HTTPStatus, body: bytes) -> None:
    request.send_response(status.value, status.phrase)
    request.send_header("Content-Type", "application/json; charset=UTF-8")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def guard(server: Any) -> None:
    """Makes the emulator refuse what is forbidden before it answers. server: the emulator's module of that name."""
    answer = server.Router.handle
    account = os.environ.get(ACCOUNT, "you@example.com")

    def handle(router: Any, method: str) -> None:
        request = router._request_handler
        forbidden = json.loads(Path(os.environ[FORBIDDEN]).read_text(encoding="utf-8"))
        if not forbidden or request.headers.get(TESTS_OWN):
            answer(router, method)
            return
        path = urlsplit(request.path).path
        refused = refusal(method, path, forbidden, account)
        if refused is None and method == "POST" and re.fullmatch("(/storage/v1)?/b", path):
            refused = taken(request, forbidden)
        if allowed := permissions_left(request.path, forbidden):
            send(request, HTTPStatus.OK, allowed)
            return
        if refused is None:
            answer(router, method)
            return
        server._read_raw_data(request)  # a client whose upload is cut off would not read the answer
        send(request, refused[0], error_body(*refused))

    server.Router.handle = handle


def taken(request: Any, forbidden: dict[str, list[str]]) -> tuple[HTTPStatus, str] | None:
    """A new bucket cannot have the name of another project's. The body is put back for the emulator to read."""
    import io

    body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
    request.rfile = io.BytesIO(body)
    denied = forbidden.get(str(json.loads(body or b"{}").get("name")))
    return (HTTPStatus.CONFLICT, TAKEN) if denied == [] else None


def keep_in_memory(storage: Any) -> None:
    """Turns off that the emulator writes the metadata of all objects at every change, for its next start, which never comes:
    75 ms of CPU time after a quarter of an hour of scenarios (measured). storage: the emulator's module of that name."""
    storage.Storage._write_config_to_file = lambda _: None


if __name__ == "__main__":
    from gcp_storage_emulator import __main__ as emulator
    from gcp_storage_emulator import server, storage

    guard(server)
    keep_in_memory(storage)
    sys.exit(emulator.main(sys.argv[1:]))
