"""Credits in combination: blends, routes, importance, heads and dtypes against plain autograd."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kernel_inputs import run, tokens
from oracle import clipped_gradient, divergence, supported
from scsdpo.advantage import (
    Advantage,
    BatchStd,
    Blend,
    Divergence,
    Full,
    GroupMean,
    GroupPassRate,
    GroupRelative,
    GroupStd,
    LeaveOneOut,
    Plan,
    Sampled,
    SelfDistillation,
    TopK,
    Unscaled,
    Weighted,
)
from scsdpo.advantage.support import largest
from scsdpo.loss import (
    NoImportance,
    SamplerImportance,
    SparseCredit,
    SumCredit,
    TokenImportance,
    kernel,
)

VOCABULARY = 7
SUPPORTS = {
    "full": (Full(), {"k": None, "tail": False}),
    "top": (TopK(k=3, tail=False), {"k": 3, "tail": False}),
    "top+tail": (TopK(k=3, tail=True), {"k": 3, "tail": True}),
    "k>V": (TopK(k=50), {"k": 50, "tail": True}),
}
RELATIVE = [
    GroupRelative(baseline=baseline, scale=scale, clip_low=0.1, clip_high=0.3)
    for baseline in (GroupMean(), LeaveOneOut())
    for scale in (Unscaled(), GroupStd(ddof=1), BatchStd(), GroupPassRate())
]


@dataclass(frozen=True)
class Undefined(Advantage):
    """Credit that is not a number, as a route's part may give where it has no say."""

    def plan(self, judged, available):
        nobody = torch.zeros_like(available)
        return Plan(active=nobody, needs_teacher=nobody, needs_reference=nobody, credit=self.credit)

    def credit(self, chunk):
        bad = torch.full_like(chunk.logprob, torch.nan)
        return SparseCredit(ids=chunk.ids[:, None], values=bad[:, None], rest=bad, objective=bad)


