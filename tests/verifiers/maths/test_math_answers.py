r"""MathAnswer on a table of answers that are right or nearly right, on mutated gold answers, on
hostile ones, and on the tables of math-verify where a checkout of it is present.

The table is made by make_math_pairs.py. MATH_VERIFY is a checkout of math-verify; there its tables
are asked too.
"""

import ast
import json
import os
import re
import time
from collections import Counter
from pathlib import Path
from random import Random

import make_math_pairs
import pytest

from scsdpo.prompt import Prompt
from scsdpo.verifiers import MathAnswer, Verification, VerifierPool
from scsdpo.verifiers.maths import final_answer

ROWS = [json.loads(line) for line in make_math_pairs.TABLE.read_text().splitlines()]
MUTATIONS = 3_000
MATH_VERIFY = Path(os.environ.get("MATH_VERIFY", "../Math-Verify")) / "tests"


def verdict(gold, response, verifier=MathAnswer()):
    prompt = Prompt(key="k", messages=(), verifier=verifier, answer=gold)
    given = verifier.verify(prompt, response)
    assert given.error == ""
    return given


def is_right(gold, answer, verifier=MathAnswer()):
    return verdict(gold, rf"So \boxed{{{answer}}}.", verifier).reward == 1


# --- the table ------------------------------------------------------------------------------------


def test_the_table_is_what_its_script_makes():
    assert list(make_math_pairs.pairs()) == ROWS
    kinds = Counter(row["kind"] for row in ROWS)
    assert len(ROWS) >= 1_000 and len(kinds) == 13 and min(kinds.values()) >= 100
    assert sum(row["right"] for row in ROWS) * 2 == len(ROWS)


def test_no_wrong_answer_of_the_table_is_accepted_and_few_right_ones_are_rejected():
    wrong, rejected, asked = [], Counter(), Counter()
    for row in ROWS:
        right = verdict(row["gold"], row["response"]).reward == 1
        if right and not row["right"]:
            wrong.append(row)
        asked[row["kind"]] += row["right"]
        rejected[row["kind"]] += row["right"] and not right
    assert wrong == []
    assert rejected.total() <= 0.02 * asked.total()
    assert all(rejected[kind] <= 0.05 * asked[kind] for kind in asked)


# --- mutations ------------------------------------------------------------------------------------

STILL_THE_SAME = [
    r"(?<![\d.])-0(?![.\d])|(?<!\d)\.\d",  # -0 is 0, and .5 is 0.5
    r"(?:^|,)\s*\$?\s*=",  # a name that is gone: `= 5` for `x = 5`
]
"""What shows that a mutation changed no value."""


def changed_digit(text, draw):
    places = [i for i, c in enumerate(text) if c in "0123456789"]
    if not places:
        return ""
    place = draw.choice(places)
    digit = draw.choice([c for c in "0123456789" if c != text[place]])
    return text[:place] + digit + text[place + 1 :]


def changed_sign(text, draw):
    places = [i for i, c in enumerate(text) if c in "+-<>"]
    if places and draw.random() < 0.7:
        place = draw.choice(places)
        other = {"+": "-", "-": "+", "<": ">", ">": "<"}[text[place]]
        return text[:place] + other + text[place + 1 :]
    places = [m.start() for m in re.finditer(r"(?:(?<=^)|(?<=[ ({,=$]))\d", text)]
    if not places:
        return ""
    place = draw.choice(places)
    return f"{text[:place]}-{text[place:]}"


def changed_letter(text, draw):
    command = r"\\[A-Za-z]+(?:\{[a-z]*matrix\}|\{array\}\{[lcr]*\})?"
    known = {i for match in re.finditer(command, text) for i in range(*match.span())}
    places = [i for i, c in enumerate(text) if re.match("[A-Za-z]", c) and i not in known]
    if not places:
        return ""
    place = draw.choice(places)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    letters = letters if text[place].isupper() else letters.lower()
    return text[:place] + draw.choice(letters.replace(text[place], "")) + text[place + 1 :]


def dropped_part(text, draw):
    parts = re.split(r"([,;]|(?<=.)[+-]|\\cup| and )", text)
    if len(parts) > 2 and draw.random() < 0.6:
        place = draw.randrange(0, len(parts), 2)
        del parts[max(0, place - 1) : place + 1 if place else 2]
        return "".join(parts)
    words = list(re.finditer(r"\d+|\\[a-z]+\{[^{}]*\}|[A-Za-z]+", text))
    if not words:
        return ""
    word = draw.choice(words)
    return text[: word.start()] + text[word.end() :]


