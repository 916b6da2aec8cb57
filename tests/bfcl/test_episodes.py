"""BFCL's tasks of several turns, through the environment: `make test-bfcl`."""

import json
from collections import Counter

import pytest
from trajectories import comes_to, gold, outcome, played, responses, reward, written

from scsdpo.data import BFCL
from scsdpo.environments.bfcl import MULTI_TURN, judged
from scsdpo.prompt import Observation, Verdict
from scsdpo.verifiers import Episodes, Verification, VerifierPool

EXTRA = {
    "GorillaFileSystem": [("mkdir", {"dir_name": "not_asked_for"})],
    "MessageAPI": [("add_contact", {"user_name": "Nobody"})],
    "TicketAPI": [("logout", {}), ("ticket_login", {"username": "nobody", "password": "none"})],
    "TradingBot": [("trading_logout", {}), ("trading_login", {"username": "a", "password": "b"})],
    "TravelAPI": [
        (
            "authenticate_travel",
            {
                "client_id": "nobody",
                "client_secret": "none",
                "refresh_token": "none",
                "grant_type": "read",
                "user_first_name": "No",
                "user_last_name": "Body",
            },
        )
    ],
    "TwitterAPI": [
        ("follow_user", {"username_to_follow": "not_asked_for"}),
        ("authenticate_twitter", {"username": "nobody", "password": "none"}),
    ],
    "VehicleControlAPI": [
        ("pressBrakePedal", {"pedalPosition": 0.37}),
        ("adjustClimateControl", {"temperature": 11.5}),
    ],
}
"""Calls that change a state; of each API the first one that does."""


@pytest.fixture(scope="module")
def base():
    return BFCL(["multi_turn_base"], "all").prompts


def other(value):
    """Another value of the same type."""
    if isinstance(value, str):
        return value + "_"
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, "x"] if isinstance(value, list) else {**value, "x": 1}


def changed(turns, turn, calls):
    return [calls if number == turn else old for number, old in enumerate(turns)]


def places(turns):
    return [(turn, place) for turn, calls in enumerate(turns) for place in range(len(calls))]


def rewards(tasks):
    """How many are scored 0, and how many 1: always what the package's classes alone say."""
    found = Counter()
    for prompt, turns in tasks:
        score = reward(prompt, turns)
        assert score == comes_to(prompt, turns), (prompt.key, turns)
        found[score] += 1
    return found


@pytest.mark.parametrize("category", MULTI_TURN)
def test_all_gold_trajectories_score_1(category):
    prompts = BFCL([category], "all").prompts
    assert len(prompts) == 200
    assert [prompt.key for prompt in prompts if reward(prompt, gold(prompt)) != 1] == []


def test_calls_one_at_a_time_and_with_text_around_them_score_1(base):
    for prompt in base[::10]:
        said = []
        for calls in gold(prompt):
            said += [f"I call it.\n{written([call])}" for call in calls] + ["That is all."]
        assert played(prompt, said)[0].reward == 1


def test_a_dropped_call_scores_0(base):
    def dropped():
        for prompt in base:
            turns = gold(prompt)
            for turn, place in places(turns):
                calls = turns[turn][:place] + turns[turn][place + 1 :]
                yield prompt, changed(turns, turn, calls)

    # Of multi_turn_base_113 a call gives what another one gave in the turn before.
    assert rewards(dropped()) == {0: 1141, 1: 1}


def test_a_call_to_another_function_scores_0(base):
    def replaced():
        for prompt in base:
            turns, names = gold(prompt), [tool["function"]["name"] for tool in prompt.tools]
            for turn, place in places(turns):
                name, given = turns[turn][place]
                others = [each for each in names if each != name]
                calls = list(turns[turn])
                calls[place] = (others[(turn + place) % len(others)], given)
                yield prompt, changed(turns, turn, calls)

    found = rewards(replaced())
    assert found[0] > 1100 and found[1] < 15  # which give the same error, or the same list


def test_a_wrong_argument_scores_0_unless_it_changes_nothing(base):
    def altered():
        for prompt in base:
            turns = gold(prompt)
            for turn, place in places(turns):
                name, given = turns[turn][place]
                for key, value in given.items():
                    calls = list(turns[turn])
                    calls[place] = (name, {**given, key: other(value)})
                    yield prompt, changed(turns, turn, calls)

    found = rewards(altered())
    assert found[0] > 1700 and found[1] < 200  # a password that nobody checks, lines that end first


