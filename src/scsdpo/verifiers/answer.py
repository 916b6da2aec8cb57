"""Verifiers of an answer that stands between <answer> tags."""

import re
from dataclasses import dataclass

from scsdpo.prompt import Prompt, Verdict, Verifier

_NO_ANSWER = "The response has no final answer between <answer> and </answer> tags."
_LETTER = re.compile(r"[\s(\[*\"'`]*([A-Za-z])[\s*\"'`]*(?:$|[.:)\]])")


def last_answer(response: str) -> str | None:
    """The text of the last closed <answer>...</answer> block, stripped; None if there is none."""
    for block in reversed(response.split("<answer>")[1:]):
        text, end, _ = block.partition("</answer>")
        if end:
            return text.strip()
    return None


@dataclass(frozen=True, kw_only=True)
class ExactMatch(Verifier):
    """Right iff the last <answer> block holds exactly `prompt.answer`, outer whitespace aside.

    Args:
        strip_thinking: judge only what stands behind the thinking, as `Verifier` says; False: all
            of the response.
    """

    strip_thinking: bool = True

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Reward 1 or 0; the verdict's answer is the block's text."""
        answer = last_answer(response)
        if answer is None:
            return Verdict(reward=0.0, feedback=_NO_ANSWER)
        if answer == prompt.answer.strip():
            return Verdict(reward=1.0, answer=answer)
        return Verdict(reward=0.0, answer=answer, feedback="The final answer is not correct.")


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(Verifier):
    """Right iff the last <answer> block holds the letter of the right option.

    Args:
        strict: the block must hold the letter and nothing else, as the published reward wants it.
            False also takes the other spellings of the letter: "a", "(A)", "A.", "A: 0.8", "**A**".
        strip_thinking: judge only what stands behind the thinking, as `Verifier` says; False: all
            of the response, as the published grader does.

    Source:
        Hübotter et al. 2026, arXiv:2601.20802, and its code (lasgroup/SDPO): the strict form.
    """

    strict: bool = True
    strip_thinking: bool = True

    def check(self, prompt: Prompt) -> None:
        """Whether it is the letter of an option."""
        if not re.fullmatch("[A-Z]", prompt.answer.strip()):
            raise ValueError(
                f"the answer must be the letter of an option (A, B, ...), got {prompt.answer!r}"
            )

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Reward 1 or 0; the verdict's answer is the letter, else whatever the block holds."""
        text = last_answer(response)
        if text is None:
            return Verdict(reward=0.0, feedback=_NO_ANSWER)
        if not self.strict:
            spelled = _LETTER.match(text)
            text = spelled[1].upper() if spelled else text
        if text == prompt.answer.strip():
            return Verdict(reward=1.0, answer=text)
        if len(text) == 1 and text.isalpha() and text.isupper():
            return Verdict(reward=0.0, answer=text, feedback="The chosen option is not correct.")
        form = "The final answer between the <answer> tags must be the letter of one option only."
        return Verdict(reward=0.0, answer=text, feedback=form)
