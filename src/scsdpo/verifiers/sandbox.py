"""The program that starts untrusted code. It imports nothing of this package.

`python -I -B sandbox.py` reads requests from the socket that is its standard input. For each it
forks two copies of itself, which restrict themselves: one runs a response, the other its tests
(`remote.py`). A fork takes a millisecond, a new Python twenty. This process never reads a response
or a test, so no copy holds anything of earlier ones, or expected values. When the socket is closed
it ends, and its copies with it.
"""

import ctypes
import gc
import json
import os
import resource
import signal
import socket
import struct
import sys
from contextlib import suppress
from typing import Any, NoReturn

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import remote  # type: ignore[import-not-found]

del sys.path[0]

NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2
DIE_WITH_PARENT, DUMPABLE = 1, 4
NEW_USER_NAMESPACE = 0x10000000
NEW_LISTENER = 1 << 3
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock's, on every machine
PATH_BENEATH, READ_FILE, READ_FOLDER = 1, 1 << 2, 1 << 2 | 1 << 3
CAPABILITIES = 0x20080522  # the version of capset's interface
REQUEST_BYTES = 1 << 17
FILE_BYTES = 1 << 16
DESCRIPTORS = 64
"""Number of descriptors that a process may have."""

libc = ctypes.CDLL(None, use_errno=True)


class Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def main() -> None:
    """Start and end copies until the socket is closed.

    A request is a JSON object. A request with restrictions starts two processes. It comes with
    three descriptors: the tests' job, their report, and a socket over which threads are counted;
    the answer has the ids of the processes, or the error's number. A request without restrictions
    ends them; the answer has exit status and seconds of CPU time of each that had ended by itself.
    """
    owner = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.close(nothing)
    os.environ["OMP_NUM_THREADS"] = "1"
    gc.collect()
    gc.freeze()
    started: list[int] = []
    while True:
        data, descriptors, _, _ = socket.recv_fds(owner, REQUEST_BYTES, 3)
        if not data:
            os._exit(0)
        request: dict[str, Any] = json.loads(data)
        answer: object
        if request:
            end(started)
            try:
                answer = started = start(request, descriptors, owner)
            except OSError as error:
                answer = error.errno
            for descriptor in descriptors:
                os.close(descriptor)
        else:
            answer = end(started)
        owner.send(json.dumps(answer).encode())


def start(request: dict[str, Any], descriptors: list[int], owner: socket.socket) -> list[int]:
    """Start a process for the response and one for the tests, joined by two pipes."""
    job, report, counter = descriptors
    from_tests, to_response = os.pipe()
    from_response, to_tests = os.pipe()
    started = []
    try:
        for own in ([from_tests, to_tests, counter], [job, report, from_response, to_response]):
            if (pid := os.fork()) == 0:
                owner.detach()
                for descriptor in {*range(3, DESCRIPTORS)} - {*own}:
                    with suppress(OSError):
                        os.close(descriptor)
                act(request, own)
            started.append(pid)
    except OSError:
        end(started)
        raise
    finally:
        for descriptor in (from_tests, to_response, from_response, to_tests):
            os.close(descriptor)
    return started


def end(started: list[int]) -> list[list[float] | None]:
    """Kill the copies; returns status and seconds of CPU time of each that had ended, else None."""
    endings: list[list[float] | None] = []
    for pid in started:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        endings.append([status, usage.ru_utime + usage.ru_stime] if ended else None)
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    started.clear()
    return endings


def act(request: dict[str, Any], own: list[int]) -> NoReturn:
    """Apply the restrictions in a copy, then run the response (three descriptors) or the tests."""
    try:
        limit(request["cpu_seconds"], request["memory_mb"])
        if request["own_users"]:  # where it may
            libc.unshare(NEW_USER_NAMESPACE)
        code, ruleset = bytes.fromhex(request["filter"]), bytes.fromhex(request["ruleset"])
        if len(own) == 3:
            source, sink, counter = own
            count_threads(counter, request["asking"], request["refusing"])
            shut_in(code, ruleset, request["readable"], request["capabilities"])
            remote.Response(remote.Line(source, sink)).serve()
        job, report, source, sink = own
        shut_in(code, ruleset, request["readable"], request["capabilities"])
        test(job, report, remote.Line(source, sink, remote.MOST_BYTES))
    finally:
        os._exit(1)


