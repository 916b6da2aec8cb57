"""Calls as BFCL writes them, as a policy writes them, and what comes of them without our code."""

import ast
import importlib
import json
from collections import Counter
from copy import deepcopy

from scsdpo.prompt import Verdict

AT_A_TIME = 8
"""Calls of a response: BFCL's gold answers have up to 34 in a turn."""


def read(call, tools):
    """(function, arguments by name) of a call in Python, by the order in the function's schema."""
    node = ast.parse(call, mode="eval").body
    name = ast.unparse(node.func)
    (schema,) = [tool["function"] for tool in tools if tool["function"]["name"] == name]
    names, values = schema["parameters"]["properties"], map(ast.literal_eval, node.args)
    given = dict(zip(names, values, strict=False))  # others are named
    return name, given | {one.arg: ast.literal_eval(one.value) for one in node.keywords}


def gold(prompt):
    """The gold calls of each turn."""
    tools = [*prompt.tools, *(tool for added in prompt.row["added"].values() for tool in added)]
    return [[read(call, tools) for call in turn] for turn in prompt.row["ground_truth"]]


def written(calls):
    return "\n".join(
        f"<tool_call>{json.dumps({'name': name, 'arguments': given})}</tool_call>"
        for name, given in calls
    )


def responses(turns):
    """What a policy says that makes these calls, and ends each turn."""
    for calls in turns:
        for start in range(0, len(calls), AT_A_TIME):
            yield written(calls[start : start + AT_A_TIME])
        yield "Done."


def played(prompt, said):
    """The verdict, and what was observed before it."""
    state, observed = prompt.verifier.begin(prompt), []
    try:
        for response in said:
            answer = prompt.verifier.step(prompt, state, response)
            if isinstance(answer, Verdict):
                return answer, observed
            observed.append(answer)
        raise AssertionError("the episode has not ended")
    finally:
        prompt.verifier.close(state)


def reward(prompt, turns):
    verdict, _ = played(prompt, responses(turns))
    assert verdict.error == ""
    return verdict.reward


def outcome(prompt, turns):
    """By turn, what the calls give and the state after them, on the package's classes alone."""
    paths = importlib.import_module(
        "bfcl_eval.constants.executable_backend_config"
    ).CLASS_FILE_PATH_MAPPING
    objects = {}
    for api in prompt.row["involved_classes"]:
        objects[api] = getattr(importlib.import_module(paths[api]), api)()
        if api != "MathAPI":
            config = deepcopy(prompt.row["initial_config"].get(api, {}))
            objects[api]._load_scenario(config, long_context="long_context" in prompt.key)
    found = []
    for calls in turns:
        results = []
        for name, given in calls:
            (owner,) = [each for each in objects.values() if hasattr(each, name)]
            try:
                results.append(str(getattr(owner, name)(**given)))
            except Exception as error:
                results.append(f"raised {type(error).__name__}: {error}")
        state = {
            api: {key: value for key, value in vars(each).items() if key[0] != "_"}
            for api, each in objects.items()
        }
        found.append((results, deepcopy(state)))
    return found


def comes_to(prompt, turns):
    """Whether calls come to what the gold calls come to.

    After each turn for which there are gold calls every state is the same, and what the gold calls
    gave in it was given, in this turn or before.
    """
    given = Counter()
    for (results, state), (wanted, gold_state), calls, right in zip(
        outcome(prompt, turns), outcome(prompt, gold(prompt)), turns, gold(prompt), strict=True
    ):
        given.update(results)
        if right and (not calls or state != gold_state or Counter(wanted) - given):
            return False
    return True
