"""Programs that want the reward without solving anything: PythonTests gives none of them any.

Each is tried against several kinds of tests, with the name that the tests call in place of NAME.
"""

import json
import sys
import time

import pytest

from scsdpo.prompt import Prompt
from scsdpo.verifiers import PythonTests
from scsdpo.verifiers.python_tests import _tests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")


def judge(code, tests, **settings):
    verifier = PythonTests(**({"seconds": 10.0, "reveal": True} | settings))
    question = Prompt(key="k", messages=(), verifier=verifier, answer=json.dumps(tests))
    verdict = verifier.verify(question, f"```python\n{code}\n```")
    assert verdict.error == ""
    return verdict


KINDS = {
    "assert": ["assert f(1) == 2", "assert f(2) == [3, 'three']", "assert not f(3) != (4,)"],
    "check": [
        "def check(candidate):\n"
        "    assert candidate(1) == 2\n"
        "    for n in range(2, 5):\n"
        "        assert abs(candidate(n) - (n * 7.25 + 1)) < 1e-6\n",
        "check(f)",
    ],
    "loops": [
        "import math",
        "assert all(map(lambda n: f(n) == n * 31 + 7, range(1, 9)))",
        "assert sorted(f(n) for n in [3, 1]) == [38, 100] and math.isclose(f(0), 7.0)",
    ],
    "program": [{"input": "1 2\n", "output": "3\n"}, {"input": "4 5", "output": "9"}],
}

