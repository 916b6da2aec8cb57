"""Ways out of a process, as programs: each hurts a decoy of the test's, or says that it could.

A program knows its decoys by name: a process VICTIM with a secret in its environment, and its
standard input from FILE; a file FILE with the secret, in FOLDER; a datagram socket at SOCKET;
System V's QUEUE and SEGMENT; LINK, which leads to FILE and to a file of Python's in turns.
"""

import platform
from dataclasses import dataclass

PRELUDE = """
import ctypes, errno, fcntl, os, platform, resource, signal, socket, struct, time
libc = ctypes.CDLL(None, use_errno=True)
ARM = platform.machine() == "aarch64"

def call(number, *arguments):
    return libc.syscall(number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))

def stay():
    # with the pipes open, whose closing is the end of the verdict
    for number in range(3, 20):
        if os.path.exists(f'/proc/self/fd/{number}'): os.set_inheritable(number, True)

def hurts(result):
    if result != -1:
        raise SystemExit("HURT")

def reaches(result):
    if result != -1 or ctypes.get_errno() not in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        raise SystemExit("HURT")

def child(process):
    if process == 0:
        os._exit(0)
    hurts(process)
"""


@dataclass(frozen=True)
class Attack:
    """A program that must get nowhere."""

    name: str
    code: str
    landlock: bool = False
    """A system call filter alone does not hold it."""
    sure: bool = True
    """Unhindered, it works on any machine and for any user."""


def _pair(kind="STREAM"):
    return f"a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_{kind})\n"


SIGNALS = (
    Attack(
        "a socket's signals go to another process",
        _pair()
        + "fcntl.fcntl(a, fcntl.F_SETOWN, VICTIM); fcntl.fcntl(a, 10, signal.SIGKILL)\n"
        + "fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC); b.send(b'x')",
    ),
    Attack(
        "the same by F_SETOWN_EX",
        _pair()
        + "fcntl.fcntl(a, 15, struct.pack('ii', 1, VICTIM)); fcntl.fcntl(a, 10, signal.SIGKILL)\n"
        + "fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC); b.send(b'x')",
    ),
    Attack(
        "the same by ioctl",
        _pair()
        + "fcntl.ioctl(a, 0x8901, struct.pack('i', VICTIM))\n"
        + "fcntl.ioctl(a, 0x5452, struct.pack('i', 1)); b.send(b'x')",
    ),
    Attack("kill", "os.kill(VICTIM, 9)"),
    Attack("a queued signal", "libc.sigqueue(VICTIM, 9, None)"),
    Attack("tgkill", "call(131 if ARM else 234, VICTIM, VICTIM, 9)"),
    Attack("a signal by pidfd", "signal.pidfd_send_signal(os.pidfd_open(VICTIM), 9)"),
    Attack(
        "a timer that signals", "hurts(libc.timer_create(0, None, ctypes.create_string_buffer(8)))"
    ),
    Attack("to outlive its parent", "hurts(libc.prctl(1, 0, 0, 0, 0))"),
    Attack("to leave its session", "hurts(os.setsid() or 0)", sure=False),
)

