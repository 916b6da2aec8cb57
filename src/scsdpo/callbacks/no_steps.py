"""Why a run took no optimizer step."""

from collections.abc import Mapping
from typing import Any

import lightning as L


def why_none(trainer: L.Trainer, module: Any) -> str:
    """In words, from what the run counted and from its last batch.

    Args:
        trainer: has the last batch's figures.
        module: the `PolicyOptimizer`.
    """
    asked, steps = int(module.batches), module.steps
    if asked == 0:
        return (
            "no batch was asked for; look at trainer.max_steps, max_epochs and limit_train_batches"
        )
    if int(steps.bad):
        return f"none of {asked} batches had a finite loss and gradient; look at the warnings"
    if not int(steps.skipped):
        return f"model.selection had not collected a batch when {asked} batches had been asked"
    return (
        f"{asked} batches, and nothing to learn from in them; {_reason(trainer.callback_metrics)}"
    )


def _reason(figures: Mapping[str, Any]) -> str:
    none, every = (float(figures[f"train/solve_{what}"]) for what in ("none", "all"))
    if none == 1:
        return (
            "no response of the last one was right: the questions are too hard, or the verifier "
            "does not accept the policy's format (`scsdpo predict` shows its responses)"
        )
    if every == 1:
        return "every response of the last one was right: these questions are mastered"
    if none + every == 1:
        return (
            "in the last one each question's responses were all right or all wrong, so that "
            "none had a sibling to learn from"
        )
    return (
        "model.weighting gives all questions of the last one weight 0, or its responses have no "
        "teacher, route or difference in reward, or model.token_weighting gives all their tokens "
        "weight 0"
    )