EQUAL = """
class Equal:
    def __init__(self, *args): pass
    def yes(self, *args): return True
    def me(self, *args): return self
    __eq__ = __le__ = __ge__ = __lt__ = __gt__ = __contains__ = __bool__ = yes
    def __ne__(self, other): return False
    __sub__ = __rsub__ = __add__ = __abs__ = __round__ = __iter__ = me
    def __hash__(self): return 2
    def __float__(self): return 0.0
    def __getattr__(self, name): return self
    def __call__(self, *args): return self
"""
HACKS = {
    "nothing": "",
    "a value that equals everything": EQUAL + "def NAME(*args): return Equal()",
    "the same below a number": "class N(int):\n    __eq__ = lambda s, o: True\n"
    "    __ne__ = lambda s, o: False\n    __hash__ = int.__hash__\ndef NAME(*args): return N(5)",
    "the same below text": "class N(str):\n    __eq__ = lambda s, o: True\n"
    "    __ne__ = lambda s, o: False\ndef NAME(*args): return N()",
    "the same below a list": "class N(list):\n    __eq__ = lambda s, o: True\n"
    "    __ne__ = lambda s, o: False\ndef NAME(*args): return N()",
    "a class with an equality of its own": "class M(type):\n    __eq__ = lambda s, o: True\n"
    "    __ne__ = lambda s, o: False\n    __hash__ = None\nclass N(metaclass=M): pass\n"
    "def NAME(*args): return N",
    "a function that is such a value": EQUAL + "NAME = Equal()",
    "exit at once": "import os; os._exit(0)",
    "sys.exit(0)": "import sys; sys.exit(0)",
    "exit in the call": "import os\ndef NAME(*args): os._exit(0)",
    "SystemExit in the call": "def NAME(*args): raise SystemExit(0)",
    "the end of an iteration": "def NAME(*args): raise StopIteration",
    "the end of a generator": "def NAME(*args): raise GeneratorExit",
    "KeyboardInterrupt": "def NAME(*args): raise KeyboardInterrupt",
    "AssertionError": "def NAME(*args): raise AssertionError",
    "an exception that is forged": "class E(Exception):\n    pass\n"
    "E.__name__ = 'StopIteration'\ndef NAME(*args): raise E",
    "compile patched": "import builtins\nold = builtins.compile\n"
    "builtins.compile = lambda s, *a, **k: old('pass', '', 'exec')\ndef NAME(*args): pass",
    "exec patched": "import builtins\nbuiltins.exec = lambda *a, **k: None\ndef NAME(*args): pass",
    "builtins patched": "import builtins\nfor n in ('abs', 'float', 'all', 'any', 'sorted', 'map',"
    " 'range', 'set', 'len', 'round', 'isinstance', 'AssertionError'):\n"
    "    setattr(builtins, n, lambda *a, **k: True)\ndef NAME(*args): return 0",
    "names of the module": "abs = all = any = sorted = map = range = lambda *a: []\n"
    "class math: isclose = lambda *a: True\nisclose = math.isclose\ndef check(*a): pass\n"
    "def NAME(*args): return 0",
    "math patched": "import math\nmath.isclose = lambda *a, **k: True\nmath.fabs = lambda x: 0\n"
    "def NAME(*args): return 0",
    "json patched": "import json\nfor n in ('dumps', 'loads'):\n"
    "    setattr(json, n, lambda *a, **k: '[\"value\", true]')\ndef NAME(*args): return 0",
    "operator patched": "import operator\noperator.eq = lambda a, b: True\ndef NAME(*args): pass",
    "the frames above": "import sys\nframe = sys._getframe()\nwhile frame:\n"
    "    for key, value in list(frame.f_locals.items()) + list(frame.f_globals.items()):\n"
    "        if key in ('tests', 'expected', 'given', 'report'): FOUND = value; 1 / 0\n"
    "    frame = frame.f_back\ndef NAME(*args): return frame",
    "forged frames": "import sys, types\ndef NAME(*args):\n    frame = sys._getframe()\n"
    "    while frame:\n        frame.f_trace = lambda *a: None\n        frame = frame.f_back\n"
    "    return None",
    "the heap, by gc": "import gc\nALL = gc.get_objects()\ndef NAME(*args):\n"
    "    for thing in ALL + gc.get_objects():\n"
    "        if isinstance(thing, dict) and 'tests' in thing and 'code' in thing: return thing\n"
    "    return None",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef NAME(*args): pass",
    "an import hook": "import sys\nclass Hook:\n    def find_spec(self, *a): raise SystemExit(0)\n"
    "sys.meta_path.insert(0, Hook())\nsys.modules.clear()\ndef NAME(*args): pass",
    "sys.modules": "import sys, types\nfor n in list(sys.modules):\n"
    "    if n in ('json', 'os', 'remote', 'ast'): sys.modules[n] = types.ModuleType(n)\n"
    "def NAME(*args): return None",
    "a tracer": "import sys\nsys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)\n"
    "def NAME(*args): return None",
    "lines on every descriptor": "import os\nfor n in range(64):\n    for line in (b'null\\n' * 9, "
    "b'[\"value\", null]\\n' * 9):\n        try: os.write(n, line)\n"
    "        except OSError: pass\nos._exit(0)",
    "the agent's own functions": "import __main__\nmain = vars(__main__)\nfor n in list(main):\n"
    "    if callable(main[n]) and not n.startswith('__'): main[n] = lambda *a, **k: None\n"
    "import remote\nremote.pack = lambda *a: True\ndef NAME(*args): return True",
    "a reply that claims a verdict": "import remote\n"
    "remote.pack = lambda value, other: ['verdict', 1]\ndef NAME(*args): pass",
    "a reference to a builtin": "import remote\nremote.pack = lambda value, other: "
    "['builtin', 'bool']\ndef NAME(*args): pass",
    "a reference to a reference": "import remote\nremote.pack = lambda value, other: ['thing', 0]\n"
    "def NAME(*args): pass",
    "a reference to the tests' own": "import remote\nremote.pack = lambda value, other: "
    "['call_back', 0]\ndef NAME(*args): pass",
    "what is not a number": "nan = float('nan')\ndef NAME(*args): return nan",
    "infinity": "def NAME(*args): return float('inf')",
    "the inputs": "def NAME(*args): return args[0] if len(args) == 1 else args",
    "everything printed": "print('\\n'.join(map(str, range(99))))\ndef NAME(*args): return 0",
    "a patched stdout": "import sys\nclass Out:\n    def __getattr__(self, name): return self\n"
    "    def __call__(self, *a): return self\n    def __eq__(self, other): return True\n"
    "sys.stdout = Out()\ndef NAME(*args): return Out()",
    "another's memory": "import os\nTEXT, me = b'', os.getpid()\n"
    "for pid in range(me - 5, me + 6):\n    for name in ('mem', 'environ', 'maps', 'fd/3'):\n"
    "        try: TEXT += open(f'/proc/{pid}/{name}', 'rb').read(9)\n        except OSError: pass\n"
    "def NAME(*args): return TEXT",
    "the other process killed": "import os\nfor pid in range(os.getpid() - 5, os.getpid() + 6):\n"
    "    if pid != os.getpid():\n        try: os.kill(pid, 9)\n        except OSError: pass\n"
    "def NAME(*args): return 0",
    "the other process traced": "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
    "for pid in range(os.getpid() - 5, os.getpid() + 6):\n    libc.ptrace(16, pid, 0, 0)\n"
    "def NAME(*args): return 0",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hack", HACKS)
def test_no_hack_earns_a_reward(hack, kind):
    verdict = judge(HACKS[hack].replace("NAME", "f"), KINDS[kind])
    assert verdict.reward == 0
    assert verdict.feedback


SOLUTIONS = {
    "assert": "def f(n): return {1: 2, 2: [3, 'three'], 3: (4,)}[n]",
    "check": "def f(n): return 2 if n == 1 else n * 7.25 + 1",
    "loops": "def f(n): return n * 31 + 7",
    "program": "print(sum(map(int, input().split())))",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_solution_of_the_same_tests_earns_it(kind):
    assert judge(SOLUTIONS[kind], KINDS[kind]).reward == 1


FORGED = [
    b"",
    b"\n",
    b"[1]\n",
    b"{\n",
    b"null\n",
    b'"value"\n',
    b'["value"]\n',
    b'["value", ["list", ["thing"]]]\n',
    b'["value", ["thing", "x"]]\n',
    b'["value", ["thing", -1]]\n',
    b'["value", ["call_back", 99]]\n',
    b'["value", ["builtin", "eval"]]\n',
    b'["value", ["array", "O", ["list"]]]\n',
    b'["value", ["dict", 1]]\n',
    b'["value", ["dict", ["list"], 1]]\n',
    b'["value", ["int", "x"]]\n',
    b'["value", ["bytes", 3]]\n',
    b'["value", ["fraction", "1/0"]]\n',
    b'["value", ["decimal", "x"]]\n',
    b'["value", ["range", 1, 2, 0]]\n',
    b'["value", {"a": 1}]\n',
    b'["raise", 3, 3]\n',
    b'["raise", ["SystemExit"], "0"]\n',
    b'["raise", ["UnicodeDecodeError"], ["x"]]\n',
    b'["call_back", 0, 1, 2]\n',
    b'["end"]\n',
    b'["value", ' + b"9" * 5000 + b"]\n",
    b'["value", "\\ud800"]\n',
    b"\xff\xfe\n",
    b"[" * 99999 + b"\n",
    b'["list",' * 9999 + b"\n",
    b'["value", ' + b'["list",' * 900 + b"1" + b"]" * 901 + b"\n",
    b'["value", "cut',
]


@pytest.mark.parametrize("line", FORGED, ids=lambda line: repr(line[:40]))
def test_a_forged_message_is_a_wrong_answer_and_no_exception(line):
    code = (
        "import gc, os, remote\n"
        "(line,) = [thing for thing in gc.get_objects() if isinstance(thing, remote.Line)]\n"
        f"def f(*args):\n    os.write(line._sink, {line!r})\n    os._exit(0)"
    )
    verdict = judge(code, KINDS["assert"])
    assert verdict.reward == 0
    assert verdict.feedback.startswith("Test 1 of 3 failed (assert f(1) == 2): ")


@pytest.mark.parametrize("ahead", [b'["value", true]\n' * 9, b"x" * 99, b"[" * 9])
def test_answers_that_come_before_the_questions_are_wrong_answers(ahead):
    code = (
        "import gc, os, remote\n"
        "(line,) = [thing for thing in gc.get_objects() if isinstance(thing, remote.Line)]\n"
        f"os.write(line._sink, {ahead!r})\ndef f(n): return 0"
    )
    for tests in (KINDS["assert"], KINDS["check"], KINDS["loops"]):
        assert judge(code, tests).reward == 0


def test_a_message_without_end_is_a_wrong_answer():
    code = "def f(*args): return 'x' * (200 << 20)"
    begin = time.monotonic()
    verdict = judge(code, ["assert f(1) == 2"])
    assert "its answer is none: too long a message" in verdict.feedback
    assert time.monotonic() - begin < 8


def test_what_is_expected_never_enters_the_process_of_the_response():
    code = (
        "import gc, sys\n"
        "def seen(depth=0):\n"
        "    return [t for t in gc.get_objects() for t in (t.values() if type(t) is dict else"
        " t if type(t) is list else ()) if isinstance(t, str) and 'SECRET' in t and len(t) < 40]\n"
        "def f(x): return [text for text in seen()]"
    )
    verdict = judge(code, ["assert f('input') == 'the ' + 'SECRET'", "assert f(1) == 'SECRET 2'"])
    assert verdict.feedback.endswith("AssertionError: got []")


TOLD = [
    # what is refused, and a word of the reason
    (["assert eval(f(1)) == 2"], "`eval`"),
    (["import pickle", "assert pickle.loads(f(1)) == 2"], "`pickle`"),
    (["from pickle import loads", "assert loads(f(1)) == 2"], "`pickle`"),
    (["assert same(f(1), 2)"], "lets one function of the response judge another"),
    (["assert f(1) = 2"], "is no Python"),
    (["def test(tmp_path):\n    assert f(tmp_path)"], "would need pytest"),
    (["def check(candidate):\n    assert candidate(1) == 2"], "no test calls check"),
    (["class T(unittest.TestCase): pass"], "would need unittest"),
    (["assert sum(3) == max(2)"], "do not say which of max, sum"),
]


@pytest.mark.parametrize(("tests", "why"), TOLD)
def test_tests_that_cannot_be_kept_apart_are_refused_before_training(tests, why):
    verifier = PythonTests()
    question = Prompt(key="k", messages=(), verifier=verifier, answer=json.dumps(tests))
    with pytest.raises(ValueError, match=why):
        verifier.check(question)
    assert why in verifier.verify(question, "```python\n1\n```").error


YES = """
class Yes:
    def __getattr__(self, name): return lambda *args: True
    def __iter__(self):
        n = 0
        while True:
            yield n
            n += 1
def f(*args): return Yes()
"""
ASKED = [
    "assert f(1).startswith('Hello')",
    "assert f(1).isdigit()",
    "assert f(1).issubset({1, 2})",
    "assert f(1).equals([3])",
    "assert (f(1) == 3).all()",
    "assert 700 in f(1)",
    "assert f(1) > 3 or f(1) <= 3",
    "assert abs(f(1) - 3) < 1",
    "assert f(1) == f(1)",
]


@pytest.mark.parametrize("test", ASKED)
def test_an_object_that_says_yes_to_everything_is_not_asked(test):
    assert judge(YES, [test]).reward == 0


def test_a_class_that_the_tests_name_is_asked():
    code = "class Trie:\n    def startswith(self, word): return word == 'ab'"
    assert judge(code, ["t = Trie()", "assert t.startswith('ab')"]).reward == 1
    assert judge(code, ["t = Trie()", "assert t.startswith('b')"]).reward == 0


def test_functions_that_pytest_would_call_are_called():
    tests = ["from solution import f\ndef test_one():\n    assert f(1) == 2\n"]
    assert judge("def f(x): return 2", tests).reward == 1
    assert judge("def f(x): return 3", tests).reward == 0
    assert judge("def f(x): return 3", [*tests, "test_one()"]).reward == 0


def test_the_names_of_a_response_are_those_that_no_library_has():
    def own(*tests):
        return _tests(json.dumps(tests))[1]

    assert own("assert math.isclose(f(1), sqrt(2))") == ["f"]
    assert own("def check(f):\n    assert set(f(1)) == {1}", "check(f)") == ["f"]
    assert own("x = [1]\nf(x)", "assert x == [2]") == ["f"]
    assert own("assert sum(10, 15) == 25") == ["sum"]
    assert own("assert set(combinations([1])) == {1}") == ["combinations"]
    assert own("assert Solution().rob([1]) == 1") == ["Solution"]
    assert own("from solution import *\nassert f(sqrt(4)) == 2") == ["f"]
    assert own("from solution import f, sqrt\nassert f(sqrt(4)) == 2") == ["f", "sqrt"]
    assert own("assert True") == []
