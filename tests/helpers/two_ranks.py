"""Train a few steps and save the weights: `two_ranks.py MODEL WORLD OUT METHOD FOLDER`.

WORLD is a number of processes, and `s` behind it puts weights in shards.

A program of its own, because Lightning starts the second process by running it again.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from runs import Toys, data, module, trainer
from scsdpo.advantage import (
    BatchStd,
    GroupRelative,
    RateWithin,
    Route,
    Routed,
    TurnRelative,
)
from scsdpo.policy import NF4, CausalLM, Lora
from scsdpo.selection import InformativePool
from scsdpo.state import DecayedBeta, all_remembered
from scsdpo.teacher import NoTeacher
from scsdpo.training import Ahead, Limits
from scsdpo.types import Sampling
from scsdpo.weighting import RatePower, TeacherEntropy, Uniform
from worlds import Echo

EPISODE = Sampling(n=2, max_new_tokens=120, stop=tuple("aeiou0123456789"))
METHODS = {
    "sc-sdpo": {"token_weighting": TeacherEntropy()},
    "grpo": {
        "advantage": GroupRelative(scale=BatchStd()),
        "teacher": NoTeacher(),
        "weighting": Uniform(),
    },
    "ahead": {"token_weighting": TeacherEntropy(), "ahead": Ahead(batches=2)},
    # Episodes of several turns, whose turns are compared over the batch.
    "episodes": {
        "advantage": TurnRelative(scale=BatchStd()),
        "teacher": NoTeacher(),
        "weighting": Uniform(),
        "sampling": EPISODE,
        "val_sampling": EPISODE,
    },
    "metrics": {"token_weighting": TeacherEntropy()},
    # A pool over all ranks, and pass rates that every rank remembers.
    "memory": {
        "advantage": Routed(
            routes=(
                Route(
                    advantage=GroupRelative(),
                    where=RateWithin(low=0.4, high=0.6, rates=DecayedBeta(decay=0.5)),
                    weighting=RatePower(failed=1, rates=DecayedBeta(decay=0.5)),
                ),
            )
        ),
        "teacher": NoTeacher(),
        "weighting": Uniform(),
        "selection": InformativePool(questions=3, max_batches=3),
    },
}


POLICIES = {"qlora": {"adapter": Lora(r=2), "quantization": NF4()}}
"""Others than a full fine-tune."""
METHODS["qlora"] = {}

QUESTIONS = {
    "episodes": {"train": Toys(16, Echo(words=1)), "val": Toys(6, Echo(words=1))},
    "metrics": {
        "train": Toys(18),
        "val": Toys(7),
        "questions_per_batch": 6,
        "val_questions_per_batch": 6,
    },
}
"""A number that 1, 2 and 3 ranks divide, and one for validation that 2 and 3 do not."""


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def main() -> None:
    folder, world, out, method, root = sys.argv[1:]
    model = module(
        Path(folder),
        CausalLM(folder, self_check=False, **POLICIES.get(method, {})),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        limits=Limits(max_tokens=60),
        # Two rollouts a question: ranks often have different numbers of rows to run, or none.
        **{"sampling": Sampling(n=2, max_new_tokens=6)} | METHODS[method],
    )
    number = int(world.rstrip("s"))
    strategy = "auto" if number == 1 else "ddp"
    if world.endswith("s"):
        strategy = ModelParallelStrategy(number, 1)
    run = trainer(
        root, devices=number, strategy=strategy, max_epochs=3 if method == "memory" else 2
    )
    questions = QUESTIONS.get(method, {"train": Toys(16), "val": Toys(6)})
    run.fit(model, data(**questions))
    state = {name: whole(value) for name, value in model.state_dict().items()}
    if run.is_global_zero:
        logged = {k: float(v) for k, v in run.callback_metrics.items()}
        kept = {f"{name}.remembered": value for name, value in all_remembered(model).items()}
        torch.save((state | kept, run.global_step, logged), out)


if __name__ == "__main__":
    main()
