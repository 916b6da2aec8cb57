"""A system call filter for code that is not trusted: it may compute and read, and no more.

The kernel refuses what would reach outside the process: sockets, other programs and processes,
signals, changes of files, shared memory, namespaces, and the lifting of its own limits. Threads,
reading of files and writing to what was open before remain. The filter cannot be taken off again.
"""

import errno
import struct

ARCHITECTURES = {"x86_64": 0, "aarch64": 1}
"""Machines whose system calls are known here, and their column in the table below."""

_AUDIT_ARCH = (0xC000003E, 0xC00000B7)
_NONE = -1
# x86_64, aarch64: from asm/unistd_64.h and asm-generic/unistd.h.
_DENIED = {
    "socket": (41, 198),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fork": (57, _NONE),
    "vfork": (58, _NONE),
    "creat": (85, _NONE),
    "unlink": (87, _NONE),
    "unlinkat": (263, 35),
    "rename": (82, _NONE),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "rmdir": (84, _NONE),
    "mkdir": (83, _NONE),
    "mkdirat": (258, 34),
    "link": (86, _NONE),
    "linkat": (265, 37),
    "symlink": (88, _NONE),
    "symlinkat": (266, 36),
    "mknod": (133, _NONE),
    "mknodat": (259, 33),
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "chmod": (90, _NONE),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, _NONE),
    "fchown": (93, 55),
    "lchown": (94, _NONE),
    "fchownat": (260, 54),
    "utime": (132, _NONE),
    "utimes": (235, _NONE),
    "utimensat": (280, 88),
    "futimesat": (261, _NONE),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "open_by_handle_at": (304, 265),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "iopl": (172, _NONE),
    "ioperm": (173, _NONE),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "setrlimit": (160, 164),
    "setpriority": (141, 140),
}
# C libraries fall back to the older call, whose arguments a filter can read.
_ABSENT = {"clone3": (435, 435), "openat2": (437, 437)}
_OPEN = {"open": ((2, _NONE), 1), "openat": ((257, 56), 2)}
"""Calls, and which argument has the flags."""
_IOCTL = (16, 29)
_NONBLOCKING = 0x5421  # FIONBIO, which asyncio needs; others type into terminals
_CLONE = (56, 220)
_CLONE_THREAD = 0x10000
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC; O_TMPFILE needs one
_KNOWN = 464
"""System calls from this number on are newer than the table."""
_X32 = 0x40000000

_LOAD, _EQUAL, _LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_REFUSE = 0x00050000 | errno.EPERM
_UNKNOWN = 0x00050000 | errno.ENOSYS
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data, little-endian


def program(machine: str) -> bytes:
    """The filter, as an array of `struct sock_filter`.

    Args:
        machine: one of `ARCHITECTURES`.
    """
    column = ARCHITECTURES[machine]
    code = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, _AUDIT_ARCH[column]), (_RETURN, 0, 0, _KILL)]
    code.append((_LOAD, 0, 0, _NUMBER))
    code += [(_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _REFUSE)]
    code += [(_LEAST, 0, 1, _KNOWN), (_RETURN, 0, 0, _UNKNOWN)]
    for table, answer in ((_DENIED, _REFUSE), (_ABSENT, _UNKNOWN)):
        for numbers in table.values():
            if numbers[column] != _NONE:
                code += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, answer)]
    for numbers, argument in _OPEN.values():
        if numbers[column] != _NONE:
            code += _by_argument(numbers[column], argument, (_ANY_BIT, _WRITING), _REFUSE, _ALLOW)
    code += _by_argument(_CLONE[column], 0, (_ANY_BIT, _CLONE_THREAD), _ALLOW, _REFUSE)
    code += _by_argument(_IOCTL[column], 1, (_EQUAL, _NONBLOCKING), _ALLOW, _REFUSE)
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def _by_argument(
    number: int, argument: int, test: tuple[int, int], then: int, otherwise: int
) -> list[tuple[int, int, int, int]]:
    """For this call: the answer `then` if its argument passes the test, else `otherwise`."""
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, _ARGUMENTS + 8 * argument),
        (test[0], 0, 1, test[1]),
        (_RETURN, 0, 0, then),
        (_RETURN, 0, 0, otherwise),
    ]
