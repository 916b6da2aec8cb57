"""The place for figures and records of one's own."""

import lightning as L

from scsdpo.types import JudgedBatch


class RolloutCallback(L.Callback):
    """Looks at every judged batch; for metrics, records and alarms of one's own.

    Inside `on_rollouts` a figure is logged as anywhere in Lightning, and is in `metrics.jsonl` too:

        class Diversity(RolloutCallback):
            def on_rollouts(self, trainer, module, batch):
                if batch.split == "train":
                    distinct = [len(set(group)) / len(group) for group in batch.rollouts.texts]
                    module.log("train/distinct", sum(distinct) / len(distinct), sync_dist=True)
    """

    def on_rollouts(
        self, trainer: L.Trainer, module: L.LightningModule, batch: JudgedBatch
    ) -> None:
        """Called on each rank with its share: in training before the optimizer steps on the batch,
        in validation and test after each batch was judged. Change nothing in it.

        With a pool (`InformativePool`) it is called with what is learned from, when it is.
        """


def show_rollouts(module: L.LightningModule, batch: JudgedBatch) -> None:
    """Hand a judged batch to every `RolloutCallback` of the module's trainer."""
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RolloutCallback):
            callback.on_rollouts(module.trainer, module, batch)
