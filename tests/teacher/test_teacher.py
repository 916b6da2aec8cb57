"""Contexts, templates, and how teachers' weights move."""

import inspect
import logging
from dataclasses import dataclass, replace

import pytest
import torch

from scsdpo.evaluation.question import questions
from scsdpo.loss import TokenLogits
from scsdpo.metrics import PhaseTimer
from scsdpo.policy import CausalLM, Lora
from scsdpo.rollout import HFRollout
from scsdpo.teacher import (
    EMA,
    DemonstrationOrFeedback,
    Feedback,
    Frozen,
    GoldSolution,
    Live,
    NoTeacher,
    PlainPrompt,
    ShortestSuccess,
    SiblingDemonstration,
    Templates,
    TrustRegion,
)
from scsdpo.training import PolicyOptimizer
from scsdpo.training.collector import Collector
from scsdpo.types import Judged, Prompt, Responses, Verdict
from scsdpo.verifiers import ExactMatch, Verification, Verifier


def group(texts, rewards, *, feedback="wrong", chat=None):
    """One question with a system turn, and its judged rollouts."""
    messages = ({"role": "system", "content": "Be {brief}."}, {"role": "user", "content": "2+2?"})
    ids = chat.render(messages) if chat else (1, 2, 3)
    prompt = Prompt(key="q", messages=messages, verifier=ExactMatch(), answer="4", ids=ids)
    lengths = torch.tensor([[len(t) for t in texts]])
    mask = torch.arange(max(int(lengths.max()), 1)) < lengths[..., None]
    zeros = torch.zeros(mask.shape)
    responses = Responses.of_one_turn(
        prompts=(prompt,),
        ids=zeros.long(),
        sampled=mask,
        sampling_logprobs=zeros,
        policy_logprobs=zeros,
        ended=mask.any(-1),
        texts=(tuple(texts),),
        temperature=1.0,
    )
    reward = torch.tensor([rewards])
    verdicts = tuple(Verdict(reward=r, feedback="" if r else feedback) for r in rewards)
    successes = reward >= 0.5
    return Judged(responses=responses, verdicts=(verdicts,), rewards=reward, successes=successes)


def with_prompt(judged, **changes):
    """The same batch, whose questions are changed."""
    prompts = tuple(replace(prompt, **changes) for prompt in judged.prompts)
    return replace(judged, responses=replace(judged.responses, prompts=prompts))


def shown(context, chat, texts, rewards, **kwargs):
    """What each teacher prompt says, decoded."""
    contexts = context.render(chat, group(texts, rewards, chat=chat, **kwargs))
    return [chat.tokenizer.decode(list(ids)) for ids in contexts.ids[0]]


def test_the_demonstration_is_another_success_the_first_in_order(policy):
    out = shown(SiblingDemonstration(), policy.chat, ["a1", "b0", "c1", "d0"], [1.0, 0, 1, 0])
    assert ["c1" in out[0], "a1" in out[1], "a1" in out[2], "a1" in out[3]] == [True] * 4
    assert "a1" not in out[0]


def test_the_only_success_of_a_group_has_no_teacher_and_its_failures_do(policy):
    out = shown(SiblingDemonstration(), policy.chat, ["a", "b", "c"], [0.0, 1, 0])
    assert [bool(text) for text in out] == [True, False, True]
    assert all(shown(SiblingDemonstration(exclude_self=False), policy.chat, ["a", "b"], [0.0, 1]))


def test_a_group_without_success_has_no_teacher(policy):
    assert not any(shown(SiblingDemonstration(), policy.chat, ["a", "b"], [0.0, 0]))


def test_the_shortest_success_can_be_picked(policy):
    context = SiblingDemonstration(pick="shortest")
    out = shown(context, policy.chat, ["long one", "s!", "bad"], [1.0, 1, 0])
    assert "s!" in out[0] and "s!" in out[2] and "long one" in out[1]


