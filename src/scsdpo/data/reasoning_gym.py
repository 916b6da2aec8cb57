"""The procedural tasks of the package reasoning-gym as a source."""

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from scsdpo.data.prompts import PromptList, make_prompt
from scsdpo.types import Prompt, stable_hash
from scsdpo.verifiers.reasoning_gym import DENIED, ReasoningGymAnswer, generated

SYSTEM = """Given a problem, your task is to answer the question by thinking step-by-step in a \
clear and specific manner.
Once you have thought about the reasoning process, provide the answer in the following format:
<answer>answer here</answer>
Do not explain your reasoning inside the answer tags, provide only the final answer. When an \
example is provided, you should strictly follow the format of the output/answer in that example.
"""
"""The package's own default system prompt."""


class ReasoningGym(PromptList):
    """Questions of reasoning-gym: algebra, arithmetic, algorithms, games, geometry, graphs, logic.

    Questions of the tasks alternate. Each task is a category with its own validation figures.
    A separate process generates the questions when the source is read, 10 a second (puzzles such as
    `zebra_puzzles`) to 1,000. With the same version of reasoning-gym, the same arguments give the
    same questions in every process.

    Args:
        tasks: settings of each task by its name, `{gcd: {}, chain_sum: {min_terms: 4}}`; the
            package's gallery lists the settings of a task, such as its difficulty.
        split: "train" or "val": their questions are drawn with different seeds. A question that
            both hold, which happens in small tasks, is counted and logged at start.
        size: number of questions, of all tasks together.
        seed: another seed gives other questions.
        system_prompt: the system turn of every question.
        name: of the source, in metrics.
        strip_thinking: as in `ReasoningGymAnswer`.

    Raises:
        ValueError: if an argument is outside its range, a task is not known or refuses its
            settings, or its rewards cannot be trained on (`DENIED`).

    Source:
        Stojanovski et al. 2025, arXiv:2505.24760; reasoning-gym 0.1.25.
    """

    def __init__(
        self,
        tasks: dict[str, dict[str, Any]],
        split: Literal["train", "val"],
        *,
        size: int = 1_000,
        seed: int = 0,
        system_prompt: str = SYSTEM,
        name: str = "reasoning-gym",
        strip_thinking: bool = True,
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"`ReasoningGym(split=...)` must be 'train' or 'val', got {split!r}")
        if size < 1:
            raise ValueError(f"`ReasoningGym(size=...)` must be >= 1, got {size}")
        if not tasks:
            raise ValueError("`ReasoningGym(tasks=...)` must name a task, such as {gcd: {}}")
        for task, settings in tasks.items():
            if task in DENIED:
                raise ValueError(
                    f"`ReasoningGym(tasks=...)`: {task!r} cannot be trained on: {DENIED[task]}; "
                    "leave it out"
                )
            own = sorted({"size", "seed"} & set(settings))
            if own:
                raise ValueError(
                    f"`ReasoningGym(tasks=...)`, {task!r}: {own[0]!r} is an argument of "
                    "`ReasoningGym` itself; set it there"
                )
        self.tasks, self.split, self.size, self.seed = dict(tasks), split, size, seed
        self.system_prompt, self._name, self.strip_thinking = system_prompt, name, strip_thinking

    @property
    def name(self) -> str:
        """The name it was given."""
        return self._name

    def __len__(self) -> int:
        return self.size

    def load(self) -> Iterable[Prompt]:
        """The questions, tasks in turn."""
        base = stable_hash(self.split, self.seed)
        for task, question, answer, entry in generated(self.tasks, size=self.size, base=base):
            verifier = ReasoningGymAnswer(
                task=task,
                settings=json.dumps(self.tasks[task]),
                entry=entry,
                strip_thinking=self.strip_thinking,
            )
            prompt = make_prompt(
                self.name,
                question=question,
                answer=answer,
                verifier=verifier,
                system=self.system_prompt,
            )
            yield replace(prompt, category=task)
