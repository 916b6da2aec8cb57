"""The sandbox of PythonTests: no attack hurts its decoy, and each does without the sandbox."""

import ctypes
import itertools
import json
import os
import platform
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from attacks import ATTACKS, PRELUDE
from scsdpo.prompt import Prompt
from scsdpo.verifiers import PythonTests, landlock, python_tests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")

IPC_PRIVATE, IPC_RMID, IPC_STAT, IPC_NOWAIT = 0, 0, 2, 0o4000
libc = ctypes.CDLL(None, use_errno=True)


class Decoys:
    """What an attack may hurt, and whether it has."""

    def __init__(self, folder):
        self.secret = secrets.token_hex(8)
        self.folder, self.file, self.link = folder, folder / "file", folder / "link"
        self.file.write_text(f"{self.secret}\n")
        with self.file.open() as opened:
            self.victim = subprocess.Popen(
                ["sleep", "60"], stdin=opened, env={"SECRET": self.secret}
            )
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(folder / "socket"))
        self.queue = libc.msgget(IPC_PRIVATE, 0o600)
        self.segment = libc.shmget(IPC_PRIVATE, 4096, 0o600)
        self.before = self.state()

    def names(self):
        values = {
            "VICTIM": self.victim.pid,
            "FILE": str(self.file),
            "FOLDER": str(self.folder),
            "LINK": str(self.link),
            "SECRET": self.secret,
            "SOCKET": str(self.folder / "socket"),
            "QUEUE": self.queue,
            "SEGMENT": self.segment,
        }
        return "".join(f"{name} = {value!r}\n" for name, value in values.items())

    def state(self):
        """All that could have changed; a process that is gone has no more than an exit code."""
        pid, message = self.victim.pid, ctypes.create_string_buffer(16)
        received = libc.msgrcv(self.queue, message, 8, 0, IPC_NOWAIT)
        segment = libc.shmctl(self.segment, IPC_STAT, ctypes.create_string_buffer(256))
        status = self.file.stat()
        things = [self.victim.poll(), received, segment, self.file.read_text(), status.st_mode]
        with suppress(BlockingIOError):
            things.append(self.socket.recv(99, socket.MSG_DONTWAIT))
        with suppress(ProcessLookupError, FileNotFoundError):
            things += [os.sched_getaffinity(pid), os.sched_getscheduler(pid)]
            things += [os.getpriority(os.PRIO_PROCESS, pid)]
            things += [libc.syscall(IOPRIO_GET, 1, pid), Path(f"/proc/{pid}/limits").read_text()]
            things += [Path(f"/proc/{pid}/oom_score_adj").read_text(), os.listxattr(self.file)]
        return things

    def hurt_by(self, feedback, patience=0.0):
        """Whether something has changed, or the program has said too much."""
        if "HURT" in feedback or self.secret in feedback:
            return True
        limit = time.monotonic() + patience
        while (same := self.state() == self.before) and time.monotonic() < limit:
            time.sleep(0.01)
        return not same

    def close(self):
        self.victim.kill()
        self.victim.wait()
        self.socket.close()
        libc.msgctl(self.queue, IPC_RMID, None)
        libc.shmctl(self.segment, IPC_RMID, None)


IOPRIO_GET = 31 if platform.machine() == "aarch64" else 252


@pytest.fixture
def decoys(tmp_path):
    decoys = Decoys(tmp_path)
    yield decoys
    decoys.close()


@pytest.fixture
def restrict(monkeypatch):
    """Sets what the kernel is told, beside or instead of what it would be."""
    usual = python_tests._restrictions()

    def build(**changed):
        monkeypatch.setattr(python_tests, "_restrictions", lambda: {**usual, **changed})

    return build


NOTHING = {"filter": struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000).hex(), "ruleset": ""}
NOTHING["capabilities"] = 0xFFFFFFFF


def feedback(code):
    question = Prompt(
        key="k", messages=(), verifier=PythonTests(seconds=10.0), answer=json.dumps(["assert True"])
    )
    verdict = question.verifier.verify(question, f"```python\n{code}\n```")
    assert verdict.error == ""
    return verdict.feedback


def run(attack, decoys):
    """Let the program run, while LINK leads here and there."""
    done = threading.Event()

    def flip():
        spare = decoys.folder / "spare"
        for target in itertools.cycle((decoys.file, os.__file__)):
            if done.is_set():
                break
            spare.symlink_to(target)
            spare.replace(decoys.link)

    flipping = threading.Thread(target=flip)
    if "LINK" in attack.code:
        flipping.start()
    said = feedback(PRELUDE + decoys.names() + attack.code)
    done.set()
    if "LINK" in attack.code:
        flipping.join()
    return said


def all_attacks(which=lambda attack: True):
    chosen = [attack for attack in ATTACKS if which(attack)]
    return pytest.mark.parametrize("attack", chosen, ids=lambda attack: attack.name)


@all_attacks()
def test_no_attack_gets_through(attack, decoys):
    if attack.landlock and not landlock.version():
        pytest.skip("this kernel has no Landlock, which PythonTests says at its start")
    said = run(attack, decoys)
    assert not decoys.hurt_by(said, patience=0.02), said


@all_attacks(lambda attack: not attack.landlock)
def test_the_filter_alone_holds_all_but_reading(attack, decoys, restrict):
    restrict(ruleset="", capabilities=0xFFFFFFFF)
    said = run(attack, decoys)
    assert not decoys.hurt_by(said, patience=0.02), said


