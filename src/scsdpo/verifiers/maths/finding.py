r"""Find the final answer in a response.

It is, in this order: the last \boxed{...} that is closed and not empty (with the boxes that it is
listed with), the last <answer> block, the text after the last "the answer is", "Answer:" or "####",
or the response's last line, if that is mathematics or ends in it. Finding it takes linear time.
"""

# ruff: noqa: RUF001

import re
from itertools import pairwise

from scsdpo.verifiers.answer import last_answer

MAX_ANSWER = 1_000
r"""Most characters of a final answer; a longer one is not read, because parsing would take long."""
_MOST_BOXES = 24
_TAIL = 6_000
"""Number of characters at the end that are searched for an answer without a box."""
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"[0-9]|[A-Za-z](?![A-Za-z])")
_LINK_WORDS = frozenset(["and", "or"])
_TURNS = frozenset([
    "but", "so", "wait", "not", "instead", "hence", "thus", "therefore", "then", "is", "gives",
    "which", "actually", "first", "try", "again", "wrong", "correct", "check", "verify", "let",
    "since", "because", "small", "large", "guess", "at",
])  # fmt: skip


def final_answer(response: str) -> str:
    """The text of the final answer; empty if there is none."""
    boxes = _boxes(response)
    if boxes:
        return _listed(response, boxes)
    block = last_answer(response)
    if block is not None:
        said = _said(block) if len(block) <= MAX_ANSWER else ""
        return said or (block if len(block) <= MAX_ANSWER else "")
    cut_off = response.rfind("\\boxed")
    response = response[:cut_off] if cut_off >= 0 else response
    tail = response.rstrip()[-_TAIL:]
    return _said(tail) or _last_line(tail)


