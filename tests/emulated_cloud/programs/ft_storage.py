"""A client of one bucket of the emulated storage, over its JSON API; our gcsfuse and gsutil use it."""

from __future__ import annotations

import datetime
import errno
import http.client
import json
import pathlib
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import IO, Any, BinaryIO

About = tuple[int, int]
"""Bytes of an object, and the time of its last change in nanoseconds since the epoch."""


def nanoseconds(moment: str) -> int:
    return int(datetime.datetime.fromisoformat(moment).timestamp() * 1e9)


def reason(error: urllib.error.HTTPError) -> Any:
    """The message of an error, if it has Google's format; else the HTTP reason."""
    try:
        return json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError, OSError):
        return error.reason


class Storage:
    """One bucket over the JSON API. Raises FileNotFoundError, and OSError for any other refusal."""

    def __init__(self, endpoint: str, bucket: str) -> None:
        self.objects = f"{endpoint}/storage/v1/b/{bucket}/o"
        self.place = f"{endpoint}/storage/v1/b/{bucket}"
        self.uploads = f"{endpoint}/upload/storage/v1/b/{bucket}/o"
        self.bucket = bucket
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(
        self, method: str, url: str, body: bytes | BinaryIO | None = None, headers: dict[str, str] | None = None
    ) -> Any:
        try:
            request = urllib.request.Request(url, data=body, method=method, headers=headers or {})
            return self.opener.open(request, timeout=600)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise FileNotFoundError(errno.ENOENT, "no such object") from None
            code = errno.EACCES if error.code in (401, 403) else errno.EIO
            raise OSError(code, f"googleapi: Error {error.code}: {reason(error)}") from None
        except (urllib.error.URLError, http.client.HTTPException):
            raise OSError(errno.EIO, "the storage cannot be reached") from None

    def exists(self) -> None:
        self.call("GET", self.place).close()

    def list(self, prefix: str, delimiter: str = "") -> tuple[dict[str, About], Sequence[str]]:
        """Object -> (bytes, nanoseconds since the epoch of its last change), and the subfolders."""
        query = urllib.parse.urlencode(
            {"prefix": prefix, "maxResults": 10000} | ({"delimiter": delimiter} if delimiter else {})
        )
        with self.call("GET", f"{self.objects}?{query}") as answer:
            found = json.load(answer)
        objects = {row["name"]: (int(row["size"]), nanoseconds(row["updated"])) for row in found.get("items", [])}
        return objects, found.get("prefixes", [])

    def get(self, name: str, file: IO[bytes]) -> None:
        with self.call("GET", f"{self.objects}/{urllib.parse.quote(name, safe='')}?alt=media") as answer:
            shutil.copyfileobj(answer, file, 1 << 20)

    def put(self, name: str, path: str) -> None:
        size = pathlib.Path(path).stat().st_size
        if size == 0:  # the storage emulator fails on an empty body
            about = json.dumps({"name": name})
            parts = (
                f"--ft\r\nContent-Type: application/json\r\n\r\n{about}\r\n--ft\r\nContent-Type: text/plain\r\n\r\n\r\n"
            )
            parts += "--ft--\r\n"
            headers = {"Content-Type": "multipart/related; boundary=ft"}
            self.call("POST", f"{self.uploads}?uploadType=multipart", parts.encode(), headers).close()
            return
        with pathlib.Path(path).open("rb") as file:
            query = urllib.parse.urlencode({"uploadType": "media", "name": name})
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            self.call("POST", f"{self.uploads}?{query}", file, headers).close()

    def copy(self, old: str, new: str) -> None:
        quoted = [urllib.parse.quote(name, safe="") for name in (old, new)]
        self.call("POST", f"{self.objects}/{quoted[0]}/copyTo/b/{self.bucket}/o/{quoted[1]}", b"").close()

    def delete(self, name: str) -> None:
        self.call("DELETE", f"{self.objects}/{urllib.parse.quote(name, safe='')}").close()

    def delete_bucket(self) -> None:
        """Deletes the bucket, which has to be empty."""
        self.call("DELETE", self.place).close()
