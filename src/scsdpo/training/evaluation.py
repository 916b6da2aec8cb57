"""Validation, test and prediction: the policy is asked and judged, and learns nothing."""

from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any, Literal

import lightning as L

from scsdpo import interrupt
from scsdpo.callbacks import show_rollouts
from scsdpo.distributed import AbortVote, all_gather
from scsdpo.evaluation import Question, Result, means, predictions, questions
from scsdpo.metrics import log_figures
from scsdpo.policy import CausalLM
from scsdpo.records import Recorded
from scsdpo.training.answering import Answering
from scsdpo.types import Prompt, Sampling


class Evaluation:
    """Every question of an epoch with its scores; mean@k and maj@k are logged.

    Args:
        answering: samples and judges.
    """

    def __init__(self, answering: Answering) -> None:
        self.answering = answering
        self.result = Result(about={}, questions=())
        """Of the last evaluation that was gone through: all ranks' questions, in order."""
        self._own: list[Question] = []

    def begin(self) -> None:
        """An evaluation can be given up as a whole; the ranks meet at its end."""
        interrupt.begin_run(AbortVote.of_ranks())
        interrupt.open_window()
        self._own.clear()

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
            self.answering.rollout.sample_nothing()
            return
        responses = self.answering.sample(module, policy, prompts, sampling)
        judged = self.answering.judge(responses, split)
        self._own += questions(judged)
        show_rollouts(module, judged)

    def end(self, module: Recorded, split: Literal["val", "test"]) -> None:
        """Log the figures of all ranks."""
        interrupt.meet()
        interrupt.close_window()
        # Rank r of R has asked questions r, r + R, ...
        rounds = zip_longest(*all_gather([self._own]))
        found = tuple(each for each in chain.from_iterable(rounds) if each is not None)
        about = {"split": split, "batch": int(module.batches), **module.described()}
        self.result = Result(about=about, questions=found)
        k = about["sampling"]["n"]
        log_figures(module, split, means(found), shown=f"mean@{k}")
        self.answering.timer.take()  # what evaluation took belongs to no training step

    def predict(
        self,
        module: L.LightningModule,
        policy: CausalLM,
        prompts: Sequence[Prompt],
        sampling: Sampling,
    ) -> list[dict[str, Any]]:
        """Responses and verdicts, one record per rollout."""
        interrupt.begin_run(AbortVote.of_ranks())
        interrupt.open_window(agreed=False)  # ranks may have different numbers of batches
        responses = self.answering.sample(module, policy, prompts, sampling)
        judged = self.answering.judge(responses, "test")
        self.answering.timer.take()
        return list(predictions(judged))
