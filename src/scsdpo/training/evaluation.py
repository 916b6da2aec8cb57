"""Validation, test and prediction: the policy's responses are judged, and nothing is learned."""

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
from scsdpo.evaluation import EvaluatedQuestion, Result, means, predictions, questions
from scsdpo.metrics import log_figures
from scsdpo.policy import CausalLM
from scsdpo.records import Outage, begin_path, recorded, run_folder
from scsdpo.rollout import Rollout
from scsdpo.training.collector import Collector
from scsdpo.types import Prompt, Sampling

FOLDER = "evaluations"
_NAME = re.compile(r"val-(\d+)\.json")


class Evaluation:
    """Collects the scores of an epoch's questions, and logs mean@k and maj@k.

    Args:
        collector: samples and judges.
    """

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        self.result = Result(about={}, questions=())
        """The last whole evaluation: all ranks' questions, in order."""
        self._own: list[EvaluatedQuestion] = []

    def begin(self) -> None:
        """Begin. A signal makes all ranks drop the whole evaluation; they agree at its end."""
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
        """Sample and judge a batch of questions, and pass it to callbacks."""
        if not prompts:  # the last batch has fewer questions than there are ranks
            self.collector.rollout.sample_nothing()
            return
        responses = self.collector.sample(module, policy, prompts, sampling)
        judged = self.collector.judge(responses, split)
        self._own += questions(judged)
        show_rollouts(module, judged)

    def end(self, module: L.LightningModule, split: Literal["val", "test"]) -> None:
        """Log the figures over all ranks' questions."""
        interrupt.meet()
        interrupt.close_window()
        # Rank r of R has questions r, r + R, ...
        rounds = zip_longest(*all_gather([self._own]))
        found = tuple(each for each in chain.from_iterable(rounds) if each is not None)
        known = recorded(module)
        about = {"split": split, "batch": int(known.batches), **known.described()}
        self.result = Result(about=about, questions=found)
        k = about["sampling"]["n"]
        log_figures(module, split, means(found), shown=f"mean@{k}")
        self.collector.timer.take()  # the time of an evaluation belongs to no training step

    def predict(
        self,
        module: L.LightningModule,
        policy: CausalLM,
        prompts: Sequence[Prompt],
        sampling: Sampling,
    ) -> list[dict[str, Any]]:
        """Sample and judge; returns one record per rollout."""
        interrupt.begin_run(AbortVote.of_ranks())
        interrupt.open_window(agreed=False)  # ranks may have different numbers of batches
        responses = self.collector.sample(module, policy, prompts, sampling)
        judged = self.collector.judge(responses, "test")
        self.collector.timer.take()
        return list(predictions(judged))


class EvaluationFiles(L.Callback):
    """Writes `evaluations/val-BATCH.json` in the run's folder after each whole validation of a fit.

    A run that goes on from a checkpoint deletes the files of later batches. In another folder than
    the checkpoint's it first copies the files of earlier batches. A run that starts anew in an old
    folder moves the old files aside. If a file cannot be written (a full disk), that is said once.

    Args:
        evaluation: the module's evaluation.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._outage = Outage(FOLDER, OSError)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer) / FOLDER  # may be a collective: all ranks must call it
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
    """Keeps a gathered copy of a sharded policy from an evaluation's start to its end.

    Weights do not change in an evaluation. With the copy ranks may sample different numbers of
    batches.
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
    # At a prediction's end ranks wait for each other while some still sample, so leave before that.
    on_test_end = on_predict_epoch_end = on_validation_end

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Pass the exception on to the open context, so that it frees its copy without waiting for
        the other ranks.
        """
        contexts = self._gathered.pop_all()
        contexts.__exit__(type(exception), exception, exception.__traceback__)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._gathered.close()
