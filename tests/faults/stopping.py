"""Runs of the command that are stopped, resumed and compared with one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = [str(HERE.parent / "helpers"), str(HERE)]

ARGUMENTS = [
    "--model.advantage.class_path=SelfDistillation",
    "--model.teacher.class_path=EMA",
    "--model.teacher.context=PlainPrompt",
    "--model.sampling={n: 2, max_new_tokens: 8}",
    "--model.val_sampling={n: 2, max_new_tokens: 8}",
    "--model.verification.workers=1",
    "--data.train=runs.Toys",
    "--data.val=runs.Toys",
    "--data.val.size=4",
    "--data.questions_per_batch=2",
    "--data.val_questions_per_batch=2",
    "--trainer.max_steps=8",
    "--trainer.max_epochs=-1",
    "--trainer.check_val_every_n_epoch=null",
    "--trainer.val_check_interval=3",
    "--trainer.num_sanity_val_steps=-1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.logger=CSVLogger",
    "--trainer.logger.save_dir=runs",
    "--trainer.logger.name=toys",
    "--trainer.callbacks+=BeforeAfter",
]
"""Eight batches over an epoch's end (six batches), validated before, after 3 and after 6."""


def share(name: str, few: int, all_of_them: int) -> int:
    """How many cases: `few`, or all with FAULTS=all; `FAULTS_<NAME>` is a number of one's own."""
    default = all_of_them if os.environ.get("FAULTS") == "all" else few
    return int(os.environ.get(f"FAULTS_{name}", default))


def environment(**more: str) -> dict[str, str]:
    """Of a process that runs the command."""
    path = os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])
    kept = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


class Commands:
    """A process that runs the command again and again, each time in a fork."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.process = subprocess.Popen(
            [sys.executable, HERE / "command.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )

    def begin(self, folder: Path, *args: str, command: str = "fit", **job) -> int:
        """Start a run in `folder`; its process."""
        folder.mkdir(exist_ok=True)
        policy = f"--model.policy.name_or_path={self.model}"
        given = [command, policy, *ARGUMENTS, *args]
        line = json.dumps({"folder": str(folder), "args": given} | job)
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return int(self._said())

    def end(self) -> int:
        """Wait for the run; its exit code, negative for the signal that killed it."""
        return int(self._said())

    def _said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def run(self, folder: Path, *args: str, **job) -> int:
        """A whole run."""
        self.begin(folder, *args, **job)
        return self.end()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


def marks(folder: Path, name: str = "marks") -> list[str]:
    """What the runs in `folder` have been at so far."""
    path = folder / name
    return path.read_text().splitlines() if path.exists() else []


def wait_for(folder: Path, phase: str, times: int, begun: int = 0, seconds: float = 300.0) -> None:
    """Until a phase was entered so often, counted from mark number `begun`."""
    limit = time.monotonic() + seconds
    while marks(folder)[begun:].count(phase) < times:
        assert time.monotonic() < limit, (phase, times, (folder / "err").read_text()[-3000:])
        time.sleep(0.002)


def send(process: int, signum: int) -> None:
    os.kill(process, signum)


def last(folder: Path) -> Path:
    """The newest `last.ckpt` of the runs in a folder."""
    return max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def state(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def same_end(folder: Path, other: Path, *, rounded: str = "nothing") -> None:
    """Weights, optimizer, data position and what strategies remember: bit for bit; figures too, but
    for those that begin with `rounded`.
    """
    mine, theirs = state(last(folder)), state(last(other))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "remembered", "global_step"):
        _same(mine[key], theirs[key], key)
    assert mine["loops"]["fit_loop"]["state_dict"] == theirs["loops"]["fit_loop"]["state_dict"]
    for mine, theirs in zip(lines(folder), lines(other), strict=True):
        left = {name for name in mine.keys() | theirs.keys() if not name.startswith(rounded)}
        assert {name: mine.get(name) for name in left} == {name: theirs.get(name) for name in left}


def _same(mine, theirs, where) -> None:
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=str(where))
    elif isinstance(theirs, dict):
        assert mine.keys() == theirs.keys(), where
        for key in theirs:
            _same(mine[key], theirs[key], (where, key))
    elif isinstance(theirs, list | tuple):
        assert len(mine) == len(theirs), where
        for number, pair in enumerate(zip(mine, theirs, strict=True)):
            _same(*pair, (where, number))
    else:
        assert mine == theirs, where


def lines(folder: Path) -> list[dict]:
    """The record of the newest run, without times and memory."""
    path = max(folder.rglob("metrics.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    of_the_machine = ("time", "train/memory")
    return [
        {
            k: v
            for k, v in record.items()
            if k not in of_the_machine and "seconds" not in k and "per_" not in k
        }
        for record in records
    ]


SIGNALS = {
    "TERM": (signal.SIGTERM, 143),
    "INT": (signal.SIGINT, 130),
    "HUP": (signal.SIGHUP, 143),
}
