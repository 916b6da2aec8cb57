"""Two ranks, one of which is hurt: `hurt_ranks.py MODEL FAULT FOLDER`.

A program of its own, because Lightning starts the second process by running it again.
"""

import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning import Callback

from runs import Toys, data, module, trainer
from scsdpo.checkpoints import Checkpoint
from scsdpo.errors import TrainingStopped, explanation
from scsdpo.training import Limits
from scsdpo.types import Sampling
from scsdpo.weighting import TeacherEntropy


class Scarce(Callback):
    """Rank 1 runs out of memory: in its first measuring pass, and in its second micro-batch."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank == 1:
            policy = pl_module.policy
            policy.run = partial(self.raising, policy.run, {"left": 1, "run": 0})
            policy.forward = partial(self.raising, policy.forward, {"left": 2, "run": 0})

    @staticmethod
    def raising(work, state, *args):
        state["run"] += 1
        if state["run"] == state["left"]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return work(*args)


class Die(Callback):
    """A rank ends in its third batch: with -9, or by an error of its own."""

    def __init__(self, rank, root, stop=False):
        self.rank, self.root, self.stop = rank, Path(root), stop

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx < 2:
            return
        if trainer.global_rank == self.rank:
            (self.root / "checkpoints" / "died").touch()
            if self.stop:
                raise TrainingStopped("it has had enough")
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("WAIT"):
            time.sleep(600)  # the others may wait for something that is not a collective


def main() -> None:
    folder, fault, root = sys.argv[1:]
    faults = {
        "none": [],
        "memory": [Scarce()],
        "lost-0": [Die(0, root)],
        "lost-1": [Die(1, root)],
        "stops-1": [Die(1, root, stop=True)],
    }
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", message="out of memory")
    model = module(
        Path(folder),
        sampling=Sampling(n=2, max_new_tokens=6),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        limits=Limits(max_tokens=60),
        token_weighting=TeacherEntropy(),
    )
    each = {"every_n_train_steps": 1, "save_top_k": -1, "save_last": True}
    saved = Checkpoint(dirpath=Path(root) / "checkpoints", **each)
    run = trainer(
        root,
        devices=2,
        strategy="ddp",
        max_epochs=1,
        limit_val_batches=0,
        enable_checkpointing=True,
        callbacks=[saved, *faults[fault]],
    )
    run.fit(model, data(Toys(16)))
    if run.is_global_zero:
        torch.save(model.state_dict(), Path(root) / "weights.pt")


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        print(f"scsdpo: error: {explanation(error) or error}", file=sys.stderr)
        sys.exit(3)
