"""Routers, and what is remembered: pass rates, successes, the pool; it survives a restart."""

import json
import pickle
import random
from collections import Counter
from dataclasses import replace

import lightning as L
import pytest
import torch

from kernel_inputs import of_rewards
from runs import Toys, data, module, trainer
from scsdpo.advantage import (
    AllOf,
    Blend,
    Every,
    Failed,
    GroupFailed,
    GroupRelative,
    HasTeacher,
    LogitMix,
    Never,
    RateWithin,
    Rhythm,
    Route,
    Routed,
    SelfDistillation,
    Succeeded,
    Warmup,
    Weighted,
)
from scsdpo.errors import ConfigurationError
from scsdpo.selection import Everything, InformativePool
from scsdpo.selection import pool as pool_module
from scsdpo.state import DecayedBeta, Instant, MovingAverage, Ramp, nested_state
from scsdpo.teacher import (
    AttemptMemory,
    Frozen,
    GoldSolution,
    NoTeacher,
    RememberedDemonstration,
    Restart,
    SiblingDemonstration,
)
from scsdpo.training import PolicyOptimizer
from scsdpo.types import Prompt
from scsdpo.verifiers import ExactMatch
from scsdpo.weighting import (
    FrozenPassRate,
    PassRate,
    Product,
    RatePower,
    Uniform,
)
from scsdpo.weighting.frozen import FORMAT, fingerprint
from table_policy import G, TableChat, TablePolicy, judged

JSD = SelfDistillation()


# ----------------------------------------------------------------------- routers and memory


def rewarded(*successes, keys=None):
    rewards = torch.stack([(torch.arange(4) < k).float() for k in successes])
    plain = of_rewards(rewards)
    names = keys or tuple(f"q{i}" for i in range(len(successes)))
    prompts = [replace(p, key=k) for p, k in zip(plain.prompts, names, strict=True)]
    return replace(plain, responses=replace(plain.responses, prompts=tuple(prompts)))


def test_routers_claim_what_they_say():
    given, available = rewarded(2, 0, 4), torch.zeros(3, 4, dtype=torch.bool)
    available[0] = True
    right = torch.arange(4) < torch.tensor([[2], [0], [4]])
    expected = {
        Every(): torch.ones(3, 4, dtype=torch.bool),
        Never(): torch.zeros(3, 4, dtype=torch.bool),
        Failed(): ~right,
        Succeeded(): right,
        HasTeacher(): available,
        GroupFailed(): torch.tensor([[False], [True], [False]]).expand(3, 4),
        RateWithin(low=0.5, high=0.9): torch.tensor([[True], [False], [False]]).expand(3, 4),
        AllOf(routers=(Failed(), HasTeacher())): ~right & available,
    }
    for router, claims in expected.items():
        assert torch.equal(router.claims(given, available), claims), router


def test_a_rate_power_has_its_closed_form_and_may_remember():
    given = rewarded(2, 0, 4, keys=("a", "b", "c"))  # p = .5, 0, 1
    for weighting, expected in (
        (RatePower(solved=1, failed=2), [0.125, 0.0, 0.0]),
        (RatePower(failed=1), [0.5, 1.0, 0.0]),
        (RatePower(), [1.0] * 3),  # 0^0 is 1
    ):
        assert torch.equal(weighting.weights(given), torch.tensor(expected)[:, None].expand(3, 4))
    average = RatePower(solved=1, rates=MovingAverage(follow=0.25))
    average.rates.observe(rewarded(4, keys=("a",)))
    assert (average.weigh(rewarded(0, keys=("a",))) == 0.75).all()
    route = Route(advantage=GroupRelative(), weighting=average)
    assert list(nested_state([route])) == [average.rates]


def seen_by(rates, batch):
    """The estimate for the one question of a batch, which asking twice does not change."""
    first, second = rates.rates(batch), rates.rates(batch)
    assert torch.equal(first, second)
    rates.observe(batch)
    return first.item()


