"""The Berkeley Function Calling Leaderboard: its files, its eight stateful APIs and its check."""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from scsdpo.environments.calling import Role, answered
from scsdpo.prompt import Environment, Message, Observation, Prompt, ToolSchema, Verdict

MULTI_TURN = (
    "multi_turn_base",
    "multi_turn_miss_func",
    "multi_turn_miss_param",
    "multi_turn_long_context",
)
"""Categories of several turns, each with 200 tasks."""
SINGLE_TURN = (
    "simple_python",
    "simple_java",
    "simple_javascript",
    "multiple",
    "parallel",
    "parallel_multiple",
    "irrelevance",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "live_irrelevance",
    "live_relevance",
)
"""Categories of one turn."""
INSTALL = "pip install --no-deps bfcl-eval==2026.3.23 mpmath==1.3.0"
_MISSING = "`BFCL` needs the package bfcl-eval ({error}): " + INSTALL + ", or choose another source"
_numbers = count()


# --- the files of the package ---------------------------------------------------------------------


def entries(category: str) -> Iterator[dict[str, Any]]:
    """The tasks of a category in the package's order, each with its `function`s.

    A task of several turns has `turns`, the user's messages of each turn, and `ground_truth`, the
    calls of each; `added` has the functions that are offered from a later turn on, by its number.
    A task of one turn has `question`, and `ground_truth` if the package gives one.

    Raises:
        ImportError: if the package is not installed; names the command that installs it.
    """
    data = Path(_package("").__file__).parent / "data"
    gold = _lines(data / "possible_answer" / f"BFCL_v4_{category}.json")
    answers = {entry["id"]: entry["ground_truth"] for entry in gold}
    for entry in _lines(data / f"BFCL_v4_{category}.json"):
        if entry["id"] in answers:
            entry["ground_truth"] = answers[entry["id"]]
        yield _with_turns(entry, data) if category in MULTI_TURN else entry


def _with_turns(entry: dict[str, Any], data: Path) -> dict[str, Any]:
    files = _package("constants.executable_backend_config").MULTI_TURN_FUNC_DOC_FILE_MAPPING
    words = _package("constants.default_prompts")
    documents = [
        document
        for api in entry["involved_classes"]
        for document in _lines(data / "multi_turn_func_doc" / files[api])
    ]
    later = {
        int(turn): [document for document in documents if document["name"] in names]
        for turn, names in entry.get("missed_function", {}).items()
    }
    held = {document["name"] for added in later.values() for document in added}
    turns = [list(turn) for turn in entry["question"]]
    for number, added in later.items():
        # An episode's tokens are never rendered again, so a message of the user shows functions
        # that are added later, as BFCL does for models without a field for functions.
        said = words.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_PROMPTING
        turns[number] = [{"role": "user", "content": said.format(functions=json.dumps(added))}]
    return {
        **entry,
        "function": [document for document in documents if document["name"] not in held],
        "turns": turns,
        "added": {number: [tool_of(one) for one in added] for number, added in later.items()},
    }


@lru_cache
def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def tool_of(document: Mapping[str, Any]) -> ToolSchema:
    """A function in the form of chat templates; BFCL's type names become those of JSON schema."""
    function = {name: document[name] for name in ("name", "description")}
    return {
        "type": "function",
        "function": {**function, "parameters": _schema(document["parameters"])},
    }


def _schema(described: Mapping[str, Any]) -> dict[str, Any]:
    names = _package("constants.type_mappings").GORILLA_TO_OPENAPI
    schema = dict(described)
    if "type" in schema:
        kind = str(schema["type"])
        schema["type"] = names.get(kind) or names.get(kind.lower(), "string")
    if isinstance(schema.get("properties"), Mapping):
        schema["properties"] = {key: _schema(one) for key, one in schema["properties"].items()}
    if isinstance(schema.get("items"), Mapping):
        schema["items"] = _schema(schema["items"])
    return schema


