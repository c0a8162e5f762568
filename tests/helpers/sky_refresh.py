"""Fetches the catalog through SkyPilot as `refresh_catalog` does, three times. A separate program, as `sky_referee`.

Arguments: the URL of a server that has the catalog, and of one that does not answer. HOME is empty at first. Prints a line
for each of: no server and nothing cached; the server; no server and an expired file.
"""

from __future__ import annotations

import os
import sys

from sky.skylet import constants

from finetune.cloud.catalog.csv_file import VMS, skypilot_folder
from finetune.cloud.catalog.offers import load_catalog, refresh_catalog
from finetune.errors import UserError


def attempt() -> str:
    try:
        refresh_catalog()
        return load_catalog(allow_snapshot=False).source
    except UserError as error:
        return f"{error.code}: {error}"


server, unreachable = sys.argv[1:]
for url in (unreachable, server, unreachable):
    constants.HOSTED_CATALOG_DIR_URL = url
    print(f"result: {attempt()}")
    path = skypilot_folder() / VMS
    if path.exists():
        os.utime(path, (0, 0))  # SkyPilot considers it old, and updates the time if it cannot fetch a new one
