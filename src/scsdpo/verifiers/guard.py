"""Find and end processes that verifiers leave behind.

Process groups do not suffice: a process that calls `setsid` leaves its group. Linux lets a process
adopt the orphans among its descendants ("subreaper"); then every process that it ever started is
its child, or becomes one when those in between die. Elsewhere only the group is known.
"""

import ctypes
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Set
from contextlib import suppress
from pathlib import Path

LINUX = sys.platform.startswith("linux")
OWNER_SECONDS = 1.0
"""Seconds that a process gets to end after its owner is gone."""
_DIE_WITH_PARENT, _ADOPT_ORPHANS = 1, 36  # prctl's


def guarded() -> None:
    """Continue in a child; this process stays, to end the processes that the child leaves behind.

    The function returns in the child, which has a new session. This process waits until the child
    has ended, until SIGTERM, or until standard input has no writer any more, which means that its
    owner is gone. Then it ends all descendants, and exits with the child's status. Call it before
    threads are started.
    """
    events = {signal.SIGCHLD, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, events)
    _prctl(_ADOPT_ORPHANS, 1)
    child = os.fork()
    if child == 0:
        os.setsid()
        _prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        _prctl(_ADOPT_ORPHANS, 1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, events)
        return
    os.close(1)  # the child's alone: the owner sees its end when it is closed
    threading.Thread(target=_watch_owner, daemon=True).start()
    ended = status = 0
    while not ended and signal.sigwait(events) == signal.SIGCHLD:
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    end_children()
    with suppress(ProcessLookupError, PermissionError):  # none left; macOS: zombies
        os.killpg(child, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, events)
    _end_as(os.waitstatus_to_exitcode(status))


def _watch_owner() -> None:
    """Wait until standard input is closed; then give the child time to end, and end it.

    A child inside a C function that never returns would not notice the closed input.
    """
    poll = select.poll()
    poll.register(0, 0)  # hang-ups only
    poll.poll()
    time.sleep(OWNER_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def children() -> frozenset[int]:
    """Child processes of this one, also those that have ended and were not waited for.

    Linux only; elsewhere none is known. Takes microseconds where the kernel lists them
    (CONFIG_PROC_CHILDREN) or there is none, and otherwise reads the table of all processes.
    """
    if not LINUX:
        return frozenset()
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return frozenset()
    found: set[int] = set()
    lists = list(Path("/proc/self/task").glob("*/children"))
    for listed in lists:
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            found.update(map(int, listed.read_text().split()))
    if lists:
        return frozenset(found)
    parent = str(os.getpid())
    for entry in os.listdir("/proc"):
        with suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            if entry.isdigit():
                # "pid (name) state parent ...", and a name may have spaces and brackets
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if fields[1] == parent:
                    found.add(int(entry))
    return frozenset(found)


def end_children(kept: Set[int] = frozenset()) -> None:
    """Kill all children but `kept`, and their children, which this process adopts by that."""
    while strays := children() - kept:
        for pid in strays:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in strays:
            with suppress(ChildProcessError):  # other code has waited for it
                os.waitpid(pid, 0)


def _prctl(option: int, value: int) -> None:
    if LINUX and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _end_as(code: int) -> None:
    """Exit with this code; if it is negative, by that signal."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):  # SIGKILL has no handler to reset
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
