"""The program in which code that is not trusted runs. It imports nothing of this package.

`python -I -B sandbox.py` reads one JSON object from standard input, shuts itself in, runs the code
and then each test, and writes a line to standard output whenever one of them has come to its end:
the secret, and null or why it failed.
"""

import ast
import ctypes
import json
import os
import resource
import signal
import struct
import sys

NO_NEW_PRIVILEGES, SECCOMP, FILTER, DIE_WITH_PARENT = 38, 22, 2, 1
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock's, on every machine
PATH_BENEATH, READ_FILE, READ_FOLDER = 1, 1 << 2, 1 << 2 | 1 << 3
CAPABILITIES = 0x20080522  # the version of capset's interface
MESSAGE = 200
REPORT_BYTES = 1 << 16

libc = ctypes.CDLL(None, use_errno=True)


class Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def main() -> None:
    """Run one job."""
    job = json.loads(sys.stdin.buffer.read())
    report = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.close(nothing)
    os.environ["OMP_NUM_THREADS"] = "1"
    limit(job["cpu_seconds"], job["memory_mb"])
    code, ruleset = bytes.fromhex(job["filter"]), bytes.fromhex(job["ruleset"])
    shut_in(code, ruleset, job["readable"], job["capabilities"])
    secret = job["secret"]

    def say(failure: str | None) -> None:
        report.write(f"{secret} {json.dumps(failure)}\n")
        report.flush()

    names: dict[str, object] = {"__name__": "solution"}
    for number, source in enumerate([job["code"], *job["tests"]]):
        failure = run(source, names, is_test=number > 0)
        say(failure)
        if failure is not None:
            break
    os._exit(0)


def limit(cpu_seconds: int, memory_mb: int) -> None:
    """Set the limits that the kernel keeps by itself."""
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_FSIZE: REPORT_BYTES,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for which, value in limits.items():
        resource.setrlimit(which, (value, value))


def shut_in(code: bytes, ruleset: bytes, readable: list[str], capabilities: int) -> None:
    """All that cannot be undone, the filter last; raises OSError if the kernel refuses."""
    check(libc.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0))
    check(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    if ruleset:
        read_only(ruleset, readable)
    keep_capabilities(capabilities)
    array = ctypes.create_string_buffer(code, len(code))
    program = Program(len(code) // 8, ctypes.addressof(array))
    check(libc.prctl(SECCOMP, FILTER, ctypes.byref(program), 0, 0))


def read_only(ruleset: bytes, readable: list[str]) -> None:
    """By Landlock: of all files, these and what is in these folders can be opened, for reading."""
    handle = check(libc.syscall(CREATE_RULESET, ruleset, ctypes.c_size_t(len(ruleset)), 0))
    for path in filter(os.path.exists, readable):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = READ_FOLDER if os.path.isdir(path) else READ_FILE
        check(libc.syscall(ADD_RULE, handle, PATH_BENEATH, struct.pack("=Qi", rights, place), 0))
        os.close(place)
    check(libc.syscall(RESTRICT_SELF, handle, 0))
    os.close(handle)


def keep_capabilities(kept: int) -> None:
    """Of what root may and a user may not, keep no more than this."""
    header = struct.pack("=Ii", CAPABILITIES, 0)
    sets = ctypes.create_string_buffer(24)  # effective, permitted, inheritable: low words, high
    check(libc.capget(header, sets))
    _, permitted, *_ = struct.unpack("=6I", sets.raw)
    check(libc.capset(header, struct.pack("=6I", permitted & kept, permitted & kept, *[0] * 4)))


def check(result: int) -> int:
    """The result of a call of the C library's, unless it failed."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def run(source: str, names: dict[str, object], *, is_test: bool) -> str | None:
    """Why it failed; None if it did not."""
    try:
        exec(compile(source, "<test>" if is_test else "<solution>", "exec"), names)
    except BaseException as error:
        if is_test and type(error) is AssertionError and not error.args:
            return f"AssertionError{_instead(source, names)}"
        return described(error)
    return None


def described(error: BaseException) -> str:
    """The exception in a few words; its own `__str__` may do anything."""
    try:
        words = f"{type(error).__name__}: {error}"
    except BaseException:
        words = "an exception that cannot be shown"
    return words[:MESSAGE]


def _instead(source: str, names: dict[str, object]) -> str:
    """For `assert left == right`, what `left` is instead."""
    try:
        last = ast.parse(source).body[-1]
        if isinstance(last, ast.Assert) and isinstance(last.test, ast.Compare):
            left = eval(compile(ast.Expression(last.test.left), "<test>", "eval"), names)
            return f": got {left!r}"[:MESSAGE]
    except BaseException:
        return ""
    return ""


if __name__ == "__main__":
    main()
