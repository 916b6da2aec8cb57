"""Thinking in the text of a response: one rule on where it ends, for verifiers and teachers.

A response is thinking and then an answer. The rule knows the tags of the common models, also nested
ones; an end without a beginning ends what began in the prompt. Takes time linear in the text.
"""

import re
from collections import Counter

# <think>, <thinking>, <thought>, <seed:think>, <mm:think>, <longcat_think>, <think_fast>,
# <ifm|think>, <think:opensource>
_NAMES = r"(?:[a-z]{1,16}[:_|])?(?:think(?:ing)?|thoughts?)(?:_[a-z]{1,16})?(?::[^\s<>]{1,64})?"
_WORKING = "reasoning|scratchpad"
"""Tags that no model has of its own: prompts ask for them, around the working that they want."""
# Behind "<", "[" or "◁"; case does not matter.
_BEGINNINGS = {
    "magistral": r"\[think\]",
    "kimi": "◁think▷",
    "kimi_k3": r"<\|open\|>\s*think\s*<\|sep\|>",
    "openthinker": r"<\|begin_of_thought\|>",
    "cohere": r"<\|start_thinking\|>",
    "apertus": r"<\|inner_prefix\|>",
    "gemma": r"<\|channel>\s*thought",
    "solar": r"<\|think\|>",
    "harmony": r"<\|channel\|>\s*analysis\b",  # gpt-oss
}
_ENDS = {
    "magistral": r"\[/think\]",
    "kimi": "◁/think▷",
    "kimi_k3": r"<\|close\|>\s*think\s*<\|sep\|>",
    "openthinker": r"<\|end_of_thought\|>",
    "cohere": r"<\|end_thinking\|>",
    "apertus": r"<\|inner_suffix\|>",
    "gemma": r"<channel\|>",
    # The header of the message that is the answer.
    "harmony": r"<\|channel\|>\s*final\b[^<]{0,99}(?:<\|constrain\|>[^<]{0,99})?<\|message\|>",
}
_ENDS_OF_OWN = {"solar": r"<\|end\|>"}
"""Ends thinking only after its own beginning; elsewhere it ends a turn."""
_KEPT_ENDS = {"harmony": r"<\|channel\|>\s*commentary\b"}
"""Ends thinking as those do, and belongs to what follows: it is the header of a tool call."""
_SORTS = {"b": _BEGINNINGS, "e": _ENDS, "o": _ENDS_OF_OWN, "k": _KEPT_ENDS}


def _tags(names: str) -> re.Pattern[str]:
    patterns = [rf"<(?P<slash>/?)(?P<name>{names})\s*>"] + [
        f"(?P<{sort}_{model}>{pattern})"
        for sort, patterns in _SORTS.items()
        for model, pattern in patterns.items()
    ]
    # Most text is none: a class of characters in front is sought for at the speed of C.
    return re.compile(f"(?=[<\\[◁])(?:{'|'.join(patterns)})", re.IGNORECASE)


_OF_MODELS, _WITH_WORKING = _tags(_NAMES), _tags(f"{_NAMES}|{_WORKING}")


def behind_thinking(text: str) -> str:
    """What stands behind the last end of thinking; all, where there is none. "" if it is open.

    Here <reasoning> and <scratchpad>, for which prompts ask, are thinking too.

    Args:
        text: the response, after what its prompt leaves open (`Prompt.thinking`).
    """
    said, thinking = _split(text, _WITH_WORKING)
    return "" if thinking else said[-1]


def without_thinking(text: str) -> str:
    """The text without its thinking and the space behind it, for a teacher to read.

    <reasoning> and <scratchpad> stay: they are working that the prompt asks for.

    Args:
        text: the response, after what its prompt leaves open (`Prompt.thinking`).
    """
    return "".join(_split(text, _OF_MODELS)[0])


def left_open(text: str) -> str:
    """The tags of thinking that have no end in `text`; of a prompt's end, say."""
    return "".join(_split(text, _OF_MODELS)[1])


def _split(text: str, tags: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """What is said outside of thinking, in parts, and the tags that are open at the end."""
    said: list[str] = []
    thinking: list[tuple[str, str]] = []  # kind and tag of each beginning
    begun: Counter[str] = Counter()
    start = previous = 0  # of what is said; end of the last beginning
    for tag in tags.finditer(text):
        sort, _, kind = (tag.lastgroup or "").partition("_")
        if tag["name"] is not None:
            sort, kind = "e" if tag["slash"] else "b", tag["name"].lower()
        if sort == "b":
            if not thinking:
                said.append(_part(text, start, tag.start()))
            # A model often repeats the tag with which its prompt ended. Messages do not nest.
            elif thinking[-1][0] == kind and (
                kind == "harmony" or not text[previous : tag.start()].strip()
            ):
                previous = tag.end()
                continue
            thinking.append((kind, tag[0]))
            begun[kind] += 1
            previous = tag.end()
        elif begun[kind]:
            closed = ""
            while closed != kind:  # what began within it ends with it
                closed = thinking.pop()[0]
                begun[closed] -= 1
            start = tag.start() if sort == "k" else tag.end()
        elif sort == "e" and not thinking:
            said.clear()
            start = tag.end()
    if not thinking:
        said.append(_part(text, start, len(text)))
    return said, [tag for _, tag in thinking]


def _part(text: str, start: int, end: int) -> str:
    """A part of what is said; the space behind an end of thinking belongs to the thinking."""
    return text[start:end].lstrip() if start else text[start:end]
