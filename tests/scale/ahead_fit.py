"""The command on several ranks against made-up servers, in forks of one process.

Reads jobs, lines of JSON on standard input, for imports take longer than a run does: a folder, the
arguments, a number of ranks, an environment. Answers with the ranks' processes, and at their end
with their exit codes. In the folder each rank notes what it learned from.
"""

import json
import os
import socket
import sys
import traceback

import runs  # noqa: F401 - its sources go by `runs.Toys`
import scsdpo.cli.lightning_cli  # noqa: F401 - before the forks
from forked import run_and_leave
from scsdpo.callbacks.rollouts import RolloutCallback
from scsdpo.rollout.servers import server


class Seen(RolloutCallback):
    """`seen.RANK.jsonl`: by batch the questions, responses and ages of this rank's share."""

    def on_batch(self, trainer, module, batch):
        responses = batch.judged.responses
        numbers = responses.versions[:, :, 0].tolist()
        line = {
            "batch": int(module.batches),
            "step": trainer.global_step,
            "keys": list(batch.judged.keys),
            "ids": responses.ids.tolist(),
            "label": [[responses.labels[number] for number in row] for row in numbers],
            "ages": batch.ages[:, 0].view(*responses.ids.shape[:2], 2).tolist(),
            "oldest": max(batch.ages[..., 1].flatten().tolist(), default=0),
        }
        with open(f"seen.{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def rank_of(job, rank, port):
    """Run the command as one of the ranks."""
    os.chdir(job["folder"])
    for descriptor in (1, 2):
        os.dup2(os.open("err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT")
    values = (rank, rank, job["ranks"], job["ranks"], 0, port)
    if job["ranks"] > 1:
        os.environ |= dict(zip(names, map(str, values), strict=True))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none"}
    os.environ |= job.get("environment", {})
    server.refusal = lambda *_: ""  # canned servers load nothing
    run_and_leave(job["args"])


def begun(job):
    """The ranks' processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(job["ranks"]):
        if (child := os.fork()) == 0:
            try:
                rank_of(job, rank, port)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(99)
        children.append(child)
    return children


def main():
    for line in sys.stdin:
        children = begun(json.loads(line))
        print(json.dumps(children), flush=True)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        print(json.dumps([os.waitstatus_to_exitcode(status) for status in statuses]), flush=True)


if __name__ == "__main__":
    main()
