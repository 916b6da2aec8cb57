"""The command in a process of its own, to be stopped somewhere.

`command.py` reads jobs and forks each run, since imports take longer than a run does. A job is a
line of JSON on standard input, its end a line on standard output; meanwhile `marks` in the job's
folder says what the run is at. `command.py fit ...` is one run on several ranks, in the folder
`FAULTS_AT`; each rank writes its process and its marks, for the first starts the others by the same
line.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from functools import wraps
from pathlib import Path

import torch

import runs  # noqa: F401 - its sources go by `runs.Toys`
import scsdpo.cli.lightning_cli  # noqa: F401 - before the forks
from forked import run_and_leave
from scsdpo.__main__ import main as command
from scsdpo.checkpoints import Checkpoint
from scsdpo.training import OptimizerSteps, PolicyOptimizer
from scsdpo.training.collector import Collector
from scsdpo.verifiers import VerifierPool

_MOMENT = 0.03
"""Seconds by which each phase is longer, so that a signal finds it."""


def marked(owner, name, phase, path, seconds=_MOMENT):
    """Let the method write the phase before it works."""
    method = getattr(owner, name)

    @wraps(method)
    def marking(self, *args, **kwargs):
        with path.open("a") as file:
            file.write(f"{phase}\n")
        time.sleep(seconds)
        return method(self, *args, **kwargs)

    setattr(owner, name, marking)


def slowed_saving(folder):
    """Write a checkpoint in pieces, with pauses."""
    save = torch.save

    def slowly(content, path, *args, **kwargs):
        save(content, path, *args, **kwargs)
        whole = Path(path).read_bytes()
        with open(path, "wb") as file:
            for start in range(0, len(whole), len(whole) // 4 + 1):
                file.write(whole[start : start + len(whole) // 4 + 1])
                file.flush()
                time.sleep(0.03)

    torch.save = slowly


def raising_at(batch):
    """A bug between sampling and update."""
    learn = OptimizerSteps.learn

    def failing(self, host, *args):
        return 1 / 0 if int(host.batches) == batch else learn(self, host, *args)

    OptimizerSteps.learn = failing


def acting_at(acts):
    """Shell commands between sampling and update of some batches: a disk fills up, or is mended."""
    learn = OptimizerSteps.learn

    def acting(self, host, *args):
        subprocess.run(acts.get(str(int(host.batches)), "true"), shell=True, check=True)
        return learn(self, host, *args)

    OptimizerSteps.learn = acting


def mark_phases(path):
    marked(PolicyOptimizer, "configure_model", "start", path)
    marked(Collector, "sample", "sampling", path)  # of batches, not of the self-check
    marked(VerifierPool, "verify", "verifying", path)
    marked(OptimizerSteps, "learn", "update", path)
    marked(PolicyOptimizer, "on_validation_epoch_start", "validation", path)
    marked(Checkpoint, "_write", "saving", path)


def run(job):
    folder = Path(job["folder"])
    os.chdir(folder)
    os.environ.update(job.get("environment", {}))
    for descriptor, name in ((1, job.get("out", "out")), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    if job.get("unread"):  # as after `| head -1`
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
    mark_phases(folder / "marks")
    if "bug_at" in job:
        raising_at(job["bug_at"])
    if "acts" in job:
        acting_at(job["acts"])
    if job.get("nohup"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if job.get("slow"):
        slowed_saving(folder)
    run_and_leave(job["args"])


def run_ranks():
    rank = os.environ.get("LOCAL_RANK", "0")
    folder = Path(os.environ["FAULTS_AT"])
    (folder / f"process.{rank}").write_text(str(os.getpid()))
    mark_phases(folder / f"marks.{rank}")
    sys.exit(command())


def main() -> None:
    if sys.argv[1:]:
        run_ranks()
    for line in sys.stdin:
        job = json.loads(line)
        if (child := os.fork()) == 0:
            try:
                run(job)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(99)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
