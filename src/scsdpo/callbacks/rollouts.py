"""The place for figures and records of one's own."""

import lightning as L

from scsdpo.advantage import Batch
from scsdpo.types import Judged


class RolloutCallback(L.Callback):
    """Looks at every judged batch; for metrics, records and alarms of one's own.

    Inside its hooks a figure is logged as anywhere in Lightning, and is in `metrics.jsonl` too:

        class Diversity(RolloutCallback):
            def on_rollouts(self, trainer, module, judged):
                if judged.split == "train":
                    distinct = [len(set(group)) / len(group) for group in judged.texts]
                    module.log("train/distinct", sum(distinct) / len(distinct), sync_dist=True)
    """

    def on_rollouts(self, trainer: L.Trainer, module: L.LightningModule, judged: Judged) -> None:
        """Called on each rank with its share: in training before the optimizer steps on the batch,
        in validation and test after each batch was judged. Change nothing in it.

        With a pool (`InformativePool`) it is called with what is learned from, when it is.
        """

    def on_batch(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch) -> None:
        """Called in training after `on_rollouts`, with what the loss will read: weights, plan and
        contexts beside the judged responses. Change nothing in it.
        """


def show_rollouts(module: L.LightningModule, judged: Judged) -> None:
    """Hand judged responses to every `RolloutCallback` of the module's trainer."""
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RolloutCallback):
            callback.on_rollouts(module.trainer, module, judged)


def show_batch(module: L.LightningModule, batch: Batch) -> None:
    """Hand what is learned from to every `RolloutCallback`: all `on_rollouts`, then `on_batch`."""
    show_rollouts(module, batch.judged)
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RolloutCallback):
            callback.on_batch(module.trainer, module, batch)