def _package(module: str) -> Any:
    """A module of bfcl-eval; those used here import no dependency that --no-deps omits."""
    try:
        return importlib.import_module(f"bfcl_eval.{module}".rstrip("."))
    except ImportError as error:
        raise ImportError(_MISSING.format(error=error)) from error


# --- the environment ------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Played:
    owner: str
    """Prefix of the names under which the package keeps the episode's objects."""
    steps: int = 0
    """Number of responses to the user's last message that called functions."""
    called: list[list[list[str]]] = field(default_factory=lambda: [[]])
    """Calls in BFCL's notation, by the user's message and by response."""


@dataclass(frozen=True, kw_only=True)
class BFCLEpisode(Environment):
    """Plays a task of several user messages over BFCL's stateful Python APIs.

    The APIs answer a response that calls functions. A response without calls ends the turn, and the
    user's next message follows. After each turn the package's own check judges the episode: every
    object must be in the state that the gold calls lead to, and the results of the gold calls must
    have been returned. If the check fails, the episode ends with reward 0; after the last turn it
    ends with reward 1.

    Calls are read as in `Tools`. All functions of the task can be called, also those that a later
    turn offers: the package runs these too, and one of its gold answers calls one.

    Args:
        reveal: the feedback on a wrong turn names the right calls.
        max_steps: number of responses with calls to one message of the user; one more ends the
            episode with reward 0.
        role: role of the APIs' answers; `user` for chat templates without a role for tools.
        strip_thinking: read only the text after the thinking; calls inside it do not count.

    Raises:
        ValueError: if `max_steps` < 1.

    Source:
        Patil et al. 2025, "The Berkeley Function Calling Leaderboard", and its package bfcl-eval
        2026.3.23. Differs: a call that cannot be read is answered by a message and does not end the
        turn.
    """

    reveal: bool = False
    max_steps: int = 20
    role: Role = "tool"
    strip_thinking: bool = True

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"`BFCLEpisode(max_steps=...)` must be >= 1, got {self.max_steps}")

    def prepare(self) -> None:
        """Import the APIs and the check."""
        _check()
        for module in _package("constants.executable_backend_config").CLASS_FILE_PATH_MAPPING:
            if not module.startswith(("Memory", "WebSearch")):  # not in `MULTI_TURN`
                _api(module)

    def check(self, prompt: Prompt) -> None:
        """Raise if the row is not that of a task of several turns."""
        missing = {"id", "turns", "involved_classes", "ground_truth"} - set(prompt.row)
        if missing:
            raise ValueError(
                f"`BFCLEpisode` needs {min(missing)!r} of a task of several turns; take its "
                "questions from the source `BFCL`"
            )

    def roles(self, prompt: Prompt) -> tuple[str, ...]:
        """The role of the APIs' answers, and the user's."""
        return tuple(dict.fromkeys((self.role, "user")))

    def begin(self, prompt: Prompt) -> _Played:
        """An empty state: the first call makes the objects."""
        return _Played(owner=f"scsdpo{next(_numbers)}")

    def step(self, prompt: Prompt, state: _Played, response: str) -> Observation | Verdict:
        """The APIs' answers; after a response without calls the next message or the verdict."""
        later = chain.from_iterable(prompt.row["added"].values())
        asked = replace(prompt, tools=(*prompt.tools, *later))
        names = [tool["function"]["name"] for tool in asked.tools]
        calls: list[str] = []
        functions = {name: partial(self._call, prompt, state, calls, name) for name in names}
        observed = answered(functions, asked, response, self.role)
        if observed is None:
            return self._end_of_turn(prompt, state)
        if calls:
            state.called[-1].append(calls)
        state.steps += 1
        if state.steps > self.max_steps:
            return self._wrong(state, f"More than {self.max_steps} responses to a message.")
        return observed

    def finish(self, prompt: Prompt, state: _Played, response: str, why: str) -> Verdict:
        """The verdict on the calls in the last turn; before it the episode is wrong."""
        if len(state.called) < len(prompt.row["turns"]):
            return super().finish(prompt, state, response, why)
        ended = self._end_of_turn(prompt, state)
        assert isinstance(ended, Verdict)
        return ended

    def close(self, state: _Played) -> None:
        """Remove the episode's objects from the package."""
        _forget(state.owner)

    def _call(
        self, prompt: Prompt, state: _Played, calls: list[str], name: str, /, **arguments: Any
    ) -> str:
        if not all(key.isidentifier() for key in arguments):
            raise ValueError(f"`{name}` takes no argument of this name")
        given = ", ".join(f"{key}={_literal(value)}" for key, value in arguments.items())
        calls.append(f"{name}({given})")
        return _run(calls[-1], prompt.row, state.owner)

    def _end_of_turn(self, prompt: Prompt, state: _Played) -> Observation | Verdict:
        turn, row = len(state.called) - 1, prompt.row
        found = judged(row, state.called)
        if not found["valid"]:
            right = "; ".join(row["ground_truth"][turn]) or "none"
            hint = f" Right would have been: {right}." if self.reveal else ""
            return self._wrong(state, f"Message {turn + 1} of the user's: {_why(found)}{hint}")
        if turn + 1 == len(row["turns"]):
            return Verdict(reward=1.0, answer=json.dumps(state.called))
        state.called.append([])
        state.steps = 0
        messages: Sequence[Message] = row["turns"][turn + 1]
        return Observation(messages=tuple(messages))

    def _wrong(self, state: _Played, feedback: str) -> Verdict:
        return Verdict(reward=0.0, answer=json.dumps(state.called), feedback=feedback)


