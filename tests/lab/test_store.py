"""The lab's store: its rules by enumeration, scripts that do not learn, the policy that ships."""

import json
import random
import sys
from dataclasses import replace
from itertools import islice, product
from math import sqrt
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from pretrain_store import (
    TRAIN_SAMPLING,
    Mixture,
    Script,
    best_script,
    examples,
    play,
    respond,
    right_script,
    score,
    scripts,
    store_tokenizer,
)
from supervised import RECORD, Example, Turn, batches

from scsdpo.environments.store import CITIES, COOLED, GOODS, WRAPPED, Store
from scsdpo.lab import StoreTasks
from scsdpo.lab.store import KEPT, STOCKS
from scsdpo.policy import SHIPPED, TINY_TOOLS_FOLDER, CausalLM, Chat
from scsdpo.rollout import HFRollout
from scsdpo.types import Prompt
from scsdpo.verifiers import Episodes, Verification, VerifierPool

GRID = len(GOODS) * len(CITIES)
"""Requests in which each good goes to each city once."""


def request(good="figs", city="Oslo", keep=2, stock=7, store=Store()):
    messages = ({"role": "user", "content": f"Send {good} to {city}, keep {keep}."},)
    row = {"good": good, "city": city, "keep": keep, "stock": stock}
    return Prompt(key="q", messages=messages, verifier=store, answer="", row=row)


def call(tool, **arguments):
    return f"Action: {tool}\nAction Input: {json.dumps(arguments)}"


def said(episode):
    return [part.text for part in episode.parts if part.role == "tool"]


# ------------------------------------------------------------------ the world


def test_a_parcel_is_right_iff_number_place_and_both_cares_are():
    for good, city, wraps, cools in product(GOODS, CITIES, *2 * [(False, True)]):
        script = Script(wraps=wraps, cools=cools)
        verdict = play(request(good, city), script.calls(request(good, city).row)).verdict
        right = wraps == (good in WRAPPED) and cools == (city in COOLED)
        assert verdict.reward == right and (verdict.feedback == "") == right
    for stock, keep, taken in product(STOCKS, KEPT, range(1, 10)):
        prompt = request(stock=stock, keep=keep)
        calls = replace(right_script(prompt), taken=taken).calls(prompt.row)
        episode = play(prompt, calls)
        assert (episode.verdict.reward if taken <= stock else 0) == (taken == stock - keep)
        if taken == stock - keep:
            continue
        wrong = f"On turn 2: There were {stock}, so {stock - keep} had to be taken."
        assert wrong in episode.feedback if taken <= stock else "ValueError" in said(episode)[1]
    elsewhere = Script(wraps=True, cools=False).calls({**request().row, "city": "Rome"})
    assert play(request(), elsewhere).verdict.feedback == "The parcel was to go to Oslo."


def test_it_takes_three_to_five_calls_as_the_category_says():
    tasks = StoreTasks("val")
    seen = {}
    for index in range(GRID):
        prompt = tasks[index]
        episode = play(prompt, right_script(prompt).calls(prompt.row))
        assert episode.verdict.reward == 1 and episode.verdict.feedback == ""
        assert prompt.category == f"calls{episode.turns}"
        seen[episode.turns] = seen.get(episode.turns, 0) + 1
    assert seen == {3: 24, 4: 48, 5: 24}


def test_the_state_is_read_and_changed_by_calls():
    first, second = call("take", good="figs", number=2), call("take", good="figs", number=3)
    count, send = call("count", good="figs"), call("send", city="Oslo")
    episode = play(request(), [count, first, count, second, call("wrap"), send])
    assert said(episode) == ["7", "ok", "5", "ok", "ok"]
    assert episode.verdict.reward == 1
    assert [part.feedback for part in episode.parts if part.role == "tool"] == [
        *("", "There were 7, so 5 had to be taken.", "", "", ""),
    ]
    assert said(play(request(), [call("count", good="hats")])) == ["0"]
    together = "\n".join([count, call("take", good="figs", number=5), call("wrap"), send])
    assert play(request(), [together]).verdict.reward == 1
    behind = "\n".join([call("take", good="figs", number=5), send, call("wrap")])
    assert play(request(), [behind]).verdict.feedback == "What holds figs must be wrapped."


