"""Verifying and reading: `python benchmarks/verifiers.py`.

How long a batch of 512 responses takes to judge, what one that hangs adds, and how fast a stream is
read again on resume.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from scsdpo.data import Records
from scsdpo.data.shuffled import ShuffledSource
from scsdpo.policy import CausalLM
from scsdpo.prompt import Prompt
from scsdpo.verifiers import (
    MathAnswer,
    MultipleChoice,
    PythonTests,
    Regex,
    Verification,
    Verifier,
    VerifierPool,
)

DEADLINE = 2.0
HANG = "import time\ndef f(x):\n    time.sleep(60)"


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def questions(verifier: Verifier, answer: str) -> list[Prompt]:
    return [Prompt(key=str(n), messages=(), verifier=verifier, answer=answer) for n in range(64)]


def main() -> None:
    pool = VerifierPool(Verification(workers=2, deadline=DEADLINE))
    thought = "Some reasoning that goes on for a while. " * 200
    choice = [[thought + "<answer>\nA\n</answer>"] * 8] * 64
    prompts = questions(MultipleChoice(), "A")
    first = seconds(lambda: pool.verify(prompts, choice), repeats=1)
    print(f"512 x MultipleChoice, start of the processes included: {first:.3f} s")
    usual = seconds(lambda: pool.verify(prompts, choice), repeats=9)
    print(f"512 x MultipleChoice: {usual:.3f} s")
    for verifier, answer, text in (
        (MathAnswer(), "1/2", thought + r"\boxed{0.5}"),
        (MathAnswer(), r"\frac{\sqrt{5}-1}{2}", thought + r"\boxed{\frac{2}{\sqrt{5}+1}}"),
        (Regex(pattern=r"answer: (\w+)"), "yes", thought + "answer: yes"),
    ):
        asked = questions(verifier, answer)
        took = seconds(lambda asked=asked, text=text: pool.verify(asked, [[text] * 8] * 64))
        print(f"512 x {type(verifier).__name__}, {answer}: {took:.3f} s")
    tests = questions(PythonTests(seconds=60.0), json.dumps(["assert f(1) == 2"]))
    good = "```python\ndef f(x):\n    return x + 1\n```"
    mixed = [*prompts[:63], tests[0]]
    quick = [*choice[:63], [good] * 8]
    hanging = [*choice[:63], [good] * 7 + [f"```python\n{HANG}\n```"]]
    plain = seconds(lambda: pool.verify(mixed, quick))
    late = seconds(lambda: pool.verify(mixed, hanging))
    print(f"504 x MultipleChoice, 8 x PythonTests: {plain:.3f} s")
    print(f"the same, one program hanging until the deadline of {DEADLINE:g} s: {late:.3f} s")
    pool.close()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_text('{"prompt": "How many of these are there?", "answer": 1}\n' * 5_000)
        source = Records(str(path), MathAnswer(), streaming=True)
        questions_in_order = ShuffledSource.of(source, CausalLM("tiny").chat, 256, seed=0)
        took = seconds(lambda: (questions_in_order[0], questions_in_order[4_999]), repeats=1)
        print(f"5,000 questions of a stream, read again: {took:.2f} s")


if __name__ == "__main__":
    main()
