"""A `PolicyOptimizer` that is looked at, and not trained."""

import lightning as L

from scsdpo.policy import CausalLM
from scsdpo.training import PolicyOptimizer


class Looking(L.LightningModule):
    """What a Trainer's prediction runs over; subclasses say what is done with a batch.

    Args:
        model: configured here, as in training.
    """

    def __init__(self, model: PolicyOptimizer) -> None:
        super().__init__()
        self.model = model

    @property
    def policy(self) -> CausalLM:
        """What the data module renders prompts for."""
        return self.model.policy

    def configure_model(self) -> None:
        self.model.configure_model()

    def teardown(self, stage: str) -> None:
        """Let the rollout's engine go, and the processes that judge."""
        self.model.collector.close()
