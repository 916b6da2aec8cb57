"""The contract of a data source."""

from abc import ABC, abstractmethod

from torch.utils.data import Dataset

from scsdpo.types import Prompt


class Source(Dataset[Prompt], ABC):
    """A map-style set of prompts: index -> `Prompt`.

    Construction is cheap and checks its arguments; files are opened by the first access, so that
    a mistake in another section of the configuration is reported first. An endless source has a
    nominal length, so that a loader's position in it can be saved and restored.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of prompts, nominal for an endless source."""

    @abstractmethod
    def __getitem__(self, index: int) -> Prompt:
        """The prompt at `index`, the same each time and in every process."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name under which validation metrics of this source are logged."""
