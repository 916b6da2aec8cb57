"""What a user's own strategy hands over is checked where it comes in: one line, with its class."""

from dataclasses import dataclass, replace

import pytest
import torch

from batches import G, Q, double_policy, gradient, judged, parts
from scsdpo.advantage import Advantage, Blend, Plan, Route, Routed, Router, Weighted
from scsdpo.errors import ConfigurationError
from scsdpo.loss import DenseCredit, Importance, SparseCredit
from scsdpo.weighting import Product, TokenWeighting, Uniform, Weighting


class _Mine(Weighting):
    def __init__(self, value):
        self.value = value

    def weigh(self, judged):
        return self.value(judged.rewards)


@pytest.mark.parametrize(
    ("value", "came"),
    [
        (lambda r: torch.ones(len(r)), r"= \[4, 3\], got float32 \[4\]"),
        (lambda r: r.tolist(), r"= \[4, 3\], got list"),
        (lambda r: r - 2, r"= \[4, 3\], got -1 among them \(12 of 12\)|got -2"),
        (lambda r: r / 0, r"got (inf|nan) among them"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: Product(factors=(Uniform(), w))])
def test_weights_must_be_a_finite_table_of_the_groups(policy, value, came, wrap):
    some = judged(policy)
    with pytest.raises(
        ConfigurationError, match=rf"`_Mine.weigh` must give finite weights.*{came}"
    ):
        wrap(_Mine(value)).weights(some)


def test_weights_of_another_dtype_are_converted(policy):
    some = judged(policy)
    for kind in (torch.float32, torch.int64, torch.bool):
        weights = _Mine(lambda r, kind=kind: (r > 0).to(kind)).weights(some)
        assert weights.dtype == torch.float64 and weights.sum() == 6


@dataclass(frozen=True)
class _Own(Advantage):
    """Credit 1 for every sampled token, spoiled by `change`."""

    change: object = staticmethod(lambda plan: plan)
    credit: object = None

    def plan(self, judged, available):
        everyone = torch.ones_like(available)
        plan = Plan(
            active=everyone,
            needs_teacher=~everyone,
            needs_reference=~everyone,
            credit=self.credit or self._credit,
        )
        return self.change(plan)

    @staticmethod
    def _credit(chunk):
        zeros = torch.zeros_like(chunk.logprob)
        return SparseCredit(chunk.ids[:, None], zeros[:, None] + 1, zeros, zeros)


WRAPS = {
    "alone": lambda advantage: advantage,
    "blended": lambda advantage: Blend(parts=(Weighted(advantage=advantage, weight=0.5),)),
    "routed": lambda advantage: Routed(routes=(Route(advantage=advantage),)),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: replace(p, active=p.active[:, 0]), r"`_Own.plan, active`.*got bool \[4\]"),
        (lambda p: replace(p, active=p.active.float()), r"bool tensor .*got float32 \[4, 3\]"),
        (lambda p: replace(p, needs_teacher=None), r"`_Own.plan, needs_teacher`.*got NoneType"),
    ],
)
def test_a_plans_masks_must_be_bool_tables_of_the_groups(policy, wrap, change, message):
    some = judged(policy)
    available = torch.ones(Q, G, dtype=torch.bool)
    with pytest.raises(ConfigurationError, match=message):
        WRAPS[wrap](_Own(change)).planned(some, available)


def short(chunk):
    return SparseCredit(chunk.ids, chunk.logprob, chunk.logprob, chunk.logprob)


def flat(chunk):
    return DenseCredit(values=chunk.logprob, objective=chunk.logprob)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(
    ("credit", "message"),
    [
        (short, r"`_Own, credit.ids` must give int64 indices \[n, k\] = .*, got int64 \["),
        (flat, r"`_Own, credit.values` must give numbers \[n, V\]"),
        (lambda chunk: chunk.logprob, r"`_Own`: a plan's credit must be .*, got Tensor"),
    ],
)
def test_a_credit_has_its_shapes_or_one_line_names_its_class(qwen3, wrap, credit, message):
    batch, update = parts(double_policy(qwen3), WRAPS[wrap](_Own(credit=credit)))
    with pytest.raises(ConfigurationError, match=message):
        gradient(double_policy(qwen3), batch, update)


def test_a_credit_in_another_precision_is_converted(qwen3):
    def narrow(chunk):
        made = _Own._credit(chunk)
        return SparseCredit(made.ids, made.values.float(), made.rest.half(), made.objective)

    policy = double_policy(qwen3)
    loss, expected, _ = gradient(policy, *parts(policy, _Own()))
    other, ours, _ = gradient(policy, *parts(policy, _Own(credit=narrow)))
    assert other == loss
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad)


class _OddTokens(TokenWeighting):
    def weigh(self, signals, distilled):
        return torch.ones(3)


class _OddImportance(Importance):
    def weigh(self, chunk):
        return torch.ones(2, 2)


class _OddRouter(Router):
    def claims(self, judged, available):
        return available.float()


def test_the_other_plug_ins_are_checked_too(qwen3):
    policy = double_policy(qwen3)
    with pytest.raises(ConfigurationError, match=r"`_OddTokens.weigh` .*\[R, L\]"):
        gradient(policy, *parts(policy, _Own(), token_weighting=_OddTokens()))
    with pytest.raises(ConfigurationError, match=r"`_OddImportance.weigh` must give numbers \[n\]"):
        gradient(policy, *parts(policy, _Own(), importance=_OddImportance()))
    some = judged(policy)
    odd = Routed(routes=(Route(advantage=_Own(), where=_OddRouter()),))
    with pytest.raises(ConfigurationError, match=r"`_OddRouter.claims` must give a bool tensor"):
        odd.planned(some, torch.ones(Q, G, dtype=torch.bool))