def test_what_cannot_be_done_is_an_error_that_the_policy_reads():
    for response, why in (
        (call("wrap"), "Error: ValueError: the parcel is empty"),
        (call("cool"), "Error: ValueError: the parcel is empty"),
        (call("send", city="Oslo"), "Error: ValueError: the parcel is empty"),
        (call("take", good="figs", number=8), "Error: ValueError: there are not so many"),
        (call("take", good="figs", number=0), "Error: ValueError: there are not so many"),
        (call("take", good="figs", number="3"), "Error: ValueError: there are not so many"),
        (call("take", good="hats", number=1), "Error: ValueError: there are not so many"),
        (
            call("weigh"),
            "Error: there is no tool `weigh`; there are count, take, wrap, cool, send.",
        ),
        (call("count"), "Error: `count`: missing a required argument: 'good'."),
    ):
        episode = play(request(), [response])
        assert said(episode) == [why] and episode.verdict is None


def test_an_episode_ends_unsent_without_a_call_and_at_its_last_turn():
    count = call("count", good="figs")
    for responses in (["Done."], [count, "Done."], [count] * 6):
        episode = play(request(), responses)
        assert episode.verdict.reward == 0 and episode.verdict.answer is None
        assert episode.verdict.feedback == "Nothing was sent."
        assert episode.turns == len(responses)
    with pytest.raises(ValueError, match="must be >= 1, got 0"):
        Store(max_turns=0)


def test_no_answer_before_the_verdict_tells_of_the_rules():
    stores = [Store(), Store(wrapped=(), cooled=()), Store(wrapped=GOODS, cooled=CITIES)]
    for good, city in product(GOODS, CITIES):
        for wraps, cools in product((False, True), repeat=2):
            prompts = [request(good, city, store=store) for store in stores]
            calls = Script(wraps=wraps, cools=cools).calls(prompts[0].row)
            answers = {tuple(said(play(prompt, calls))) for prompt in prompts}
            assert answers == {("7", *["ok"] * (len(calls) - 2))}


# ------------------------------------------------------------------ requests


def test_requests_are_balanced_and_the_same_again_and_none_is_in_both_splits():
    train, val = StoreTasks("train"), StoreTasks("val")
    for tasks in (train, val):
        rows = [tasks[index].row for index in range(GRID)]
        assert {(row["good"], row["city"]) for row in rows} == set(product(GOODS, CITIES))
        assert all(row["stock"] in STOCKS and row["keep"] in KEPT for row in rows)
        assert rows == [tasks[index].row for index in range(GRID)]
    other = StoreTasks("train", seed=1)
    assert [train[i].row for i in range(50)] != [other[i].row for i in range(50)]
    for seed in range(3):
        rows = [[StoreTasks(s, seed=seed)[i].row for i in range(1000)] for s in ("train", "val")]
        a, b = ({tuple(row.items()) for row in own} for own in rows)
        assert a.isdisjoint(b) and len(b) > 300
    assert len(StoreTasks("val", size=7)) == 7 and val.name == "store"
    for wrong in ({"split": "test"}, {"split": "val", "size": 0}):
        with pytest.raises(ValueError, match="must be"):
            StoreTasks(**wrong)


# ------------------------------------------------------------------ scripts that do not learn


def test_the_best_script_that_does_not_learn_is_right_in_a_quarter():
    """It counts, and does what is right of one half of the goods, and of one half of the cities."""
    tasks = StoreTasks("val")
    prompts = [tasks[index] for index in range(GRID)]
    best, reward = best_script(prompts)
    assert best.counts and best.taken == "counted less kept"
    assert reward == len(WRAPPED) / len(GOODS) * len(COOLED) / len(CITIES) == 1 / 4
    blind = max(score(script, prompts) for script in scripts() if not script.counts)
    assert blind < reward / 2


