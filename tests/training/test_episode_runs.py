"""Runs that learn from episodes: contexts, records, checkpoints, refusals."""

import json
import pickle

import pytest
import torch

import worlds
from runs import Toys, assert_same, data, module, trainer
from scsdpo.advantage import (
    BatchStd,
    Blend,
    GroupRelative,
    SelfDistillation,
    TurnRelative,
    Weighted,
)
from scsdpo.callbacks import RunRecords
from scsdpo.data.rendered import rendered
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.policy import CausalLM
from scsdpo.rollout import HFRollout
from scsdpo.selection import InformativePool
from scsdpo.selection import pool as kept
from scsdpo.state import all_remembered
from scsdpo.teacher import (
    EMA,
    AttemptMemory,
    DemonstrationOrFeedback,
    NoTeacher,
    SiblingDemonstration,
)
from scsdpo.types import Episode, Part, Sampling, Verdict
from scsdpo.verifiers import Verification
from scsdpo.weighting import Uniform

STOP = tuple("aeiou0123456789")
"""A random model says one of these soon, so that its turns end."""
SAMPLING = Sampling(n=4, max_new_tokens=100, stop=STOP)
WORLD = worlds.Echo(turns=2, words=1)


def learner(folder, **settings):
    torch.manual_seed(0)
    defaults = {
        "sampling": SAMPLING,
        "val_sampling": Sampling(n=2, max_new_tokens=80, stop=STOP),
        "teacher": EMA(context=DemonstrationOrFeedback(both=True)),
        "verification": Verification(workers=1),
    }
    return module(folder, CausalLM(str(folder)), **(defaults | settings))


def fit(model, folder, steps, *, world=WORLD, questions=2, **more):
    torch.manual_seed(0)
    limits = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0}
    run = trainer(folder, callbacks=more.pop("callbacks", []), **limits)
    run.fit(model, data(train=Toys(verifier=world), questions_per_batch=questions), **more)
    return run


def test_a_run_learns_from_episodes_and_a_resumed_one_is_the_same(qwen3, tmp_path):
    whole, half, resumed = (learner(qwen3) for _ in range(3))
    records = RunRecords(questions="all", trace_every=1)
    before = CausalLM(str(qwen3))
    before.configure_model()
    fit(whole, tmp_path, 2, callbacks=[records])
    fit(half, tmp_path, 1).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, tmp_path, 2, ckpt_path=tmp_path / "half.ckpt")
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()), "state")
    moved = zip(before.parameters(), whole.policy.parameters(), strict=True)
    assert not all(torch.equal(old, new) for old, new in moved)
    (file,) = tmp_path.rglob("rollouts/train_000001.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    played = [line for line in lines if len(line["turns"]) == 3]
    assert played
    for line in played:
        assert [turn["role"] for turn in line["turns"]] == ["assistant", "user", "assistant"]
        assert line["turns"][1]["text"] in line["response"]
        assert line["finished"] and line["reward"] in (0.0, 1.0)
    # A sibling's whole episode, with what its world answered, stands before the same tokens.
    told = [line["teacher_prompt"] for line in played if line["teacher_prompt"]]
    assert any("[user]\n" in each and "[/user]" in each for each in told)
    (file,) = tmp_path.rglob("tokens/train_000001.jsonl")
    for line in map(json.loads, file.read_text().splitlines()):
        assert set(line["turn"]) == {0, 1} and line["turn"] == sorted(line["turn"])
        (own,) = [e for e in lines if (e["key"], e["sample"]) == (line["key"], line["sample"])]
        assert len(line["ids"]) == own["n_tokens"] == len(line["credit"])


def strategies_that_remember():
    """Turn credit and distillation, from attempts that are kept, over a pool of groups."""
    both = (
        Weighted(advantage=TurnRelative(scale=BatchStd())),
        Weighted(advantage=SelfDistillation(), weight=0.5),
    )
    return {
        "advantage": Blend(parts=both),
        "teacher": EMA(context=AttemptMemory()),
        "weighting": Uniform(),
        "selection": InformativePool(questions=2, max_batches=2),
        "updates_per_rollout": 2,
    }


def test_what_strategies_remember_of_episodes_is_the_same_after_a_resume(qwen3, tmp_path):
    whole, half, resumed = (learner(qwen3, **strategies_that_remember()) for _ in range(3))
    world = worlds.Echo(turns=2, words=1)
    limits = {"world": world, "questions": 4}
    fit(whole, tmp_path, 4, **limits)
    fit(half, tmp_path, 2, **limits).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, tmp_path, 4, ckpt_path=tmp_path / "half.ckpt", **limits)
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()), "state")
    states = all_remembered(whole)
    assert_same(all_remembered(resumed), states, "remembered")
    (memory,) = (value for value in states.values() if "right" in value)
    told = [
        text for side in ("right", "wrong") for texts in memory[side].values() for text in texts
    ]
    assert any("[user]\n" in text for text in told)


