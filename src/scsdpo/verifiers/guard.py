"""Processes that verifiers leave behind, and how they are found and ended.

Process groups do not do it: whoever calls `setsid` has left. Linux lets a process adopt the orphans
among its descendants instead of init ("subreaper"); then all that it ever started are its children,
or become so as those in between die. Elsewhere the group is all there is.
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
"""Left to a process whose owner is gone."""
_DIE_WITH_PARENT, _ADOPT_ORPHANS = 1, 36  # prctl's


def guarded() -> None:
    """Go on in a child of this process, which itself stays to end what the child leaves behind.

    It returns in the child, in a session of its own. This process waits until the child has ended,
    however that comes about, or until it is told to end it: by SIGTERM, or because standard input
    has no writer any more, so that its owner is gone. Then it ends all descendants, and itself as
    the child did. Call it before there are threads.
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
    os.close(1)  # it is the child's: its other end waits for it to close it
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
    """Wait for the other end of standard input to be closed, which the child, inside a C function
    that never returns, may not notice; then let it end by itself, or end it.
    """
    poll = select.poll()
    poll.register(0, 0)  # nothing but the end
    poll.poll()
    time.sleep(OWNER_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def children() -> frozenset[int]:
    """Processes whose parent is this one, those included that have ended and were not waited for.

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
    """Kill all children but `kept`, and theirs, which become children of this process by that."""
    while strays := children() - kept:
        for pid in strays:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in strays:
            with suppress(ChildProcessError):  # somebody else waited for it
                os.waitpid(pid, 0)


def _prctl(option: int, value: int) -> None:
    if LINUX and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _end_as(code: int) -> None:
    """End with this exit code or, if it is negative, by that signal."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):  # SIGKILL has no handler to take away
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