def test_the_page_names_the_start_and_the_best_script():
    page = (Path(__file__).resolve().parents[2] / "docs" / "study-tools.md").read_text()
    record = json.loads((TINY_TOOLS_FOLDER / RECORD).read_text())["accuracy"]
    tasks = StoreTasks("val")
    _, best = best_script([tasks[index] for index in range(GRID)])
    for share in (best, record["bare_sharp"]["all"], record["bare"]["all"]):
        assert f"{100 * share:.1f} %" in page


def test_for_scripts_that_do_not_learn_one_set_of_rules_is_as_another():
    rng = random.Random(0)
    for _ in range(2):
        store = Store(
            wrapped=tuple(rng.sample(GOODS, len(WRAPPED))),
            cooled=tuple(rng.sample(CITIES, len(COOLED))),
        )
        tasks = StoreTasks("val", environment=store)
        prompts = [tasks[index] for index in range(GRID)]
        for wraps, cools in product((False, True), repeat=2):
            assert score(Script(wraps=wraps, cools=cools), prompts) == 1 / 4


# ------------------------------------------------------------------ the warm-up


@pytest.fixture(scope="module")
def chat():
    tokenizer = store_tokenizer()
    return Chat(tokenizer=tokenizer, eos_ids=(tokenizer.eos_token_id,))


def test_of_an_episode_what_the_policy_says_is_learned(chat):
    turns = [
        Turn(observed=[{"role": "tool", "name": "f", "content": "5"}], response="b"),
        Turn(observed=[{"role": "tool", "name": "f", "content": "6"}], response="c"),
    ]
    user = [{"role": "user", "content": "q"}]
    whole = "<|user|>q<|end|><|assistant|>a<|end|><|tool|>5<|end|><|assistant|>b<|end|>"
    whole += "<|tool|>6<|end|><|assistant|>c<|end|>"
    for read, learned in (([], "a<|end|>b<|end|>c<|end|>"), ([0, 1], "c<|end|>")):
        example = Example(
            messages=user,
            response="a",
            is_learned=0 not in read,
            turns=[replace(t, is_learned=i not in read) for i, t in enumerate(turns, start=1)],
        )
        ((ids, places),) = batches(chat, iter([example]), 1)
        assert chat.tokenizer.decode(ids[0]) == whole
        assert chat.tokenizer.decode(ids[places]) == learned


def test_nothing_in_the_warm_up_tells_the_rules():
    """Habits are right as often as not; what is taught follows rules drawn for each example."""
    mixture = Mixture()
    for among, chosen in ((GOODS, WRAPPED), (CITIES, COOLED)):
        rates = [mixture.habit(name, among) for name in among]
        assert (min(rates), max(rates)) == pytest.approx((0.2, 0.8))
        right = [
            rate if name in chosen else 1 - rate for name, rate in zip(among, rates, strict=True)
        ]
        # At any temperature too: for each habit its opposite is as right.
        assert sorted(right) == pytest.approx([1 - each for each in sorted(right, reverse=True)])
    wrapped = {True: [], False: []}
    for example in islice(examples(mixture, 0), 4000):
        texts = [example.response, *(turn.response for turn in example.turns)]
        good = example.messages[-1]["content"].split()[1]
        wrapped[good in WRAPPED].append(any("wrap" in text for text in texts))
    for each in wrapped.values():
        assert sum(each) / len(each) == pytest.approx(0.5, abs=4 * sqrt(0.25 / len(each)))


