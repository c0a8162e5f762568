#!/usr/bin/env bash
# Installs the browser that tests of pages drive: Debian's Chromium, which the tests find by its name on the PATH.
#   dev/browser.sh    does nothing where there is one; says what to install where it cannot
set -euo pipefail

for name in chromium chromium-browser google-chrome-stable google-chrome; do
  if command -v "$name" >/dev/null; then exit 0; fi
done
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
  echo "browser: none is installed; as root: apt-get install chromium" >&2
  exit 0  # the tests say that they are skipped, or fail with FT_BROWSER_REQUIRED=1
fi
export DEBIAN_FRONTEND=noninteractive
echo "browser: installing chromium" >&2
if ! { apt-get update --quiet=2 && apt-get install --quiet=2 --yes --no-install-recommends chromium; } >&2; then
  echo "browser: apt-get could not install chromium" >&2
fi
