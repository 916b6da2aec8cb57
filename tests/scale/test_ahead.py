"""Two ranks, weights whole or in shards, whose servers draw the next batches: `make test-scale`.

Servers are made up; what they answer depends on the seed of a request alone.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress

import pytest

from canned_vllm import Paced, ready, serving
from conftest import HERE, TESTS
from scsdpo.policy import CausalLM

ENGINE = "--model.rollout.init_args.engine.init_args"
ARGUMENTS = [
    "--model.advantage.class_path=SelfDistillation",
    "--model.teacher.class_path=EMA",
    "--model.teacher.context=PlainPrompt",
    "--model.importance.class_path=TokenImportance",
    "--model.sampling={n: 2, max_new_tokens: 8}",
    "--model.verification.workers=1",
    "--model.gap={warn: .inf, stop: .inf}",
    "--model.optimizer=torch.optim.SGD",
    "--model.optimizer.lr=0.1",
    "--model.rollout.class_path=VLLMRollout",
    "--model.rollout.init_args.engine.class_path=Servers",
    f"{ENGINE}.delivery=Download",
    "--data.train=runs.Toys",
    "--data.train.size=24",
    "--data.val=[]",
    "--data.questions_per_batch=4",
    "--trainer.max_epochs=-1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.logger=false",
    "--trainer.default_root_dir=run",
    "--trainer.callbacks+=__main__.Seen",
    "--checkpoint.save_last=true",
]
KINDS = {
    "one": [],
    "ddp": ["--trainer.devices=2", "--trainer.strategy=ddp"],
    "fsdp": [
        "--trainer.devices=2",
        "--trainer.strategy.class_path=scsdpo.checkpoints.FullySharded",
    ],
}
TWO = ["ddp", "fsdp"]


class Runs:
    """A process that forks the ranks of one run after the other."""

    def __init__(self, model):
        self.model, self.pids, self.codes = model, [], None
        path = os.pathsep.join([str(TESTS / "helpers"), os.environ.get("PYTHONPATH", "")])
        kept = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", HERE / "ahead_fit.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            text=True,
        )

    def begin(self, folder, kind, servers, *args, steps=99, ahead=2, patience=30):
        """Start a run."""
        folder.mkdir(exist_ok=True)
        urls = ", ".join(server.url for server in servers)
        given = (
            *("fit", f"--model.policy.name_or_path={self.model}", *ARGUMENTS, *KINDS[kind]),
            *(f"{ENGINE}.urls=[{urls}]", f"{ENGINE}.patience={patience}", f"{ENGINE}.timeout=30"),
            *(f"--model.ahead.batches={ahead}", f"--trainer.max_steps={steps}", *args),
        )
        job = {"folder": str(folder), "args": given, "ranks": 1 if kind == "one" else 2}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        self.folder, self.codes = folder, None
        self.pids = json.loads(self.process.stdout.readline())
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        self.codes = json.loads(self.process.stdout.readline())

    def wait_for(self, batch):
        """Until a rank has come so far."""
        limit = time.monotonic() + 240
        while max(seen(self.folder), default=0) < batch:
            assert self.codes is None and time.monotonic() < limit, said(self.folder)
            time.sleep(0.01)

    def signal(self, signum, *ranks):
        for rank in ranks:
            os.kill(self.pids[rank], signum)

    def end(self, seconds=120.0):
        """The ranks' exit codes; a run that does not end is killed."""
        self._reader.join(seconds)
        hangs = self.codes is None
        for pid in self.pids if hangs else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._reader.join(10)
        assert not hangs, said(self.folder)
        return self.codes

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


class Mortal:
    """A server that can be killed, and started again where it was.

    Args:
        seconds: that a request takes.
    """

    def __init__(self, seconds=0.05):
        self.seconds, self._port, self.held = seconds, 0, threading.Event()
        self.holds = ()
        """Ids of a prompt that it answers once `held` is set."""
        self.jumps = False
        """Whether it gets weights of another run while it draws the next response."""
        self.start()

    def start(self):
        self._running = ExitStack()
        self.server = self._running.enter_context(serving(self._port))
        self.url, self._port = self.server.url, self.server.server_address[1]
        self.paced, self._dead = Paced(self.server, self.seconds), threading.Event()
        self.paced.draw = self._draw

    def _draw(self, handler):
        if self._dead.wait(self.seconds):
            raise ConnectionResetError
        if tuple(json.loads(handler.body)["token_ids"]) == self.holds:
            self.held.wait(200)
        if self.jumps:
            self.jumps = False
            self.server.answers |= ready("another run's")

    def kill(self):
        self._dead.set()
        self.held.set()
        self._running.close()


