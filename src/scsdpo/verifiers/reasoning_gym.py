"""Questions and verdicts of the package reasoning-gym, whose tasks are generated procedurally.

Run as a program, this module reads the arguments of `generated` as JSON from
standard input, and writes what it gives, or the kind and text of an error, as pickle.
"""

import ast
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from scsdpo.prompt import Prompt, Verdict, Verifier, stable_hash
from scsdpo.verifiers.answer import NO_ANSWER, last_answer

DENIED = {
    "boxnet": "its own answers are not scored 1",
    "coin_flip": "the answer 0 is scored 1 for many questions",
    "composite": "it is made of other tasks; name those",
    "game_of_life_halting": "garbage is scored 1",
    "graph_color": "its own answers are not scored 1",
    "list_functions": "its questions are not the same in every process",
    "propositional_logic": "its own answers are not scored 1",
    "puzzle24": "the answer need not use the question's numbers",
    "rubiks_cube": "its own answers are not scored 1",
    "rush_hour": "its own answers are not scored 1",
}
"""Tasks of reasoning-gym 0.1.25 that are refused, with the reason."""
_LISTS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Tasks whose scorer calls `eval` on the answer, where it expects a list."""
_FORMULAS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "simple_integration"}
)
"""Tasks whose scorer hands the answer to sympy's `parse_expr`, which calls `eval`."""
_FUNCTIONS = frozenset(
    [
        "Abs",
        "abs",
        "acos",
        "acosh",
        "asin",
        "asinh",
        "atan",
        "atanh",
        "cos",
        "cosh",
        "cot",
        "csc",
        "exp",
        "ln",
        "log",
        "sec",
        "sin",
        "sinh",
        "sqrt",
        "tan",
        "tanh",
    ]
)
_PLAIN = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.Name, ast.Load, ast.operator, ast.unaryop),
    ast.Constant,
)
"""Syntax that calls nothing: arithmetic on constants and names."""
_MISSING = (
    "`ReasoningGym` needs reasoning-gym ({error}): pip install 'scsdpo[reasoning-gym]', or choose "
    "another source"
)


@dataclass(frozen=True, kw_only=True)
class ReasoningGymAnswer(Verifier):
    """The score that reasoning-gym gives the last <answer> block.

    Scores are in [0, 1], and 1 is right. Some tasks give a part for a near answer, or .01 for any
    answer.

    Some scorers evaluate an answer as Python. So an answer that is no plain list, where a list is
    read, or no plain formula, where a formula is read, gets 0 and is not evaluated. `Integral(...)`
    is no plain formula: it names the solution without finding it.

    Args:
        task: name of the task.
        settings: settings of the task, as JSON.
        entry: the question with its solution, pickled.
        strip_thinking: judge only the text after the thinking (see `Verifier`); False: the whole
            response.

    Source:
        Stojanovski et al. 2025, arXiv:2505.24760; reasoning-gym 0.1.25.
    """

    task: str
    settings: str
    entry: bytes = field(repr=False)
    strip_thinking: bool = True
    _wrong: ClassVar[str] = "The final answer is not correct."

    def prepare(self) -> None:
        """Import the package and the task."""
        _dataset(self.task, self.settings)

    def written(self, prompt: Prompt) -> str:
        """The answer in a block."""
        return f"<answer>{prompt.answer}</answer>"

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """The task's score; the verdict's answer is the block's text."""
        answer = last_answer(response)
        if answer is None:
            return Verdict(reward=0.0, feedback=NO_ANSWER)
        score = 0.0
        if is_harmless(self.task, answer):
            # Scorers raise on answers that they cannot read: such answers are wrong.
            with redirect_stdout(sys.stderr), suppress(Exception):
                dataset = _dataset(self.task, self.settings)
                score = float(dataset.score_answer(answer, pickle.loads(self.entry)))
        score = min(max(score, 0.0), 1.0) if score == score else 0.0
        return Verdict(reward=score, answer=answer, feedback="" if score == 1 else self._wrong)