def test_a_pool_of_groups_keeps_their_episodes_over_a_restart(qwen3, tmp_path):
    model = learner(qwen3)
    model.configure_model()
    prompts = [
        rendered(prompt, model.policy.chat) for prompt in Toys(size=4, verifier=WORLD).read()
    ]
    judged = model.judge(model.sample(prompts, SAMPLING))
    model.teardown("fit")
    for group in (judged[[q]] for q in range(4)):
        torch.save(kept._plain(group), tmp_path / "x.pt")
        restored = kept._restored(*torch.load(tmp_path / "x.pt", weights_only=True))
        assert restored.responses.episodes == group.responses.episodes
        assert torch.equal(restored.responses.sampled, group.responses.sampled)


def test_feedback_is_told_turn_by_turn(qwen3):
    model = learner(qwen3)
    model.configure_model()
    world = worlds.Counting(turns=2)
    (prompt,) = Toys(size=1, verifier=world).read()
    judged = model.judge(model.sample([rendered(prompt, model.policy.chat)], SAMPLING))
    model.teardown("fit")
    assert judged.responses.episodes[0][0].feedback.startswith("On turn 1: step 1")
    failed = type(judged)(
        responses=judged.responses,
        verdicts=judged.verdicts,
        rewards=judged.rewards * 0,
        successes=judged.successes & False,
    )
    contexts = DemonstrationOrFeedback().render(model.policy.chat, failed)
    assert "On turn 1: step 1" in model.policy.chat.decode(contexts.ids[0][0])
    # What is told is cut at its beginning; the question stays.
    whole = SiblingDemonstration().render(model.policy.chat, judged).ids[0][0]
    cut = SiblingDemonstration(max_tokens=len(whole) - 30).render(model.policy.chat, judged)
    said = model.policy.chat.decode(cut.ids[0][0])
    assert len(cut.ids[0][0]) <= len(whole) - 30 and "0?" in said


class OneTurn(HFRollout):
    """An engine of somebody's that has no `play`."""

    plays_episodes = False


def test_what_cannot_play_is_refused_before_weights_are_loaded(qwen3, tmp_path):
    model = learner(qwen3, rollout=OneTurn())
    with pytest.raises(ConfigurationError, match="Echo is an environment of several turns, but"):
        fit(model, tmp_path, 1)
    model = learner(qwen3)
    tokenizer = model.policy.chat.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<end>")
    with pytest.raises(ConfigurationError, match="cannot be continued with turns of the role user"):
        fit(model, tmp_path, 1)


def test_a_run_stops_where_environments_do_not_work(qwen3, tmp_path):
    model = learner(qwen3, advantage=GroupRelative(), teacher=NoTeacher(), weighting=Uniform())
    with pytest.raises(TrainingStopped, match=r"Opening fails too often: .* OSError\('no door'\)"):
        fit(model, tmp_path, 1, world=worlds.Opening(fails=True))


def test_episodes_travel_between_ranks():
    episode = Episode(parts=(Part(role="tool", text="x", name="f"),), verdict=Verdict(reward=1.0))
    assert pickle.loads(pickle.dumps(episode)) == episode
