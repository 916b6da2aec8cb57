"""Sharded weights, gathered once for a whole evaluation."""

from contextlib import ExitStack

import lightning as L

from scsdpo.policy import CausalLM
from scsdpo.rollout import Rollout


class HeldWeights(L.Callback):
    """Keeps a whole copy of the policy from an evaluation's start to its end, if it is sharded.

    Nothing moves the weights meanwhile, and ranks may then sample different numbers of batches.
    """

    def __init__(self) -> None:
        self._held = ExitStack()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        policy, rollout = pl_module.policy, pl_module.rollout
        assert isinstance(policy, CausalLM) and isinstance(rollout, Rollout)
        with trainer.strategy.precision_plugin.forward_context():  # the dtype of sampling
            self._held.enter_context(rollout.hold_weights(policy, barrier=False))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._held.close()

    on_test_start = on_predict_start = on_validation_start
    # Behind a prediction's last batch ranks wait for each other, and some may still sample.
    on_test_end = on_predict_epoch_end = on_validation_end

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """What is held learns that this rank comes to no end."""
        held = self._held.pop_all()
        held.__exit__(type(exception), exception, exception.__traceback__)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._held.close()