@dataclass(frozen=True)
class Route(Advantage):
    """Even rollouts to one advantage, odd ones to another; a third has no say anywhere."""

    even: Advantage
    odd: Advantage

    def plan(self, judged, available):
        plans = [a.plan(judged, available) for a in (self.even, self.odd, Undefined())]
        return replace(plans[0], credit=partial(self.credit, plans))

    def credit(self, plans, chunk):
        even = (chunk.rollout % 2 == 0).to(chunk.logprob.dtype)
        says = [even, 1 - even, torch.zeros_like(even)]
        credits = [plan.credit(chunk) for plan in plans]
        return SumCredit(parts=tuple(zip(says, credits, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything a token's loss is made of, in float64, with a graph to `hidden` and the head."""

    head: nn.Linear
    hidden: torch.Tensor
    teacher: torch.Tensor
    ids: torch.Tensor
    scale: torch.Tensor
    rewards: torch.Tensor
    noise: torch.Tensor
    temperature: float

    @staticmethod
    def draw(n, *, dtype=torch.float64, bias=True, temperature=1.0, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        head = nn.Linear(4, VOCABULARY, bias=bias, dtype=dtype)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.copy_(normal(*parameter.shape))
        return Problem(
            head=head,
            hidden=normal(n, 4).requires_grad_(),
            teacher=normal(n, 4),
            ids=torch.randint(VOCABULARY, (n,), generator=generator),
            scale=torch.rand(n, generator=generator, dtype=torch.float64),
            rewards=torch.randint(0, 2, (1, n), generator=generator).float(),
            noise=torch.randn(2, n, generator=generator, dtype=torch.float64) / 3,
            temperature=temperature,
        )

    def logits(self):
        both = (self.head(self.hidden), self.head(self.teacher).detach())
        return [z.double() / self.temperature for z in both]

    def logprob(self):
        return self.logits()[0].log_softmax(-1).gather(-1, self.ids[:, None])[:, 0]

    def batch(self):
        logprob = self.logprob().detach()
        sampled, old = logprob + self.noise[0], logprob + self.noise[1]
        return tokens(self.ids, scale=self.scale, sampling_logprob=sampled, old_logprob=old)

    def kernel(self, advantage, importance):
        return run(
            advantage,
            self.hidden,
            self.teacher,
            self.batch(),
            rewards=self.rewards,
            head=self.head,
            importance=importance,
            temperature=self.temperature,
        )

    def factor(self, importance):
        """Importance by hand: current, old and sampler's log-probs."""
        ratio = {
            NoImportance: torch.zeros_like(self.noise[0]),
            TokenImportance: -self.noise[0],
            SamplerImportance: self.noise[1] - self.noise[0],
        }[type(importance)].exp()
        return ratio if isinstance(importance, NoImportance) else ratio.clamp(max=importance.cap)

    def token_losses(self, advantage):
        """[n] by the oracle."""
        z_s, z_t = self.logits()
        logprob = self.logprob()
        if isinstance(advantage, GroupRelative):
            old = logprob.detach() + self.noise[1]
            a = advantage.advantages(self.rewards)[0]
            return clipped_gradient(logprob - old, a, advantage.clip_low, advantage.clip_high)
        if advantage.support.sampled:
            z_t = z_t.log_softmax(-1).gather(-1, self.ids[:, None])[:, 0]
            value = (logprob - z_t).detach()
            return value + value * (logprob - logprob.detach())
        view = next(v for s, v in SUPPORTS.values() if s == advantage.support)
        return divergence(advantage.divergence.alpha, *supported(z_s, z_t, **view))


distillations = st.builds(
    lambda alpha, name: SelfDistillation(
        divergence=Divergence(alpha=alpha), support=SUPPORTS[name][0]
    ),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.sampled_from(sorted(SUPPORTS)),
) | st.just(SelfDistillation(divergence=Divergence(alpha=1.0), support=Sampled()))
leaves = distillations | st.sampled_from(RELATIVE)
importances = st.sampled_from(
    [NoImportance(), TokenImportance(cap=1.2), SamplerImportance(cap=1.2), SamplerImportance()]
)
problems = st.builds(
    partial(Problem.draw),
    st.integers(2, 6),  # a group of one has no baseline, and is refused
    bias=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7]),
    seed=st.integers(0, 10**6),
)


def same_gradients(ours, expected, problem, rtol=1e-9, atol=1e-11):
    wanted = [problem.hidden, *problem.head.parameters()]
    torch.testing.assert_close(ours.loss, expected, rtol=rtol, atol=atol)
    pairs = zip(*(torch.autograd.grad(x, wanted) for x in (ours.loss, expected)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


@given(problems, st.lists(st.tuples(leaves, st.floats(-2, 2)), min_size=1, max_size=3), importances)
@settings(max_examples=120, deadline=None)
def test_any_blend_under_any_importance_equals_autograd(problem, parts, importance):
    blend = Blend(parts=tuple(Weighted(advantage=a, weight=w) for a, w in parts))
    factor = problem.scale * problem.factor(importance)
    active = [
        w * torch.where(advantage_speaks(a, problem), problem.token_losses(a), 0.0)
        for a, w in parts
    ]
    expected = (factor * torch.stack(active).sum(0)).sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernel.CHUNK_BYTES, "cpu", 1)
        patch.setattr(kernel, "FEWEST_ROWS", 3)
        patch.setitem(kernel.BLOCK_BYTES, "cpu", 4 * VOCABULARY * 2)
        same_gradients(problem.kernel(blend, importance), expected, problem)


def advantage_speaks(advantage, problem):
    """[n] bool: a group without spread has no policy gradient."""
    if isinstance(advantage, GroupRelative):
        return advantage.advantages(problem.rewards)[0] != 0
    return torch.ones(len(problem.ids), dtype=torch.bool)


@given(problems, leaves, leaves, importances)
@settings(max_examples=80, deadline=None)
def test_a_route_is_each_part_where_it_has_a_say_and_reads_nothing_elsewhere(
    problem, even, odd, importance
):
    factor = problem.scale * problem.factor(importance)
    here = torch.arange(len(problem.ids)) % 2 == 0
    losses = torch.where(here, problem.token_losses(even), problem.token_losses(odd))
    same_gradients(problem.kernel(Route(even, odd), importance), (factor * losses).sum(), problem)


@given(st.integers(2, 6), st.integers(0, 10**6), leaves, importances)
@settings(max_examples=60, deadline=None)
def test_bf16_states_and_head_lose_no_more_than_bf16(n, seed, advantage, importance):
    """Against float64 maths on the same bf16 logits: 2^-5 of the largest entry."""
    narrow = Problem.draw(n, dtype=torch.bfloat16, bias=False, seed=seed)
    output = narrow.kernel(advantage, importance)
    assert output.objective.dtype == torch.float32
    factor = narrow.scale * narrow.factor(importance)
    expected = (factor * narrow.token_losses(advantage)).sum()
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-4, atol=1e-4)
    wanted = [narrow.hidden, narrow.head.weight]
    pairs = zip(*(torch.autograd.grad(x, wanted) for x in (output.loss, expected)), strict=True)
    # The oracle's own backward rounds to bf16 too: two roundings of products of 7 and 6 terms.
    for mine, theirs in pairs:
        scale = theirs.abs().max().clamp(min=0.05)
        assert (mine - theirs).abs().max() <= 2**-5 * scale


def test_a_tied_head_gets_the_gradient_of_both_its_uses():
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(4, VOCABULARY, bias=False, dtype=torch.float64)
    read = torch.randint(VOCABULARY, (5,), generator=generator)
    problem = Problem.draw(5)

    def loss(through):
        head.zero_grad()
        hidden = nn.functional.embedding(read, head.weight).tanh()  # reads the same matrix
        through(hidden).backward()
        return head.weight.grad.clone()

    def ours(hidden):
        advantage = SelfDistillation(support=Full())
        return run(advantage, hidden, problem.teacher, problem.batch(), head=head).loss

    def plain(hidden):
        z_t = head(problem.teacher).detach()
        value = divergence(0.5, head(hidden).log_softmax(-1), z_t.log_softmax(-1))
        return (problem.scale * value).sum()

    torch.testing.assert_close(loss(ours), loss(plain), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("support", [s for s, _ in SUPPORTS.values()], ids=repr)
def test_a_token_that_the_head_forbids_gets_no_gradient_and_spoils_no_other(support):
    problem = Problem.draw(5)
    with torch.no_grad():
        problem.head.bias[3] = -torch.inf
    allowed = replace(problem, ids=problem.ids.clamp(max=2))
    output = allowed.kernel(SelfDistillation(support=support), NoImportance())
    output.loss.backward()
    assert output.loss.isfinite() and output.entropy.isfinite().all()
    assert problem.hidden.grad.isfinite().all()
    assert (problem.head.weight.grad[3] == 0).all() and problem.head.bias.grad[3] == 0


def test_the_gradient_is_given_away_once():
    problem = Problem.draw(3)
    loss = problem.kernel(SelfDistillation(), NoImportance()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward: call it once"):
        loss.backward()


@pytest.mark.parametrize("shape", [(5, 8195, 100), (3, 40, 2), (4, 16, 15), (2, 1000, 1)])
def test_the_largest_are_those_of_topk(shape):
    rows, vocabulary, k = shape
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[:, :3] = -torch.inf
    assert torch.equal(largest(logits, k), logits.topk(k, dim=-1).indices)
