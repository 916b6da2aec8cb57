"""BFCL as a source, and its tasks of one response: `make test-bfcl`."""

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from trajectories import written

from scsdpo.data import BFCL
from scsdpo.data.bfcl import split_of
from scsdpo.environments.bfcl import MULTI_TURN, SINGLE_TURN
from scsdpo.verifiers import Verification, VerifierPool
from test_configs import CONFIGS, scsdpo, small  # noqa: F401 - a fixture

SIZES = {
    "simple_python": 400,
    "simple_java": 100,
    "simple_javascript": 50,
    "multiple": 200,
    "parallel": 200,
    "parallel_multiple": 200,
    "irrelevance": 240,
    "live_simple": 256,  # of 258
    "live_multiple": 1053,
    "live_parallel": 16,
    "live_parallel_multiple": 24,
    "live_irrelevance": 884,
    "live_relevance": 16,
}
WITH_CALLS = [name for name in SINGLE_TURN if "relevance" not in name]


@pytest.fixture(scope="module")
def prompts():
    return {name: BFCL([name], "all").prompts for name in (*MULTI_TURN, *SINGLE_TURN)}


def verified(prompt, response):
    verdict = prompt.verifier.verify(prompt, response)
    assert verdict.error == ""
    return verdict.reward


def test_the_categories_are_the_packages_own():
    from bfcl_eval.constants import category_mapping

    assert list(MULTI_TURN) == category_mapping.MULTI_TURN_CATEGORY
    assert sorted(category_mapping.SINGLE_TURN_CATEGORY) == sorted(SINGLE_TURN)


def test_every_category_is_there_whole(prompts):
    sizes = {name: len(found) for name, found in prompts.items()}
    assert sizes == dict.fromkeys(MULTI_TURN, 200) | SIZES
    for name, found in prompts.items():
        assert {prompt.category for prompt in found} == {name}
        assert len({prompt.key for prompt in found}) == len(found)


def test_tools_are_json_schemas(prompts):
    kinds = set()

    def walk(schema):
        kinds.add(schema.get("type"))
        for one in schema.get("properties", {}).values():
            walk(one)
        if isinstance(schema.get("items"), dict):
            walk(schema["items"])

    for prompt in (prompt for found in prompts.values() for prompt in found):
        for tool in prompt.tools:
            assert tool["type"] == "function"
            walk(tool["function"]["parameters"])
    assert kinds <= {"object", "array", "string", "number", "integer", "boolean", None}


def test_the_split_is_by_number_and_variants_of_a_task_stay_together(prompts):
    assert split_of("multi_turn_base_15") == split_of("live_simple_20-3-14") == "val"
    assert split_of("multi_turn_base_151") == split_of("live_simple_19-5-10") == "train"
    for name, found in prompts.items():
        train, val = (BFCL([name], split).prompts for split in ("train", "val"))
        keys = [[prompt.key for prompt in part] for part in (train, val)]
        assert sorted(chain(*keys)) == sorted(prompt.key for prompt in found)
        assert len(val) == pytest.approx(len(found) / 5, abs=1.5)
    sides = {
        name: {prompt.key.rsplit("_", 1)[1] for prompt in BFCL([name], "val").prompts}
        for name in MULTI_TURN
    }
    assert len({frozenset(side) for side in sides.values()}) == 1


def test_each_group_of_apis_is_in_both_splits():
    for split, count in (("train", 160), ("val", 40)):
        found = BFCL(["multi_turn_base"], split).prompts
        apis = Counter(api for prompt in found for api in prompt.row["involved_classes"])
        assert len(found) == count and len(apis) == 8 and min(apis.values()) >= 2


@pytest.mark.parametrize("name", SINGLE_TURN)
def test_gold_answers_score_1(prompts, name):
    for prompt in prompts[name]:
        prompt.verifier.check(prompt)
        tool = prompt.tools[0]["function"]["name"] if prompt.tools else ""
        response = prompt.verifier.written(prompt) or written([(tool, {})])
        assert verified(prompt, response) == 1, prompt.key