UNIT = re.compile(r"\s*(?:\\[a-z]+\s*\{[^{}]*\}|[a-z]+)\$?")
ACCEPTED: list[tuple[str, str]] = []
"""Mutations that are accepted though they change a value, each with its gold answer: none."""


def test_of_3000_mutated_gold_answers_none_is_accepted_but_quantities_without_their_unit():
    """A quantity without its unit is right: that is a rule of MathAnswer."""
    draw = Random(2)
    golds = sorted({row["gold"] for row in ROWS})
    mutations = [changed_digit, changed_sign, changed_letter, dropped_part]
    asked, accepted, without_unit = 0, [], 0
    while asked < MUTATIONS:
        gold = draw.choice(golds)
        mutant = draw.choice(mutations)(gold, draw)
        if not mutant.strip(" $") or mutant.replace(" ", "") == gold.replace(" ", ""):
            continue
        if any(re.search(same, mutant) and not re.search(same, gold) for same in STILL_THE_SAME):
            continue
        asked += 1
        if is_right(gold, mutant):
            gone = gold.replace(mutant.strip(" $"), "", 1).strip(" $")
            is_unit = mutant.strip(" $") in gold and UNIT.fullmatch(gone)
            without_unit += bool(is_unit)
            accepted += [] if is_unit else [(gold, mutant)]
    assert accepted == ACCEPTED
    assert without_unit <= MUTATIONS / 100


