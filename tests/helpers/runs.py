"""A whole training run in a second: a random model, a source of toy questions, a coin verifier."""

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import torch

from coins import Always, Coin
from scsdpo.advantage import SelfDistillation, TopK
from scsdpo.data import Source, TaskDataModule
from scsdpo.policy import CausalLM
from scsdpo.prompt import Environment
from scsdpo.teacher import EMA, NoTeacher
from scsdpo.training import PolicyOptimizer
from scsdpo.types import Prompt, Sampling
from scsdpo.weighting import PassRate, Uniform

__all__ = ["Always", "Coin", "Toys", "data", "module", "strategies", "trainer", "weights"]


def strategies(chat):
    """What a data module asks of the module that it feeds."""
    policy = SimpleNamespace(chat=chat)
    return SimpleNamespace(policy=policy, teacher=NoTeacher(), weightings=Uniform())


class Toys(Source):
    def __init__(self, size: int = 12, verifier: Environment = Coin()):
        self.size, self.verifier = size, verifier

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return Prompt(
            key=f"toy/{index}",
            messages=({"role": "user", "content": f"{index}?"},),
            verifier=self.verifier,
            answer="",
            category="even" if index % 2 == 0 else "odd",
        )

    @property
    def name(self):
        return "toys"


def module(folder, policy=None, **settings):
    """SC-SDPO unless `settings` say otherwise."""
    defaults = {
        "advantage": SelfDistillation(support=TopK(k=20)),
        "teacher": EMA(),
        "weighting": PassRate(),
        "sampling": Sampling(n=4, max_new_tokens=8),
        "val_sampling": Sampling(n=2, max_new_tokens=8, temperature=0.6, top_p=0.95),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    }
    return PolicyOptimizer(
        policy or CausalLM(str(folder), self_check=False), **(defaults | settings)
    )


def data(train=None, val=None, **settings):
    return TaskDataModule(
        train or Toys(),
        val or Toys(4),
        **({"questions_per_batch": 4, "val_questions_per_batch": 4} | settings),
    )


def trainer(folder: Path, **settings):
    defaults = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**(defaults | settings))


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


ARGUMENTS = [
    "--model.advantage.class_path=SelfDistillation",
    "--model.teacher.class_path=EMA",
    "--model.teacher.context=PlainPrompt",
    "--model.sampling={n: 2, max_new_tokens: 2}",
    "--model.val_sampling={n: 2, max_new_tokens: 2}",
    "--data.train=runs.Toys",
    "--data.val=runs.Toys",
    "--data.val.size=2",
    "--data.questions_per_batch=2",
    "--trainer.max_steps=3",
    "--trainer.val_check_interval=2",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
"""Of a command line that configures a run of `Toys`; every rollout gets credit."""


def assert_same(ours, theirs, where):
    """Equal to the bit: tensors and what is around them."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for name, value in ours.items():
            assert_same(value, theirs[name], f"{where}.{name}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(mine, other, f"{where}.{number}")
    elif isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=where)
    else:
        assert ours == theirs, where