def test_another_order_scores_0_where_it_matters(base):
    def reversed_turns():
        for prompt in base:
            turns = gold(prompt)
            for turn, calls in enumerate(turns):
                if len(calls) > 1:
                    yield prompt, changed(turns, turn, calls[::-1])

    found = rewards(reversed_turns())
    assert found[0] > 130 and found[1] > 100  # BFCL lets independent calls come in any order


@pytest.mark.parametrize("api", EXTRA)
def test_an_extra_call_that_changes_a_state_scores_0(base, api):
    found = 0
    for prompt in base:
        turns = gold(prompt)
        if api not in prompt.row["involved_classes"] or not turns[-1]:
            continue
        before = outcome(prompt, turns)[-1][1]
        for call in EXTRA[api]:
            more = [*turns[:-1], [*turns[-1], call]]
            if outcome(prompt, more)[-1][1] != before:
                assert reward(prompt, more) == 0, prompt.key
                found += 1
                break
    assert found >= 20


def test_an_extra_call_that_only_looks_scores_1(base):
    looks = {"GorillaFileSystem": "pwd", "TradingBot": "get_current_time"}
    for prompt in base[::7]:
        for api in looks.keys() & prompt.row["involved_classes"]:
            turns = gold(prompt)
            assert reward(prompt, [*turns[:-1], [*turns[-1], (looks[api], {})]]) == 1


def test_a_turn_without_calls_ends_the_episode_and_says_which(base):
    verdict, observed = played(base[0], ["I would rather not.", "Done."])
    assert verdict.reward == 0 and observed == []
    assert verdict.feedback == (
        "Message 1 of the user's: Nothing was called, and something should have been."
    )


def test_feedback_names_the_state_and_not_what_it_should_be(base):
    turns = gold(base[0])
    turns[0][1] = ("mkdir", {"dir_name": "tmp"})
    verdict, _ = played(base[0], responses(turns))
    assert verdict.feedback == (
        "Message 1 of the user's: After the calls `root` is not as it was asked for."
    )
    told = BFCL(["multi_turn_base"], "all", reveal=True).prompts[0]
    verdict, _ = played(told, responses(turns))
    assert (
        "Right would have been: cd(folder='document'); mkdir(dir_name='temp')" in verdict.feedback
    )


def test_the_user_speaks_turn_by_turn_and_the_apis_answer_between(base):
    prompt, (first, *others) = base[0], base[0].row["turns"]
    assert prompt.messages == tuple(first)
    _, observed = played(prompt, responses(gold(prompt)))
    said = [one.messages for one in observed if one.messages[0]["role"] == "user"]
    assert said == [tuple(turn) for turn in others]
    assert observed[0].messages[0] == {
        "role": "tool",
        "name": "cd",
        "content": '{"current_working_directory": "document"}',
    }
    assert prompt.verifier.roles(prompt) == ("tool", "user")


def test_functions_that_come_later_are_shown_by_the_user_then():
    (prompt, *_) = BFCL(["multi_turn_miss_func"], "all").prompts
    ((turn, added),) = prompt.row["added"].items()
    names = {tool["function"]["name"] for tool in added}
    assert names and not names & {tool["function"]["name"] for tool in prompt.tools}
    (message,) = prompt.row["turns"][turn]
    assert "I have updated some more functions" in message["content"]
    assert all(f'"name": "{name}"' in message["content"] for name in names)


@pytest.mark.parametrize(
    ("response", "says"),
    [
        (written([("no_such_tool", {})]), "Error: there is no tool `no_such_tool`"),
        (written([("_load_scenario", {"scenario": {}})]), "there is no tool `_load_scenario`"),
        (written([("cd", {"nowhere": 1})]), "Error during execution"),
        (written([("cd", {"a=1, b": 1})]), "Error: ValueError: `cd` takes no argument of this"),
        (written([("cd", {"self": 1, "name": 2})]), "Error during execution"),
        ('<tool_call>{"name": "cd", "arguments": {"folder"</tool_call>', "Error: "),
    ],
)
def test_what_cannot_be_called_is_told_and_no_code_runs(base, response, says):
    state = base[0].verifier.begin(base[0])
    answer = base[0].verifier.step(base[0], state, response)
    assert isinstance(answer, Observation) and says in answer.messages[0]["content"]
    base[0].verifier.close(state)