@pytest.mark.parametrize("name", WITH_CALLS)
def test_wrong_calls_score_0(prompts, name):
    for prompt in prompts[name]:
        calls = [
            json.loads(one)
            for one in re.findall(
                r"<tool_call>(.*?)</tool_call>", prompt.verifier.written(prompt), re.DOTALL
            )
        ]
        pairs = [(call["name"], call["arguments"]) for call in calls]
        (tool, given), *others = pairs
        assert verified(prompt, written(pairs[::-1])) == 1  # in any order
        wrong = [
            "I cannot do that.",
            written(others),
            written([*pairs, pairs[0]]),
            written([(tool + "x", given), *others]),
            written([(tool, {**given, "no_such_argument": 1}), *others]),
            written([(tool, [given]), *others]),
        ]
        gold = json.loads(prompt.answer)
        for key in given:
            if "" not in gold[0][tool][key]:
                less = {name: value for name, value in given.items() if name != key}
                wrong.append(written([(tool, less), *others]))
            wrong.append(written([(tool, {**given, key: {"other": [given[key]]}}), *others]))
        assert [text for text in wrong if verified(prompt, text)] == [], prompt.key


@pytest.mark.parametrize("name", ["irrelevance", "live_irrelevance"])
def test_a_call_scores_0_where_nothing_fits(prompts, name):
    for prompt in prompts[name]:
        assert verified(prompt, "None of the functions does that.") == 1
        assert verified(prompt, written([("anything", {})])) == 0
        assert verified(prompt, '<tool_call>{"name": "any') == 0


def test_any_call_to_an_offered_function_scores_1_where_one_fits(prompts):
    for prompt in prompts["live_relevance"]:
        tool = prompt.tools[-1]["function"]["name"]
        assert verified(prompt, written([(tool, {"x": 1})])) == 1
        assert verified(prompt, written([("no_such_function", {})])) == 0
        assert verified(prompt, "I do not know.") == 0


def test_a_system_turn_of_ones_own_stands_before_that_of_the_task(prompts):
    (number,) = [
        place
        for place, prompt in enumerate(prompts["live_parallel"])
        if prompt.messages[0]["role"] == "system"
    ]
    told = BFCL(["live_parallel"], "all", system_prompt="Be brief.").prompts
    own = prompts["live_parallel"][number].messages[0]["content"]
    assert told[number].messages[0]["content"] == f"Be brief.\n\n{own}"
    assert {prompt.messages[0]["role"] for prompt in told} == {"system"}
    assert {prompt.messages[-1]["role"] for prompt in told} == {"user"}


def test_the_pool_judges_single_turns(prompts):
    asked = [prompts[name][0] for name in WITH_CALLS]
    pool = VerifierPool(Verification(deadline=10.0))
    try:
        texts = [[prompt.verifier.written(prompt), "No."] for prompt in asked]
        verdicts = pool.verify(asked, texts)
    finally:
        pool.close()
    assert [[each.reward for each in row] for row in verdicts] == [[1, 0]] * len(asked)


def test_a_run_trains_on_it(qwen3, scsdpo):  # noqa: F811
    """From the command to a checkpoint, with a random model."""
    task = ("--config", CONFIGS / "tasks" / "bfcl.yaml", "--data.max_prompt_tokens=200000")
    short = (
        "--trainer.limit_train_batches=1",
        "--trainer.limit_val_batches=1",
        "--trainer.num_sanity_val_steps=0",
    )
    arguments = [*small(qwen3), *task, *short, "--data.val_questions_per_batch=1"]
    assert scsdpo("fit", "--config", CONFIGS / "qwen3.yaml", *arguments) in (0, None)
    rows = [
        json.loads(line)
        for file in Path().rglob("rollouts/train_*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert {row["category"] for row in rows} == {"multi_turn_base"}
    assert {row["reward"] for row in rows} == {0} and not any(row["error"] for row in rows)
