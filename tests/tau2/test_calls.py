"""tau2-bench's tasks with a scripted customer: `make test-tau2`."""

import json

import pytest

from scsdpo.data import Tau2
from scsdpo.environments.tau2 import GO_ON
from scsdpo.prompt import Observation, Verdict

LOOKS = ("get_", "search_", "list_", "calculate", "transfer_")
"""Functions that leave the database as it is begin so."""


@pytest.fixture(scope="module")
def airline():
    return Tau2("airline", "all").prompts


def call(name, given):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': given})}</tool_call>"


def criteria(prompt):
    return json.loads(prompt.row["task"])["evaluation_criteria"]


def actions(prompt):
    return [(one["name"], one["arguments"]) for one in criteria(prompt)["actions"]]


def played(prompt, calls, *texts):
    """The verdict on these calls, each in a response of its own, and then these words."""
    state, observed = prompt.verifier.begin(prompt), []
    for response in (*(call(*one) for one in calls), *texts):
        answer = prompt.verifier.step(prompt, state, response)
        if isinstance(answer, Verdict):
            return answer, observed
        observed.append(answer)
    raise AssertionError("the episode has not ended")


def told(prompt):
    return ("Done. " + " ".join(criteria(prompt)["communicate_info"] or ()), "It is.", "Bye.")


def test_the_splits_are_the_packages_own():
    sizes = {split: len(Tau2("airline", split).prompts) for split in ("train", "val", "all")}
    assert sizes == {"train": 30, "val": 20, "all": 50}
    keys = [{prompt.key for prompt in Tau2("airline", split).prompts} for split in ("train", "val")]
    assert not keys[0] & keys[1]
    assert len(Tau2("mock", "train").prompts) == 5  # judged without a model, from the beginning


@pytest.mark.parametrize("tenth", range(10))
def test_gold_actions_score_1(airline, tenth):
    for prompt in airline[tenth::10]:
        verdict, observed = played(prompt, actions(prompt), *told(prompt))
        assert verdict.reward == 1, (prompt.key, verdict)
        assert [one.messages[0]["content"] for one in observed[-2:]] == [GO_ON, GO_ON]


def test_gold_actions_of_the_mock_score_1_and_none_scores_0():
    for prompt in Tau2("mock", "all").prompts:
        assert played(prompt, actions(prompt), *told(prompt))[0].reward == 1
        assert played(prompt, [], *told(prompt))[0].reward == 0


@pytest.mark.parametrize("kind", ["dropped", "another value", "one more"])
def test_another_state_of_the_database_scores_0(airline, kind):
    found = 0
    for prompt in airline:
        right = actions(prompt)
        writes = [i for i, (name, _) in enumerate(right) if not name.startswith(LOOKS)]
        if not writes or found == 6:
            continue
        at = writes[-1]
        name, given = right[at]
        if kind == "dropped":
            wrong = [*right[:at], *right[at + 1 :]]
        elif kind == "another value":
            key = next(key for key, value in given.items() if isinstance(value, str))
            wrong = [*right[:at], (name, {**given, key: given[key] + "X"}), *right[at + 1 :]]
        else:
            user = json.loads(prompt.row["task"])["user_scenario"]["instructions"]["known_info"]
            ids = [word.strip(".'") for word in user.split() if word.count("_") == 2]
            if not ids:
                continue
            wrong = [*right, ("send_certificate", {"user_id": ids[0], "amount": 17})]
        verdict, _ = played(prompt, wrong, *told(prompt))
        assert verdict.reward == 0 and "What was done is not what" in verdict.feedback
        found += 1
    assert found == 6


def test_what_had_to_be_said_is_missed(airline):
    asked = [prompt for prompt in airline if criteria(prompt)["communicate_info"]]
    assert asked
    for prompt in asked[:3]:
        verdict, _ = played(prompt, actions(prompt), "Done.", "It is.", "Bye.")
        assert verdict.reward == 0 and "was not told what had to be said" in verdict.feedback


def test_the_rules_and_the_notes_are_the_prompt(airline):
    system, user = airline[0].messages
    assert system["role"] == "system" and "Airline Agent Policy" in system["content"]
    assert "You want to cancel reservation EHGLP3" in user["content"]
    assert "book_reservation" in [tool["function"]["name"] for tool in airline[0].tools]


def test_a_wrong_call_is_answered_and_costs_nothing(airline):
    prompt = airline[0]
    state = prompt.verifier.begin(prompt)
    for name, given, says in (
        ("get_user_details", {"user_id": "nobody"}, "Error: User nobody not found"),
        ("get_user_details", {"requestor": "user"}, "Error: "),
        ("get_user_details", {"name": 1, "state": 2}, "Error: "),
        ("no_such_tool", {}, "Error: there is no tool `no_such_tool`"),
    ):
        answer = prompt.verifier.step(prompt, state, call(name, given))
        assert isinstance(answer, Observation) and says in answer.messages[0]["content"]


def test_a_call_that_does_not_end_scores_0():
    prompt = Tau2("mock", "all", max_steps=3).prompts[0]
    verdict, observed = played(prompt, [("get_users", {})] * 3)
    assert verdict.reward == 0 and len(observed) == 2 and "after 3 responses" in verdict.feedback


def test_worlds_are_apart():
    prompt = Tau2("mock", "all").prompts[0]
    assert played(prompt, actions(prompt) * 2, *told(prompt))[0].reward == 0
    assert played(prompt, actions(prompt), *told(prompt))[0].reward == 1
