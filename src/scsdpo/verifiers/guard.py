"""Processes that verifiers leave behind, and how they are found and ended.

Process groups do not do it: whoever calls `setsid` has left. Linux lets a process adopt the orphans
among its descendants instead of init ("subreaper"); then all that it ever started are its children,
or become so as those in between die. Elsewhere the group is all there is.
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Set
from contextlib import suppress
from pathlib import Path

LINUX = sys.platform.startswith("linux")
_DIE_WITH_PARENT, _ADOPT_ORPHANS = 1, 36  # prctl's


def guarded() -> None:
    """Go on in a child of this process, which itself stays to end what the child leaves behind.

    It returns in the child, in a session of its own. This process waits until the child has ended,
    however that comes about, or until it is told to end it (SIGTERM); then it ends all descendants,
    and itself as the child did. Call it before there are threads.
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
    for pipe in (0, 1):  # they are the child's: their other ends wait for it to close them
        os.close(pipe)
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


def children() -> frozenset[int]:
    """Processes whose parent is this one, those included that have ended and were not waited for.

    Linux only; elsewhere none is known. Takes microseconds if there is none, and otherwise reads
    the table of all processes.
    """
    if not LINUX:
        return frozenset()
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return frozenset()
    parent, found = str(os.getpid()), set()
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