@pytest.fixture(scope="module")
def model(folders):
    return folders / "tied"


@pytest.fixture(scope="module")
def runs(model):
    made = Runs(model)
    yield made
    made.close()


@pytest.fixture
def servers():
    """Two, the second of which is slow."""
    both = [Mortal(0.05), Mortal(0.4)]
    yield both
    for server in both:
        server.kill()


def seen(folder):
    """By batch what each rank has learned from, in the order of the ranks."""
    found = {}
    for path in sorted(folder.glob("seen.*.jsonl")):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                told = json.loads(line)
                found.setdefault(told["batch"], []).append(told)
    return found


def said(folder):
    return (folder / "err").read_text(errors="replace")[-4000:]


def responses(folder):
    """By batch the responses to each question, whichever rank had it."""
    return {
        number: {q: ids for each in ranks for q, ids in zip(each["keys"], each["ids"], strict=True)}
        for number, ranks in seen(folder).items()
    }


def figures(folder):
    (path,) = folder.rglob("metrics.jsonl")
    lines = map(json.loads, path.read_text().splitlines())
    return {line["batch"]: line for line in lines if "train/age_batches_max" in line}


@pytest.fixture(scope="module")
def of_one(runs, tmp_path_factory):
    """The responses of a run on one rank that asked for each batch when it learned from it."""
    server, folder = Mortal(0.0), tmp_path_factory.mktemp("one")
    try:
        runs.begin(folder, "one", [server], steps=12, ahead=0)
        assert runs.end() == [0], said(folder)
    finally:
        server.kill()
    return responses(folder)


@pytest.mark.parametrize("kind", TWO)
def test_ranks_stay_within_the_bound_while_a_server_is_killed_and_heals(
    runs, servers, of_one, tmp_path, kind
):
    """A label ends with a count of steps, which tells the age that was noted."""
    other, victim = servers
    other.seconds = 0.3
    runs.begin(tmp_path, kind, servers, steps=12)
    runs.wait_for(2)
    victim.kill()
    runs.wait_for(3)
    victim.seconds = 0.05
    victim.start()
    assert runs.end() == [0, 0], said(tmp_path)
    assert victim.paced.drew
    assert responses(tmp_path) == of_one
    moves = lambda label: int(label.rsplit(".", 1)[1])  # noqa: E731
    start = moves(seen(tmp_path)[1][0]["label"][0][0])
    for number, ranks in seen(tmp_path).items():
        assert len(ranks) == 2
        for told in ranks:
            assert told["oldest"] <= min(number - 1, 2)
            for labels, ages in zip(told["label"], told["ages"], strict=True):
                drawn = [told["step"] - steps for steps, _ in ages]
                assert drawn == [moves(label) - start for label in labels]
    told = figures(tmp_path)
    assert max(each["train/age_batches_max"] for each in told.values()) == 2
    assert told[12]["train/asked_again"] == 0


@pytest.mark.parametrize(("kind", "rank"), [("ddp", 0), ("ddp", 1), ("fsdp", 0), ("fsdp", 1)])
def test_ranks_stop_together_while_one_of_them_waits_for_a_server(
    runs, servers, model, tmp_path, kind, rank
):
    """The second rank waits for the third batch, the first one for the second rank."""
    chat = CausalLM(str(model)).chat
    for server in servers:  # one of the second rank's questions
        server.holds = chat.render(({"role": "user", "content": "5?"},))
    runs.begin(tmp_path, kind, servers, ahead=1)
    runs.wait_for(2)
    time.sleep(1.0)
    runs.signal(signal.SIGTERM, rank)
    assert runs.end(40) == [143, 0]
    for server in servers:
        server.held.set()
    assert max(seen(tmp_path)) == 2
    assert "the state after batch 2 is in" in said(tmp_path)