def test_running_pass_rates_have_their_closed_forms():
    average, beta = MovingAverage(follow=0.25), DecayedBeta(prior=1, decay=0.5)
    seen = [rewarded(4, keys=("a",)), rewarded(2, keys=("b",)), rewarded(0, keys=("a",))]
    rates = [(seen_by(average, o), seen_by(beta, o)) for o in seen]
    # a: 1, then 1 + (0 - 1) / 4. Beta: (1 + 4) / (2 + 4); two batches later 4 / 4 successes are 1.
    assert [r[0] for r in rates] == [1.0, 0.5, 0.75]
    assert [r[1] for r in rates] == pytest.approx([5 / 6, 3 / 6, (1 + 1) / (2 + 1 + 4)])
    assert Instant().rates(seen[1]).tolist() == [0.5]
    everything = DecayedBeta(prior=0, decay=1)
    assert [seen_by(everything, o) for o in seen] == [1.0, 0.5, 0.5]


@pytest.mark.parametrize("make", [MovingAverage, DecayedBeta])
def test_running_pass_rates_survive_a_reload(make):
    first, second = make(), make()
    first.observe(rewarded(4, 1))
    second.remember(pickle.loads(pickle.dumps(first.remembered())))
    again = rewarded(0, 3)
    assert torch.equal(first.rates(again), second.rates(again))


def test_a_ramp_and_a_warmup_follow_the_steps_taken():
    ramp, warmup = Ramp(start=0.5, end=0.8, steps=3), Warmup(steps=2)
    given, available = rewarded(2), torch.ones(1, 4, dtype=torch.bool)
    values, claims = [], []
    for _ in range(5):
        values.append(ramp.value())
        claims.append(bool(warmup.claims(given, available).all()))
        ramp.after_step()
        warmup.after_step()
    assert values == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.8])
    assert claims == [True, True, False, False, False]


def test_state_is_found_wherever_it_is_nested():
    rates, ramp = DecayedBeta(), Ramp(start=0, end=1, steps=2)
    advantage = Blend(
        parts=(
            Weighted(advantage=SelfDistillation(target=LogitMix(share=ramp))),
            Weighted(
                advantage=Routed(
                    routes=(
                        Route(
                            advantage=GroupRelative(),
                            where=AllOf(routers=(RateWithin(low=0, high=1, rates=rates),)),
                        ),
                    )
                )
            ),
        )
    )
    assert list(nested_state([advantage])) == [ramp, rates]


def test_a_remembered_success_teaches_a_group_without_one_and_survives_a_reload():
    chat, right = TableChat(), judged()
    context = RememberedDemonstration(size=1)
    plain = SiblingDemonstration().render(chat, right)
    assert context.render(chat, right).ids == plain.ids  # nothing to remember yet
    context.observe(right)
    wrong = replace(right, successes=torch.zeros_like(right.successes))
    reloaded = RememberedDemonstration(size=1)
    reloaded.remember(pickle.loads(pickle.dumps(context.remembered())))
    for one in (context, reloaded):
        told = one.render(chat, wrong)
        # question 0 succeeded with its rollouts 0 and 1: the last of them is shown to all
        text = SiblingDemonstration().show(chat, right.prompts[0], "response 0 1")
        assert told.ids[0] == (text,) * G
        assert told.available.tolist() == [[True] * 4, [False] * 4, [True] * 4, [True] * 4]


def with_texts(batch, *texts):
    """The same batch, in which every question got these responses."""
    responses = replace(batch.responses, texts=(texts,) * len(batch.prompts))
    return replace(batch, responses=responses)


def test_the_best_success_is_remembered_and_one_without_anything_to_show_is_not():
    chat, batch = TableChat(), judged()
    rewards = torch.tensor([[1.0, 0.5, 0.0, 0.0]] * len(batch.prompts))
    right = replace(batch, rewards=rewards, successes=rewards >= 0.5)
    wrong = replace(batch, rewards=0 * rewards, successes=rewards > 2)
    context = RememberedDemonstration(size=2)
    context.observe(right)
    context.observe(with_texts(right, "<think>only</think>", "half", "c", "d"))
    assert context.kept["toy/0"] == [(0.5, "half"), (1.0, "response 0 0")]
    older = RememberedDemonstration()
    older.remember({"kept": {"toy/0": ["a", "response 0 0"]}})  # as once saved, without rewards
    told = context.render(chat, wrong).ids[0]
    assert told == older.render(chat, wrong).ids[0]
    assert told[0] == SiblingDemonstration().show(chat, batch.prompts[0], "response 0 0")
    # A group whose only success is all thinking is told what is remembered.
    first = with_texts(right, "<think>only</think>", "b", "c", "d")
    assert context.render(chat, replace(first, successes=rewards == 1)).ids[0] == told