OTHERS = (
    Attack("sched_setaffinity of another", "os.sched_setaffinity(VICTIM, {0})", sure=False),
    Attack(
        "sched_setscheduler of another",
        "os.sched_setscheduler(VICTIM, os.SCHED_IDLE, os.sched_param(0))",
    ),
    Attack("prlimit of another", "resource.prlimit(VICTIM, resource.RLIMIT_NOFILE, (9, 9))"),
    Attack("setpriority of another", "os.setpriority(os.PRIO_PROCESS, VICTIM, 19)"),
    Attack("ioprio_set of another", "call(30 if ARM else 251, 1, VICTIM, 3 << 13)"),
    Attack("oom_score_adj of another", "open(f'/proc/{VICTIM}/oom_score_adj', 'w').write('999')"),
    Attack("kcmp with another", "reaches(call(272 if ARM else 312, os.getpid(), VICTIM, 1, 0, 0))"),
    Attack("ptrace", "hurts(libc.ptrace(16, VICTIM, 0, 0))", sure=False),
    Attack(
        "process_vm_readv",
        "buffer = ctypes.create_string_buffer(64)\n"
        "maps = [l for l in open(f'/proc/{VICTIM}/maps') if 'stack' in l]\n"
        "start = int(maps[0].split('-')[0], 16) if maps else 0\n"
        "vector = lambda at: struct.pack('PN', at, 64)\n"
        "to, source = vector(ctypes.addressof(buffer)), vector(start)\n"
        "reaches(libc.process_vm_readv(VICTIM, to, 1, source, 1, 0))",
        sure=False,
    ),
    Attack(
        "a descriptor of another's",
        "fd = call(438, os.pidfd_open(VICTIM), 0, 0)\nraise SystemExit(os.pread(fd, 99, 0))",
        sure=False,
    ),
    Attack("msgsnd", "libc.msgsnd(QUEUE, struct.pack('l8s', 1, b'HURT'), 8, 0o4000)"),
    Attack("shmctl(IPC_RMID)", "libc.shmctl(SEGMENT, 0, None)"),
    Attack("mq_open", "reaches(libc.mq_open(b'/not-there', 0))"),
    Attack("semget", "reaches(libc.semget(0x7fff1234, 1, 0))"),
)

READING = (
    Attack("a file", "raise SystemExit(open(FILE).read())", landlock=True),
    Attack("a folder", "os.listdir(FOLDER); hurts(0)", landlock=True),
    Attack("the root folder", "os.listdir('/'); hurts(0)", landlock=True),
    Attack("passwords", "open('/etc/passwd').read(); hurts(0)", landlock=True),
    Attack("a file by O_PATH", "fd = os.open(FILE, os.O_PATH)\n"
        "raise SystemExit(open(f'/proc/self/fd/{fd}').read())", landlock=True),
    Attack("a file by /proc/self/root", "raise SystemExit(open('/proc/self/root' + FILE).read())",
        landlock=True),
    Attack("the environment of another", "raise SystemExit(open(f'/proc/{VICTIM}/environ').read())",
        landlock=True),
    Attack("the environment of the owner",
        "owner = open(f'/proc/{os.getppid()}/stat').read().rpartition(')')[2].split()[1]\n"
        "if open(f'/proc/{owner}/environ', 'rb').read(): hurts(0)", landlock=True),
    Attack("the memory of the parent",
        "maps = open(f'/proc/{os.getppid()}/maps').read()\n"
        "start = int(maps[:maps.index('-')], 16)\n"
        "memory = open(f'/proc/{os.getppid()}/mem', 'rb', 0)\n"
        "memory.seek(start); memory.read(9); hurts(0)", landlock=True, sure=False),
    Attack("what another has open", "raise SystemExit(open(f'/proc/{VICTIM}/fd/0').read())",
        landlock=True, sure=False),
    Attack("what the parent runs", "open(f'/proc/{os.getppid()}/cmdline').read(); hurts(0)",
        landlock=True),
    Attack(
        "a link that changes underneath",
        "end = time.monotonic() + 1\n"
        "while time.monotonic() < end:\n"
        "  try:\n"
        "    if SECRET in (text := open(LINK).read()): raise SystemExit(text)\n"
        "  except OSError: pass", landlock=True),
    Attack("a file by its handle",
        "handle, mount = ctypes.create_string_buffer(136), ctypes.c_int()\n"
        "struct.pack_into('I', handle, 0, 128)\n"
        "hurts(libc.name_to_handle_at(-100, FILE.encode(), handle, ctypes.byref(mount), 0))"),
    Attack("to watch a folder",
        "hurts(libc.inotify_add_watch(libc.inotify_init1(0), FOLDER.encode(), 0xFFF))"),
)  # fmt: skip

