#!/usr/bin/env bash
# The cloud tests; `make cloud-test` calls this. Runs the real SkyPilot on an emulated Google Cloud, free of charge, or, if
# GCP_PROJECT is set, on that project, which costs money, after printing the maximum cost and asking for a `yes`.
#
#   dev/cloud_test.sh [PYTEST ARGUMENT...]
#
# Environment: SUITE=short       one test for each kind of scenario, instead of all
#              SCENARIO          part of a test's name, as in pytest's -k
#              FT_CLOUD_REQUIRED=1  fail if the emulated cloud is not available, instead of skipping it
#              FT_CLOUD_PACE     is measured: slowdown of this machine relative to tests/emulated_cloud/pace.py
#              FT_CLOUD_IMAGE    a folder in which the machines' image is reused by later sessions
#              GCP_PROJECT       a project of Google Cloud; YES=1 answers `yes`
# Exit codes: 0 passed, or skipped with the reason printed; 1 failed; 2 user error.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly PYTHON=.venv/bin/python HERE=tests/emulated_cloud PACKAGE=tests.emulated_cloud
readonly ENVIRONMENTS=2  # in parallel, as in pace.py; with three all are too slow on 2 cores
only=()
case "${SUITE:-whole}" in
  whole) suite="cloud and not cloud_short(only=True)" ;;
  short) suite=cloud_short ;;
  *)
    printf 'cloud-test: SUITE: expected short or whole, found %s\n' "$SUITE" >&2
    exit 2
    ;;
esac
readonly suite
[ -z "${SCENARIO:-}" ] || only=(-k "$SCENARIO")

say() { printf 'cloud-test: %s\n' "$*" >&2; }

lacking() {  # the packages of packages.txt that are not installed
  local package
  while read -r package; do
    [ "$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
  done <"$HERE/packages.txt"
}

install_packages() {
  command -v dpkg-query >/dev/null || return 0  # not Debian: the test below names missing packages
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
    touch /etc/ssh/sshd_not_to_be_run  # Debian's marker file: a test must not make this computer reachable
    say "its sshd is not started: /etc/ssh/sshd_not_to_be_run"
  fi
  export DEBIAN_FRONTEND=noninteractive
  if ! { apt-get update --quiet=2 && apt-get install --quiet=2 --yes --no-install-recommends "${packages[@]}"; } >&2; then
    say "apt-get could not install them"  # missing packages are named below
  fi
}

emulated() {
  local reason scratch junit code=0
  install_packages
  if ! reason=$("$PYTHON" -m "$PACKAGE.possible"); then
    [ -n "$reason" ] || exit 1  # the check itself failed and printed why
    if [ "${FT_CLOUD_REQUIRED:-}" = 1 ]; then
      say "failed, because FT_CLOUD_REQUIRED=1 and the emulated cloud is not available here: $reason"
      exit 1
    fi
    say "skipped, because the emulated cloud is not available here: $reason"
    exit 0
  fi
  FT_CLOUD_PACE=$("$PYTHON" -m "$PACKAGE.pace")  # before the environments: they would slow each other down
  export FT_CLOUD_PACE
  scratch=$("$PYTHON" -m "$PACKAGE.orphans" begin $$)
  trap '"$PYTHON" -m "$PACKAGE.orphans" end $$' EXIT  # also removes what tests leave behind after Ctrl-C
  junit="$scratch/junit.xml"
  export FT_CLOUD_IMAGE="${FT_CLOUD_IMAGE:-$scratch/image}"  # shared by the processes
  "$PYTHON" -m pytest -vv -ra -m "$suite" --numprocesses "$ENVIRONMENTS" --dist loadgroup "$HERE" "${only[@]}" \
    --basetemp="$scratch/pytest" --junitxml="$junit" -o junit_duration_report=call -o junit_logging=system-out "$@" || code=$?
  if [ "$code" -eq 5 ]; then
    say "no test of this suite has ${SCENARIO:-a mark} in its name"
    exit 2
  fi
  if [ -s "$junit" ]; then
    "$PYTHON" -m "$PACKAGE.table" "$junit" || code=1
  fi
  exit "$code"
}

if [ -n "${GCP_PROJECT:-}" ]; then
  exec "$PYTHON" -m "$PACKAGE.real_run" "$GCP_PROJECT" "${only[@]}" "$@"
fi
emulated "$@"
