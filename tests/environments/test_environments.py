"""Tools and worlds as people have them."""

import json

import pytest

import worlds
from scsdpo.data import Records
from scsdpo.environments import SkyRLEnvironment, Tools, TRLEnvironment
from scsdpo.prompt import Observation, Prompt, Verdict
from scsdpo.verifiers import ExactMatch, MathAnswer

WRITES = {
    "hermes": '<tool_call>{"name": "%s", "arguments": %s}</tool_call>',
    "llama": '{"name": "%s", "parameters": %s}',
    "mistral": "[TOOL_CALLS]%s[ARGS]%s",
    "react": "Action: %s\nAction Input: %s",
}


def call(tool, form="hermes", **arguments):
    return WRITES[form] % (tool, json.dumps(arguments))


def asked(world, answer="5", **row):
    messages = ({"role": "user", "content": "What is 2 + 3?"},)
    return Prompt(key="q", messages=messages, verifier=world, answer=answer, row=row)


def said(observation):
    assert isinstance(observation, Observation), observation
    return [message["content"] for message in observation.messages]


@pytest.fixture
def tools():
    return Tools(tools=("worlds:add", "worlds:lookup"), verifier=MathAnswer(), max_turns=4)


@pytest.mark.parametrize("form", WRITES)
def test_functions_are_called_until_the_policy_answers(tools, form):
    prompt = asked(tools)
    state = tools.begin(prompt)
    observed = tools.step(prompt, state, call("add", form, a=2, b=3))
    assert observed.messages == ({"role": "tool", "name": "add", "content": "5"},)
    verdict = tools.step(prompt, state, "It is \\boxed{5}.")
    assert isinstance(verdict, Verdict) and verdict.reward == 1.0


def test_the_schemas_are_in_the_prompt(tools):
    prompt = asked(tools)
    assert [tool["function"]["name"] for tool in prompt.tools] == ["add", "lookup"]
    assert prompt.tools[0]["function"]["parameters"]["required"] == ["a", "b"]
    assert tools.roles(prompt) == ("tool",)


def test_parallel_calls_are_answered_in_their_order(tools):
    prompt = asked(tools)
    both = call("add", a=1, b=1) + call("lookup", city="Oslo")
    observed = tools.step(prompt, tools.begin(prompt), both)
    assert [m["name"] for m in observed.messages] == ["add", "lookup"]
    assert said(observed) == ["2", '{"degrees": 12}']


@pytest.mark.parametrize(
    ("response", "words"),
    [
        ('<tool_call>{"name": "add", "arguments": {"a": 1,</tool_call>', "not valid JSON"),
        (call("sub", a=1), "there is no tool `sub`; there are add, lookup"),
        (call("add", a=1), "missing a required argument: 'b'"),
        (call("add", a=1, b=2, c=3), "unexpected keyword argument 'c'"),
        (call("lookup", city="Rome"), "KeyError: 'Rome'"),
        (call("add", a=1, b="x"), "TypeError"),
        ('<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>', "must be a JSON object"),
        (call("add", a=1, b=1) * 17, "at most 16 calls at a time, and these are 17"),
    ],
)
def test_what_cannot_be_called_is_told_to_the_policy(tools, response, words):
    prompt = asked(tools)
    observed = tools.step(prompt, tools.begin(prompt), response)
    (text,) = said(observed)
    assert text.startswith("Error: ") and words in text
    assert observed.calls == observed.failed == (17 if "17" in words else 1)


def test_calls_are_counted_and_those_that_failed(tools):
    prompt = asked(tools)
    calls = call("add", a=1, b=1) + call("lookup", city="Rome") + call("lookup", city="Oslo")
    observed = tools.step(prompt, tools.begin(prompt), calls)
    assert (observed.calls, observed.failed) == (3, 1)
    assert [text[:7] for text in said(observed)] == ["2", "Error: ", '{"degre']


def test_an_answer_in_json_is_no_broken_call():
    world = Tools(tools=("worlds:add",), verifier=ExactMatch())
    prompt = asked(world, '{"x": 1}')
    verdict = world.step(prompt, world.begin(prompt), '{"x": 1}')
    assert isinstance(verdict, Verdict)


