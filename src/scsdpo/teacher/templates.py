"""The words that tell a teacher its privileged information."""

import re
from dataclasses import dataclass

from scsdpo.types import Message


@dataclass(frozen=True, kw_only=True)
class Templates:
    """The teacher's last user turn: `turn` with {prompt}, {solution} and {feedback} filled in.

    Args:
        turn: the whole turn; must contain {prompt}, {solution} and {feedback}.
        solution: text around {demonstration}; left out when there is no demonstration.
        feedback: text around {feedback}; left out when there is no feedback.

    Raises:
        ValueError: if a placeholder is missing.

    Source:
        Hübotter et al. 2026, arXiv:2601.20802, and its code (lasgroup/SDPO), word for word.
    """

    turn: str = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n"
    solution: str = "\nCorrect solution:\n\n{demonstration}\n\n"
    feedback: str = (
        "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback}\n\n"
    )

    def __post_init__(self) -> None:
        needed = {
            "turn": ("{prompt}", "{solution}", "{feedback}"),
            "solution": ("{demonstration}",),
            "feedback": ("{feedback}",),
        }
        for name, places in needed.items():
            for place in places:
                if place not in getattr(self, name):
                    raise ValueError(f"`Templates({name}=...)` must contain {place}")

    def fill(
        self, messages: tuple[Message, ...], *, demonstration: str = "", feedback: str = ""
    ) -> list[Message]:
        """The conversation with its last turn rewritten; earlier turns stay."""
        parts = {
            "prompt": messages[-1]["content"],
            "solution": _insert(self.solution, "demonstration", demonstration),
            "feedback": _insert(self.feedback, "feedback", feedback),
        }
        # One pass, and not `str.format`: prompts and demonstrations may contain braces.
        turn = re.sub(r"\{(prompt|solution|feedback)\}", lambda place: parts[place[1]], self.turn)
        return [*messages[:-1], {**messages[-1], "content": turn}]


ATTEMPT_WORDS = Templates(
    solution="\nAttempts that were right:\n\n{demonstration}\n\n",
    feedback="\nAttempts that were wrong:\n\n{feedback}\n\n",
)
"""The words around right and wrong rollouts. They are ours."""


def _insert(template: str, place: str, text: str) -> str:
    return template.replace(f"{{{place}}}", text) if text.strip() else ""
