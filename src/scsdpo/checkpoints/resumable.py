"""A LightningModule that can be stopped at any batch and goes on with the next."""

from typing import Any

from scsdpo.checkpoints.safe_point import SafePoint
from scsdpo.records import Recorded
from scsdpo.state import remember_all


class Resumable(Recorded):
    """Knows its state after the last finished batch, and puts that into every checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.safe_point = SafePoint()

    def on_train_start(self) -> None:
        """Before the first batch."""
        self.safe_point.keep(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Loggers count batches; after a resume Lightning is off by one at times."""
        loop = self.trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = loop.batch_progress.total.ready - 1

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The batch is finished."""
        self.safe_point.keep(self)

    def on_validation_epoch_end(self) -> None:
        """The validation after this batch was gone through; its figures are there."""
        if not self.trainer.sanity_checking:
            self.safe_point.validated = int(self.batches)

    def on_validation_end(self) -> None:
        """Its figures are those of the last finished batch now."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.safe_point.keep(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What strategies remember beyond buffers, and where the run is, in this one place."""
        self.safe_point.into(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        remember_all(self, checkpoint["remembered"])
        self.safe_point.validated = checkpoint.get("validated", -1)