def test_attempts_without_words_are_not_remembered():
    batch, context = judged(), AttemptMemory()
    verdicts = tuple(
        tuple(replace(verdict, feedback=" ") for verdict in group) for group in batch.verdicts
    )
    blank = with_texts(batch, "<think>a</think>", " ", "<think>c", "d")
    context.observe(replace(blank, verdicts=verdicts))
    assert {
        entry for kept in (context.right, context.wrong) for e in kept.values() for entry in e
    } == {"d"}


def test_attempts_are_remembered_right_and_wrong_up_to_their_numbers_and_survive_a_reload():
    chat, batch = TableChat(), judged()
    first, second = (AttemptMemory(successes=3, failures=1) for _ in range(2))
    first.observe(batch)
    assert first.right["toy/2"] == ["response 2 1", "response 2 2", "response 2 3"]
    assert first.right["toy/0"] == ["response 0 0", "response 0 1"] and "toy/2" not in first.wrong
    assert first.wrong["toy/1"] == ["response 1 3\nwrong 1 3"]
    second.remember(pickle.loads(pickle.dumps(first.remembered())))
    later = with_texts(batch, "<think>a</think> new", "b", "c", "d")
    for one in (first, second):
        before = pickle.dumps(one.remembered())
        told = one.render(chat, later)
        assert pickle.dumps(one.remembered()) == before  # asking changes nothing
        one.observe(later)
        assert one.right["toy/3"] == ["response 3 0", "new"]
        # All that is remembered of question 1 is its last rollout, which is not told of itself.
        assert (~told.available).nonzero().tolist() == [[1, 3]]
        assert one.right["toy/0"] == ["response 0 1", "new", "b"]
        assert one.wrong["toy/0"] == ["d\nwrong 0 3"]
        # The last rollout is its question's remembered failure, and is told of the successes only.
        text = "\n\n".join(["response 0 1", "new", "b"])
        words = f"question 0?\nAttempts that were right:\n\n{text}\n\n"
        turn = f"{words}\n\nCorrectly solve the original question.\n"
        assert told.ids[0][3] == chat.render([{"role": "user", "content": turn}])


def test_the_gold_solution_is_told_to_every_rollout():
    chat, batch = TableChat(), judged()
    told = GoldSolution().render(chat, batch)
    text = SiblingDemonstration().show(chat, batch.prompts[2], "gold 2")
    assert told.available.all() and told.ids[2] == (text,) * G


# --------------------------------------------------------------------------------- the pool


def test_the_pool_waits_for_informative_groups_and_gives_exactly_its_size():
    pool = InformativePool(questions=3, max_batches=9)
    batch = judged()
    assert pool.select(batch) == ()  # questions 0 and 3
    (joined,) = pool.select(batch)
    assert len(joined.keys) == 3 and set(joined.keys) == {"toy/0", "toy/3"}
    for place, q in enumerate(int(key[-1]) for key in joined.keys):
        assert torch.equal(joined.responses.ids[place], batch.responses.ids[q])
        assert joined.texts[place] == batch.texts[q]
        assert torch.equal(joined.rewards[place], batch.rewards[q])
    assert pool.groups == []


def informative(keys):
    """A batch of one right and one wrong rollout for each key."""
    prompts = tuple(Prompt(key=k, messages=(), verifier=ExactMatch(), answer="") for k in keys)
    return of_rewards(
        torch.tensor([[1.0, 0.0]]).expand(len(keys), 2),
        prompts=prompts,
        ids=torch.tensor([[[len(k)], [ord(k[-1])]] for k in keys]),
        texts=(("yes", "no"),) * len(keys),
    )


