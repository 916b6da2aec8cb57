"""The Berkeley Function Calling Leaderboard as a source."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from scsdpo.data.prompts import PromptList
from scsdpo.environments import Environment
from scsdpo.environments.bfcl import MULTI_TURN, SINGLE_TURN, BFCLEpisode, entries, tool_of
from scsdpo.environments.calling import Role
from scsdpo.types import Message, Prompt
from scsdpo.verifiers.bfcl import BFCLCalls, BFCLRelevance

HELD_OUT = 5
"""A task whose number is a multiple of this belongs to validation."""


class BFCL(PromptList):
    """Tasks of BFCL, the Berkeley Function Calling Leaderboard: functions to call, with arguments.

    Tasks of several turns (`multi_turn_*`) run over eight stateful Python APIs (`BFCLEpisode`);
    the others are judged by the calls of one response (`BFCLCalls`, `BFCLRelevance`). Each category
    has validation figures of its own.

    A task belongs to validation iff its number, the first one after the category in its id, is a
    multiple of five. Tasks of equal number in the categories of several turns are variants of one
    task, so all variants of a task are in one split.

    Two tasks of live_simple are left out: their gold answers list no value for an argument, and the
    package judges every response to them wrong.

    After training on either split, the policy's score on the leaderboard no longer measures how it
    uses functions that it has not seen.

    Args:
        categories: by the package's own names.
        split: "train" or "val"; or "all", to evaluate a policy that is not trained on it.
        system_prompt: a system turn before each task; empty: BFCL's own only.
        reveal: the feedback on wrong calls names the right ones.
        max_steps: as in `BFCLEpisode`.
        role: as in `BFCLEpisode`.
        name: of the source, in metrics.
        strip_thinking: calls inside thinking do not count.

    Raises:
        ValueError: if an argument is outside its range, or a category is not known.

    Source:
        Patil et al. 2025, "The Berkeley Function Calling Leaderboard"; bfcl-eval 2026.3.23.
    """

    def __init__(
        self,
        categories: Sequence[str],
        split: Literal["train", "val", "all"],
        *,
        system_prompt: str = "",
        reveal: bool = False,
        max_steps: int = 20,
        role: Role = "tool",
        name: str = "bfcl",
        strip_thinking: bool = True,
    ) -> None:
        if split not in ("train", "val", "all"):
            raise ValueError(f"`BFCL(split=...)` must be 'train', 'val' or 'all', got {split!r}")
        if not categories or isinstance(categories, str):
            raise ValueError(
                f"`BFCL(categories=...)` must be a list of names, such as [multi_turn_base], got "
                f"{categories!r}"
            )
        for category in categories:
            if category not in (*MULTI_TURN, *SINGLE_TURN):
                raise ValueError(
                    f"`BFCL(categories=...)`: there is no category {category!r} that can be "
                    f"trained on, only {', '.join((*MULTI_TURN, *SINGLE_TURN))}"
                )
        self.categories, self.split, self._name = tuple(categories), split, name
        self.system_prompt, self.strip_thinking, self.reveal = system_prompt, strip_thinking, reveal
        self.episode = BFCLEpisode(
            reveal=reveal, max_steps=max_steps, role=role, strip_thinking=strip_thinking
        )

    @property
    def name(self) -> str:
        """The name it was given."""
        return self._name

    def load(self) -> Iterable[Prompt]:
        """The tasks, category by category, in the package's order."""
        for category in self.categories:
            for entry in entries(category):
                if self.split in ("all", split_of(entry["id"])) and _can_be_right(entry):
                    yield self._prompt(category, entry)

    def _prompt(self, category: str, entry: dict[str, Any]) -> Prompt:
        verifier: Environment = self.episode
        answer, row, turn = "", {}, entry["question"][0]
        if category in MULTI_TURN:
            read = ("id", "turns", "added", "initial_config", "involved_classes", "ground_truth")
            row, turn = {name: entry[name] for name in read}, entry["turns"][0]
        elif category == "live_relevance":
            verifier = BFCLRelevance(strip_thinking=self.strip_thinking)
        else:
            verifier = BFCLCalls(reveal=self.reveal, strip_thinking=self.strip_thinking)
            answer = json.dumps(entry.get("ground_truth", []))  # irrelevance has none
        system: tuple[Message, ...] = ()
        if self.system_prompt:
            system = ({"role": "system", "content": self.system_prompt},)
            if turn[0]["role"] == "system":
                own, turn = turn[0]["content"], turn[1:]
                system = ({"role": "system", "content": f"{self.system_prompt}\n\n{own}"},)
        return Prompt(
            key=f"{self.name}/{entry['id']}",
            messages=(*system, *turn),
            verifier=verifier,
            answer=answer,
            tools=tuple(tool_of(one) for one in entry["function"]),
            row=row,
            category=category,
        )


def _can_be_right(entry: Mapping[str, Any]) -> bool:
    calls = (call for call in entry.get("ground_truth", ()) if isinstance(call, Mapping))
    return all(values for call in calls for given in call.values() for values in given.values())


def split_of(task: str) -> str:
    """The split, "train" or "val", of a task by its id, such as `live_simple_19-3-15`."""
    found = re.search(r"_([0-9]+)(?:-[0-9]+)*$", task)
    assert found, task
    return "val" if int(found[1]) % HELD_OUT == 0 else "train"
