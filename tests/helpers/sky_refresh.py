"""Fetches the catalog through SkyPilot as `refresh_catalog` does, three times. A program of its own, as `sky_referee`.

Arguments: the URL of a server that has the catalog, and of one that does not answer. HOME is empty at first. Prints a line
for each of: no server and nothing cached; the server; no server and a file that is due.
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


server, nobody = sys.argv[1:]
for url in (nobody, server, nobody):
    constants.HOSTED_CATALOG_DIR_URL = url
    print(f"result: {attempt()}")
    path = skypilot_folder() / VMS
    if path.exists():
        os.utime(path, (0, 0))  # SkyPilot thinks it old, and sets the time anew when it cannot fetch another
