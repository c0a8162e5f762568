"""File names of a prepared folder. Imports nothing: a launch and the job on a cloud machine need only the names.

`data.prepare` writes the folder and documents each file; `data.prepared` reads it.
"""

from __future__ import annotations

MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
DATABASES = "databases"
SOURCES = "sources.json"
"""SHA-256 of each file that records were read from, by its path. No part of the set: the manifest does not list it."""


def records_file(split: str) -> str:
    """Name of the file with the records of one split."""
    return f"{split}.jsonl"