# --- boxes ----------------------------------------------------------------------------------------


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Start, end and text of the last closed and non-empty boxes, in order."""
    found: list[tuple[int, int, str]] = []
    place = len(text)
    for _ in range(_MOST_BOXES):
        place = max(text.rfind("\\boxed", 0, place), text.rfind("\\fbox", 0, place))
        if place < 0:
            break
        match = _BOX.match(text, place)
        if match is None:
            continue
        end = match.end()
        if text[end : end + 1] == "{":
            close = _close(text, end)
            inner = text[end + 1 : close].strip() if close > 0 else ""
            end = close + 1
        else:
            bare = _BARE.match(text, end) if match[0][-1:].isspace() else None
            inner, end = (bare[0], bare.end()) if bare else ("", end)
        if inner:
            found = [box for box in found if box[0] >= end]  # those inside this one
            found.insert(0, (place, end, inner))
    return found


def _close(text: str, start: int) -> int:
    r"""Index of the brace that closes the one at `start`, without \{ and \}; 0: there is none."""
    depth, place = 0, start
    most = min(len(text), start + MAX_ANSWER + 2)
    while place < most:
        if text[place] == "\\":
            place += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
        place += 1
    return 0


def _listed(text: str, boxes: list[tuple[int, int, str]]) -> str:
    """The last box and the boxes joined to it, which together are one answer."""
    parts = [boxes[-1][2]]
    for before, after in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        if not _is_link(text[before[1] : after[0]]):
            break
        if before[2] not in parts:
            parts.insert(0, before[2])
    return ", ".join(parts) if len(parts) > 1 else parts[0]


def _is_link(text: str) -> bool:
    r"""True for a text that only joins a list: ", ", " and ", "$ and $x_2 = ", a \quad, nothing."""
    if len(text) > 80:
        return False
    text = re.sub(r"\\text\s*\{([^{}]*)\}|\\(?:quad|qquad|[,;: ])", r" \1 ", text)
    text = re.sub(r"\$|\\[()\[\]]|\*\*|&|\\\\", " ", text)
    if re.search(r"[.!?]\s|\n\s*\n|:", text):
        return False
    words = re.findall(r"[A-Za-z]{2,}", text.lower())
    if _TURNS & set(words):
        return False
    joined = bool(_LINK_WORDS & set(words)) or "," in text or ";" in text
    bare = not text.strip()
    return bare or (joined and len(words) <= 5)


# --- sentences ------------------------------------------------------------------------------------

_CUE = re.compile(
    r"(?:\b(?:final|correct|right)?\s*(?:answer|result|solution)s?\b"
    r"(?P<middle>[^.\n:=$]{0,60}?)\s*\b(?:is|are|equals|(?:should|must|will|to)\s+be|comes?\s+(?:out\s+)?to)\b\s*:?"
    r"|^\W*(?:ans|final|final\s+result|result|solution|output)\s*[:.→]+(?=[\s*_]*[-$\\\d(])"
    r"|\banswers?\b(?P<between>[^.\n:=$]{0,60}?)\s*[:=→]|####|^\W*(?:final\s+)?answer\s+(?=[$\\\d]))",
    re.IGNORECASE | re.MULTILINE,
)
_HEADING = re.compile(r"(?im)^[\s#*]*(?:the\s+)?(?:final\s+)?answer\s*:?[\s*]*$")
_LEAD = re.compile(
    r"(?:[\s:*]|(?:simply|just|exactly|therefore|thus|then|indeed|clearly|given by|equal to|that)\b"
    r"|(?:the|our|my|final|correct|answer)\s+(?:final\s+|correct\s+)?answer\s+is\b)+",
    re.IGNORECASE,
)
_NOT = re.compile(
    r"\s*(?:not|n't|never|no longer|unknown|unclear|wrong|incorrect)\b", re.IGNORECASE
)
_COURTESY = re.compile(
    r"\W*(?:very\s+)?(?:helpful|clear|correct|right|useful|as follows|(?:given|shown|found)? ?"
    r"(?:above|below)|what you)\b",
    re.IGNORECASE,
)
_REST = re.compile(
    r",?\s+(?:because|since|as|which|where|so|after|by|not|rather|instead|in which|i\.e\.)\b"
    r"|\s+\(|\s*⇒|,\s+(?:and|but)\s+(?:the|this|it|we)\b"
)
_MATH = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|(?<!\\)\$([^$\n]+?)(?<!\\)\$|\\\((.+?)\\\)", re.DOTALL
)
_END = re.compile(r"[.!?](?=\s|$|\*)|\n")
_NUMBER = re.compile(r"(?<![\w.,])[-−+]?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?(?![\w])")
_SO_NUMBER = re.compile(
    rf"(?i)\W*(?:so|thus|hence|therefore|finally)\b[\s,:]*({_NUMBER.pattern})[\s.!*_]*"
)
_VERB = re.compile(
    r"\b(?:is|are|equals|gives?|gets?|obtain|have|has|had|makes?|costs?|needs?|pays?|takes?|'s)\b"
    r"(?:\s+(?:therefore|thus|exactly|then))?|="
)
_COUNTED = re.compile(
    rf"(?:{_NUMBER.pattern}|\$[^$]+\$|\\\(.+?\\\))(?:\s+[A-Za-z]+){{0,2}}?"
    r"(?=\s+(?:of|in|at|for|to|on)\b|\s*$)"
)
_VAGUE = re.compile(
    r"(?i)\b(?:wrong|incorrect|impossible|too|fewer|less|more|greater|larger|smaller|least|most|"
    r"between|about|approximately|around|nearly|almost|would|could|should|might|may|than|either|or)\b"
)
_DOUBT = re.compile(
    r"(?i)\b(?:not|cannot|can't|don't|unknown|unclear|maybe|perhaps|if|guess|whether|try|let|n't)\b"
)
_MATH_SIGN = re.compile(r"[\d$\\=√π∞¼-¾⅐-⅞]")
_IS_ANSWER = re.compile(
    r"(?i)(?:^|[.!?]\s|\n)(?P<said>(?:[^.!?\n]|\.(?=\d)){1,80}?)\s+(?:is|are)\s+(?:the|our|my)\s+"
    r"(?:final\s+|correct\s+|right\s+)?(?:answers?|results?|solutions?)\b"
)
_WORDS = re.compile(r"[A-Za-z]{2,}")
_KNOWN_WORDS = frozenset([
    "sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "exp", "sqrt", "pi", "and", "or",
    "frac", "infty", "cup",
])  # fmt: skip


def _said(text: str) -> str:
    """The text after the last words that announce an answer; '': there are none."""
    cues = [(match.end(), match) for match in _CUE.finditer(text)]
    cues += [(match.end(), match) for match in _HEADING.finditer(text)]
    for place, match in sorted(cues, key=lambda cue: cue[0], reverse=True)[:6]:
        words, rest = match.groupdict(), text[place : place + MAX_ANSWER]
        middle = words.get("middle") or words.get("between") or ""
        if _COURTESY.match(rest):
            continue
        if _DOUBT.search(middle) or re.search(r"\b(?:would|too|was)\b", middle):
            continue
        return _statement(rest)
    turned = list(_IS_ANSWER.finditer(text))
    if turned and not _DOUBT.search(turned[-1]["said"]):
        said = re.sub(r"(?i)^\W*(?:so|thus|hence|therefore)\b[\s,]*", "", turned[-1]["said"])
        return "" if len(_WORDS.findall(_MATH.sub(" ", said))) > 3 else said.strip("*_ ")
    return ""


def _statement(text: str) -> str:
    """The answer that a text begins with."""
    text = text.lstrip(" \t:*\r\n")
    lead = _LEAD.match(text)
    text = text[lead.end() :] if lead else text
    if _NOT.match(text):
        return ""
    display = re.match(r"\s*(?:\$\$(.+?)\$\$|\\\[(.+?)\\\])", text, re.DOTALL)
    if display:
        return (display[1] or display[2]).strip().rstrip(".,")
    sentence = _sentence(text).strip().strip("*_").strip()
    rest = _REST.search(_blanked(sentence))
    sentence = sentence[: rest.start()].strip() if rest else sentence
    chunks = list(_MATH.finditer(sentence))
    last_is = list(re.finditer(r"\b(?:is|are|equals)\b", _blanked(sentence)))
    if last_is and sentence[last_is[-1].end() :].strip():
        sentence = sentence[last_is[-1].end() :].strip()
        chunks = list(_MATH.finditer(sentence))
    sentence = sentence.strip("*_ ").rstrip(".!*_ ")
    outside = _WORDS.findall(re.sub(r"\\[A-Za-z]+", " ", _MATH.sub(" ", sentence)))
    words = [word for word in outside if word.lower() not in _KNOWN_WORDS]
    if chunks and chunks[0].start() == 0 and len(words) > 3:
        return chunks[0][0]
    if len(words) > 5 or _DOUBT.search(" ".join(words[:2])):
        number = _NUMBER.match(sentence)
        compared = re.search(r"\b(?:more|less|fewer|times|than|plus|minus|or|not)\b", sentence)
        return number[0] if number and not compared else ""
    return sentence


def _blanked(text: str) -> str:
    """The text with blanks for its mathematics, so that letters there are not read as words."""
    return _MATH.sub(lambda match: "0" * len(match[0]), text)


def _sentence(text: str) -> str:
    """The text up to the first end of a sentence or line outside mathematics."""
    end = _END.search(_blanked(text))
    return text[: end.start()] if end else text


def _last_line(text: str) -> str:
    """The last line if it is mathematics, else the number or formula that it ends in."""
    text = re.sub(r"(?s)\\\[(.+?)\\\]", lambda m: "\n$" + " ".join(m[1].split()) + "$\n", text)
    text = re.sub(r"(?s)\$\$(.+?)\$\$", lambda m: "\n$" + " ".join(m[1].split()) + "$\n", text)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for line in reversed(lines[-5:]):
        line = line.strip("*_# ")
        bare = re.sub(r"^\$(.*)\$[.,]?$", r"\1", line) if line.count("$") == 2 else line
        words = _WORDS.findall(re.sub(r"\\[A-Za-z]+", " ", bare))
        has_math = _MATH_SIGN.search(line)
        counted = re.fullmatch(rf"(?:\$[^$]+\$|{_NUMBER.pattern})\s*[a-z%°]+(?:\s[a-z]+)?\.?", line)
        if counted:
            return line.rstrip(".")
        if _MATH.fullmatch(re.sub(r"[.,!]$", "", line)):
            return bare.rstrip(".,!") if len(bare) <= MAX_ANSWER else ""
        if has_math and not [w for w in words if w.lower() not in _KNOWN_WORDS]:
            return bare.rstrip(".!,") if len(bare) <= MAX_ANSWER else ""
        if not has_math:
            continue  # a polite phrase
        return _concluded(line)
    return ""


def _concluded(line: str) -> str:
    """The statement of the last sentence with mathematics in a line."""
    sentences = [s for s in _sentences(line) if _MATH_SIGN.search(s)]
    if not sentences:
        return ""
    sentence = sentences[-1].strip().strip("*_ ")
    if _DOUBT.search(sentence) or _VAGUE.search(sentence):
        return ""
    blank = _blanked(sentence)
    verbs = list(_VERB.finditer(blank))
    if verbs:
        after = sentence[verbs[-1].end() :].strip().strip("*_ ").rstrip(".!*_ ")
        counted = _COUNTED.match(after)
        if counted:
            return counted[0]
    chunks = list(_MATH.finditer(sentence))
    ends_in_one = len(chunks) == 1 and not sentence[chunks[0].end() :].strip(".!*_ ")
    if ends_in_one and re.search(r"[\d=<>]|\\(?:[lg]eq?|[lg]t|in|begin)\b", chunks[0][0]):
        return chunks[0][0]
    lone = _SO_NUMBER.fullmatch(blank)
    return lone[1] if lone else ""


def _sentences(line: str) -> list[str]:
    places = [match.end() for match in _END.finditer(_blanked(line))]
    edges = [0, *places, len(line)]
    return [line[a:b] for a, b in pairwise(edges) if line[a:b].strip()]