HOSTILE = (
    "'); open('{mark}', 'w'); ('",
    "x' + open('{mark}', 'w').name + 'x",
    "\\'); open('{mark}', 'w') #",
    "mkdir (open('{mark}', 'w'))",
    "__import__('os').system('touch {mark}')",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_stay_texts(base, text, tmp_path):
    mark = tmp_path / "mark"
    text = text.format(mark=mark)
    prompt = base[0]
    state = prompt.verifier.begin(prompt)
    for name, given in (
        ("echo", {"content": text}),
        ("touch", {"file_name": "note"}),
        ("echo", {"content": text, "file_name": "note"}),
        ("cat", {"file_name": "note"}),
    ):
        answer = prompt.verifier.step(prompt, state, written([(name, given)]))
        (message,) = answer.messages
        if name == "cat" or "file_name" not in given:
            assert text in json.loads(message["content"]).values(), message
    prompt.verifier.step(prompt, state, written([("cd", {f"folder={text}, x": "a"})]))
    prompt.verifier.close(state)
    assert not mark.exists()


def test_a_message_has_20_responses_that_call(base):
    prompt = base[0]
    verdict, observed = played(prompt, [written([("pwd", {})])] * 21)
    assert len(observed) == 20 and verdict.reward == 0
    assert verdict.feedback == "More than 20 responses to a message."
    short = BFCL(["multi_turn_base"], "all", max_steps=1).prompts[0]
    assert len(played(short, [written([("pwd", {})])] * 2)[1]) == 1


def test_a_cut_in_the_last_turn_is_judged_and_one_before_is_not(base):
    prompt = base[0]
    said = [*responses(gold(prompt))][:-1]
    state = prompt.verifier.begin(prompt)
    for response in said:
        prompt.verifier.step(prompt, state, response)
    assert prompt.verifier.finish(prompt, state, "So I have", "it was cut").reward == 1
    state = prompt.verifier.begin(prompt)
    prompt.verifier.step(prompt, state, said[0])
    early = prompt.verifier.finish(prompt, state, "So", "it was cut")
    assert early.reward == 0 and "it was cut" in early.feedback


def test_calls_in_thinking_are_drafts(base):
    prompt = base[0]
    state = prompt.verifier.begin(prompt)
    draft = f"<think>{written([('pwd', {})])}</think>Done."
    assert isinstance(prompt.verifier.step(prompt, state, draft), Verdict)


def test_nothing_is_left_behind_and_episodes_do_not_meet(base):
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils

    before = set(vars(multi_turn_utils))
    prompt = base[0]
    one, two = prompt.verifier.begin(prompt), prompt.verifier.begin(prompt)
    prompt.verifier.step(prompt, one, written([("cd", {"folder": "document"})]))
    looked = prompt.verifier.step(prompt, two, written([("pwd", {})]))
    assert json.loads(looked.messages[0]["content"])["current_working_directory"] == "/workspace"
    prompt.verifier.close(one)
    prompt.verifier.close(two)
    judged(prompt.row, [[["cd(folder='document')"]]])
    assert set(vars(multi_turn_utils)) == before


def test_the_package_writes_nothing_beside_itself(base):
    """Its module of settings makes folders where it is imported; we do not import it."""
    import sys

    assert reward(base[0], gold(base[0])) == 1
    assert "bfcl_eval.constants.eval_config" not in sys.modules
    assert "torch" not in vars(sys.modules["scsdpo.environments.bfcl"])


def test_all_gold_trajectories_score_1_in_the_processes_that_judge(base):
    pool = VerifierPool(Verification(workers=2, turn_deadline=20.0, episode_deadline=100.0))
    said = [list(responses(gold(prompt))) for prompt in base]
    verdicts, turn = {}, Counter()
    try:
        with Episodes(pool, base, 1) as episodes:
            episodes.open()
            for row, texts in enumerate(said):
                episodes.submit(row, texts[0])
            while len(verdicts) < len(said):
                for row, answer in episodes.answers(wait=True):
                    if isinstance(answer, Verdict):
                        verdicts[row] = answer
                    else:
                        turn[row] += 1
                        episodes.submit(row, said[row][turn[row]])
    finally:
        pool.close()
    assert [verdicts[row].error for row in verdicts if verdicts[row].error] == []
    assert [verdicts[row].reward for row in range(200)] == [1] * 200
