"""PythonTests: right programs pass, wrong ones are told what failed, and none gets out."""

import json
import os
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scsdpo.prompt import Prompt
from scsdpo.verifiers import PythonTests, Verification, VerifierPool, python_tests
from scsdpo.verifiers.python_tests import last_code

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")

TESTS = ["assert f(1) == 2", "assert f(2) == 3, 'two'", "assert f([]) is None"]
GOOD = "def f(x):\n    return x + 1 if x else None"


def prompt(tests=TESTS, **settings):
    verifier = PythonTests(**({"seconds": 10.0} | settings))
    return Prompt(key="k", messages=(), verifier=verifier, answer=json.dumps(tests))


def block(code):
    return f"So:\n```python\n{code}\n```\nDone."


def judge(code, **settings):
    verdict = (question := prompt(**settings)).verifier.verify(question, block(code))
    assert verdict.error == ""
    assert bool(verdict.feedback) == (verdict.reward == 0)
    return verdict


def test_code_that_passes_every_test_is_right():
    assert judge(GOOD).reward == 1
    assert judge(GOOD).answer == GOOD


@pytest.mark.parametrize(
    ("code", "feedback"),
    [
        ("def f(x): return 2", "Test 2 of 3 failed: AssertionError: two"),
        ("def f(x): return x", "Test 1 of 3 failed: AssertionError: got 1"),
        ("def f(x): return x + 1", "Test 3 of 3 failed: TypeError: can only concatenate list"),
        ("def f(x): return y", "Test 1 of 3 failed: NameError: name 'y' is not defined"),
        ("def f(x): return f(x)", "Test 1 of 3 failed: RecursionError"),
        ("def f(x", "The code failed before any test: SyntaxError"),
        ("raise KeyError(3)", "The code failed before any test: KeyError: 3"),
        ("\ud800", "The code failed before any test: UnicodeEncodeError"),
        ("import os; os._exit(0)", "The code failed before any test: the process ended"),
        ("raise SystemExit(0)", "The code failed before any test: SystemExit: 0"),
        ("input()", "The code failed before any test: EOFError"),
        ("x = 'x' * 10**10", "The code failed before any test: MemoryError"),
        ("def f(x):\n  import os; os._exit(0)", "Test 1 of 3 failed: the process ended"),
        ("print('[\"passed\"]' * 9**6); 1 / 0", "The code failed before any test: ZeroDivision"),
    ],
)
def test_the_feedback_says_which_test_failed_and_how(code, feedback):
    verdict = judge(code)
    assert verdict.reward == 0
    assert verdict.feedback.startswith(feedback)
    assert "f(1)" not in verdict.feedback


def test_the_failed_test_is_shown_only_on_request():
    assert judge("def f(x): return 2", reveal=True).feedback == (
        "Test 2 of 3 failed (assert f(2) == 3, 'two'): AssertionError: two"
    )


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(99)"])
def test_code_that_does_not_end_is_ended(code):
    begin = time.monotonic()
    verdict = judge(code, seconds=0.5)
    assert time.monotonic() - begin < 3
    assert verdict.feedback == (
        "The code failed before any test: it did not end within 0.5 s of time"
    )


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket()",
        "import urllib.request as u; u.urlopen('http://127.0.0.1')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.fork()",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.kill(os.getppid(), 9)",
        "open(PATH, 'w')",
        "open(PATH, 'a')",
        "open(PATH, 'r+')",
        "import os; os.remove(PATH)",
        "import os; os.rename(PATH, PATH + 'x')",
        "import os; os.truncate(PATH, 0)",
        "import os; os.chmod(PATH, 0)",
        "import os; os.utime(PATH)",
        "import os; os.link(PATH, PATH + 'x')",
        "import os; os.symlink(PATH, PATH + 'x')",
        "import os; os.mkdir(PATH + 'x')",
        "import tempfile; tempfile.TemporaryFile()",
        "import multiprocessing as m; m.Process(target=print).start()",
        "from multiprocessing.shared_memory import SharedMemory; SharedMemory(create=True, size=9)",
        "import os; os.memfd_create('x')",
    ],
)
def test_the_kernel_refuses_what_reaches_out(tmp_path, code):
    path = tmp_path / "kept"
    path.write_text("as it was")
    before = path.stat()
    feedback = judge(f"PATH = {str(path)!r}\n{code}").feedback
    assert "not permitted" in feedback or "No usable temporary directory" in feedback
    assert (path.read_text(), path.stat().st_mtime_ns) == ("as it was", before.st_mtime_ns)
    assert os.listdir(tmp_path) == ["kept"]


def test_raw_system_calls_are_refused_too():
    code = "\n".join(
        [
            "import ctypes, os",
            "libc = ctypes.CDLL(None, use_errno=True)",
            "calls = [libc.socket(2, 1, 0), libc.fork(), libc.unlink(b'/nowhere')]",
            "calls += [libc.prctl(1, 0, 0, 0, 0), libc.setrlimit(0, None), libc.ptrace(0)]",
            "calls += [libc.syscall(435, None, 0), libc.syscall(425, 1, None), libc.syscall(999)]",
            "assert calls == [-1] * 9, calls",
        ]
    )
    assert judge(code, tests=["assert True"]).reward == 1


