"""Teachers with several contexts: what is read, by whom, and how often."""

import pytest
import torch

from batches import ALL, double_policy, gradient, judged
from batches import parts as prepared
from scsdpo.advantage import (
    Batch,
    Blend,
    Full,
    GroupRelative,
    Plan,
    Purified,
    ReferenceAnchor,
    SelfDistillation,
    SiblingContrast,
    Weighted,
)
from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM
from scsdpo.teacher import (
    EMA,
    Contexts,
    FailedSibling,
    Frozen,
    GoldSolution,
    PlainPrompt,
    PrivilegedInfo,
    Reprompt,
    SiblingDemonstration,
    SolutionAlone,
    contexts_of,
)
from scsdpo.training import PolicyOptimizer
from scsdpo.types import Sampling
from scsdpo.weighting import ContrastPaths
from table_policy import TableChat
from table_policy import judged as table_batch

PARTS = {"told": GoldSolution(), "alone": SolutionAlone(), "plain": PlainPrompt()}


def test_a_teacher_and_a_reference_with_equal_weights_and_context_run_once(qwen3, monkeypatch):
    policy = double_policy(qwen3)
    teacher, reference = Frozen(PlainPrompt()), Frozen(PlainPrompt())
    advantage = Blend(
        parts=(
            Weighted(advantage=SelfDistillation(support=Full())),
            Weighted(advantage=ReferenceAnchor()),
        )
    )
    batch, update = prepared(policy, advantage, teacher=teacher, reference=reference)
    ran, run = [], CausalLM.run

    def counted(self, weights, work):
        ran.append(weights)
        return run(self, weights, work)

    monkeypatch.setattr(CausalLM, "run", counted)
    _, apart, _ = gradient(policy, batch, update)
    of_two = len(ran)
    reference.weights = teacher.weights
    ran.clear()
    _, together, _ = gradient(policy, batch, update)
    assert 2 * len(ran) == of_two > 0
    for name, grad in apart.items():
        torch.testing.assert_close(together[name], grad, rtol=1e-12, atol=1e-14)


def test_a_frozen_reference_shares_the_copy_of_a_frozen_teacher(qwen3):
    model = PolicyOptimizer(
        CausalLM(str(qwen3)),
        Blend(
            parts=(Weighted(advantage=SelfDistillation()), Weighted(advantage=ReferenceAnchor()))
        ),
        Frozen(GoldSolution()),
        reference=Frozen(PlainPrompt()),
    )
    model.configure_model()
    assert model.reference.weights is model.teacher.weights


def test_further_contexts_are_read_by_the_rollouts_that_have_them():
    context = Contexts(
        parts={
            "right": SiblingDemonstration(),
            "wrong": FailedSibling(),
            "more": FailedSibling(number=1),
        },
        needed=2,
    )
    teacher, batch = EMA(context=context), table_batch()
    chat_prompts = contexts_of(teacher, Frozen(PlainPrompt()), TableChat(), batch)
    assert [*chat_prompts] == ["teacher", "teacher/wrong", "teacher/more", "reference"]
    # 2, 0, 4 and 1 of 4 rollouts are right: a right sibling, and wrong ones other than oneself.
    available = teacher.available(chat_prompts)
    assert available.tolist() == [[True] * 4, [False] * 4, [False] * 4, [False, True, True, True]]
    ready = Batch.of(
        batch,
        Plan(active=available, needs_teacher=available, credit=None),
        torch.ones(4, 4),
        chat_prompts,
        (4,),
    )
    more = ready.reads("teacher/more").view(4, 4)
    assert more.tolist() == [
        [True, True, False, False],
        [False] * 4,
        [False] * 4,
        [False, True, True, True],
    ]


def test_a_micro_batch_or_a_split_changes_no_number_with_several_contexts(qwen3, monkeypatch):
    from transformers.models.qwen3 import modeling_qwen3

    from batches import exact_norm

    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", exact_norm)
    policy = double_policy(qwen3)
    contrast = Contexts(parts={"right": SiblingDemonstration(), "wrong": FailedSibling()})
    cases = (
        (
            SelfDistillation(support=Full(), target=Purified()),
            {"teacher": EMA(context=Contexts(parts={**contrast.parts, "plain": PlainPrompt()}))},
        ),
        (
            GroupRelative(modulator=SiblingContrast(threshold=0.0)),
            {"teacher": EMA(context=contrast), "token_weighting": ContrastPaths(threshold=0.0)},
        ),
    )
    for advantage, settings in cases:
        batch, update = prepared(policy, advantage, **settings)
        whole, expected, one = gradient(policy, batch, update)
        loss, grads, many = gradient(policy, batch, update, ALL, 20)
        assert many > one and whole == pytest.approx(loss, rel=1e-10)
        scale = max(grad.abs().max() for grad in expected.values())
        assert scale > 0
        for name, grad in expected.items():
            assert (grads[name] - grad).abs().max() <= 1e-10 * scale, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": {}}, r"`Contexts\(parts=...\)` must name at least one context"),
        ({"parts": {"a": Contexts(parts=PARTS)}}, r"must not be nested: a is Contexts"),
        ({"parts": PARTS, "needed": 4}, r"`Contexts\(needed=...\)` must be between 0 and 3, got 4"),
    ],
)
def test_contexts_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Contexts(**settings)


def test_an_advantage_that_reads_more_contexts_than_there_are_is_refused(qwen3):
    for advantage, settings in (
        (SelfDistillation(target=Purified()), {}),
        (GroupRelative(modulator=SiblingContrast()), {}),
        (SelfDistillation(), {"token_weighting": ContrastPaths()}),
    ):
        with pytest.raises(ConfigurationError, match=r"model.teacher.context: .* has 1: set it to"):
            PolicyOptimizer(
                CausalLM(str(qwen3)), advantage, EMA(), sampling=Sampling(n=4), **settings
            )


def test_a_context_of_ones_own_says_what_to_tell_and_no_more(policy):
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Hint(Reprompt):
        def privileged(self, question, rollout, judged):
            return PrivilegedInfo(demonstration=f"hint {question}" if rollout else "")

    told = Hint(max_tokens=200).render(policy.chat, judged(policy))
    assert told.available.tolist() == [[False, True, True]] * 4
    assert "hint 2" in policy.chat.decode(told.ids[2][1]) and told.ids[2][1] == told.ids[2][2]
