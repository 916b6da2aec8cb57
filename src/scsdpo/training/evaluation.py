"""Validation, test and prediction: the policy is asked and judged, and learns nothing."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import lightning as L
import torch

from scsdpo import interrupt
from scsdpo.callbacks import show_rollouts
from scsdpo.distributed import Agreement
from scsdpo.metrics import ByCategory, log_figures
from scsdpo.policy import CausalLM
from scsdpo.training.answering import Answering
from scsdpo.types import JudgedBatch, Prompt, Sampling


class Evaluation:
    """mean@k and maj@k over the questions of an epoch, overall and by category.

    Args:
        answering: samples and judges.
    """

    def __init__(self, answering: Answering) -> None:
        self.answering = answering
        self.figures = ByCategory()

    def begin(self) -> None:
        """An evaluation can be given up as a whole; the ranks meet at its end."""
        interrupt.begin_run(Agreement.of_ranks())
        interrupt.open_window()

    def step(
        self,
        module: L.LightningModule,
        policy: CausalLM,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        split: Literal["val", "test"],
    ) -> None:
        """Ask a batch of questions, judge, and show it to callbacks."""
        if not prompts:  # the last batch of fewer questions than ranks
            return
        rollouts = self.answering.sample(module, policy, prompts, sampling)
        outcomes = self.answering.judge(rollouts)
        self.figures.update(rollouts, outcomes)
        weights = torch.ones_like(outcomes.rewards).double()
        batch = JudgedBatch(split=split, rollouts=rollouts, outcomes=outcomes, weights=weights)
        show_rollouts(module, batch)

    def end(self, module: L.LightningModule, k: int, split: Literal["val", "test"]) -> None:
        """Log the figures of all ranks, and begin anew."""
        interrupt.meet()
        interrupt.close_window()
        log_figures(module, split, self.figures.compute(k, module.device), shown=f"mean@{k}")
        self.figures.reset()
        self.answering.timer.take()  # what evaluation took belongs to no training step

    def predict(
        self,
        module: L.LightningModule,
        policy: CausalLM,
        prompts: Sequence[Prompt],
        sampling: Sampling,
    ) -> list[dict[str, Any]]:
        """Responses and verdicts, one record per rollout."""
        interrupt.begin_run(Agreement.of_ranks())
        interrupt.open_window(agreed=False)  # ranks may have different numbers of batches
        rollouts = self.answering.sample(module, policy, prompts, sampling)
        outcomes = self.answering.judge(rollouts)
        return [
            {"key": prompt.key, "response": text, **asdict(verdict)}
            for prompt, texts, verdicts in zip(
                prompts, rollouts.texts, outcomes.verdicts, strict=True
            )
            for text, verdict in zip(texts, verdicts, strict=True)
        ]