def test_calls_in_thinking_are_drafts(tools):
    prompt = asked(tools)
    draft = f"<think>{call('add', a=1, b=1)}</think>\\boxed{{5}}"
    assert tools.step(prompt, tools.begin(prompt), draft).reward == 1.0
    behind = f"<think>{call('add', a=1, b=1)}</think>{call('add', a=2, b=2)}"
    assert said(tools.step(prompt, tools.begin(prompt), behind)) == ["4"]


def test_bare_texts_are_what_the_schema_wants(tools):
    prompt = asked(tools)
    text = "<tool_call><function=add><parameter=a>1</parameter><parameter=b>2</parameter>"
    assert said(tools.step(prompt, tools.begin(prompt), f"{text}</function></tool_call>")) == ["3"]


def test_the_last_turn_is_judged_as_answer(tools):
    prompt = asked(tools)
    state = tools.begin(prompt)
    answers = [tools.step(prompt, state, call("add", a=1, b=1)) for _ in range(4)]
    assert [type(a) for a in answers] == [Observation] * 3 + [Verdict]
    assert answers[-1].reward == 0.0 and answers[-1].stopped == "turns"
    for last, stopped in (("\\boxed{5}", ""), ("<tool_call>{", "turns")):
        state = tools.begin(prompt)
        for text in (call("add", a=1, b=1),) * 3:
            tools.step(prompt, state, text)
        assert tools.step(prompt, state, last).stopped == stopped
    vault = TRLEnvironment(factory="worlds:Vault", max_turns=1)
    prompt = asked(vault, "", secret=7)
    assert vault.step(prompt, vault.begin(prompt), call("listen")).stopped == "turns"
    assert vault.step(prompt, vault.begin(prompt), "Done.").stopped == ""


