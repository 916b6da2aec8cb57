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
    with pytest.raises(ValueError, match="runs only on Linux on x86-64 or arm64"):
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


# --- forms of tests: (tests, code that is right, code that is nearly right) ----------------------

FORMS = {
    "a comparison": (["assert f(1) == 2"], "def f(x): return 2", "def f(x): return '2'"),
    "an integral float": (["assert f(1) == 2"], "def f(x): return 2.0", "def f(x): return 2.5"),
    "a tolerance": (
        ["assert abs(f(3) - 1.0471975) < 1e-6"],
        "import math\ndef f(x): return math.pi / x",
        "def f(x): return 3.14 / x",
    ),
    "math.isclose without an import": (
        ["assert math.isclose(f(2), 2 ** 0.5, rel_tol=1e-9)"],
        "def f(x): return x ** 0.5",
        "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return x",
    ),
    "sets": (["assert set(f([1, 1, 2])) == {1, 2}"], "f = list", "def f(x): return [1]"),
    "counters": (
        ["from collections import Counter", "assert Counter(f('aab')) == Counter(a=2, b=1)"],
        "def f(text): return {letter: text.count(letter) for letter in text}",
        "def f(text): return {letter: 1 for letter in text}",
    ),
    "a default dictionary": (
        ["assert f('aab') == {'a': 2, 'b': 1}"],
        "from collections import defaultdict\ndef f(text):\n    n = defaultdict(int)\n"
        "    for letter in text: n[letter] += 1\n    return n",
        "def f(text): return list(text)",
    ),
    "one of several": (["assert f(1) in ([1, 2], [2, 1])"], "def f(x): return [2, 1]", "f = str"),
    "tuples are no lists": (
        ["assert f() == (1, 2)"],
        "def f(): return 1, 2",
        "def f(): return [1, 2]",
    ),
    "True is 1, as in Python": (
        ["assert f() == 1"],
        "def f(): return True",
        "def f(): return 'True'",
    ),
    "a truth": (["assert f(2)", "assert not f(3)"], "def f(x): return x % 2 == 0", "f = bool"),
    "None": (["assert f(1) is None"], "def f(x): pass", "def f(x): return 0"),
    "numbers of any size": (
        ["assert f(5000) == 3 ** 5000 and f(0) == 1"],
        "def f(x): return 3 ** x",
        "def f(x): return 3 ** x + (x > 9)",
    ),
    "an exception": (
        [
            "try:\n    f(-1)\nexcept ValueError as e:\n    assert str(e) == 'no'\n"
            "else:\n    assert False"
        ],
        "def f(x): raise ValueError('no')",
        "def f(x): raise TypeError('no')",
    ),
    "HumanEval's check": (
        [
            "def check(candidate):\n    assert candidate([1]) == 1\n    assert candidate([]) == 0",
            "check(f)",
        ],
        "def f(xs): return sum(xs)",
        "def f(xs): return sum(xs) or None",
    ),
    "random inputs": (
        [
            "import random",
            "for _ in range(50):\n    xs = random.choices(range(9), k=5)\n"
            "    assert f(xs) == sorted(xs)",
        ],
        "def f(xs): return sorted(xs)",
        "def f(xs): return xs",
    ),
    "a change in place": (
        ["xs = [[3, 1], [2]]\nf(xs)\nassert xs == [[2], [3, 1]]"],
        "def f(xs): xs.reverse()",
        "def f(xs): return xs[::-1]",
    ),
    "a class": (
        [
            "s = Stack()\ns.push(3)\ns.push(4)",
            "assert s.pop() == 4",
            "assert s.items == [3]",
            "assert len(s) == 1 and isinstance(s, Stack) and [x for x in s] == [3]",
        ],
        "class Stack:\n    def __init__(self): self.items = []\n"
        "    def push(self, x): self.items.append(x)\n    def pop(self): return self.items.pop()\n"
        "    def __len__(self): return len(self.items)\n"
        "    def __iter__(self): return iter(self.items)",
        "class Stack:\n    items = []\n    def push(self, x): pass\n    def pop(self): return 4",
    ),
    "LeetCode's class": (
        ["assert Solution().twoSum([2, 7, 11], target=9) == [0, 1]"],
        "class Solution:\n    def twoSum(self, nums, target): return [0, 1]",
        "class Solution:\n    def twoSum(self, nums, target): return [1, 0]",
    ),
    "objects of the response's as arguments": (
        ["assert f([Pair(1, 2), Pair(3, 4)]) == 10"],
        "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
        "def f(pairs): return sum(p.a + p.b for p in pairs)",
        "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, a\n"
        "def f(pairs): return sum(p.a + p.b for p in pairs)",
    ),
    "functions of the tests' as arguments": (
        ["assert f(lambda x: x + 1, 3) == 5 and f(abs, -3) == 3"],
        "def f(g, x): return g(g(x))",
        "def f(g, x): return g(x)",
    ),
    "functions that are returned": (
        ["assert f(2)(3) == 5"],
        "def f(x): return lambda y: x + y",
        "def f(x): return lambda y: y",
    ),
    "a generator": (
        ["assert list(f(3)) == [0, 1, 2]", "g = f(2)\nassert next(g) == 0"],
        "def f(n): yield from range(n)",
        "def f(n): yield from range(n - 1)",
    ),
    "a variable": (["assert x == 4"], "x = 4", "x = '4'"),
    "a variable that changes": (
        ["f()\nf()", "assert n == 2"],
        "n = 0\ndef f():\n    global n\n    n += 1",
        "n = 0\ndef f(): pass",
    ),
    "a name that is built in": (["assert sum(10, 15) == 25"], "def sum(a, b): return a + b", ""),
    "numpy": (
        ["import numpy as np", "assert np.allclose(f(3), [0.0, 0.5, 1.0])", "assert f(2)[1] == 1"],
        "import numpy\ndef f(n): return numpy.linspace(0, 1, n)",
        "import numpy\ndef f(n): return numpy.linspace(0, 2, n)",
    ),
    "numpy's numbers": (
        ["assert f(3) == 3"],
        "import numpy\ndef f(n): return numpy.int64(n)",
        "import numpy\ndef f(n): return numpy.float32(n + 0.1)",
    ),
    "fractions and decimals": (
        [
            "from fractions import Fraction\nfrom decimal import Decimal",
            "assert f() == [Fraction(1, 3), Decimal('0.1'), 1j, b'x', frozenset({1})]",
        ],
        "from fractions import Fraction\nfrom decimal import Decimal\n"
        "def f(): return [Fraction(2, 6), Decimal('0.10'), 1j, b'x', frozenset([1])]",
        "def f(): return [1 / 3, 0.1, 1j, b'x', frozenset([1])]",
    ),
    "annotations as text": (
        ["assert f(3) == 3"],
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\n"
        "class P:\n    x: int\ndef f(x): return P(x).x",
        "def f(x): return str(x)",
    ),
    "programs": (
        [{"input": "2\n1 2\n3 4\n", "output": "3\n7\n"}, {"input": "0\n", "output": ""}],
        "import sys\ndef main():\n    for _ in range(int(input())):\n"
        "        print(sum(map(int, sys.stdin.readline().split())), end=' \\n')\n"
        "if __name__ == '__main__':\n    main()\n    sys.exit(0)",
        "for _ in range(int(input())): print(sum(map(int, input().split())), end=' ')",
    ),
    "programs that use bytes": (
        [{"input": "ü 1\n", "output": "1 ü"}],
        "import sys\na, b = sys.stdin.buffer.read().split()\nsys.stdout.buffer.write(b + b' ' + a)",
        "print(input())",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_tests_of_every_form_tell_right_from_nearly_right(form):
    tests, right, wrong = FORMS[form]
    assert judge(right, tests=tests).feedback == ""
    assert judge(wrong, tests=tests).reward == 0


def test_an_object_of_the_responses_own_equals_nothing():
    code = "class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, o): return True"
    assert judge(code, tests=["assert P(1) == P(1)"]).reward == 0
    assert judge(code, tests=["assert P(1) != 1 and P(1).x == 1"]).reward == 1


def test_a_program_that_fails_or_prints_something_else_is_told_so():
    tests = [{"input": "1\n", "output": "2\n"}]
    said = judge("print(int(input()) / 0)", tests=tests).feedback
    assert said == "Test 1 of 1 failed: ZeroDivisionError: division by zero"
    said = judge("print(input())", tests=tests, reveal=True).feedback
    assert said == "Test 1 of 1 failed (input '1\\n'): the output is '1\\n'"


BOMB = """
import ctypes, mmap, struct
libc = ctypes.CDLL(None, use_errno=True)
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes([0xB8, 34, 0, 0, 0, 0x0F, 0x05, 0xEB, 0xF7]))  # pause, for ever
code = ctypes.addressof(ctypes.c_char.from_buffer(page))
stack = mmap.mmap(-1, 1 << 16)
stack.write(struct.pack('Q', code) * (1 << 13))
top = ctypes.c_long(ctypes.addressof(ctypes.c_char.from_buffer(stack)) + (1 << 15))
made = 0
for _ in range(TRIES):
    made += libc.syscall(56, ctypes.c_long(0x50F00), top, 0, 0, 0) > 0
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="machine code")
def test_threads_are_counted_whoever_starts_them():
    said = judge(BOMB.replace("TRIES", "500"), tests=["assert made == -1"]).feedback
    made = int(said.rpartition("got ")[2])
    assert 32 < made < 2 * python_tests.THREADS
    begin = time.monotonic()
    said = judge(BOMB.replace("TRIES", "10**9"), tests=["assert made == -1"]).feedback
    assert said == "The code failed before any test: it starts threads without end"
    assert time.monotonic() - begin < 5


def test_threads_that_end_make_room_for_others():
    code = (
        "import threading\ndef f(n):\n    for _ in range(n):\n"
        "        thread = threading.Thread(target=int); thread.start(); thread.join()\n    return n"
    )
    assert judge(code, tests=["assert f(300) == 300"]).reward == 1


def test_where_threads_cannot_be_counted_there_are_none(monkeypatch):
    usual = python_tests._restrictions()
    # A filter with a listener that is no filter: the kernel refuses it.
    monkeypatch.setattr(python_tests, "_restrictions", lambda: {**usual, "asking": "00" * 8})
    said = judge("import threading\nthreading.Thread(target=int).start()").feedback
    assert said == "The code failed before any test: RuntimeError: can't start new thread"
    assert judge(GOOD).reward == 1
