#!/usr/bin/env bash
# The tests of the cloud path; `make cloud-test` calls this. Either the real SkyPilot on an emulated Google Cloud, for nothing, or,
# where GCP_PROJECT is set, on that project, for money, after a table of what it costs at most and a `yes`.
#
#   dev/cloud_test.sh [PYTEST ARGUMENT...]
#
# Environment: SUITE=short       one guard for each kind of scenario, instead of all of them
#              SCENARIO          a part of tests' names, as pytest's -k has it
#              FT_CLOUD_REQUIRED=1  fail where the emulated cloud cannot be had, instead of skipping it
#              FT_CLOUD_PACE     is measured: how many times as long as in tests/emulated_cloud/pace.py things take here
#              FT_CLOUD_IMAGE    a folder that keeps the machines' image from one session to the next
#              GCP_PROJECT       a project of Google Cloud; YES=1 answers the question
# Exit codes: 0 passed, or skipped with the reason printed; 1 failed; 2 the user's mistake.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly PYTHON=.venv/bin/python HERE=tests/emulated_cloud PACKAGE=tests.emulated_cloud
readonly WORLDS=2  # side by side, as in pace.py; a third makes all of them too slow on 2 cores
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

emulated() {
  local reason scratch junit code=0
  install_packages
  if ! reason=$("$PYTHON" -m "$PACKAGE.possible"); then
    [ -n "$reason" ] || exit 1  # it failed itself, and has said how
    if [ "${FT_CLOUD_REQUIRED:-}" = 1 ]; then
      say "failed, because FT_CLOUD_REQUIRED=1 and the emulated cloud cannot be had here: $reason"
      exit 1
    fi
    say "skipped, because the emulated cloud cannot be had here: $reason"
    exit 0
  fi
  FT_CLOUD_PACE=$("$PYTHON" -m "$PACKAGE.pace")  # before the worlds: they would slow each other down
  export FT_CLOUD_PACE
  scratch=$("$PYTHON" -m "$PACKAGE.orphans" begin $$)
  trap '"$PYTHON" -m "$PACKAGE.orphans" end $$' EXIT  # also of what Ctrl-C has kept the tests from removing
  junit="$scratch/junit.xml"
  export FT_CLOUD_IMAGE="${FT_CLOUD_IMAGE:-$scratch/image}"  # the processes share it
  "$PYTHON" -m pytest -vv -ra -m "$suite" --numprocesses "$WORLDS" --dist loadgroup "$HERE" "${only[@]}" \
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
