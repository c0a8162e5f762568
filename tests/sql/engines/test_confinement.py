"""Code that runs inside the worker, as after a flaw in SQLite, reaches nothing but the databases and the temporary folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.sql.engines import confinement
from finetune.sql.engines.sqlite import SqlSandbox
from tests.sql.engines.test_sqlite import linux_only
from tests.sql.engines.test_sqlite_process import database as database

pytestmark = linux_only

ATTEMPTS = {
    "read a database": "open(database, 'rb').read(16)",
    "write a temporary file": "open(temporary + '/new', 'w').write('x')",
    "delete a temporary file": "os.unlink(temporary + '/new')",
    "random numbers": "open('/dev/urandom', 'rb').read(1)",
    "start a thread": "[thread := threading.Thread(target=int), thread.start(), thread.join()]",
    "lower a limit": "resource.setrlimit(resource.RLIMIT_CPU, (50, 60))",
    "read another file": "open(secret).read()",
    "read /etc/passwd": "open('/etc/passwd').read()",
    "read the environment of the parent": "open(f'/proc/{os.getppid()}/environ').read()",
    "list a folder": "os.listdir('/')",
    "write a database": "open(database, 'ab')",
    "write elsewhere": "open(secret + '.new', 'w')",
    "delete a database": "os.unlink(database)",
    "rename a database": "os.rename(database, database + '.old')",
    "make a folder": "os.mkdir(temporary + '/folder')",
    "make a link": "os.symlink('/', temporary + '/link')",
    "open a TCP socket": "socket.socket()",
    "open a UDP socket": "socket.socket(type=socket.SOCK_DGRAM)",
    "open a UNIX socket": "socket.socket(socket.AF_UNIX)",
    "open a pair of sockets": "socket.socketpair()",
    "start a program": "os.execv('/bin/sh', ['sh', '-c', 'echo started'])",
    "start a program by posix_spawn": "os.posix_spawn('/bin/sh', ['sh', '-c', 'exit'], {})",
    "start a process": "os.fork()",
    "signal the parent": "os.kill(os.getppid(), 0)",
    "change a limit of the parent": "resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0))",
    "trace the parent": "check(libc.ptrace(16, os.getppid(), 0, 0))",
    "leave a name space": "check(libc.unshare(0x10000000))",
    "a file in memory": "os.memfd_create('x')",
    "io_uring": "check(libc.syscall(425, 1, None))",
}
ALLOWED = list(ATTEMPTS)[: list(ATTEMPTS).index("read another file")]

ATTACK = """
import ctypes, json, os, resource, socket, sys, threading
from finetune.sql.engines.confinement import confine
database, temporary, secret, attempts = *sys.argv[1:4], json.loads(sys.argv[4])
libc = ctypes.CDLL(None, use_errno=True)
def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
layers = confine([database.encode(), b"/no/such/file"], temporary.encode())
worked = []
for name, code in attempts.items():
    try:
        eval(code)
    except OSError:
        continue
    worked.append(name)
print(json.dumps([layers, worked]))
"""


def test_only_databases_and_temporary_files_can_be_reached(tmp_path: Path) -> None:
    shop, secret, temporary = tmp_path / "shop.sqlite", tmp_path / "token", tmp_path / "tmp"
    shop.write_bytes(b"SQLite format 3\0")
    secret.write_text("hf_secret")
    temporary.mkdir()
    command = [sys.executable, "-c", ATTACK, str(shop), str(temporary), str(secret), json.dumps(ATTEMPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    layers, worked = json.loads(done.stdout)
    if len(layers) < 2:
        pytest.skip(f"this kernel has only {layers}")
    assert worked == ALLOWED


def test_the_worker_is_confined(database: Path) -> None:
    with SqlSandbox() as sandbox:
        layers = sandbox.second_layer()
        assert sandbox._worker is not None
        status = Path(f"/proc/{sandbox._worker.pid}/status").read_text()
        filters = [line.split()[1] for line in status.splitlines() if line.startswith("Seccomp:")]
        assert filters == (["2"] if "seccomp" in layers else ["0"])
        for path in Path(f"/proc/{sandbox._worker.pid}/task").iterdir():  # the thread that watches the parent, too
            assert (path / "status").read_text().count("NoNewPrivs:\t1") == 1


WITHOUT = """
import errno, sys
from pathlib import Path
from finetune.sql.engines import confinement, sqlite_worker
if "Landlock" in sys.argv[1]:
    confinement.LANDLOCK_CREATE_RULESET = 100_000  # a system call that no kernel has: ENOSYS
if "seccomp" in sys.argv[1]:
    confinement.ARCHITECTURES.clear()
if "libc" in sys.argv[1]:
    def no_libc():
        raise OSError(errno.ENOSYS, "no libc")
    confinement._libc = no_libc
sqlite_worker.main()
"""


@pytest.mark.parametrize("absent", ["Landlock", "seccomp", "Landlock seccomp", "libc"])
def test_queries_run_where_the_kernel_has_no_second_layer(
    database: Path, absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = f"import sys; sys.argv = ['', {absent!r}]; sys.path.append({{!r}})\n" + WITHOUT.replace("{", "{{").replace(
        "}", "}}"
    )
    monkeypatch.setattr("finetune.sql.engines.sqlite_process.START_WORKER", start)
    with SqlSandbox() as sandbox:
        layers = {layer.split()[0] for layer in sandbox.second_layer()}
        assert layers.isdisjoint(absent.split()) and (absent != "libc" or not layers)
        assert sandbox.run(database, "SELECT a FROM t", 5).rows == [(1,)]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_refuses_what_it_lists(machine: str) -> None:
    """Interprets the program, also for the machine that this is not."""
    architecture, column = confinement.ARCHITECTURES[machine]
    for name, numbers in confinement.DENIED.items():
        if (number := numbers[column]) is not None:
            assert filtered(machine, architecture, number) == "EPERM", name
    assert filtered(machine, architecture, confinement.CLONE3[column]) == "ENOSYS"
    assert filtered(machine, architecture, confinement.CLONE[column], 0x11) == "EPERM"
    assert filtered(machine, architecture, confinement.CLONE[column], 0x3D0F00) == "allow"
    assert filtered(machine, architecture, confinement.PRLIMIT64[column], 0) == "allow"
    assert filtered(machine, architecture, confinement.PRLIMIT64[column], 17) == "EPERM"
    assert filtered(machine, architecture, 0) == "allow"  # read on x86-64, io_setup on ARM64
    assert filtered(machine, architecture, confinement.X32) == "EPERM"
    assert filtered(machine, 0x40000003, 0) == "kill"  # a 32-bit system call
    assert len({numbers[column] for numbers in confinement.DENIED.values()} - {None}) >= 40


def filtered(machine: str, architecture: int, number: int, argument: int = 0) -> str:
    import struct

    code = list(struct.iter_unpack("=HBBI", confinement.filter_program(machine)))
    fields, accumulator, at = {0: number, 4: architecture, 16: argument}, 0, 0
    while True:
        operation, if_true, if_false, operand = code[at]
        at += 1
        if operation == 0x06:
            return {0x7FFF0000: "allow", 0x80000000: "kill", 0x00050001: "EPERM", 0x00050026: "ENOSYS"}[operand]
        if operation == 0x20:
            accumulator = fields[operand]
            continue
        holds = {0x15: accumulator == operand, 0x35: accumulator >= operand, 0x45: bool(accumulator & operand)}[
            operation
        ]
        at += if_true if holds else if_false