def test_ordinary_programs_run():
    code = "\n".join(
        [
            "import asyncio, collections, itertools, json, math, random, re, threading",
            "import numpy",
            "threads = [threading.Thread(target=print, args=(n,)) for n in range(4)]",
            "[t.start() for t in threads]; [t.join() for t in threads]",
            "text = open('/proc/self/stat').read()",
            "async def g(): return len(text)",
            "def f(x): return asyncio.run(g()) > 0 and int(numpy.arange(x + 1).sum())",
            "if __name__ == '__main__': raise RuntimeError",
        ]
    )
    assert judge(code, tests=["assert f(3) == 6"]).reward == 1


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "import sympy\nx = sympy.symbols('x')\ny = sympy.integrate(2 * x, x)",
            "SystemExit: x**2",
        ),
        ("import numpy\ny = numpy.linalg.inv(numpy.eye(2) / 2).sum()", "SystemExit: 4.0"),
        (
            "import asyncio\nasync def g():\n  await asyncio.sleep(0.01)\n"
            "  return await asyncio.to_thread(sum, await asyncio.gather(*map(h, range(3))))\n"
            "async def h(n):\n  await asyncio.sleep(0)\n  return n\ny = asyncio.run(g())",
            "SystemExit: 3",
        ),
        (
            "from concurrent.futures import ThreadPoolExecutor as Pool\nwith Pool(8) as pool:\n"
            "  y = sum(pool.map(lambda n: n * n, range(9)))",
            "SystemExit: 204",
        ),
        (
            "import signal, time\nsignal.signal(signal.SIGALRM, lambda *_: 1 / 0)\n"
            "signal.setitimer(signal.ITIMER_REAL, 0.01)\ntime.sleep(9)",
            "ZeroDivisionError",
        ),
        (
            "import datetime, zoneinfo\n"
            "y = datetime.datetime(2020, 7, 1, tzinfo=zoneinfo.ZoneInfo('UTC')).tzname()",
            "SystemExit: UTC",
        ),
        (
            "import os, resource\ny = os.cpu_count() > 0 < resource.getrlimit(0)[0]",
            "SystemExit: True",
        ),
        (
            "import os, socket\na, b = socket.socketpair()\na.send(b'x')\ny = b.recv(9)",
            "SystemExit: b'x'",
        ),
    ],
)
def test_what_a_program_may_need_is_there(code, said):
    feedback = judge(f"{code}\nraise SystemExit(y)").feedback
    assert said in feedback


@pytest.mark.parametrize("answer", ["", "x", "[]", "{}", "[1]", "[" * 9999])
def test_an_unreadable_gold_answer_is_an_error(answer):
    verifier = PythonTests()
    question = Prompt(key="k", messages=(), verifier=verifier, answer=answer)
    assert "must be a JSON list of statements" in verifier.verify(question, block(GOOD)).error


def test_a_system_without_the_filter_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(python_tests.platform, "machine", lambda: "riscv64")
    python_tests._check_system.cache_clear()
    with pytest.raises(ValueError, match="runs on Linux on x86-64 or arm64 only"):
        PythonTests().prepare()
    monkeypatch.undo()
    monkeypatch.setattr(python_tests, "SANDBOX", "/nowhere")
    monkeypatch.setattr(python_tests, "_starters", {})
    monkeypatch.setattr(python_tests, "_PAUSES", ())
    with pytest.raises(ValueError, match="allow seccomp in this container"):
        PythonTests().prepare()
    python_tests._check_system.cache_clear()


@pytest.mark.parametrize(("name", "value"), [("seconds", 0), ("memory_mb", 8)])
def test_bad_limits_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"`PythonTests\({name}=...\)` must be"):
        PythonTests(**{name: value})


def test_it_works_in_the_pool():
    pool = VerifierPool(Verification(workers=2))
    verdicts = pool.verify([prompt()], [[block(GOOD), block("def f(x): return x"), "none"]])[0]
    assert [v.reward for v in verdicts] == [1, 0, 0]
    assert not any(v.error for v in verdicts)
    pool.close()


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("```python\na\n```", "a"),
        ("```\na\n```", "a"),
        ("```py\na\n```\n```python\nb\n\nc\n```\n", "b\n\nc"),
        ("```python\r\na\r\n```\r\n", "a\r"),
        ("```python\na\n```\n```python\nb", "a"),
        ("```bash\na\n```", ""),
        ("a", ""),
    ],
)
def test_the_last_closed_block_is_the_code(response, code):
    assert last_code(response) == code


@settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(["```", "python", "py", "\n", " ", "\t", "x", "\r"])).map("".join))
def test_no_response_makes_the_parser_raise(response):
    assert last_code(response) in response


@pytest.mark.parametrize(
    "bit", ["```", "``` ", "```python\n", "```\n", " ", "\n", "```\n \n", "``` x"]
)
def test_a_megabyte_is_parsed_in_linear_time(bit):
    begin = time.perf_counter()
    last_code("```python\n" + bit * (1_000_000 // len(bit)))
    last_code("```" + " " * 1_000_000 + "x")
    assert time.perf_counter() - begin < 3
