"""What the files of a prepared folder are called. Imports nothing: a launch and a rented machine's job look at the names alone.

`data.prepare` writes the folder and says what is in each file; `data.prepared` reads it.
"""

from __future__ import annotations

MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
DATABASES = "databases"


def records_file(split: str) -> str:
    """The records of one split."""
    return f"{split}.jsonl"