CHANGING = (
    Attack("truncation while reading", "os.open(FILE, os.O_RDONLY | os.O_TRUNC)"),
    Attack("writing", "open(FILE, 'a').write('HURT')"),
    Attack("an attribute", "os.setxattr(FILE, 'user.x', b'1')", sure=False),
    Attack(
        "setxattrat",
        "value = ctypes.create_string_buffer(b'1')\n"
        "how = struct.pack('QII', ctypes.addressof(value), 1, 0)\n"
        "call(463, -100, FILE.encode(), 0, b'user.x', how, 16)",
        sure=False,
    ),
    Attack(
        "a lock on a file of Python's", "fcntl.flock(open(os.__file__), fcntl.LOCK_EX); hurts(0)"
    ),
    Attack("a record lock", "fcntl.lockf(open(os.__file__), fcntl.LOCK_SH); hurts(0)"),
    Attack("a lease", "fcntl.fcntl(open(os.__file__), 1024, 0); hurts(0)", sure=False),
    Attack("a message to a socket", _pair("DGRAM") + "a.sendto(b'HURT', SOCKET)"),
    Attack("the same by sendmsg", _pair("DGRAM") + "a.sendmsg([b'HURT'], [], 0, SOCKET)"),
    Attack("the same by connect", _pair("DGRAM") + "a.connect(SOCKET); a.send(b'HURT')"),
    Attack("a new socket", "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', SOCKET)"),
)

PROGRAMS = (
    Attack("fork", "child(os.fork())"),
    Attack("clone without a thread", "child(call(220 if ARM else 56, 17, 0, 0, 0, 0))"),
    Attack("clone3", "child(call(435, struct.pack('8Q', 0, 0, 0, 0, 17, 0, 0, 0), 64))"),
    Attack("another program", "stay(); os.execv('/bin/sh', ['sh', '-c', f'echo HURT > {FILE}'])"),
    Attack(
        "a program in memory",
        "fd = os.memfd_create('x', 0)\n"
        "os.write(fd, f'#!/bin/sh\\necho HURT > {FILE}\\n'.encode())\n"
        "stay(); os.execv(f'/proc/self/fd/{fd}', ['x'])",
    ),
    Attack("a namespace", "hurts(libc.unshare(0x400))"),
    Attack("a user namespace", "hurts(libc.unshare(0x10000000))", sure=False),
    Attack("another root folder", "hurts(libc.chroot(b'/'))", sure=False),
)

KERNEL = (
    Attack("io_uring", "hurts(call(425, 8, ctypes.create_string_buffer(120)))", sure=False),
    Attack("userfaultfd", "hurts(call(282 if ARM else 323, 1))", sure=False),
    Attack("bpf", "reaches(call(280 if ARM else 321, 0, 0, 0))", sure=False),
    Attack("perf_event_open", "reaches(call(241 if ARM else 298, 0, 0, -1, -1, 0))", sure=False),
    Attack("keys", "hurts(call(219 if ARM else 250, 0, -3, 0))", sure=False),
    Attack("fspick", "hurts(call(433, -100, b'/', 0))", sure=False),
    Attack("adjtimex", "hurts(libc.adjtimex(ctypes.create_string_buffer(208)))"),
    Attack("clock_settime", "reaches(call(112 if ARM else 227, 0, struct.pack('ll', 0, 10**10)))"),
    Attack("settimeofday", "hurts(call(170 if ARM else 164, 0, 0))", sure=False),
    Attack("to poison memory", "hurts(libc.madvise(None, 0, 100))", sure=False),
    Attack("out-of-band data", _pair() + "hurts(a.send(b'xy', socket.MSG_OOB))", sure=False),
    Attack("a pipe of notifications", "hurts(os.pipe2(0o200)[0])", sure=False),
    Attack("to type into a terminal", "reaches(libc.ioctl(0, 0x5412, b'x'))"),
    Attack("a filter of its own", "reaches(libc.prctl(22, 2, None, 0, 0))"),
)
if platform.machine() == "x86_64":
    KERNEL += (
        Attack(
            "a system call of 32 bits",
            "import mmap\n"
            "page = mmap.mmap(-1, 4096, prot=7)\n"
            "page.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))\n"  # getpid
            "at = ctypes.addressof(ctypes.c_char.from_buffer(page))\n"
            "if ctypes.CFUNCTYPE(ctypes.c_int)(at)() == os.getpid(): hurts(0)",
            sure=False,
        ),
    )

ATTACKS = SIGNALS + OTHERS + READING + CHANGING + PROGRAMS + KERNEL
