"""A system call filter for untrusted code, which may compute and read, and nothing else.

The filter is an allow-list: the kernel refuses every call that is not named here, and some named
ones by their arguments. Allowed are threads, reading files, and writing to descriptors that were
open before. Refused is everything that reaches outside the process: sockets, other programs and
processes, signals, locks and changes of files, shared memory, namespaces, clocks, and raising its
own limits. The filter cannot be removed again.
"""

import errno
import struct

ARCHITECTURES = {"x86_64": 0, "aarch64": 1}
"""Architectures whose system calls are listed, with their column in the tables below."""

_AUDIT_ARCH = (0xC000003E, 0xC00000B7)
_NONE = -1
# x86_64, aarch64: from asm/unistd_64.h and asm-generic/unistd.h.
_ALLOWED = {
    # open descriptors, and metadata of files
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "lseek": (8, 62),
    "close": (3, 57),
    "close_range": (436, 436),
    "dup": (32, 23),
    "dup2": (33, _NONE),
    "dup3": (292, 24),
    "pipe": (22, _NONE),
    "stat": (4, _NONE),
    "fstat": (5, 80),
    "lstat": (6, _NONE),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, _NONE),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, _NONE),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    # memory and threads
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "brk": (12, 214),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "restart_syscall": (219, 128),
    # signals to itself
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "alarm": (37, _NONE),
    "pause": (34, _NONE),
    # time and clocks
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, _NONE),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "sysinfo": (99, 179),
    "uname": (63, 160),
    "getrandom": (318, 278),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getpgrp": (111, _NONE),
    # waiting, and asyncio's pair of sockets
    "poll": (7, _NONE),
    "ppoll": (271, 73),
    "select": (23, _NONE),
    "pselect6": (270, 72),
    "epoll_create": (213, _NONE),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, _NONE),
    "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441),
    "eventfd2": (290, 19),
    "shutdown": (48, 210),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    "getsockopt": (55, 209),
}

_LOAD, _EQUAL, _LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_REFUSE = 0x00050000 | errno.EPERM
_NO_MORE = 0x00050000 | errno.EAGAIN
_ASK = 0x7FC00000
_UNKNOWN = 0x00050000 | errno.ENOSYS
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data, little-endian

Instruction = tuple[int, int, int, int]
"""`struct sock_filter`: operation, jump if true, jump if false, operand."""
Check = tuple[int, int, int, bool]
"""Index of an argument's word, an operation, its operand, and the required result."""
SyscallRule = tuple[tuple[int, int], tuple[Check, ...]]
"""A call by its numbers, and the checks that must all hold."""

_ALL_BITS = 0xFFFFFFFF
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC; O_TMPFILE needs one
_ASYNC = 0o20000  # O_ASYNC: signals to whomever F_SETOWN named
_THREAD = 0x10000
# Flags of pthread_create: VM FS FILES SIGHAND THREAD SYSVSEM SETTLS PARENT_SETTID CHILD_CLEARTID,
# and musl's DETACHED. Flags for new namespaces, which threads may use too, are refused.
_THREAD_FLAGS = 0x7D0F00
_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC = 0, 1, 2, 3, 4, 1030
_FIONCLEX, _FIOCLEX, _FIONBIO = 0x5450, 0x5451, 0x5421  # other requests type into terminals
_PR_SET_NAME, _PR_GET_NAME = 15, 16
_AF_UNIX, _SOCK_STREAM = 1, 1
# Rarely used parts of the kernel that have had vulnerabilities.
_MSG_OOB, _O_NOTIFICATION_PIPE = 0x1, 0o200
_MADV_GUARD_INSTALL, _MADV_GUARD_REMOVE = 102, 103


def _is(argument: int, value: int) -> Check:
    """Check that an int argument has this value; the kernel reads its low word only."""
    return (2 * argument, _EQUAL, value, True)


def _with(argument: int, bits: int) -> Check:
    return (2 * argument, _ANY_BIT, bits, True)


def _without(argument: int, bits: int) -> Check:
    return (2 * argument, _ANY_BIT, bits, False)


def _null(argument: int) -> tuple[Check, Check]:
    low, high = 2 * argument, 2 * argument + 1
    return (low, _ANY_BIT, _ALL_BITS, False), (high, _ANY_BIT, _ALL_BITS, False)


