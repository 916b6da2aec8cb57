"""Validation, test and prediction: the policy is asked and judged, and learns nothing."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal

import lightning as L

from scsdpo import interrupt
from scsdpo.callbacks import show_rollouts
from scsdpo.distributed import AbortVote, all_gather
from scsdpo.evaluation import Question, Result, means, predictions, questions
from scsdpo.metrics import log_figures
from scsdpo.policy import CausalLM
from scsdpo.records import Outage, begin_path, recorded, run_folder
from scsdpo.rollout import Rollout
from scsdpo.training.collector import Collector
from scsdpo.types import Prompt, Sampling

FOLDER = "evaluations"
_NAME = re.compile(r"val-(\d+)\.json")


class Evaluation:
    """Every question of an epoch with its scores; mean@k and maj@k are logged.

    Args:
        collector: samples and judges.
    """

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
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
            self.collector.rollout.sample_nothing()
            return
        responses = self.collector.sample(module, policy, prompts, sampling)
        judged = self.collector.judge(responses, split)
        self._own += questions(judged)
        show_rollouts(module, judged)

    def end(self, module: L.LightningModule, split: Literal["val", "test"]) -> None:
        """Log the figures of all ranks."""
        interrupt.meet()
        interrupt.close_window()
        # Rank r of R has asked questions r, r + R, ...
        rounds = zip_longest(*all_gather([self._own]))
        found = tuple(each for each in chain.from_iterable(rounds) if each is not None)
        known = recorded(module)
        about = {"split": split, "batch": int(known.batches), **known.described()}
        self.result = Result(about=about, questions=found)
        k = about["sampling"]["n"]
        log_figures(module, split, means(found), shown=f"mean@{k}")
        self.collector.timer.take()  # what evaluation took belongs to no training step

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
        responses = self.collector.sample(module, policy, prompts, sampling)
        judged = self.collector.judge(responses, "test")
        self.collector.timer.take()
        return list(predictions(judged))


class EvaluationFiles(L.Callback):
    """`evaluations/val-BATCH.json` in the run's folder, after each whole validation of a fit.

    A run that goes on from a checkpoint deletes those of later batches, and in another folder than
    the checkpoint's it begins with copies of those before; one that starts anew in an old folder
    sets the old ones aside. What cannot be written (a full disk) is said once.

    Args:
        evaluation: of the module.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._outage = Outage(FOLDER, OSError)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer) / FOLDER  # may ask rank 0: everyone must ask
        if trainer.is_global_zero:
            batches = int(recorded(pl_module).batches)
            self._outage.attempt(partial(_begin, folder, batches, trainer.ckpt_path))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        whole = not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf")
        if trainer.state.fn != "fit" or not whole:
            return
        folder = run_folder(trainer) / FOLDER
        if trainer.is_global_zero:
            result = self._evaluation.result
            path = folder / f"val-{result.about['batch']}.json"
            self._outage.attempt(partial(result.write, path))


def _begin(folder: Path, batch: int, checkpoint: str | Path | None) -> None:
    begin_path(folder, batch, checkpoint)
    for path in folder.glob("val-*.json"):
        found = _NAME.fullmatch(path.name)
        if found and int(found[1]) > batch:
            path.unlink()


class GatheredWeights(L.Callback):
    """Keeps a whole copy of the policy from an evaluation's start to its end, if it is sharded.

    Nothing moves the weights meanwhile, and ranks may then sample different numbers of batches.
    """

    def __init__(self) -> None:
        self._gathered = ExitStack()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        policy, rollout = pl_module.policy, pl_module.rollout
        assert isinstance(policy, CausalLM) and isinstance(rollout, Rollout)
        with trainer.strategy.precision_plugin.forward_context():  # the dtype of sampling
            self._gathered.enter_context(rollout.hold_weights(policy, barrier=False))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._gathered.close()

    on_test_start = on_predict_start = on_validation_start
    # Behind a prediction's last batch ranks wait for each other, and some may still sample.
    on_test_end = on_predict_epoch_end = on_validation_end

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Pass the exception on to the open context, so that it frees its copy without waiting for
        the other ranks.
        """
        held = self._gathered.pop_all()
        held.__exit__(type(exception), exception, exception.__traceback__)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._gathered.close()
