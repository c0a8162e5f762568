"""llama.cpp's server in a process of its own: it answers, refuses, and ends with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib import util
from pathlib import Path

import pytest

from finetune.models.llama_cpp import LlamaServer
from tests.helpers.errors import raises

pytest.importorskip("xllamacpp", reason="the extra `export` is not installed")


def has_ended(pid: int, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_it_answers_on_loopback_and_ends(tiny_gguf: Path) -> None:
    with LlamaServer(tiny_gguf, context_tokens=64, parallel=2, api_key="secret") as server:
        running = server.alive
        assert server.url.startswith("http://127.0.0.1:") and running
        ids = server.tokenize("SELECT name")
        whole = server.request("/completion", {"prompt": ids, "n_predict": 5, "temperature": 0, "return_tokens": True})
        events = list(
            server.stream("/completion", {"prompt": ids, "n_predict": 5, "temperature": 0, "return_tokens": True})
        )
        assert [token for event in events for token in event["tokens"]] == whole["tokens"] and events[-1]["stop"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/completions", data=b"{}"), timeout=10)
        with raises("llama.refused"):
            server.request("/completion", {"prompt": list(range(4, 9)) * 200, "n_predict": 5})
        assert server._process is not None
        pid = server._process.pid
    assert not server.alive and has_ended(pid)
    with raises("llama.lost"):
        server.request("/tokenize", {"content": "x"})


def test_it_ends_with_a_parent_that_is_killed(tiny_gguf: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from finetune.models.llama_cpp import LlamaServer\n"
        "with LlamaServer(Path(sys.argv[1]), context_tokens=64) as s: print(s._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tiny_gguf)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert has_ended(child)


def test_a_crash_is_one_line(tiny_gguf: Path) -> None:
    with LlamaServer(tiny_gguf, context_tokens=64) as server:
        assert server._process is not None
        os.kill(server._process.pid, signal.SIGKILL)
        server._process.wait()
        with raises("llama.lost", match="has ended"):
            server.tokenize("x")


@pytest.mark.parametrize("content", [b"", b"not a model" * 100, "cut"], ids=["empty", "other", "cut"])
def test_a_file_that_does_not_load_is_refused(tiny_gguf: Path, tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:5000] if isinstance(content, str) else content)
    with raises("llama.load_failed"), LlamaServer(path):
        pass
    with raises("llama.load_failed", match="no such file"), LlamaServer(tmp_path / "absent.gguf"):
        pass


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with raises("install.missing_package", match="export"):
        LlamaServer(Path("model.gguf"))
    assert util.find_spec("xllamacpp") is None, "patched for the whole process, and undone after the test"
