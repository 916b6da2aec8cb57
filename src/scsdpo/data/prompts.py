"""Sources that hold their prompts in memory."""

from abc import abstractmethod
from collections.abc import Iterable
from functools import cached_property

from scsdpo.data._base import CHECK_AHEAD, Source
from scsdpo.data.golds import refuse_unmet
from scsdpo.data.table import Table
from scsdpo.types import Message, Prompt, stable_hash
from scsdpo.verifiers import Verifier


class PromptList(Source):
    """A finite source: `load` gives all its prompts, at the first access."""

    @abstractmethod
    def load(self) -> Iterable[Prompt]:
        """The prompts, in the same order each time."""

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """What `load` gave."""
        return tuple(self.load())

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


def make_prompt(
    source: str, *, question: str, answer: str, verifier: Verifier, system: str = ""
) -> Prompt:
    """A question as a prompt of `source`, which is its category too.

    Its key hashes what the question says: it is the same in whatever order, file or process the
    question turns up, and equal for a question that the source holds twice.
    """
    system_turn: tuple[Message, ...] = ({"role": "system", "content": system},) if system else ()
    return Prompt(
        key=f"{source}/{stable_hash(source, system, question, answer):016x}",
        messages=(*system_turn, {"role": "user", "content": question}),
        verifier=verifier,
        answer=answer,
        category=source,
    )


def table_prompts(
    table: Table,
    name: str,
    verifier: Verifier,
    *,
    prompt: str = "prompt",
    answer: str = "answer",
    system: str = "",
    instruction: str = "",
) -> list[Prompt]:
    """A prompt of source `name` for each row; `prompt`, `answer` and `system` name the columns.

    `instruction` follows each question.

    Raises:
        ValueError: if a row has no question or no answer, or the verifier cannot read the answer;
            with the number of the row; or if no response could meet an answer.
    """
    questions, answers = table.texts(prompt), table.texts(answer)
    systems = table.texts(system, optional=True) if system else [""] * len(questions)
    prompts = [
        make_prompt(
            name, question=question + instruction, answer=gold, verifier=verifier, system=turn
        )
        for question, gold, turn in zip(questions, answers, systems, strict=True)
    ]
    if len(prompts) > 1 or table.number(0) <= CHECK_AHEAD:  # of a stream's rows, the first ones
        refuse_unmet(name, prompts, table.where)
    return prompts