def test(job: int, report: int, line: remote.Line) -> NoReturn:
    """Run one job, and report each finished part in a line: null, or the reason why it failed.

    The parts are the restriction of both processes, the code, and each test.
    """
    with open(job, "rb") as file:
        given = json.load(file)

    def say(failure: str | None) -> None:
        os.write(report, json.dumps(failure).encode() + b"\n")
        if failure is not None:
            os._exit(0)

    tests = remote.Tests(line, given["own"], given["libraries"], given["cases"])
    tests.begin()
    say(None)
    if any(isinstance(test, str) for test in given["tests"]):
        say(tests.run(given["code"]))
    else:
        say(None)
    for test in given["tests"]:
        if isinstance(test, str):
            say(tests.test(test))
        else:
            say(tests.program(given["code"], test["input"], test["output"]))
    os._exit(0)


def limit(cpu_seconds: int, memory_mb: int) -> None:
    """Set the limits that the kernel enforces (rlimits)."""
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: DESCRIPTORS,
        resource.RLIMIT_CORE: 0,
    }
    for which, value in limits.items():
        # The soft limit of CPU time sends SIGXCPU, the hard one SIGKILL.
        hard = value + 1 if which == resource.RLIMIT_CPU else value
        resource.setrlimit(which, (value, hard))


def count_threads(counter: int, asking: str, refusing: str) -> None:
    """Send the owner a descriptor over which the kernel asks it before each new thread.

    If the kernel cannot do that, threads are refused: it has no limit on the threads of one
    process, and RLIMIT_NPROC does not apply to root.
    """
    check(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    number = 277 if os.uname().machine == "aarch64" else 317
    program = filter_program(bytes.fromhex(asking))
    listener = libc.syscall(number, 1, NEW_LISTENER, ctypes.byref(program))
    with socket.socket(fileno=counter) as owner:
        if listener >= 0:
            socket.send_fds(owner, [b"x"], [listener])
            os.close(listener)
    if listener < 0:
        program = filter_program(bytes.fromhex(refusing))
        check(libc.prctl(SECCOMP, FILTER, ctypes.byref(program), 0, 0))


def shut_in(code: bytes, ruleset: bytes, readable: list[str], capabilities: int) -> None:
    """Apply the restrictions, which cannot be undone; raises OSError if the kernel refuses one."""
    check(libc.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0))
    check(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    check(libc.prctl(DUMPABLE, 0, 0, 0, 0))  # the response must not read the memory of the tests
    if ruleset:
        read_only(ruleset, readable)
    keep_capabilities(capabilities)
    program = filter_program(code)
    check(libc.prctl(SECCOMP, FILTER, ctypes.byref(program), 0, 0))


def filter_program(code: bytes) -> Program:
    """The filter as the kernel takes it; `kept` keeps its memory alive."""
    array = ctypes.create_string_buffer(code, len(code))
    kept.append(array)
    return Program(len(code) // 8, ctypes.addressof(array))


kept: list[object] = []


def read_only(ruleset: bytes, readable: list[str]) -> None:
    """Let Landlock allow opening only these files and folders, and only for reading."""
    handle = check(libc.syscall(CREATE_RULESET, ruleset, ctypes.c_size_t(len(ruleset)), 0))
    for path in filter(os.path.exists, readable):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = READ_FOLDER if os.path.isdir(path) else READ_FILE
        check(libc.syscall(ADD_RULE, handle, PATH_BENEATH, struct.pack("=Qi", rights, place), 0))
        os.close(place)
    check(libc.syscall(RESTRICT_SELF, handle, 0))
    os.close(handle)


def keep_capabilities(kept: int) -> None:
    """Drop all of root's capabilities but these."""
    header = struct.pack("=Ii", CAPABILITIES, 0)
    sets = ctypes.create_string_buffer(24)  # effective, permitted, inheritable: low words, high
    check(libc.capget(header, sets))
    _, permitted, *_ = struct.unpack("=6I", sets.raw)
    check(libc.capset(header, struct.pack("=6I", permitted & kept, permitted & kept, *[0] * 4)))


def check(result: int) -> int:
    """The result of a C library call; raises OSError if it failed."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


if __name__ == "__main__":
    main()
