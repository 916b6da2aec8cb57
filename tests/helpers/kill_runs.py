"""Train, and be killed again and again: `kill_runs.py MODEL SEED FOLDER KILLS [FOLDER KILLS]`.

One process that forks each run, since imports take longer than a run does.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

from lightning import Callback

from runs import Toys, data, module, trainer
from scsdpo.teacher import EMA, PlainPrompt
from scsdpo.types import Sampling
from scsdpo.verifiers import Verification
from scsdpo.weighting import Uniform
from streams import Lines

STEPS = 26
"""Of 4 questions: nearly 4 passes over 15 questions at once and 12 in a stream."""


class Log(Callback):
    """Writes what is asked before it is asked, and saves after each step."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with open(self.folder / "asked", "a") as file:
            file.write(json.dumps([trainer.global_step, [p.key for p in batch]]) + "\n")

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / "last.ckpt")


def run(model, folder):
    warnings.simplefilter("ignore")
    optimizer = module(
        model,
        teacher=EMA(context=PlainPrompt()),
        weighting=Uniform(),
        sampling=Sampling(n=2, max_new_tokens=3),
        verification=Verification(workers=1),
    )
    questions = data([Toys(15), Lines(str(folder / "lines"), size=12, window=5)])
    saved = folder / "last.ckpt"
    trainer(
        folder, max_steps=STEPS, max_epochs=-1, limit_val_batches=0, callbacks=[Log(folder)]
    ).fit(optimizer, questions, ckpt_path=saved if saved.exists() else None, weights_only=False)


def asked(folder):
    log = folder / "asked"
    return log.read_text().count("\n") if log.exists() else 0


def until_done(model, folder, kills, rng):
    while True:
        before = asked(folder)
        child = os.fork()
        if child == 0:
            run(model, folder)
            os._exit(0)
        if kills:
            more = rng.choice([1, 2, 2, 3])
            while asked(folder) < before + more:
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "a run ended by itself"
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            kills -= 1
        _, status = os.waitpid(child, 0)
        if status == 0:
            return
        assert os.WIFSIGNALED(status), status


def main() -> None:
    model, rng = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    for folder, kills in zip(sys.argv[3::2], sys.argv[4::2], strict=True):
        until_done(model, Path(folder), int(kills), rng)


if __name__ == "__main__":
    main()
