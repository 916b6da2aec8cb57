"""The contract of a verifier."""

from abc import ABC, abstractmethod

from scsdpo.prompt import Prompt, Verdict


class Verifier(ABC):
    """Judges a response: (prompt, response text) -> `Verdict`.

    A verifier is a frozen dataclass in a module that can be imported: prompts carry it to the
    processes that judge. It has no state, so that its verdicts do not depend on what was judged
    before.
    """

    def prepare(self) -> None:  # noqa: B027
        """Whatever takes long the first time, such as imports; off the clock of any verdict.

        Called in each process that judges, at least once before `verify`. What it raises ends the
        run: a verifier that cannot work at all is a mistake in the configuration.
        """

    def check(self, prompt: Prompt) -> None:  # noqa: B027
        """Whether `verify` can read the gold answer of `prompt`; without this, any.

        Called in the training process, for the first 20,000 prompts of a source before training.

        Raises:
            ValueError: if it cannot, so that no response to the prompt would ever be right.
        """

    @abstractmethod
    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """The verdict on one response. It may be slow, hang, raise or exit: `VerifierPool` contains
        all of that.
        """
