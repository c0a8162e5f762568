"""The message if this computer cannot run the emulated cloud, and where a Python 3.10 is searched for."""

from __future__ import annotations

import ipaddress
import json
import os
import sys
from pathlib import Path

import pytest

from tests.emulated_cloud import possible
from tests.emulated_cloud.machine import Site
from tests.emulated_cloud.orphans import SLOTS


def build(folder: Path, version: str) -> Path:
    """A Python of that version in a pyenv folder."""
    place = folder / "versions" / version
    (place / "bin").mkdir(parents=True)
    (place / "bin" / f"python{version.rpartition('.')[0]}").touch()
    return place


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No pyenv and an empty home, as in CI."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("PYENV_ROOT", raising=False)
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "usr"))
    return tmp_path


def test_python_310_is_found_without_home_or_a_global_version(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(Path("/opt/hostedtoolcache/Python").glob("3.10*")):
        pytest.skip("this computer has one where GitHub keeps it")
    assert possible.python310() is None
    beside = build(nowhere / "a", "3.10.1")
    build(nowhere / "a", "3.11.9")
    monkeypatch.setattr(sys, "base_prefix", str(nowhere / "a" / "versions" / "3.11.9"))
    assert possible.python310() == beside, "this very Python is pyenv's"
    on_path = build(nowhere / "pyenv", "3.10.2")
    monkeypatch.setenv("PATH", str(nowhere / "pyenv" / "shims"))
    assert possible.python310() == on_path, "pyenv's programs are on PATH"
    at_home = build(nowhere / "home" / ".pyenv", "3.10.3")
    assert possible.python310() == at_home
    named = build(nowhere / "named", "3.10.4")
    build(nowhere / "named", "3.10.0")
    monkeypatch.setenv("PYENV_ROOT", str(nowhere / "named"))
    assert possible.python310() == named, "the newest"
    (named / "bin" / "python3.10").unlink()
    assert possible.python310() == nowhere / "named" / "versions" / "3.10.0", "half a build does not count"


def test_all_that_is_missing_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(possible, "PROGRAMS", {"ft-no-such-program": "no-such-package", "sh": "dash"})
    monkeypatch.setattr(possible, "python310", lambda: None)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    message = possible.missing()
    assert message.startswith("it needs root (network namespaces, overlay mounts); ")
    assert "Debian packages are missing: apt-get install no-such-package" in message
    assert "pyenv install 3.10" in message


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        ([{"dst": "default", "dev": "eth0"}, {"dst": "10.0.0.0/16", "dev": "eth0"}], ""),
        ([{"dst": "10.128.16.0/20", "dev": "ft-bridge1"}], ""),
        ([{"dst": "10.128.0.1", "dev": "ens4"}], "10.128.0.1 on ens4"),
        ([{"dst": "default", "gateway": "10.128.0.1", "dev": "ens4"}], "10.128.0.1 on ens4"),
        ([{"type": "local", "dst": "10.128.20.5", "dev": "ens4"}, {"dst": "default"}], "10.128.20.5 on ens4"),
        ([{"dst": "10.0.0.0/8", "dev": "vpn"}], ""),
    ],
)
def test_a_computer_that_is_in_the_machines_network(
    routes: list[dict[str, str]], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a machine in Google's us-central1 is: it would lose its gateway."""
    program = tmp_path / "ip"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(routes)}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert possible.own_network() == message
    last = Site(SLOTS - 1, tmp_path, tmp_path, "", "").machine_addresses()[-1]
    assert ipaddress.ip_address(last) in possible.ADDRESSES


def test_make_installs_what_is_asked_for() -> None:
    listed = (Path(possible.HERE) / "packages.txt").read_text(encoding="utf-8").split()
    assert {*possible.PROGRAMS.values(), "python3"} == set(listed)
