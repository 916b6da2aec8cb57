"""Verifiers of an answer between <answer> tags."""

import re
import unicodedata
from dataclasses import dataclass

from scsdpo.prompt import Prompt, Verdict, Verifier

NO_ANSWER = "The response has no final answer between <answer> and </answer> tags."
_WRAPPED = re.compile(r"\\(?:boxed|fbox|text\w*|math\w+)\s*\{([^{}]*)\}")
_BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_MARKUP = str.maketrans("", "", "$*_`\"'{}\u201c\u201d\u2018\u2019")
_LETTER = re.compile(
    r"\s*(?:(?:the\s+)?(?:(?:final|correct|right|best)\s+)?(?:answer|option|choice)"
    r"(?:\s*(?:is\b|:))?\s*)*"
    r"[(\[<]?\s*([a-z])\s*(?:[)\]>.:]|$)",
    re.IGNORECASE,
)
# After the letter, another one that is marked as an option: "B)", "or B", a letter alone.
_ANOTHER = re.compile(
    r"(?:^|[\s(\[,;/&])[A-Z]\s*[):\]]|(?:^|[\n,;/&]|\b(?:or|and))\s*\(?[A-Z](?:[.,;]|\s*$)",
    re.MULTILINE,
)
_LONGEST = 1_000
"""Greatest length, in characters, of a letter with its option's text."""
_LABEL = re.compile(r"(?:^|[\s(\[])\**\(?([A-Z])\**[.):\]]", re.MULTILINE)


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
        strip_thinking: judge only the text after the thinking (see `Verifier`); False: the whole
            response.
    """

    strip_thinking: bool = True

    def written(self, prompt: Prompt) -> str:
        """The answer in a block."""
        return f"<answer>{prompt.answer}</answer>"

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Reward 1 or 0; the verdict's answer is the block's text."""
        answer = last_answer(response)
        if answer is None:
            return Verdict(reward=0.0, feedback=NO_ANSWER)
        if answer == prompt.answer.strip():
            return Verdict(reward=1.0, answer=answer)
        return Verdict(reward=0.0, answer=answer, feedback="The final answer is not correct.")


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(Verifier):
    r"""Right iff the last <answer> block holds the letter of the right option.

    Args:
        strict: the block must hold the letter and nothing else, as the published reward wants it.
            False also takes the other spellings of the letter: "a", "(A)", "A.", "A: 0.8", "**A**",
            "Option A", "\boxed{A}"; and, where there is no block, the last box, or a response that
            is nothing but the letter. A text that names several options is none of them.
        strip_thinking: judge only the text after the thinking (see `Verifier`); False: all
            of the response, as the published grader does.

    Source:
        Hübotter et al. 2026, arXiv:2601.20802, and its code (lasgroup/SDPO): the strict form.
    """

    strict: bool = True
    strip_thinking: bool = True

    def check(self, prompt: Prompt) -> None:
        """Raise if the answer is no letter, or no option that the question lists."""
        letter = prompt.answer.strip()
        if not re.fullmatch("[A-Z]", letter):
            raise ValueError(
                f"the answer must be the letter of an option (A, B, ...), got {prompt.answer!r}"
            )
        listed = set(_LABEL.findall(prompt.messages[-1]["content"])) if prompt.messages else set()
        if {"A", "B"} <= listed and letter not in listed:
            raise ValueError(
                f"the answer {letter!r} is none of the options {', '.join(sorted(listed))} of the "
                "question"
            )

    def written(self, prompt: Prompt) -> str:
        """The letter in a block."""
        return f"<answer>{prompt.answer.strip()}</answer>"

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Reward 1 or 0; the verdict's answer is the letter, or the block's text without one."""
        text = last_answer(response) if self.strict else _letter(response)
        if text is None:
            return Verdict(reward=0.0, feedback=NO_ANSWER)
        if text == prompt.answer.strip():
            return Verdict(reward=1.0, answer=text)
        if len(text) == 1 and text.isalpha() and text.isupper():
            return Verdict(reward=0.0, answer=text, feedback="The chosen option is not correct.")
        form = "The final answer between the <answer> tags must be the letter of one option only."
        return Verdict(reward=0.0, answer=text, feedback=form)


def _letter(response: str) -> str | None:
    """The letter that a response chooses, however spelled; else its last block, or None."""
    block = last_answer(response)
    if block is not None:
        return _spelled(block, with_text=True) or block
    boxed = [line for line in response[-_LONGEST:].split("\n") if "\\boxed" in line][-1:]
    said = _BOX.findall(boxed[0]) if boxed else [response]
    letters = {_spelled(text, with_text=False) for text in said}
    return letters.pop() if len(letters) == 1 else None


def _spelled(text: str, *, with_text: bool) -> str | None:
    """The one letter that a text names, perhaps with its option's text; None: none or several."""
    if len(text) > _LONGEST:
        return None
    text = unicodedata.normalize("NFKC", text)
    while (bare := _WRAPPED.sub(r"\1", text)) != text:
        text = bare
    text = text.translate(_MARKUP)
    letter = _LETTER.match(text)
    rest = text[letter.end() :].strip(" \t\n.)]>") if letter else ""
    if letter is None or _ANOTHER.search(rest) or (rest and not with_text):
        return None
    return letter[1].upper()
