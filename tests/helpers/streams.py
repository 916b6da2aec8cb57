"""Streams of questions, in a module that other processes can import."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning import LightningModule, Trainer

from coins import Coin
from scsdpo.data import Stream, make_prompt
from scsdpo.teacher import NoTeacher
from scsdpo.weighting import Uniform


class Lines(Stream):
    """A question each line of a file."""

    def __init__(self, path: str, size: int = 8, window: int = 4):
        super().__init__(size=size, window=window)
        self.path = path

    @property
    def name(self):
        return Path(self.path).stem

    def read(self):
        with open(self.path) as file:
            for line in file:
                yield make_prompt(self.name, question=line.strip(), answer="", verifier=Coin())


class Counting(Stream):
    """0, 1, 2, ... without end; every fifth question is long."""

    def __init__(self, size: int = 100, window: int = 10):
        super().__init__(size=size, window=window)

    @property
    def name(self):
        return "counting"

    def read(self):
        number = 0
        while True:
            question = f"{number} {'long ' * 20}" if number % 5 == 4 else f"{number} "
            yield make_prompt("counting", question=question, answer="", verifier=Coin())
            number += 1


def lines(path, numbers):
    path.write_text("".join(f"{n}\n" for n in numbers))
    return str(path)


def rows(path, count):
    path.write_text(
        "".join(json.dumps({"question": f"{n}?", "answer": n}) + "\n" for n in range(count))
    )
    return str(path)


class Recorder(LightningModule):
    """Notes the questions that it is asked."""

    def __init__(self, chat):
        super().__init__()
        self.policy, self.teacher = SimpleNamespace(chat=chat), NoTeacher()
        self.weightings = Uniform()
        self.layer = torch.nn.Linear(1, 1)
        self.asked = []

    def training_step(self, batch, batch_idx):
        self.asked.append([prompt.messages[-1]["content"].strip() for prompt in batch])
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        raise AssertionError("there are no such questions")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


def run(chat, data, steps, save=None, resume=None):
    """The questions of each step, up to step `steps`."""
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_steps=steps,
        limit_val_batches=0,
    )
    module = Recorder(chat)
    trainer.fit(module, data, ckpt_path=resume, weights_only=False if resume else None)
    if save:
        trainer.save_checkpoint(save)
    return module.asked
