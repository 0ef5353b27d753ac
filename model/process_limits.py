"""Take from this process what a decoder of hostile files has no need of, with no way back.

Limits of the system (`setrlimit`) bound memory, CPU time and descriptors; a filter in the kernel
(seccomp) refuses the network, other programs, other processes and every change to the disk, also
to machine code that a damaged file brought to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys

_MAX_DESCRIPTORS = 64

# System calls by number: network, programs, other processes, changes to the disk, other ways in.
_REFUSED = {
    "x86_64": (
        41, 42, 43, 44, 46, 49, 50, 53, 288, 57, 58, 59, 322, 62, 101, 310, 311, 424, 434,
        76, 77, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 132, 133, 258, 259, 260, 263, 264,
        265, 266, 268, 280, 316, 437, 2, 165, 248, 249, 250, 272, 298, 308, 321, 323, 425,
    ),
    "aarch64": (
        198, 199, 200, 201, 202, 203, 206, 211, 242, 221, 281, 129, 117, 270, 271, 424, 434,
        45, 46, 33, 34, 35, 36, 37, 38, 52, 53, 54, 55, 88, 276, 437, 40, 217, 218, 219, 97, 241,
        268, 280, 282, 425,
    ),
}  # fmt: skip
_OPENAT = {"x86_64": 257, "aarch64": 56}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_THREAD = 0x10000  # a clone with this flag stays in the process
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_FOREIGN_CALLS = 0x40000000  # from here on: another table of numbers for the same calls
_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Instructions of the filter, and where the kernel puts what it judges.
_LOAD, _EQUAL, _FROM, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT, _THIRD_ARGUMENT_AT = 0, 4, 16, 32
_ALLOW, _REFUSE, _UNKNOWN = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2  # arguments of prctl


def limit(memory: int, cpu_seconds: float, wall_seconds: float) -> None:
    """Bound this process: bytes of data, seconds of all its threads, seconds on the clock."""
    cpu = max(1, int(cpu_seconds + 0.999))
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _MAX_DESCRIPTORS),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    with contextlib.suppress(ValueError):  # an outer limit is lower still
        # The second one kills; the first can be told from a kill for lack of memory.
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 2))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(max(1, int(wall_seconds + 0.999)))  # the end, should nobody be left to kill us


def close_doors() -> bool:
    """Refuse network, programs and changes to the disk; False where the kernel has no filters."""
    machine = platform.machine()
    if machine not in _REFUSED or not sys.platform.startswith("linux"):
        return False
    program = b"".join(struct.pack("HBBI", *line) for line in _filter(machine))
    kept = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(kept))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    unsigned = ctypes.c_ulong
    if prctl(_NO_NEW_PRIVILEGES, unsigned(1), unsigned(0), unsigned(0), unsigned(0)) != 0:
        return False
    return prctl(_SECCOMP, unsigned(_FILTER), ctypes.c_char_p(described)) == 0


def _filter(machine: str) -> list[tuple[int, int, int, int]]:
    """(operation, lines to skip if true, ... if false, value), one line after the other."""
    refused = _REFUSED[machine]
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _REFUSE),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    rest = [
        (_EQUAL, 0, 1, _CLONE3),  # its flags cannot be seen; the C library then uses clone
        (_RETURN, 0, 0, _UNKNOWN),
        (_EQUAL, 0, 2, _CLONE[machine]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
        (_ANY_BIT, 3, 4, _THREAD),
        (_EQUAL, 0, 2, _OPENAT[machine]),
        (_LOAD, 0, 0, _THIRD_ARGUMENT_AT),
        (_ANY_BIT, 1, 0, _CHANGES),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    for place, number in enumerate((_FOREIGN_CALLS, *refused)):
        to_refusal = len(refused) - place + len(rest) - 1
        lines.append((_FROM if place == 0 else _EQUAL, to_refusal, 0, number))
    return lines + rest