# --- rules, one by one ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "near"),
    [
        (r"\frac{1}{2^{70}}", r"\frac{1}{2^{71}}"),
        ("0.0000001", "0.0"),
        ("e^{-50}", "e^{-51}"),
        ("3^{100000}", "3^{100000}+1"),
        ("123456.7", "123456.8"),
        ("1000000.5", "1000000"),
        (r"\frac{1}{3}", "0.333"),
        (r"\sqrt{2}", "1.414213"),
        ("25\\pi", "78.54"),
        ("10-20", "-10"),
        ("2024-01-05", "2018"),
        ("3:45 PM", "3:45 AM"),
        ("AB", "BA"),
        ("2R", "2r"),
        ("A", "a"),
        ("$5$;$10$", "10"),
        (r"$\max$ at $x=2$, min at $x=4$", "x=4"),
        (r"30 \text{ mph}, 40 \text{ mph}", "30"),
        (r"4-\mathrm{i}", "4"),
        ("x=1, y=2", "x=2, y=1"),
        ("(1,2)", r"\{1,2\}"),
        ("(12,102)", "12102"),
        ("1,234", "1, 234"),
        (r"\ln|x|", r"\ln x"),
        ("x^{2}+121=0", "1=2"),
        (r"\sin^2x+\cos^2x=1", "1=1"),
        ("I=5", "I=7"),
        ("x=5", "y=5"),
        ("y=2x+3", "2x+3"),
        ("x>3", r"x \ge 3"),
        ("x>3", "x<3"),
        ("5 cm", "5 km"),
        ("5 apples", "5 oranges"),
        (r"\$5", "5 euros"),
        ("5", r"5 \text{ million}"),
        ("5", r"5 \text{ tenths}"),
        ("5", r"5 \text{ below zero}"),
        ("5", "--5"),
        (r"15\mbox{ cm}^2", r"15 \text{ cm}"),
        ("1011_2", "1011_3"),
        ("1011_2", "1011"),
        ("a_{12}", "A_{12}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
        (r"\sum_{k=1}^{n} k^2", r"\sum_{k=1}^{n} k^3"),
        ("f(x)", "f(y)"),
        ("1/2x", "x/2"),
        ("1", "x+z=1"),
        (r"\sin x=0", "0"),
        ("1st", "st"),
        (r"x \in [1,2]", r"y \in [1,2]"),
        (r"x \in [1,2]", r"1 < x \le 2"),
        (r"\cos(10^{-30})", "1"),
        (r"\sqrt{10^{40}+1}", "10^{20}"),
        ("x^2+2x+1", "(x+1)^2+10^{-50}"),
        (r"e^{\pi\sqrt{163}}", "262537412640768744"),
        (r"P \wedge Q", r"P \vee Q"),
        (r"k<-1 \text{ or } k>3", r"k<-1 \text{ and } k>3"),
        (r"\{\{1\},2\}", r"\{1,2\}"),
        (r"\{(1,2)\}", r"\{1,2\}"),
    ],
)
def test_what_is_near_is_wrong(gold, near):
    assert is_right(gold, gold)
    assert not is_right(gold, near)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1/2", "½"),
        ("x^2", "x²"),
        (r"\sqrt{2}", "√2"),
        (r"90^\circ", "90°"),
        (r"[1, \infty)", "[1, ∞)"),
        ("7", "７"),  # noqa: RUF001
        ("-5", "–5"),  # noqa: RUF001
        (r"\sin 30^\circ", r"\frac{1}{2}"),
        (r"\frac{\sqrt{5}-1}{2}", r"\frac{2}{\sqrt{5}+1}"),
        (r"\frac{1}{2}+\frac{\sqrt{3}}{2}i", r"e^{i\pi/3}"),
        (r"\frac{(2n)!}{n!n!}", r"\binom{2n}{n}"),
        (r"25\pi", "78.5398163"),
        ("0.333333", r"\frac{1}{3}"),
        (r"x\le2 \text{ or } x\ge5", r"(-\infty,2]\cup[5,\infty)"),
        (r"x \in [1,2]", r"1 \le x \le 2"),
        (r"1 \le x \le 2", r"x \in [1,2]"),
        (r"x \in [1,2]", "[1,2]"),
        (r"[1,2]", r"x \in [1,2]"),
        (r"x \in \{1,2\}", "x = 1, x = 2"),
        ("204", "m+n=204"),
        (r"\frac{3}{5}", r"\cos\theta=\frac{3}{5}"),
        ("55", r"\sum_{k=1}^{10} k = 55"),
        (r"30^\circ", r"m\angle A = 30^\circ"),
        ("y=2x+3", "4x-2y+6=0"),
        ("x^2+y^2=4", r"\frac{x^2}{4}+\frac{y^2}{4}=1"),
        (r"\left\{\begin{array}{l}x=1\\y=2\end{array}\right.", "x=1, y=2"),
        ("(p,q)=(3,2)", "(3,2)"),
        (r"1 \text{ hour}", r"60 \text{ minutes}"),
        (r"60 \text{ mph}", r"60 \text{ miles per hour}"),
        (r"\{(1,2),(2,1)\}", "(2,1), (1,2)"),
        (r"\frac{1}{1+\frac{1}{2}}", r"\frac{2}{3}"),
        (r"\int_0^1 f(x)dx", r"\int_0^1 f(x)\,dx"),
        (r"F_n=\sum_{k=0}^{n-1} F_k F_{n-k-1}", r"F_n=\sum_{k=0}^{n-1} F_{n-k-1} F_k"),
        ("5 January 2024", "January 5, 2024"),
    ],
)
def test_what_is_equal_is_right(gold, answer):
    assert is_right(gold, answer)


def test_a_tolerance_is_relative_and_concerns_decimals_only():
    rough = MathAnswer(tolerance=0.01)
    assert is_right("2.31", "2.3", rough) and is_right(r"\pi", "3.14", rough)
    assert is_right("0.00231", "0.0023", rough)
    assert not is_right("0.00231", "0.0022", rough) and not is_right("0.0001", "0.0", rough)
    assert not is_right("1000", "1001", rough) and not is_right("2.31", "2.3")
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"MathAnswer\(tolerance=\.\.\.\)"):
            MathAnswer(tolerance=wrong)


def test_units_are_compared_unless_they_are_to_be_ignored():
    ignored = MathAnswer(units="ignored")
    assert is_right("5 cm", "5 km", ignored) and not is_right("5 cm", "6 cm", ignored)
    assert is_right("5 cm", "5") and is_right("5", "5 cm")
    assert is_right(r"50\%", "0.5") and is_right(r"50\%", "50") and not is_right(r"50\%", r"5\%")
    assert not is_right("1011_2", "1011_3", ignored)


# --- where the answer stands ----------------------------------------------------------------------