def test_tools_may_answer_as_the_user():
    world = Tools(tools=("worlds:add",), verifier=MathAnswer(), role="user")
    prompt = asked(world)
    observed = world.step(prompt, world.begin(prompt), call("add", a=1, b=1))
    assert observed.messages == ({"role": "user", "content": "add: 2"},)
    assert world.roles(prompt) == ("user",)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Tools(tools=(), verifier=MathAnswer()), "at least one function"),
        (lambda: Tools(tools=("worlds:none",), verifier=MathAnswer()), "has no attribute 'none'"),
        (lambda: Tools(tools=("worlds",), verifier=MathAnswer()), "must read `module:function`"),
        (
            lambda: Tools(tools=("worlds:untyped",), verifier=MathAnswer()),
            r"`Tools\(tools=\['worlds:untyped'\]\)`: `untyped` cannot be described to a model",
        ),
        (
            lambda: Tools(tools=("worlds:add", "worlds:add"), verifier=MathAnswer()),
            "two functions `add`",
        ),
        (lambda: TRLEnvironment(factory="worlds:Lamp"), "has no method `get_reward`"),
        (lambda: TRLEnvironment(factory="worlds:add"), "must be a class with a method `reset`"),
        (lambda: TRLEnvironment(factory={}), "must name a class, got none"),
        (lambda: SkyRLEnvironment(factory="worlds:Sum"), "has no attribute 'Sum'"),
    ],
)
def test_mistakes_are_told_when_it_is_made(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# --- TRL's ----------------------------------------------------------------------------------------


def test_a_class_of_trl_plays_as_it_is():
    world = TRLEnvironment(factory="worlds:Vault")
    prompt = asked(world, "", secret=7)
    assert [tool["function"]["name"] for tool in prompt.tools] == ["listen", "turn"]
    state = world.begin(prompt)
    # What `reset` says is shown (it is dropped where TRL 6067 bites).
    (opening,) = world.opening(prompt, state)
    assert opening["content"] == "What is 2 + 3?\n\nThe vault has 2 digits."
    assert said(world.step(prompt, state, call("listen"))) == ["Tick."]
    assert said(world.step(prompt, state, call("turn", number=9))) == ["lower"]
    assert said(world.step(prompt, state, call("turn", number=7))) == ["It opens."]
    # Its reward arrives, though `get_reward` is async (TRL 6027).
    assert world.step(prompt, state, "Done.") == Verdict(reward=0.5, answer="Done.")


def test_states_are_apart():
    world = TRLEnvironment(factory="worlds:Vault")
    one, other = asked(world, "", secret=1), asked(world, "", secret=2)
    first, second = world.begin(one), world.begin(other)
    assert said(world.step(one, first, call("turn", number=1))) == ["It opens."]
    assert said(world.step(other, second, call("turn", number=1))) == ["higher"]


def test_a_reward_function_reads_the_environment():
    world = TRLEnvironment(factory="worlds:Lamp", reward="worlds:lit")
    prompt = asked(world, "")
    state = world.begin(prompt)
    assert world.opening(prompt, state) == prompt.messages
    assert said(world.step(prompt, state, call("press"))) == ["on: True"]
    assert world.step(prompt, state, "It is on.").reward == 1.0
    state = world.begin(prompt)
    assert world.finish(prompt, state, "", "no room").reward == 0.0


def test_the_row_chooses_among_several(tmp_path):
    world = TRLEnvironment(
        factory={"vault": "worlds:Vault", "lamp": "worlds:Lamp"}, reward="worlds:lit"
    )
    rows = [
        {"prompt": "Open it.", "environment": "vault", "secret": 3},
        {"prompt": "Open it.", "environment": "vault", "secret": 4},
        {"prompt": "Light it.", "environment": "lamp", "secret": None},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = Records(str(path), world, answer="", columns=("environment", "secret"))
    names = [[tool["function"]["name"] for tool in prompt.tools] for prompt in source.read()]
    assert names == [["listen", "turn"], ["listen", "turn"], ["press"]]
    # Questions that differ in what the environment reads are different questions.
    assert len({prompt.key for prompt in source.read()}) == 3
    path.write_text(json.dumps(rows[0] | {"environment": "tower"}))
    again = Records(str(path), world, answer="", columns=("environment", "secret"))
    with pytest.raises(ValueError, match=r"line 1: .*'vault', 'lamp', and .* is 'tower'"):
        list(again.read())  # at the start, and not in mid-run (TRL 6002)


def test_gold_answers_are_needed_where_they_are_compared(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Hello."}))
    with pytest.raises(ValueError, match="MathAnswer compares with one; name their column"):
        Records(str(path), MathAnswer(), answer="")
    with pytest.raises(ValueError, match="Tools compares with one"):
        Records(str(path), Tools(tools=("worlds:add",), verifier=MathAnswer()), answer="")


# --- skyrl-gym's ----------------------------------------------------------------------------------


def test_an_environment_of_skyrl_plays_as_it_is():
    world = SkyRLEnvironment(factory="worlds:Sums", arguments={"most": 3})
    prompt = asked(world, "", wanted="5")
    state = world.begin(prompt)
    assert [m["role"] for m in world.opening(prompt, state)] == ["system", "user"]
    answer = world.step(prompt, state, "4")
    assert said(answer) == ["Try again."] and answer.reward == 0.1
    verdict = world.step(prompt, state, "5")
    assert verdict.reward == pytest.approx(0.1 + 0.6) and verdict.answer == "5"
    assert verdict.earned == 0.1  # the last turn's is the rest
    world.close(state)
    assert state.world.closed
    state = world.begin(prompt)
    world.step(prompt, state, "4")
    verdict = world.finish(prompt, state, "", "no room")
    assert verdict.reward == verdict.earned == 0.1


def test_the_whole_response_is_shown_to_worlds_that_read_tags():
    world = SkyRLEnvironment(factory="worlds:Sums", arguments={"most": 3})
    prompt = asked(world, "", wanted="<think>5</think>")
    assert world.step(prompt, world.begin(prompt), "<think>5</think>").reward > 0.5


def test_worlds_travel_to_other_processes(tools):
    import pickle

    for world in (tools, TRLEnvironment(factory="worlds:Vault"), worlds.Echo()):
        assert pickle.loads(pickle.dumps(asked(world))).verifier == world
