"""Takes from the SQL worker what a query never needs, so that a flaw in SQLite which executes code gets nothing out of it.

Standard library only, called once by `sqlite_worker.py`, before the first query. Both layers are Linux's, and each is left out
where the kernel has none of it:

- Landlock (https://docs.kernel.org/userspace-api/landlock.html): files are closed, except the databases for reading and one
  folder for temporary files; from its version 4 on TCP too, from version 6 on signals to other processes.
- seccomp (https://www.kernel.org/doc/html/latest/userspace-api/seccomp_filter.html): no sockets, no programs, no new or other
  processes, and none of the system calls in DENIED. On x86-64 and ARM64.

The system calls are made through ctypes, because the packages that wrap them (landlockpy, py-landlock, pyseccomp) are each in an
early version, and need site-packages, which the worker does not load.
"""

import contextlib
import ctypes
import errno
import os
import signal
import stat
import struct
import sys
from collections.abc import Iterable

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446

READ_FILE, READ_DIR = 1 << 2, 1 << 3
TEMPORARY_FILES = 1 << 1 | READ_FILE | 1 << 5 | 1 << 8 | 1 << 14  # write, read, remove, make and cut regular files
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""Version of Landlock -> how many rights to files it knows; they are the lowest bits (linux/landlock.h)."""
TCP_FROM, SIGNALS_FROM = 4, 6
ALWAYS_READABLE = ("/dev/urandom", "/etc/localtime", "/usr/share/zoneinfo")
"""What random() and date('now', 'localtime') read."""

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""Machine -> its AUDIT_ARCH number (linux/audit.h), and the column of its numbers in the tables below."""
X32 = 0x40000000
"""From this number on, x86-64 has a second table of the same system calls."""
CLONE, CLONE3, PRLIMIT64 = (56, 220), (435, 435), (302, 261)
CLONE_THREAD = 0x00010000
DENIED = {
    "socket": (41, 198), "socketpair": (53, 199), "bind": (49, 200), "connect": (42, 203),
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "memfd_create": (319, 279),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "personality": (135, 92),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "open_by_handle_at": (304, 265),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
}  # fmt: skip
"""Refused with EPERM: name -> its number on x86-64 and on ARM64 (asm/unistd_64.h, asm-generic/unistd.h)."""


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the thread that started it ends, even if another process still holds its pipes."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            _check(_libc().prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), _ZERO, _ZERO, _ZERO))
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def confine(readable: Iterable[bytes], temporary: bytes) -> list[str]:
    """Close everything but these files, and this folder for temporary files. Returns the layers that hold from now on.

    Threads that exist already are not confined: call it before starting one.
    """
    layers: list[str] = []
    if sys.platform != "linux":
        return layers
    with contextlib.suppress(OSError):
        _check(_libc().prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), _ZERO, _ZERO, _ZERO))
        with contextlib.suppress(OSError):
            version = _restrict_files(readable, temporary)
            layers.append(f"Landlock {version}")
        with contextlib.suppress(OSError):
            _filter_system_calls()
            layers.append("seccomp")
    return layers


def _restrict_files(readable: Iterable[bytes], temporary: bytes) -> int:
    version = _system_call(LANDLOCK_CREATE_RULESET, None, 0, 1)
    rights = max(number for known, number in FILE_RIGHTS.items() if known <= version)
    handled = (1 << rights) - 1
    attributes = struct.pack(
        "=QQQ", handled, 0b11 if version >= TCP_FROM else 0, 0b11 if version >= SIGNALS_FROM else 0
    )
    size = 24 if version >= SIGNALS_FROM else 16 if version >= TCP_FROM else 8
    rules = _system_call(LANDLOCK_CREATE_RULESET, attributes, size, 0)
    try:
        for path in (*map(os.fsencode, ALWAYS_READABLE), *readable):
            _allow(rules, path, READ_FILE)
        _allow(rules, temporary, TEMPORARY_FILES & handled)
        _system_call(LANDLOCK_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)
    return version


def _allow(rules: int, path: bytes, rights: int) -> None:
    """One rule: these rights to a file, or to a folder and everything in it. A path that is missing needs none."""
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if rights == READ_FILE and stat.S_ISDIR(os.fstat(opened).st_mode):
            rights |= READ_DIR
        _system_call(LANDLOCK_ADD_RULE, rules, 1, struct.pack("=Qi", rights, opened), 0)
    finally:
        os.close(opened)


def _filter_system_calls() -> None:
    program = filter_program(os.uname().machine)
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _check(_libc().prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), header, _ZERO, _ZERO))


def filter_program(machine: str) -> bytes:
    """The filter as instructions of classic BPF, 8 bytes each (linux/filter.h, linux/seccomp.h). Raises OSError for a machine
    whose numbers are not known here."""
    if machine not in ARCHITECTURES or struct.calcsize("P") != 8:
        raise OSError(errno.ENOSYS, "no filter for this machine")
    audit_arch, column = ARCHITECTURES[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    number, architecture, first_argument = 0, 4, 16  # offsets in struct seccomp_data; the argument's lower half
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    code: list[tuple[int, int, int, int]] = [  # operation, instructions to skip if true and if false, operand
        (load, 0, 0, architecture), (equal, 1, 0, audit_arch), (give, 0, 0, kill),
        (load, 0, 0, number), (at_least, 0, 1, X32), (give, 0, 0, refuse | errno.EPERM),
    ]  # fmt: skip
    for numbers in DENIED.values():
        if (denied := numbers[column]) is not None:
            code += [(equal, 0, 1, denied), (give, 0, 0, refuse | errno.EPERM)]
    code += [
        # a structure in memory, which a filter cannot read; the C library then uses clone
        (equal, 0, 1, CLONE3[column]), (give, 0, 0, refuse | errno.ENOSYS),
        (equal, 0, 4, CLONE[column]), (load, 0, 0, first_argument),
        (any_bit, 1, 0, CLONE_THREAD), (give, 0, 0, refuse | errno.EPERM), (give, 0, 0, allow),
        (equal, 0, 3, PRLIMIT64[column]), (load, 0, 0, first_argument),
        (equal, 1, 0, 0), (give, 0, 0, refuse | errno.EPERM), (give, 0, 0, allow),
    ]  # fmt: skip
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


_ZERO = ctypes.c_ulong(0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _system_call(number: int, *arguments: int | bytes | None) -> int:
    """Integers are passed as long: syscall() has a variable number of arguments, which ctypes would cut to 32 bits."""
    passed = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    return _check(_libc().syscall(ctypes.c_long(number), *passed))


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