@all_attacks()
def test_without_the_sandbox_it_hurts(attack, decoys, restrict):
    restrict(**NOTHING)
    said = run(attack, decoys)
    hurt = decoys.hurt_by(said, patience=2.0 if attack.sure else 0.2)
    if not hurt and not attack.sure:
        pytest.skip(f"this machine, or this user, cannot do it anyway: {said}")
    assert hurt, said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has what is dropped")
@all_attacks(lambda attack: attack.landlock and "{VICTIM}" in attack.code)
def test_even_without_landlock_root_keeps_other_processes_to_itself(attack, decoys, restrict):
    restrict(ruleset="")
    said = run(attack, decoys)
    assert not decoys.hurt_by(said), said
    restrict(ruleset="", capabilities=0xFFFFFFFF)
    said = run(attack, decoys)
    assert decoys.hurt_by(said), said


def test_what_a_kernel_without_landlock_leaves_open_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(landlock, "version", lambda: 0)
    python_tests._report_missing_layer.cache_clear()
    PythonTests()
    PythonTests()
    assert len(caplog.messages) == 1
    assert "no Landlock" in caplog.messages[0]
    python_tests._report_missing_layer.cache_clear()


@pytest.mark.parametrize("interface", range(1, landlock.version() + 1))
def test_every_version_of_landlock_that_this_kernel_has_keeps_the_secret(
    interface, decoys, restrict
):
    restrict(ruleset=landlock.ruleset(interface).hex())
    (attack,) = (attack for attack in ATTACKS if attack.name == "a file")
    said = run(attack, decoys)
    assert "Permission denied" in said
    assert not decoys.hurt_by(said)


def alive(process):
    """Whether it runs; a zombie, for whom nobody waits, does not."""
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_all_processes_end_with_an_owner_that_is_killed():
    code = "import time; open('/dev/null'); time.sleep(60)"
    source = (
        f"from scsdpo.verifiers import python_tests as p; p._run({code!r}, '[\"1\"]', 60., 512)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", source], env=environment)

    def children(pid):
        lists = Path(f"/proc/{pid}/task").glob("*/children")
        return [child for listed in lists for child in listed.read_text().split()]

    def filtered(pid):
        return "\nSeccomp:\t2" in Path(f"/proc/{pid}/status").read_text()

    def processes():
        """The one that starts others, the response's and the tests'."""
        with suppress(OSError):
            return [*children(parent.pid), *(c for s in children(parent.pid) for c in children(s))]
        return []

    limit = time.monotonic() + 20
    while len(found := processes()) != 3 or not all(map(filtered, found[1:])):
        assert time.monotonic() < limit
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    while any(alive(Path(f"/proc/{pid}")) for pid in found):
        assert time.monotonic() < limit
        time.sleep(0.02)


LOOK = """
import os
for number in range(64):
    try: text = os.pread(number, 99, 0)
    except OSError: continue
    if text: raise SystemExit(text)
raise SystemExit(dict(os.environ))
"""


def test_it_inherits_no_descriptor_and_no_environment(decoys, monkeypatch):
    monkeypatch.setenv("TOKEN", decoys.secret)
    python_tests._starter().close()
    with decoys.file.open() as opened:
        os.set_inheritable(opened.fileno(), True)
        assert "SystemExit: {" in feedback(LOOK)
        assert not decoys.hurt_by(feedback(LOOK))
    start = subprocess.Popen
    carrying = lambda *args, env, **options: start(*args, env=os.environ, **options)  # noqa: E731
    fresh_starter(monkeypatch, carrying)
    assert decoys.hurt_by(feedback("import os; raise SystemExit(os.environ['TOKEN'])"))
    python_tests._starter().close()


def fresh_starter(monkeypatch, start):
    """The next response is started by a process that is started in this way."""
    python_tests._starter().close()
    monkeypatch.setattr(python_tests.subprocess, "Popen", start)


MEMORY_OF_OTHERS = """
import json, os, sys
from scsdpo.prompt import Prompt
from scsdpo.verifiers import PythonTests, python_tests
assert os.getuid() == 65534
LOOK = '''
import os
read = []
starter = os.getppid()
judge = int(open(f'/proc/{starter}/stat').read().rpartition(')')[2].split()[1])
for pid in (os.getpid() + 1, starter, judge):
    for name in ('environ', 'maps', 'mem'):
        try:
            open(f'/proc/{pid}/{name}', 'rb').read(1)
            read.append(name)
        except PermissionError: pass
        except OSError: read.append(name)
raise SystemExit(read)
'''
usual = python_tests._restrictions()
python_tests._restrictions = lambda: {**usual, "ruleset": "", "own_users": sys.argv[1] == "own"}
prompt = Prompt(key="k", messages=(), verifier=PythonTests(seconds=10.0), answer='["assert True"]')
print(prompt.verifier.verify(prompt, f"```python\\n{LOOK}\\n```").feedback)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="by setpriv")
def test_without_landlock_a_users_processes_are_kept_by_users_of_its_own():
    """And what the tests' process has, even without those."""
    become = "setpriv --reuid=65534 --regid=65534 --clear-groups"
    become += " --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"  # Python may be root's
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"

    def said(how):
        command = [*become.split(), sys.executable, "-c", MEMORY_OF_OTHERS, how]
        return subprocess.check_output(command, env=environment, text=True).strip()

    able = subprocess.run([*become.split(), "unshare", "-U", "true"], stderr=subprocess.DEVNULL)
    if able.returncode == 0:
        assert said("own").endswith("SystemExit: []")
    of_starter_and_judge = ["environ", "maps", "mem"] * 2
    assert said("shared").endswith(f"SystemExit: {of_starter_and_judge}")
