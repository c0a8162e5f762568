#!/usr/bin/env bash
# The tests of the cloud path; `make cloud-test` calls this. Either the real SkyPilot on an emulated Google Cloud, for nothing, or,
# where GCP_PROJECT is set, on that project, for money, after a table of what it costs at most and a `yes`.
#
#   tools/cloud_test.sh [PYTEST ARGUMENT...]
#
# Environment: SCENARIO          a part of tests' names, as pytest's -k has it
#              FT_CLOUD_REQUIRED=1  fail where the emulated cloud cannot be had, instead of skipping it
#              FT_CLOUD_IMAGE    a folder that keeps the machines' image from one session to the next
#              GCP_PROJECT       a project of Google Cloud; YES=1 answers the question
# Exit codes: 0 passed, or skipped with the reason printed; 1 failed; 2 the user's mistake.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly PYTHON=.venv/bin/python HERE=tests/cloud
only=()
[ -z "${SCENARIO:-}" ] || only=(-k "$SCENARIO")

say() { printf 'cloud-test: %s\n' "$*" >&2; }

lacking() {  # the packages of packages.txt that are not installed
  local package
  while read -r package; do
    [ "$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
  done <"$HERE/packages.txt"
}

install_packages() {
  command -v dpkg-query >/dev/null || return 0  # another Linux: the test below names what is missing
  local packages
  mapfile -t packages < <(lacking)
  [ "${#packages[@]}" -gt 0 ] || return 0
  if [ "$(id -u)" -ne 0 ]; then
    say "Debian packages are missing: apt-get install ${packages[*]}"
    return 0
  fi
  say "installing ${packages[*]}"
  if [[ " ${packages[*]} " == *" openssh-server "* ]] && [ ! -e /etc/ssh/sshd_not_to_be_run ]; then
    mkdir -p /etc/ssh
    touch /etc/ssh/sshd_not_to_be_run  # Debian's word for it: this computer is not to be reachable because of a test
    say "its sshd stays off: /etc/ssh/sshd_not_to_be_run"
  fi
  export DEBIAN_FRONTEND=noninteractive
  if ! { apt-get update --quiet=2 && apt-get install --quiet=2 --yes --no-install-recommends "${packages[@]}"; } >&2; then
    say "apt-get could not install them"  # what is still missing is named below
  fi
}

table() {  # JUNIT-FILE: a line a test, in the order of running. Fails where a test was skipped that was not to be
  "$PYTHON" - "$1" <<'TABLE'
import os, sys
import xml.etree.ElementTree as tree
suite = next(tree.parse(sys.argv[1]).iter("testsuite"))
states = {"failure": "FAILED", "error": "ERROR", "skipped": "skipped"}
rows, skipped = [], []
for case in suite.iter("testcase"):
    state = next((states[part.tag] for part in case if part.tag in states), "passed")
    reason = next((part.get("message", "") for part in case if part.tag == "skipped"), "")
    module = case.get("classname", "").rpartition(".")[2].removeprefix("test_")
    rows.append((module, case.get("name", "").removeprefix("test_"), float(case.get("time", 0)), f"{state} {reason}".strip()))
    skipped += [case.get("name", "")] if state == "skipped" else []
whole = float(suite.get("time", 0))
width = max([len(f"{module}  {name}") for module, name, _, _ in rows] + [30])
print(f"\n{'scenario':<{width}}  seconds")
for module, name, seconds, state in rows:
    print(f"{f'{module}  {name}':<{width}}  {seconds:7.1f}  {state}")
print(f"{'preparation, and emptying between tests':<{width}}  {whole - sum(row[2] for row in rows):7.1f}")
print(f"{'all':<{width}}  {whole:7.1f}  = {whole / 60:.1f} minutes (measured)")
if skipped and os.environ.get("FT_CLOUD_REQUIRED") == "1":
    sys.exit(f"cloud-test: skipped, though FT_CLOUD_REQUIRED=1: {', '.join(skipped)}")
TABLE
}

emulated() {
  local reason scratch junit code=0
  install_packages
  if ! reason=$("$PYTHON" "$HERE/possible.py"); then
    [ -n "$reason" ] || exit 1  # it failed itself, and has said how
    if [ "${FT_CLOUD_REQUIRED:-}" = 1 ]; then
      say "failed, because FT_CLOUD_REQUIRED=1 and the emulated cloud cannot be had here: $reason"
      exit 1
    fi
    say "skipped, because the emulated cloud cannot be had here: $reason"
    exit 0
  fi
  scratch=$(mktemp -d)
  # shellcheck disable=SC2064  # this folder
  trap "rm -rf '$scratch'" EXIT
  junit="$scratch/junit.xml"
  export FT_CLOUD_IMAGE="${FT_CLOUD_IMAGE:-$scratch/image}"  # the processes share it
  "$PYTHON" -m pytest -vv -ra -m cloud --numprocesses 2 --dist loadgroup "$HERE" "${only[@]}" --junitxml="$junit" -o junit_duration_report=call "$@" || code=$?
  if [ "$code" -eq 5 ]; then
    say "no test has ${SCENARIO:-the marker cloud} in its name"
    exit 2
  fi
  if [ -s "$junit" ]; then
    table "$junit" || code=1
  fi
  exit "$code"
}

if [ -n "${GCP_PROJECT:-}" ]; then
  exec "$PYTHON" "$HERE/real_run.py" "$GCP_PROJECT" "${only[@]}" "$@"
fi
emulated "$@"
