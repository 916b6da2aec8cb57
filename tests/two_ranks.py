"""Train a few steps and save the weights: `two_ranks.py FOLDER WORLD OUT METHOD`.

A program of its own, because Lightning starts the second process by running it again.
"""

import sys
from pathlib import Path

import torch

from runs import Toys, data, module, trainer
from scsdpo.advantage import BatchStd, GroupRelative, RateWithin, Route, Routed
from scsdpo.selection import InformativePool
from scsdpo.state import DecayedBeta, all_remembered
from scsdpo.teacher import NoTeacher
from scsdpo.training import Limits
from scsdpo.types import Sampling
from scsdpo.weighting import TeacherEntropy, Uniform

METHODS = {
    "sc-sdpo": {"token_weighting": TeacherEntropy()},
    "grpo": {
        "advantage": GroupRelative(scale=BatchStd()),
        "teacher": NoTeacher(),
        "weighting": Uniform(),
    },
    # A pool over all ranks, and pass rates that every rank remembers.
    "memory": {
        "advantage": Routed(
            routes=(
                Route(
                    advantage=GroupRelative(),
                    where=RateWithin(low=0.4, high=0.6, rates=DecayedBeta(decay=0.5)),
                ),
            )
        ),
        "teacher": NoTeacher(),
        "weighting": Uniform(),
        "selection": InformativePool(questions=3, max_batches=3),
    },
}


def main() -> None:
    folder, world, out, method = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    model = module(
        folder,
        # Two rollouts a question: ranks often have different numbers of rows to run, or none.
        sampling=Sampling(n=2, max_new_tokens=6),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        limits=Limits(max_tokens=60),
        **METHODS[method],
    )
    run = trainer(folder, devices=world, strategy="ddp" if world > 1 else "auto", max_epochs=2)
    run.fit(model, data(Toys(16), Toys(6)))
    if run.is_global_zero:
        logged = {k: float(v) for k, v in run.callback_metrics.items()}
        kept = {f"{name}.remembered": value for name, value in all_remembered(model).items()}
        torch.save((model.state_dict() | kept, run.global_step, logged), out)


if __name__ == "__main__":
    main()