def test_no_group_loses_its_place_in_the_pool_by_its_name_or_by_when_it_came():
    """Of 24 informative groups 15 stay: each in 5/8 of the pools, whatever source and batch."""
    pool, kept, pools = InformativePool(questions=15, max_batches=9), Counter(), 200
    sources = ("algebra", "zoology")
    first, second = ([f"{s}/{i}{b}" for s in sources for i in range(6)] for b in ("a", "b"))
    for _ in range(pools):
        assert pool.select(informative(first)) == ()
        (result,) = pool.select(informative(second))
        kept.update(set(result.keys))
    std = (pools * 5 / 8 * 3 / 8) ** 0.5
    for key in (*first, *second):
        assert abs(kept[key] - pools * 5 / 8) < 4 * std, key  # 24 groups: 1 of 650 seeds fails
    for part in (*sources, "a", "b"):
        ours = [n for key, n in kept.items() if key.startswith(part + "/") or key[-1] == part]
        assert len(ours) == 12
        # The sum of 12 draws without replacement has less variance than 12 independent ones.
        assert abs(sum(ours) - 12 * pools * 5 / 8) < 3 * 12**0.5 * std, part


@pytest.mark.parametrize("ranks", [2, 3])
def test_which_groups_stay_depends_neither_on_ranks_nor_on_the_order_in_the_batch(
    monkeypatch, ranks
):
    keys = [f"{s}/{i}" for s in ("a", "z") for i in range(9)]
    shuffled = random.Random(1).sample(keys, len(keys))

    def chosen(order, rank=0, ranks=1):
        monkeypatch.setattr(pool_module, "rank_and_size", lambda: (rank, ranks))
        # What a rank gathers: the groups of all ranks, one rank's after the other's.
        everyone = informative([k for r in range(ranks) for k in order[r::ranks]])
        groups = [everyone[[q]] for q in range(len(keys))]
        monkeypatch.setattr(pool_module, "all_gather", lambda _: groups)
        pool = InformativePool(questions=7)
        results = [pool.select(informative(order[rank::ranks])) for _ in range(3)]
        return [result.keys for (result,) in results]

    alone = chosen(keys)
    assert len({frozenset(batch) for batch in alone}) == 3  # drawn anew each time
    assert chosen(shuffled) == alone
    shares = [chosen(shuffled, rank, ranks) for rank in range(ranks)]
    for number, whole in enumerate(alone):
        for rank, share in enumerate(shares):
            assert share[number] == whole[rank::ranks]


def test_a_resumed_pool_draws_what_an_uninterrupted_one_does():
    keys = [f"q/{i}" for i in range(9)]
    whole = InformativePool(questions=4)
    for _ in range(3):
        whole.select(informative(keys))
    resumed = InformativePool(questions=4)
    resumed.remember(whole.remembered())
    (mine,), (theirs,) = (p.select(informative(keys)) for p in (whole, resumed))
    (anew,) = InformativePool(questions=4).select(informative(keys))
    assert mine.keys == theirs.keys != anew.keys


def test_the_pool_is_used_at_its_cap_even_if_it_is_empty():
    pool = InformativePool(questions=3, max_batches=2)
    nothing = replace(judged(), rewards=torch.zeros(4, G))
    assert pool.select(nothing) == ()
    (joined,) = pool.select(nothing)
    assert len(joined.prompts) == 0 and joined.rewards.shape == (0, G)


def test_the_pool_survives_a_reload_without_objects_in_the_checkpoint(tmp_path):
    first, second = (InformativePool(questions=4, max_batches=9) for _ in range(2))
    first.select(judged())
    torch.save(first.remembered(), tmp_path / "pool.pt")
    second.remember(torch.load(tmp_path / "pool.pt", weights_only=True))
    (mine,), (theirs,) = (pool.select(judged()) for pool in (first, second))
    assert torch.equal(mine.responses.ids, theirs.responses.ids) and mine.texts == theirs.texts
    assert [p.ids for p in mine.prompts] == [p.ids for p in theirs.prompts]


def test_everything_is_learned_from_at_once():
    assert len(Everything().select(judged())[0].prompts) == 4