_CLONE = (56, 220)
_FCNTL, _IOCTL, _PRCTL, _MADVISE = (72, 25), (16, 29), (157, 167), (28, 233)
_CHECKED: tuple[SyscallRule, ...] = (
    ((2, _NONE), (_without(1, _WRITING),)),  # open
    ((257, 56), (_without(2, _WRITING),)),  # openat
    (_CLONE, (_with(0, _THREAD), _without(0, _ALL_BITS ^ _THREAD_FLAGS))),
    *(
        (_FCNTL, (_is(1, command),))
        for command in (_F_DUPFD, _F_DUPFD_CLOEXEC, _F_GETFD, _F_SETFD, _F_GETFL)
    ),
    (_FCNTL, (_is(1, _F_SETFL), _without(2, _ASYNC))),
    *((_IOCTL, (_is(1, request),)) for request in (_FIONBIO, _FIOCLEX, _FIONCLEX)),
    *((_PRCTL, (_is(0, option),)) for option in (_PR_SET_NAME, _PR_GET_NAME)),
    # Values from 100 on include some that take pages of memory from the machine.
    (_MADVISE, (_without(2, _ALL_BITS ^ 31),)),
    *((_MADVISE, (_is(2, advice),)) for advice in (_MADV_GUARD_INSTALL, _MADV_GUARD_REMOVE)),
    # A connected pair, whose messages have no address; asyncio uses one to wake itself.
    ((53, 199), (_is(0, _AF_UNIX), _with(1, _SOCK_STREAM), _without(1, 0xF ^ _SOCK_STREAM))),
    ((44, 206), (_without(3, _MSG_OOB), *_null(4))),  # sendto
    ((45, 207), (_without(3, _MSG_OOB),)),  # recvfrom
    ((293, 59), (_without(1, _O_NOTIFICATION_PIPE),)),  # pipe2
    # prlimit64: only to read its own limits.
    ((302, 261), (_is(0, 0), *_null(2), _with(3, _ALL_BITS))),
)
# Refused with ENOSYS: C libraries fall back to the older call, whose arguments can be checked.
_ABSENT = {"clone3": (435, 435), "openat2": (437, 437)}
_KNOWN = 464
"""System calls from this number on are newer than the tables."""


def program(machine: str) -> bytes:
    """The filter, as an array of `struct sock_filter`.

    Args:
        machine: one of `ARCHITECTURES`.
    """
    column = ARCHITECTURES[machine]
    code = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, _AUDIT_ARCH[column]), (_RETURN, 0, 0, _KILL)]
    code.append((_LOAD, 0, 0, _NUMBER))
    for table, answer in ((_ALLOWED, _ALLOW), (_ABSENT, _UNKNOWN)):
        for numbers in table.values():
            if numbers[column] != _NONE:
                code += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, answer)]
    # Numbers of the x32 ABI, from 0x40000000 on, are unknown here and so refused.
    code += [(_LEAST, 0, 1, _KNOWN), (_RETURN, 0, 0, _UNKNOWN)]
    for numbers, checks in _CHECKED:
        if numbers[column] != _NONE:
            code += _checked(numbers[column], checks)
    code.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def threads(machine: str, *, asking: bool) -> bytes:
    """A second filter beside `program`, which decides on new threads only.

    Args:
        machine: one of `ARCHITECTURES`.
        asking: the holder of the filter's descriptor decides; otherwise new threads are refused
            with EAGAIN, as if the machine had no room.
    """
    answer = _ASK if asking else _NO_MORE
    code = [
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 0, 3, _CLONE[ARCHITECTURES[machine]]),
        (_LOAD, 0, 0, _ARGUMENTS),
        (_ANY_BIT, 0, 1, _THREAD),
        (_RETURN, 0, 0, answer),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def _checked(number: int, checks: tuple[Check, ...]) -> list[Instruction]:
    """Allow this call if all checks hold; otherwise go on to the next rule."""
    size = 2 + 2 * len(checks) + 1
    code = [(_LOAD, 0, 0, _NUMBER), (_EQUAL, 0, size - 2, number)]
    for word, operation, operand, wanted in checks:
        left = size - len(code) - 2  # instructions of this rule after the jump
        code.append((_LOAD, 0, 0, _ARGUMENTS + 4 * word))
        code.append((operation, *((0, left) if wanted else (left, 0)), operand))
    return [*code, (_RETURN, 0, 0, _ALLOW)]
