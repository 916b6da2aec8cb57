"""The parts that the analyses share: a LightningModule and a source of given questions."""

from collections.abc import Iterable

import lightning as L

from scsdpo.data import Source
from scsdpo.data.prompts import PromptList
from scsdpo.policy import CausalLM
from scsdpo.training import PolicyOptimizer
from scsdpo.types import Prompt


class AnalysisModule(L.LightningModule):
    """Analyses a `PolicyOptimizer` in a Trainer's prediction; subclasses define `predict_step`.

    Args:
        model: is configured here, as in training, and is not trained.
    """

    def __init__(self, model: PolicyOptimizer) -> None:
        super().__init__()
        self.model = model

    @property
    def policy(self) -> CausalLM:
        """The policy whose chat template renders the data module's prompts."""
        return self.model.policy

    def configure_model(self) -> None:
        self.model.configure_model()

    def teardown(self, stage: str) -> None:
        """Close the rollout's engine and the processes that judge."""
        self.model.collector.close()


class _GivenPrompts(PromptList):  # private: no configuration can choose it
    name = "told"

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self._prompts = tuple(prompts)

    def load(self) -> Iterable[Prompt]:
        return self._prompts


def given_prompts(prompts: Iterable[Prompt]) -> Source:
    """A source of prompts that a command has made, e.g. with a demonstration in each."""
    return _GivenPrompts(prompts)