def judged(row: Mapping[str, Any], called: Sequence[Sequence[Sequence[str]]]) -> dict[str, Any]:
    """The result of BFCL's check of a task's first turns: `valid`, and the reason if not.

    Args:
        row: the task's row, as `entries` gives it.
        called: the calls of each response with calls, by turn.
    """
    owner = f"scsdpo{next(_numbers)}"
    try:
        found: dict[str, Any] = _check().multi_turn_checker(
            called, row["ground_truth"][: len(called)], dict(row), "", owner
        )
    finally:
        _forget(owner)
    return found


def _why(found: Mapping[str, Any]) -> str:
    kind = found["error_type"].rpartition(":")[2]
    if kind == "empty_turn_model_response":
        return "Nothing was called, and something should have been."
    if kind == "execution_response_mismatch":
        return "A call that was needed is not there, or has other arguments."
    # Names the objects and their attributes, without the right values.
    names = ", ".join(f"`{name}`" for name in found["details"]["differences"])
    return f"After the calls {names} is not as it was asked for."


def _run(call: str, row: Mapping[str, Any], owner: str) -> str:
    """The package's result of a call on the objects of `owner`, which the first call makes."""
    (result,), _ = _utils().execute_multi_turn_func_call(
        [call],
        row.get("initial_config", {}),
        row["involved_classes"],
        owner,
        row["id"],
        long_context="long_context" in row["id"],
    )
    return str(result)


def _literal(value: Any) -> str:
    """A JSON value as a Python literal, with brackets in strings escaped.

    The package puts an object's name before each known name that a bracket follows, also in
    strings.
    """
    return repr(value).replace("(", "\\x28")


def _check() -> Any:
    return _package("eval_checker.multi_turn_eval.multi_turn_checker")


def _utils() -> Any:
    return _package("eval_checker.multi_turn_eval.multi_turn_utils")


def _forget(owner: str) -> None:
    """Remove the objects of `owner`, which are globals of a module of the package."""
    held = vars(_utils())
    for name in [name for name in held if name.startswith(f"{owner}_")]:
        del held[name]


def _api(name: str) -> Callable[[], Any]:
    path = _package("constants.executable_backend_config").CLASS_FILE_PATH_MAPPING[name]
    api: Callable[[], Any] = getattr(_package(path.removeprefix("bfcl_eval.")), name)
    return api