def is_harmless(task: str, answer: str) -> bool:
    """True if the scorer of `task` evaluates only the list or formula that the task asks for."""
    if task not in _LISTS | _FORMULAS:
        return True
    try:
        tree = ast.parse(answer.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        # `eval` would fail on it too. `parse_expr` has its own syntax.
        return task in _LISTS
    if task in _LISTS:
        return all(isinstance(node, (*_PLAIN, ast.List, ast.Tuple)) for node in ast.walk(tree))
    return all(map(_is_arithmetic, ast.walk(tree)))


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        plain = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        return plain and not node.keywords
    if isinstance(node, ast.Constant):  # sympy would parse a string as a formula
        return isinstance(node.value, int | float)
    return isinstance(node, _PLAIN)


def generated(
    tasks: Mapping[str, Mapping[str, Any]], *, size: int, base: int
) -> list[tuple[str, str, str, bytes]]:
    """Questions of `tasks` in turn, as (task, question, answer, pickled entry).

    A separate process generates them. Some tasks iterate over sets of strings, whose order depends
    on Python's hash seed; that process fixes it, so that the questions are the same on every rank
    and after a restart.

    Args:
        tasks: settings by name.
        size: number of questions.
        base: seed; question i of a task depends on it, on the task and on i.

    Raises:
        ImportError: if the package is not installed.
        ValueError: if a task is not known, or refuses its settings.
    """
    asked = json.dumps({"tasks": dict(tasks), "size": size, "base": base})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__],
        input=asked.encode(),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    found: list[tuple[str, str, str, bytes]] | tuple[str, str] = pickle.loads(done.stdout)
    if isinstance(found, tuple):
        kind, why = found
        raise (ImportError if kind == "import" else ValueError)(why)
    return found


def _generate(tasks: Mapping[str, Mapping[str, Any]], size: int, base: int) -> Any:
    datasets: list[tuple[str, Any]] = []
    each = -(-size // len(tasks))
    for name, settings in tasks.items():
        # Entry i is drawn with seed + i, so neighbouring seeds would share questions.
        seed = stable_hash("reasoning-gym", base, name) % 2**31
        try:
            dataset = _package().create_dataset(name, **settings, size=each, seed=seed)
        except ImportError as error:
            return "import", str(error)
        except Exception as error:
            known = _package().factory.DATASETS
            why = f"{error}" if name in known else f"there is no such task, only {sorted(known)}"
            return "value", f"`ReasoningGym(tasks=...)`, {name!r}: {why or type(error).__name__}"
        datasets.append((name, dataset))
    found = []
    for number in range(size):
        name, dataset = datasets[number % len(datasets)]
        index = number // len(datasets)
        if index >= len(dataset):  # a task of fixed size
            return "value", (
                f"`ReasoningGym(size={size})`: {name!r} has {len(dataset)} questions only; lower "
                f"size to {len(dataset) * len(datasets)}, or remove the task"
            )
        entry = dataset[index]
        found.append((name, entry["question"], str(entry["answer"]), pickle.dumps(entry)))
    return found


def _package() -> Any:
    try:
        import reasoning_gym  # an extra, and slow to import
    except ImportError as error:
        raise ImportError(_MISSING.format(error=error)) from error
    return reasoning_gym


@lru_cache(maxsize=256)
def _dataset(task: str, settings: str) -> Any:
    """The task's data set, for its scorer; the entry holds everything of a question."""
    return _package().create_dataset(task, **json.loads(settings), size=1, seed=0)


def main() -> None:
    """Generate the questions that standard input asks for."""
    asked = json.load(sys.stdin)
    sink = os.fdopen(os.dup(1), "wb")
    with redirect_stdout(sys.stderr):
        sink.write(pickle.dumps(_generate(asked["tasks"], asked["size"], asked["base"])))
    sink.close()


if __name__ == "__main__":
    main()