def test_a_run_that_is_stopped_amid_its_draws_goes_on_with_any_number_of_ranks(
    runs, servers, of_one, tmp_path
):
    last = []
    for kind in ("ddp", "one", "fsdp"):
        begun = max(seen(tmp_path), default=0)
        runs.begin(tmp_path, kind, servers, *last)
        runs.wait_for(begun + 2)
        runs.signal(signal.SIGTERM, *range(len(runs.pids)))
        assert runs.end(60)[0] == 143, said(tmp_path)
        last = ["--ckpt_path=last"]
    learned = responses(tmp_path)
    assert learned == {number: of_one[number] for number in learned} and len(learned) >= 6
    assert all(told["oldest"] <= 2 for ranks in seen(tmp_path).values() for told in ranks)


@pytest.mark.parametrize(("kind", "rank"), [("ddp", 0), ("ddp", 1), ("fsdp", 1)])
def test_a_rank_that_is_killed_amid_its_draws_is_named_and_its_run_goes_on(
    runs, servers, of_one, tmp_path, kind, rank
):
    """Rank 0 saves without the other, under shards nobody can: with what was saved before."""
    runs.begin(tmp_path, kind, servers, "--checkpoint.every_minutes=0")
    runs.wait_for(3)
    runs.signal(signal.SIGKILL, rank)
    codes = runs.end(90)
    assert codes[rank] == -9 and codes[1 - rank] == 3, said(tmp_path)
    assert f"scsdpo: error: rank {rank} was lost" in said(tmp_path)
    runs.begin(tmp_path, "one", servers[:1], "--ckpt_path=last", steps=6)
    assert runs.end() == [0], said(tmp_path)
    learned = responses(tmp_path)
    assert sorted(learned) == [*range(1, 7)]
    assert learned == {number: of_one[number] for number in learned}


def test_ranks_whose_servers_are_all_gone_end_with_their_names_and_the_run_goes_on(
    runs, of_one, tmp_path
):
    """Rank 0 alone saves then: what waits is asked again, and counted."""
    server = Mortal(0.1)
    runs.begin(tmp_path, "ddp", [server], patience=2)
    runs.wait_for(3)
    server.kill()
    assert 3 in runs.end(90)
    assert "no vLLM server could be used for" in said(tmp_path)
    assert "the state after batch" in said(tmp_path)
    server.start()
    try:
        runs.begin(tmp_path, "ddp", [server], "--ckpt_path=last", steps=7)
        assert runs.end() == [0, 0], said(tmp_path)
    finally:
        server.kill()
    assert responses(tmp_path) == {number: of_one[number] for number in range(1, 8)}
    assert figures(tmp_path)[7]["train/asked_again"] > 0


def test_what_a_server_draws_with_weights_of_another_run_is_learned_from_on_no_rank(
    runs, of_one, tmp_path
):
    """It says so; both ranks ask again once rank 0 has brought the weights."""
    server = Mortal(0.2)
    try:
        runs.begin(tmp_path, "ddp", [server], steps=6)
        runs.wait_for(2)
        server.jumps = True
        assert runs.end() == [0, 0], said(tmp_path)
    finally:
        server.kill()
    assert responses(tmp_path) == {number: of_one[number] for number in range(1, 7)}
    labels = {
        label
        for ranks in seen(tmp_path).values()
        for told in ranks
        for row in told["label"]
        for label in row
    }
    assert "another run's" not in labels
    assert not server.jumps and "is not used until it works again: " in said(tmp_path)


@pytest.mark.parametrize("kind", TWO)
def test_ranks_keep_step_over_validations_and_weights_that_change_amid_responses(
    runs, servers, of_one, tmp_path, kind
):
    """Of three validation questions one rank has more than the other."""
    for server, seconds in zip(servers, (0.2, 0.5), strict=True):
        server.seconds = seconds
    more = (
        "--model.ahead.within_responses=true",
        "--model.val_sampling={n: 2, max_new_tokens: 8}",
        *("--data.val=runs.Toys", "--data.val.size=3", "--data.val_questions_per_batch=2"),
        *("--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"),
        "--trainer.num_sanity_val_steps=0",
    )
    runs.begin(tmp_path, kind, servers, *more, steps=6)
    assert runs.end() == [0, 0], said(tmp_path)
    assert responses(tmp_path) == {number: of_one[number] for number in range(1, 7)}
    assert all(told["oldest"] <= 2 for ranks in seen(tmp_path).values() for told in ranks)
    assert any(first != last for server in servers for *_, first, last in server.paced.drew)
    made = sorted(path.name for path in tmp_path.rglob("val-*.json"))
    assert made == ["val-2.json", "val-4.json", "val-6.json"]