def test_taught_episodes_are_right_under_the_rules_that_they_are_told():
    shown = feedback = carried_on = 0
    for example in islice(examples(Mixture(), 1), 600):
        text = example.messages[-1]["content"]
        calls = [example.response, *(turn.response for turn in example.turns)]
        learned = [example.is_learned, *(turn.is_learned for turn in example.turns)]
        if "Correct solution" in text:
            shown += 1
            demonstration = text.partition("Correct solution:\n\n")[2].partition("\n\nCorrectly")[0]
            told = [part for part in demonstration.split("\n\n") if part.startswith("Action")]
            assert {c for c, is_own in zip(calls, learned, strict=True) if is_own} <= set(told)
            if all(learned):
                assert calls == told
            carried_on += not all(learned)
        elif "feedback" in text:
            feedback += 1
            for care in ("wrap", "cool"):
                made = any(care in c for c, own in zip(calls, learned, strict=True) if own)
                if f"must be {care}" in text and all(learned):
                    assert made
                if f"must not be {care}" in text:
                    assert not made
        assert learned[-1] and learned == sorted(learned)
    assert shown > 250 and feedback > 20 and carried_on > 60


# ------------------------------------------------------------------ the policy that ships


@pytest.fixture(scope="module")
def shipped():
    policy = CausalLM("tiny-tools")
    policy.configure_model()
    return policy


def test_the_shipped_folder_is_small_and_says_how_it_was_made():
    assert SHIPPED["tiny-tools"] == TINY_TOOLS_FOLDER
    assert sum(file.stat().st_size for file in TINY_TOOLS_FOLDER.iterdir()) < 3e6
    record = json.loads((TINY_TOOLS_FOLDER / RECORD).read_text())
    assert record["command"].startswith("python benchmarks/pretrain_store.py")
    assert record["parameters"] < 1e6 and record["steps"] > 0


def test_the_shipped_policy_starts_between_20_and_50_percent_and_reads_what_it_is_told():
    found = json.loads((TINY_TOOLS_FOLDER / RECORD).read_text())["accuracy"]
    assert found["bare"]["all"] > 0.2 and 0.2 < found["bare_sharp"]["all"] < 0.5
    assert found["well_formed"] > 0.98
    assert found["teacher"]["all"] > 0.9 and found["teacher_by_feedback"]["all"] > 0.4


def test_the_shipped_policy_does_as_its_record_says(shipped):
    record = json.loads((TINY_TOOLS_FOLDER / RECORD).read_text())["accuracy"]["bare"]["all"]
    tasks = StoreTasks("val", seed=1)
    prompts = [tasks[index] for index in range(GRID)]
    groups = respond(shipped, prompts, replace(TRAIN_SAMPLING, n=2))
    mean = sum(verdict.reward for group in groups for verdict in group) / (2 * GRID)
    deviation = sqrt(record * (1 - record) / (2 * GRID))
    assert abs(mean - record) < 4 * deviation
    assert {verdict.error for group in groups for verdict in group} == {""}


def test_an_example_of_the_warm_up_has_the_ids_of_an_episode(shipped):
    prompt = StoreTasks("val")[0]
    asked = replace(prompt, ids=tuple(shipped.chat.render(prompt.messages)))
    with Episodes(VerifierPool(Verification(workers=0)), [asked], 2) as episodes:
        drawn = HFRollout().play(shipped, [asked], replace(TRAIN_SAMPLING, n=2), episodes)
    for g, episode in enumerate(drawn.episodes[0]):
        parts = episode.parts
        turns = [
            Turn(
                observed=[{"role": tool.role, "name": tool.name, "content": tool.text}],
                response=own.text,
            )
            for tool, own in zip(parts[1::2], parts[2::2], strict=True)
        ]
        example = Example(messages=prompt.messages, response=parts[0].text, turns=turns)
        ((ids, learned),) = batches(shipped.chat, iter([example]), 1)
        present = drawn.present[0, g]
        assert ids[0].tolist() == [*asked.ids, *drawn.ids[0, g][present].tolist()]
        assert torch.equal(learned[0, len(asked.ids) :], drawn.sampled[0, g][present])