LONG = "We go on for a while, and nothing of it matters. " * 20


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"So \boxed{7}. (As asked, in \boxed{}.)", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed 7", "7"),
        (r"\boxed{7}. Let me verify: \boxed{", "7"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        (r"$x_1 = \boxed{1}$, $x_2 = \boxed{2}$", "1, 2"),
        (r"\boxed{1}, but that is wrong, so \boxed{2}", "2"),
        (r"\boxed{1} no no no no no \boxed{2}", "2"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        ("<answer>3</answer>", "3"),
        ("<answer>The answer is 3.</answer>", "3"),
        (r"<answer>3</answer> \boxed{4}", "4"),
        ("one\nThe answer is 5.\n", "5"),
        ("The answer is 42", "42"),
        ("**Answer:** 42", "42"),
        ("The final answer is $42$. I hope it is correct.", "$42$"),
        (f"The answer is 42.\n\nI hope this helps! {LONG}", "42"),
        ("The answer is:\n\n\\[\n42\n\\]\n\nLet me know!", "42"),
        ("#### 42", "42"),
        ("42.", "42"),
        ("We get $x = 42$.", "$x = 42$"),
        ("Hence there are 42 of them.", "42"),
        ("The answer is $5$ or $7$.", "$5$ or $7$"),
        ("The answer is Evelyn.", "Evelyn"),
        ("The answer is not 42.", ""),
        ("The answer is 42, not 43.", "42"),
        ("The answer is 42? No, the answer is not 42.", ""),
        ("The answer is 42. I hope the answer is clear.", "42"),
        ("My first answer is 42. But the answer should be 43.", "43"),
        ("The answer is at least 42.", "at least 42"),
        ("The answer is 42 when x > 0 and 43 otherwise.", "42 when x > 0 and 43 otherwise"),
        ("So 42 is wrong.", ""),
        ("So there are at least 42.", ""),
        ("Therefore 42 divides n.", ""),
        ("So she pays $64 for 16 glasses.", "$64"),
        ("So she has 42 apples.", "42 apples"),
        ("I do not know.", ""),
        ("We add the 3 apples and the 4 pears.", ""),
        ("Let $n$ be the number of apples.", ""),
        (r"\boxed{6", ""),
        (r"\boxed{}", ""),
        (r"\boxed{" + "1" * 1_100 + "}", ""),
        ("", ""),
    ],
)
def test_the_final_answer_is_found_or_there_is_none(response, answer):
    assert final_answer(response) == answer


def test_of_a_gold_answer_that_is_a_worked_solution_the_box_counts():
    gold = r"We add $3$ and $4$, which makes $\boxed{7}$. So the answer is odd."
    assert is_right(gold, "7") and not is_right(gold, "3")
    MathAnswer().check(Prompt(key="k", messages=(), verifier=MathAnswer(), answer=gold))


def test_thinking_holds_no_answer():
    assert verdict("7", r"<think>I guess \boxed{7}").reward == 0
    assert verdict("7", r"<think>first \boxed{8}</think>The answer is 7.").reward == 1
    assert verdict("8", r"<think>first \boxed{8}</think>The answer is 7.").reward == 0
    whole = MathAnswer(strip_thinking=False)
    assert verdict("7", r"<think>I guess \boxed{7}", whole).reward == 1


def test_equal_wrong_answers_vote_together_and_others_do_not():
    for spellings in (
        [r"2\sqrt{2}", r"\sqrt{8}"],
        ["x^2-1", "(x+1)(x-1)"],
        ["1, 2", r"\{2, 1\}", "x = 2, x = 1"],
        ["50 cm", r"0.5\text{ m}"],
    ):
        votes = {verdict("777", rf"\boxed{{{text}}}").answer for text in spellings}
        assert len(votes) == 1
    votes = {verdict("777", rf"\boxed{{{t}}}").answer for t in ("1", "-1", "x", "(1,2)", "[1,2]")}
    assert len(votes) == 5
    assert verdict("777", "We add the 3 apples and the 4 pears.").answer is None


# --- the documentation ----------------------------------------------------------------------------

DOCS = Path(__file__).parents[3] / "docs" / "verifiers.md"
EXAMPLES = re.findall(
    r"^\| `([^`]+)` \| `([^`]+)` \| (right|wrong) \|", DOCS.read_text(), re.MULTILINE
)


def test_the_documentations_examples_are_judged_as_it_says():
    assert len(EXAMPLES) > 20
    for gold, answer, said in EXAMPLES:
        response = answer if " " in answer and "." in answer else rf"\boxed{{{answer}}}"
        assert (verdict(gold, response).reward == 1) == (said == "right"), (gold, answer)


# --- size -----------------------------------------------------------------------------------------