def test_the_teacher_prompt_is_the_published_template(policy):
    text = shown(SiblingDemonstration(), policy.chat, ["a", "<think>no</think>\n4"], [0.0, 1])[0]
    assert text == (
        "<|im_start|>system\nBe {brief}.<|im_end|>\n<|im_start|>user\n2+2?\nCorrect solution:"
        "\n\n4\n\n\n\nCorrectly solve the original question.\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_thinking_opened_in_the_prompt_is_stripped_too(policy):
    out = shown(SiblingDemonstration(), policy.chat, ["hmm</think>\n\nyes", "b"], [1.0, 0])
    assert "hmm" not in out[1] and "yes" in out[1]
    kept = SiblingDemonstration(strip_thinking=False)
    assert "hmm" in shown(kept, policy.chat, ["hmm</think>\n\nyes", "b"], [1.0, 0])[1]


def test_the_demonstration_is_the_best_success_whatever_the_threshold(policy):
    rewards = [0.5, 0, 0.5, 1, 0, 1, 1, 1]
    texts = [f"<{letter}>" for letter in "abcdefgh"]
    out = shown(SiblingDemonstration(), policy.chat, texts, rewards)  # threshold 0.5
    assert ["<d>" in text for text in out] == [g != 3 for g in range(8)]
    assert "<f>" in out[3]
    out = shown(SiblingDemonstration(pick="shortest"), policy.chat, ["a", "b1", "c22"], [0.5, 1, 1])
    assert ["b1" in text for text in out] == [True, False, True] and "c22" in out[1]
    assert not any("\na\n" in text for text in out)


@pytest.mark.parametrize("empty", ["<think>all of it</think>", "</think>", " \n", "<think>open"])
def test_a_success_that_leaves_nothing_to_show_does_not_cost_the_others_their_teacher(
    policy, empty
):
    out = shown(SiblingDemonstration(), policy.chat, [empty, "b", "c", empty], [1.0, 1, 0, 0])
    assert ["\nb\n" in text for text in out] == [True, False, True, True]
    assert not out[1]  # the other success has nothing to show
    out = shown(DemonstrationOrFeedback(), policy.chat, [empty, "b"], [1.0, 0])
    assert not out[0] and "wrong" in out[1]
    out = shown(ShortestSuccess(), policy.chat, ["right", empty, "wrong one"], [1.0, 0, 0])
    assert "wrong one" in out[0] and not any(out[1:])


@dataclass(frozen=True)
class Half(Verifier):
    """As much of the answer as the response names."""

    def verify(self, prompt, response):
        return Verdict(reward=float(response))


def test_a_success_is_a_reward_of_1_and_the_first_partial_one_is_told_once(policy, caplog):
    assert inspect.signature(PolicyOptimizer).parameters["success_threshold"].default == 1
    responses = group(["0", "1", "0.5", "0.9999"], [0.0] * 4, chat=policy.chat).responses
    prompts = tuple(replace(prompt, verifier=Half()) for prompt in responses.prompts)
    collector = Collector(HFRollout(), Verification(workers=0), 1.0, PhaseTimer())
    with caplog.at_level(logging.INFO):
        whole = replace(responses, prompts=prompts, texts=(("0", "1", "1", "0"),))
        assert collector.judge(whole, "train").successes.tolist() == [[False, True, True, False]]
        assert not caplog.messages
        for _ in range(2):
            judged = collector.judge(replace(responses, prompts=prompts), "train")
            assert judged.successes.tolist() == [[False, True, False, False]]
    assert caplog.messages == [
        "the verifier gave a reward between 0 and 1 (0.5). A response counts as right if its "
        "reward is at least model.success_threshold, which is 1"
    ]


def test_an_evaluation_keeps_the_best_response_that_is_more_than_thinking():
    texts = ["half", "<think>all</think>", "<think>a</think>right", "right too"]
    (question,) = questions(group(texts, [0.5, 1, 1, 1]))
    assert question.right == "<think>a</think>right"
    (question,) = questions(group(["half", "a"], [0.5, 0]))
    assert question.right == "half"
    (question,) = questions(group(["<think>", "a"], [1.0, 0]))
    assert question.right == "<think>"


def test_the_shortest_of_the_best_successes_is_taught(policy):
    out = shown(ShortestSuccess(), policy.chat, ["half", "whole one", "whole"], [0.5, 1, 1])
    assert [bool(text) for text in out] == [False, False, True]
    assert "were right" in out[2] and "half" in out[2]


@pytest.mark.parametrize("blank", ["", " ", "\n\t "])
def test_white_space_is_nothing_to_tell(policy, blank):
    assert not any(shown(Feedback(), policy.chat, ["a", "b"], [0.0, 0], feedback=blank))
    both = DemonstrationOrFeedback(both=True)
    assert "unsuccessful" not in shown(both, policy.chat, ["a", "b"], [0.0, 1], feedback=blank)[0]
    judged = group(["a", "b"], [0.0, 1], chat=policy.chat)
    told = GoldSolution().render(policy.chat, with_prompt(judged, answer=blank))
    assert not told.available.any()


def test_thinking_that_the_prompt_opened_and_nothing_ends_is_not_shown(policy):
    judged = group(["no end", "a</think>b", "c"], [1.0, 1, 0], chat=policy.chat)
    told = SiblingDemonstration().render(policy.chat, with_prompt(judged, thinking="<think>"))
    texts = [policy.chat.tokenizer.decode(list(ids)) for ids in told.ids[0]]
    assert ["\nb\n" in text for text in texts] == [True, False, True]


def test_feedback_is_told_to_failures_only(policy):
    out = shown(Feedback(), policy.chat, ["a", "b"], [1.0, 0], feedback="off by {one}")
    assert not out[0] and "off by {one}" in out[1] and "unsuccessful earlier attempt" in out[1]
    assert not any(shown(Feedback(), policy.chat, ["a"], [0.0], feedback=""))


def test_feedback_steps_in_where_there_is_no_demonstration(policy):
    context = DemonstrationOrFeedback()
    assert "wrong" in shown(context, policy.chat, ["a", "b"], [0.0, 0])[0]
    assert "wrong" not in shown(context, policy.chat, ["a", "b"], [0.0, 1])[0]
    both = shown(DemonstrationOrFeedback(both=True), policy.chat, ["a", "bee"], [0.0, 1])[0]
    assert "wrong" in both and "bee" in both


@pytest.mark.parametrize("limit", [150, 160, 200])
def test_only_the_demonstration_is_cut_and_its_end_stays(policy, limit):
    demonstration = "".join(chr(97 + i % 26) for i in range(300)) + "ANSWER"
    judged = group([demonstration, "b"], [1.0, 0], chat=policy.chat)
    contexts = SiblingDemonstration(max_tokens=limit).render(policy.chat, judged)
    ids = contexts.ids[0][1]
    text = policy.chat.tokenizer.decode(list(ids))
    assert len(ids) <= limit
    assert text.endswith("original question.\n<|im_end|>\n<|im_start|>assistant\n")
    assert "2+2?" in text and "SWER\n" in text


def test_no_room_for_template_and_question_means_no_teacher(policy):
    assert not any(shown(SiblingDemonstration(max_tokens=20), policy.chat, ["a", "b"], [1.0, 0]))


def test_plain_prompt_shows_what_the_student_sees(policy):
    judged = group(["a", "b"], [1.0, 0], chat=policy.chat)
    contexts = PlainPrompt().render(policy.chat, judged)
    assert contexts.ids == ((judged.prompts[0].ids,) * 2,)
    assert contexts.available.all()


def test_templates_insert_text_with_braces_as_it_is():
    filled = Templates().fill(
        ({"role": "user", "content": "{solution}"},), demonstration="{prompt} {0}"
    )
    assert filled[0]["content"].startswith("{solution}\nCorrect solution:\n\n{prompt} {0}\n")


def test_a_template_without_its_placeholder_is_refused():
    with pytest.raises(ValueError, match=r"`Templates\(solution=...\)` must contain"):
        Templates(solution="no place")


def configured(teacher, policy):
    teacher.configure(policy, "teacher")
    return teacher


def move(policy):
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("lora", [False, True])
def test_ema_closes_the_gap_by_its_rate_each_step(qwen3, lora):
    policy = CausalLM(str(qwen3), adapter=Lora(r=2)) if lora else CausalLM(str(qwen3))
    policy.configure_model()
    teacher = configured(EMA(rate=0.05), policy)
    start = [own.clone() for own, _ in teacher.weights.pairs(policy.wrapped)]
    assert start
    move(policy)
    for _ in range(3):
        teacher.after_step(policy)
    # After n steps towards a constant: theta + (1 - r)^n (theta' - theta)
    for (own, student), first in zip(teacher.weights.pairs(policy.wrapped), start, strict=True):
        torch.testing.assert_close(own, student + 0.95**3 * (first - student), rtol=1e-4, atol=1e-5)


def test_ema_of_rate_zero_never_moves_and_of_rate_one_follows(policy):
    still, follows = configured(EMA(rate=0.0), policy), configured(EMA(rate=1.0), policy)
    before = [own.clone() for own, _ in still.weights.pairs(policy.wrapped)]
    move(policy)
    still.after_step(policy)
    follows.after_step(policy)
    for (own, _), first in zip(still.weights.pairs(policy.wrapped), before, strict=True):
        torch.testing.assert_close(own, first, rtol=0, atol=0)
    for own, student in follows.weights.pairs(policy.wrapped):
        torch.testing.assert_close(own, student)


def test_frozen_weights_are_not_saved_and_moving_ones_are(policy):
    assert not configured(Frozen(), policy).state_dict()
    assert not configured(TrustRegion(), policy).state_dict()
    assert configured(EMA(), policy).state_dict()


def test_trust_region_is_the_geometric_mix():
    logits = [TokenLogits(torch.randn(2, 5).double()) for _ in range(2)]
    mixed = TrustRegion(mix=0.3).combine(lambda: logits[0], tuple(logits))
    product = logits[0].probs ** 0.7 * logits[1].probs ** 0.3
    torch.testing.assert_close(mixed.probs, product / product.sum(-1, keepdim=True))


def test_trunks_are_the_student_the_first_policy_or_both(policy):
    assert len(Live().weights_to_run(policy)) == 1
    assert len(configured(TrustRegion(), policy).weights_to_run(policy)) == 2
    assert NoTeacher().weights_to_run(policy) == () and not NoTeacher().exists


def test_rates_outside_the_unit_interval_are_refused():
    with pytest.raises(ValueError, match=r"`EMA\(rate=...\)` must be in \[0, 1\], got 2"):
        EMA(rate=2)
    with pytest.raises(ValueError, match=r"`TrustRegion\(mix=...\)`"):
        TrustRegion(mix=-1)