MEMORIES = {
    "pool": lambda: {
        "advantage": GroupRelative(),
        "teacher": NoTeacher(),
        "weighting": Uniform(),
        "selection": InformativePool(questions=7, max_batches=3),
    },
    "drift": lambda: {
        "advantage": Routed(
            routes=(
                Route(advantage=JSD, where=Failed()),
                Route(
                    advantage=GroupRelative(modulator=Rhythm(window=2)),
                    where=RateWithin(low=0.3, high=0.7, rates=DecayedBeta()),
                ),
            )
        ),
        "teacher": Restart(every=2, context=RememberedDemonstration()),
        "weighting": Uniform(),
    },
}


@pytest.mark.parametrize("name", MEMORIES)
def test_a_run_with_memory_resumes_bit_for_bit(qwen3, tmp_path, name):
    class SaveHalfWay(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def fit(model, *callbacks, **kwargs):
        torch.manual_seed(0)
        run = trainer(tmp_path, limit_val_batches=0, callbacks=list(callbacks))
        run.fit(model, data(Toys(28)), **kwargs)
        return run

    def tensors(model):
        return {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}

    whole, resumed = (module(qwen3, **MEMORIES[name]()) for _ in range(2))
    assert fit(whole, SaveHalfWay()).global_step > 1
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert any(saved["remembered"].values())
    fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.batches == whole.batches == 7
    for key, value in tensors(whole).items():
        torch.testing.assert_close(tensors(resumed)[key], value, rtol=0, atol=0, msg=key)


# ------------------------------------------------------------------------- frozen pass rates


def rates(folder, policy, **changes):
    content = {"format": FORMAT, "policy": "table", "fingerprint": fingerprint(policy)}
    content |= {"rates": {"q0": [1, 4], "q1": [2, 4], "q2": [4, 4]}} | changes
    (folder / "rates.json").write_text(json.dumps(content))
    return str(folder / "rates.json")


def test_frozen_pass_rates_weigh_by_the_files_mean_and_not_by_the_batch(tmp_path):
    weighting = FrozenPassRate(path=rates(tmp_path, TablePolicy()))
    # p (1 - p): 3/16, 4/16, 0, of mean 7/48; the batch's own pass rates do not matter
    weights = weighting.weigh(rewarded(0, 4, keys=("q1", "q2")))[:, 0]
    assert weights.tolist() == pytest.approx([(4 / 16) / (7 / 48), 0])


def test_frozen_pass_rates_refuse_another_policy_and_other_data(tmp_path):
    weighting = FrozenPassRate(path=rates(tmp_path, TablePolicy()))
    weighting.configure(TablePolicy())
    with pytest.raises(ConfigurationError, match="were measured with another policy"):
        weighting.configure(TablePolicy(seed=1))
    with pytest.raises(ConfigurationError, match="has no rate of question 'q9'"):
        weighting.weigh(rewarded(1, keys=("q9",)))
    both = Product(factors=(PassRate(), Product(factors=(weighting,))))
    both.check_questions(iter(["q0", "q2"]))
    with pytest.raises(ConfigurationError, match="has no rate of question 'q9'"):
        both.check_questions(iter(["q0", "q9"]))
    part = Weighted(advantage=JSD, weighting=weighting)
    route = Route(advantage=Blend(parts=(part,)), where=Failed())
    nested = Routed(routes=(Route(advantage=JSD, where=Succeeded()), route))
    model = PolicyOptimizer(TablePolicy(seed=1), advantage=nested, teacher=Frozen())
    with pytest.raises(ConfigurationError, match="were measured with another policy"):
        model.configure_model()
    with pytest.raises(ConfigurationError, match="has no rate of question 'q9'"):
        model.weightings.check_questions(iter(["q0", "q9"]))
    with pytest.raises(ValueError, match="is not a file of pass rates"):
        FrozenPassRate(path=rates(tmp_path, TablePolicy(), format="other"))
    with pytest.raises(ValueError, match="every weight is 0"):
        FrozenPassRate(path=rates(tmp_path, TablePolicy(), rates={"q0": [4, 4]}))
