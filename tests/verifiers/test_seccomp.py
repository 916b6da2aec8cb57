"""The system call filter, run by an interpreter of its own: on both machines it says the same."""

import errno
import struct

import pytest

from scsdpo.verifiers.seccomp import ARCHITECTURES, program

ALLOWED, REFUSED, ABSENT, KILLED = (
    0x7FFF0000,
    0x50000 | errno.EPERM,
    0x50000 | errno.ENOSYS,
    1 << 31,
)
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
COLUMNS = {"x86_64": 0, "aarch64": 1}
THREAD = 0x3D0F00  # glibc's pthread_create


def answer(machine, number, *arguments, audit=None):
    """What the filter says of a call: classic BPF, as far as seccomp needs it."""
    words = [number, AUDIT[machine] if audit is None else audit, 0, 0]
    for argument in (*arguments, *[0] * (6 - len(arguments))):
        words += [argument & 0xFFFFFFFF, argument >> 32 & 0xFFFFFFFF]
    code = list(struct.iter_unpack("<HBBI", program(machine)))
    at = accumulator = 0
    while True:
        operation, yes, no, operand = code[at]
        at += 1
        if operation == 0x20:
            accumulator = words[operand // 4]
        elif operation == 0x06:
            return operand
        else:
            test = {
                0x15: accumulator == operand,
                0x35: accumulator >= operand,
                0x45: bool(accumulator & operand),
            }
            at += yes if test[operation] else no


HIGH = 1 << 32
CALLS = [
    ("read", (0, 63), (), ALLOWED),
    ("mmap", (9, 222), (), ALLOWED),
    ("futex", (202, 98), (), ALLOWED),
    ("openat for reading", (257, 56), (0, 0, 0o2000000), ALLOWED),
    ("openat for writing", (257, 56), (0, 0, 0o1), REFUSED),
    ("openat O_RDONLY | O_TRUNC", (257, 56), (0, 0, 0o1000), REFUSED),
    ("openat O_TMPFILE", (257, 56), (0, 0, 0o20200002), REFUSED),
    ("clone a thread", (56, 220), (THREAD,), ALLOWED),
    ("clone a thread, musl", (56, 220), (THREAD | 0x400000,), ALLOWED),
    ("clone a process", (56, 220), (17,), REFUSED),
    ("clone a thread with a network of its own", (56, 220), (THREAD | 0x40000000,), REFUSED),
    ("clone a thread that is traced", (56, 220), (THREAD | 0x2000,), REFUSED),
    ("clone3", (435, 435), (), ABSENT),
    ("openat2", (437, 437), (), ABSENT),
    ("fcntl F_GETFL, with whatever is left in the third", (72, 25), (3, 3, 0o20000), ALLOWED),
    ("fcntl F_SETFL O_NONBLOCK", (72, 25), (3, 4, 0o4000), ALLOWED),
    ("fcntl F_SETFL O_ASYNC", (72, 25), (3, 4, 0o20000), REFUSED),
    ("fcntl F_SETOWN", (72, 25), (3, 8, 1), REFUSED),
    ("fcntl F_SETOWN behind high bits", (72, 25), (3, 8 | HIGH, 1), REFUSED),
    ("fcntl F_SETLK", (72, 25), (3, 6), REFUSED),
    ("ioctl FIONBIO", (16, 29), (3, 0x5421), ALLOWED),
    ("ioctl TIOCSTI", (16, 29), (3, 0x5412), REFUSED),
    ("prctl PR_SET_NAME", (157, 167), (15,), ALLOWED),
    ("prctl PR_SET_PDEATHSIG", (157, 167), (1,), REFUSED),
    ("madvise MADV_DONTNEED", (28, 233), (0, 0, 4), ALLOWED),
    ("madvise MADV_HWPOISON", (28, 233), (0, 0, 100), REFUSED),
    ("madvise MADV_GUARD_INSTALL", (28, 233), (0, 0, 102), ALLOWED),
    ("socketpair", (53, 199), (1, 1 | 0o2000000), ALLOWED),
    ("socketpair of datagrams", (53, 199), (1, 2), REFUSED),
    ("socketpair of packets", (53, 199), (1, 5), REFUSED),
    ("socketpair of another family", (53, 199), (16, 1), REFUSED),
    ("send", (44, 206), (3, 1, 1, 0x4000, 0, 0), ALLOWED),
    ("sendto", (44, 206), (3, 1, 1, 0, 0x1000, 9), REFUSED),
    ("sendto an address of high bits alone", (44, 206), (3, 1, 1, 0, HIGH, 9), REFUSED),
    ("getrlimit", (302, 261), (0, 7, 0, 0x1000), ALLOWED),
    ("setrlimit", (302, 261), (0, 7, 0x1000, 0), REFUSED),
    ("setrlimit at high bits alone", (302, 261), (0, 7, HIGH, 0x1000), REFUSED),
    ("prlimit of another", (302, 261), (99, 7, 0, 0x1000), REFUSED),
    ("execve", (59, 221), (), REFUSED),
    ("kill", (62, 129), (), REFUSED),
    ("socket", (41, 198), (), REFUSED),
    ("io_uring_setup", (425, 425), (), REFUSED),
    ("setxattrat", (463, 463), (), REFUSED),
    ("what is to come", (464, 464), (), ABSENT),
    ("x32", (0x40000000, 0x40000000), (), ABSENT),
]


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_each_call_gets_its_answer(machine, call):
    _, numbers, arguments, expected = call
    assert answer(machine, numbers[COLUMNS[machine]], *arguments) == expected


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_less_than_a_third_of_all_calls_is_allowed_whatever_the_arguments(machine):
    allowed = [number for number in range(464) if answer(machine, number) == ALLOWED]
    assert 60 < len(allowed) < 464 / 3


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_calls_of_another_machine_end_the_process(machine):
    assert answer(machine, 3, audit=0x40000003) == KILLED  # those of 32-bit x86
