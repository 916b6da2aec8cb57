"""The base class for callbacks that read judged batches: for figures and records of your own."""

import lightning as L

from scsdpo.advantage import Batch
from scsdpo.types import Judged


class RolloutCallback(L.Callback):
    """Reads every judged batch; the base class for metrics, records and alarms of your own.

    Log a figure in its hooks as anywhere in Lightning. It is in `metrics.jsonl`, too:

        class Diversity(RolloutCallback):
            def on_rollouts(self, trainer, module, judged):
                if judged.split == "train":
                    distinct = [len(set(group)) / len(group) for group in judged.texts]
                    module.log("train/distinct", sum(distinct) / len(distinct), sync_dist=True)
    """

    def on_rollouts(self, trainer: L.Trainer, module: L.LightningModule, judged: Judged) -> None:
        """Called on each rank with its share of a judged batch, which must not be changed.

        In training it is called before the optimizer steps on the batch; with `InformativePool`,
        for the batches that the pool gives. In validation and test it is called after each batch.
        """

    def on_batch(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch) -> None:
        """Called in training after `on_rollouts`, with plan, weights and contexts beside the judged
        responses. The batch must not be changed.
        """


def show_rollouts(module: L.LightningModule, judged: Judged) -> None:
    """Call `on_rollouts` of every `RolloutCallback` of the module's trainer."""
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RolloutCallback):
            callback.on_rollouts(module.trainer, module, judged)


def show_batch(module: L.LightningModule, batch: Batch) -> None:
    """Call `on_rollouts` of every `RolloutCallback` of the trainer, then `on_batch`."""
    show_rollouts(module, batch.judged)
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RolloutCallback):
            callback.on_batch(module.trainer, module, batch)