def nested(depth):
    text = "x"
    for _ in range(depth):
        text = rf"\frac{{1}}{{1+{text}}}"
    return text


HOSTILE = [
    "9^{9^{9}}",
    "9^{9^{9^{9}}}",
    nested(18),
    "{" * 140 + "x" + "}" * 140,
    "(" * 140 + "x" + ")" * 140,
    "100000000000!",
    "3!!!!!!!!",
    "2^{999999999999}",
    r"\binom{10^9}{5\cdot 10^8}",
    r"\sin(10^{10^{6}})",
    r"(1+10^{-400})^{10^{400}}",
    "1" * 990,
    r"\frac{" + "1" * 450 + "}{" + "7" * 450 + "}",
    r"\begin{pmatrix}" + r"\\".join(["&".join(["1"] * 100)] * 100) + r"\end{pmatrix}",
    r"\sum_{k=1}^{10^{10}} \frac{1}{k^k}",
    r"\int_0^1 x^x e^{x^x} dx",
    "(x+y+z)^{4000}",
    "((1,2),(3,4))," * 60,
    "2^" * 300,
    r"\pm " * 50 + "1",
    "½" * 500,
    "1e999999999",
    "+".join([r"\sin(10^{300})"] * 30),
    "+".join([r"\binom{500x}{300y}"] * 20),
    "+".join([r"\tan(10^{300}x)"] * 30),
]


@pytest.mark.parametrize("gold", ["7", "x^2+1", "y=2x", r"\{1,2,3\}", r"\sum_{k=1}^n k"])
def test_256_hostile_answers_take_as_long_as_a_few_thousand_plain_ones(gold):
    """In times of judging a plain answer on this very machine, so that a slow one fails nothing."""
    verdict("7", r"\boxed{8}"), verdict(r"\sqrt{2}", r"\boxed{\sqrt{3}}")
    begin = time.process_time()
    for number in range(256):
        verdict("7", rf"We add and get \boxed{{x^2+{number}\sqrt{{3}}}}")
    plain = time.process_time() - begin
    begin = time.process_time()
    for number in range(256):
        answer = HOSTILE[number % len(HOSTILE)]
        verdict(gold, rf"\boxed{{{answer}}}" if number % 2 else f"The answer is {answer}")
    assert time.process_time() - begin < 40 * plain


def test_the_pool_judges_256_hostile_answers_before_any_deadline():
    pool = VerifierPool(Verification(workers=1, deadline=5.0))
    prompt = Prompt(key="k", messages=(), verifier=MathAnswer(), answer="7")
    responses = [rf"\boxed{{{HOSTILE[n % len(HOSTILE)]}}}" for n in range(256)]
    verdicts = pool.verify([prompt], [responses])[0]
    pool.close()
    assert {(v.reward, v.error) for v in verdicts} == {(0.0, "")}


# --- math-verify's own tables ---------------------------------------------------------------------

OTHERWISE = {
    r"1 - \frac{1}{\mathrm{e}}": "1 + 1/e is taken for 1 - 1/e there",
    "Answer \\( \n 9 \n \\)": "mathematics over several lines is no answer there",
    r"$-2 \\le x \\le 7$": "an inequality is no interval there, unless an option is set",
}
"""Their verdicts that ours contradicts."""


def tables(folder):
    """Gold answer, response, verdict, of each table in the tests of math-verify."""
    for path in sorted(folder.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "parametrize":
                try:
                    rows = ast.literal_eval(node.args[1])
                except ValueError:
                    continue
                for row in rows:
                    if len(row) > 2 and all(isinstance(text, str) for text in row[:2]):
                        yield *row[:2], bool(row[-1] if path.name == "test_strict.py" else row[2])


@pytest.mark.skipif(not MATH_VERIFY.is_dir(), reason="MATH_VERIFY names no checkout of math-verify")
def test_no_wrong_answer_of_math_verifys_tables_is_accepted():
    asked, rejected = 0, 0
    for gold, response, right in tables(MATH_VERIFY):
        gold = gold if len(gold) < 120 and "boxed" not in gold else final_answer(gold)
        known = any(text in gold or text in response for text in OTHERWISE)
        if not gold.strip("\\") or known:
            continue
        asked += right
        accepted = verdict(gold, response).reward == 1
        assert right or not accepted, (gold, response)
        rejected += right and not accepted
    assert rejected <= 0.15 * asked
