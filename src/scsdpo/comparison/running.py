"""Run commands in processes, several at a time, without those that are done."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from scsdpo.io.files import parsed, tell, write_object

DONE = "done.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run.

    Args:
        name: name in messages.
        folder: folder of the run; it has `done.json` once the run is finished.
        words: arguments of `scsdpo fit`, which must make the run write into `folder`.
    """

    name: str
    folder: Path
    words: tuple[str, ...]

    def is_done(self) -> bool:
        """True if the run is finished.

        Raises:
            ValueError: if it was run with another command.
        """
        file = self.folder / DONE
        if not file.exists():
            return False
        found = parsed(file.read_bytes(), "command")
        if found is None:
            tell(f"{file} is incomplete; the run is repeated")
            return False
        before = found["command"]
        if before != list(self.words):
            odd = [word for word in self.words if word not in before]
            odd += [word for word in before if word not in self.words]
            raise ValueError(f"{file} is of another command ({odd[0]}): choose another --out")
        return True

    def run(self, threads: int) -> None:
        """Run it, from its last checkpoint if there is one; a failure raises a RuntimeError."""
        last = self.folder / "checkpoints" / "last.ckpt"
        more = [f"--ckpt_path={last}"] if last.exists() else []
        command = [sys.executable, "-m", "scsdpo", "fit", *self.words, *more]
        seconds = execute(command, self.folder / "output.txt", threads=threads)
        record = {"command": list(self.words), "cpu_seconds": seconds}
        write_object(self.folder / DONE, record)


def execute(words: Sequence[str], output: Path, *, threads: int = 1) -> float:
    """Run a command; returns its seconds of CPU time. OMP_NUM_THREADS of the environment wins.

    Raises:
        RuntimeError: if it fails; names the file with its output.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ}
    with output.open("a") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=env)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}, see {output}")
    return used.ru_utime + used.ru_stime


def run_all(jobs: Sequence[Job], processes: int, say: Callable[[str], None]) -> list[Job]:
    """Run the jobs that are not done.

    Args:
        jobs: all of them.
        processes: number of runs at a time; each gets an equal share of the cores.
        say: called with a line for each run that ends.

    Returns:
        The failed jobs; the others were run all the same.

    Raises:
        ValueError: before the first run, if a job was run with another command.
    """
    todo = [job for job in jobs if not job.is_done()]
    threads = max((os.cpu_count() or 1) // max(processes, 1), 1)

    def one(job: Job) -> Job | None:
        try:
            job.run(threads)
        except RuntimeError as error:
            say(f"{job.name}: {error}")
            return job
        say(f"{job.name}: done")
        return None

    with ThreadPoolExecutor(processes) as pool:
        return [job for job in pool.map(one, todo) if job is not None]
