"""Restrict what untrusted code may read, by Landlock: Python's own files, and little of /proc.

A system call filter sees numbers, never paths; Landlock (Linux from 5.13 on, where it is switched
on) sees the file that a path leads to, through any links. It also denies the code the memory and
the environment of other processes. It does not hide names: the code can still ask whether a file
exists, and for its size and dates.
"""

import ctypes
import os
import site
import struct
import sys
import sysconfig
from functools import cache

_CREATE_RULESET, _TELL_VERSION = 444, 1
# Number of file rights by version of the interface: 13 in the first; then REFER, TRUNCATE and, in
# the fifth, IOCTL_DEV. Separate fields hold TCP's bind and connect (from the fourth version on) and
# abstract Unix sockets and signals (from the sixth on).
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_NEWEST_FILE_RIGHTS = 16
_TWO_RIGHTS = 3

_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
_SYSTEM = (
    *("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"),
    *("/etc/localtime", "/usr/share/zoneinfo"),
    *("/sys/devices/system/cpu", "/proc/cpuinfo", "/proc/meminfo"),
    *(f"/proc/self/{name}" for name in ("stat", "statm", "status", "maps")),
)


@cache
def version() -> int:
    """Version of the kernel's Landlock; 0: it has none."""
    if not sys.platform.startswith("linux"):
        return 0
    call = ctypes.CDLL(None, use_errno=True).syscall
    return max(0, int(call(_CREATE_RULESET, None, ctypes.c_size_t(0), _TELL_VERSION)))


def ruleset(interface: int) -> bytes:
    """`struct landlock_ruleset_attr` that handles every right of this version of the interface."""
    files = (1 << _FILE_RIGHTS.get(interface, _NEWEST_FILE_RIGHTS)) - 1
    fields = [files]
    if interface >= 4:
        fields.append(_TWO_RIGHTS)
    if interface >= 6:
        fields.append(_TWO_RIGHTS)
    return struct.pack(f"={len(fields)}Q", *fields)


def readable() -> list[str]:
    """Files and folders that may be read: those that a program needs to start and to import."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    python = [sysconfig.get_path(name) for name in names] + site.getsitepackages()
    python.append(os.path.join(sys.base_prefix, "lib"))
    return sorted({*python, *_LIBRARIES, *_SYSTEM})
