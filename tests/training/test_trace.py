"""`PolicyOptimizer.trace`: every token's credit is what autograd of the logged loss says."""

from dataclasses import dataclass, replace

import pytest
import torch

from runs import Toys, data, strategies
from runs import module as toy_module
from scsdpo.records import TokenTrace
from scsdpo.rollout import Rollout
from scsdpo.state import DecayedBeta, all_remembered
from scsdpo.types import Verdict
from scsdpo.verifiers import Verification, Verifier
from table_policy import SUCCESSES, G, Q, V, judged, state
from test_methods import BATCHES, BY_HAND, LIVE, Case, module


@dataclass(frozen=True)
class AsJudged(Verifier):
    """The verdicts of `table_policy.judged`, read off a response's text."""

    def verify(self, prompt, response):
        q, g = map(int, response.split()[1:])
        right = g < SUCCESSES[q]
        return Verdict(reward=float(right), feedback="" if right else f"wrong {q} {g}")


class Drawn(Rollout):
    """The rollouts of a batch, whatever is asked."""

    def __init__(self, batch):
        self.batch = batch

    def sample(self, policy, prompts, sampling):
        return replace(self.batch.responses, prompts=tuple(prompts))


class TokenCase(Case):
    """With logits [V] of its own, divided by the temperature, at every token."""

    def __init__(self, model, batch, *, live):
        super().__init__(model, batch, live=live)
        self.z = {}

    def log_s(self, q, g, t):
        if (q, g, t) not in self.z:
            place = self.place(q, g, t)
            previous = int(self.rollouts.ids[q, g, place - 1]) if place else -1
            row = self.table[state(self.rollouts.prompts[q].ids, previous)] / self.tau
            self.z[q, g, t] = row.detach().requires_grad_()
        return self.z[q, g, t].log_softmax(-1)


def questions_of(batch):
    return [replace(prompt, verifier=AsJudged()) for prompt in batch.prompts]


def traced(name, tmp_path, batch):
    """(trace, -d loss / d z [Q, G, L, V] as an observer saw it)."""
    model = module(name, tmp_path, verification={"workers": 0})
    model.collector.rollout = Drawn(batch)
    width = judged().responses.sampled.shape[-1]
    questions = 2 if name == "dapo" else Q  # the informative ones, 0 and 3
    table = torch.zeros(questions * G * width, V, dtype=torch.float64)

    def observe(seen):
        table[seen.chunk.places] = seen.credit

    trace = model.trace(questions_of(judged()), observe=observe)
    return model, trace, table.view(questions, G, width, V)


def assert_recorded(model, trace):
    """A record of the tokens has the same numbers, and its factors multiply to the credit."""
    batch = trace.batch
    rows = batch.active.nonzero()[:, 0].tolist()
    taught, length = batch.plan.needs_teacher.flatten(), batch.sampled.shape[1]
    record = TokenTrace(rows, taught, length=length, candidates=2)
    model.trace(questions_of(judged()), observe=record)
    for row in rows:
        kept = record.columns(row, batch.sampled[row])
        for name in ("credit", "magnitude", "objective", "logprob", "teacher_logprob", "entropy"):
            expected = getattr(trace, name).flatten(0, 1)[row][batch.sampled[row]]
            torch.testing.assert_close(kept[name], expected, equal_nan=True, rtol=1e-12, atol=0)
        weight = batch.weights.flatten()[row]
        denominators = kept["scale"] / weight
        assert bool((denominators == denominators[0]).all()) and float(denominators[0]) > 0
        assert bool((kept["credit"][kept["token_weight"] * kept["importance"] == 0] == 0).all())


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "one turn") for name in BY_HAND), ("sdpo", "episodes"), ("dash", "episodes")],
)
def test_the_credit_of_every_token_is_minus_autograd_of_the_logged_loss(name, kind, tmp_path):
    batch = BATCHES[kind]()
    model, trace, table = traced(name, tmp_path, batch)
    case = TokenCase(model, batch, live=name in LIVE)
    expected = BY_HAND[name](case)
    gradients = torch.autograd.grad(expected, list(case.z.values()), allow_unused=True)
    by_token = torch.zeros_like(table)
    for (q, g, t), gradient in zip(case.z, gradients, strict=True):
        if gradient is not None:
            place = case.place(q, g, t)
            by_token[{3: 1}.get(q, q) if name == "dapo" else q, g, place] = -gradient
    assert by_token.abs().max() > 1e-7
    assert trace.loss == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(table, by_token, rtol=1e-10, atol=1e-13)
    known = ~trace.credit.isnan()
    ids = trace.batch.judged.responses.ids[..., None]
    sampled = by_token.gather(-1, ids)[..., 0]
    torch.testing.assert_close(trace.credit[known], sampled[known], rtol=1e-10, atol=1e-13)
    assert_recorded(model, trace)
    pull = by_token.abs().sum(-1)
    torch.testing.assert_close(trace.magnitude[known], pull[known], rtol=1e-10, atol=1e-13)
    assert not pull[~known].any()  # what was not run has no gradient


@pytest.mark.parametrize("name", ["sc-sdpo", "srpo"])
def test_the_recorded_factors_multiply_to_the_credit(name, tmp_path):
    """credit = scale * token weight * importance * c(y), c(y) = -d jsd / d z(y)."""
    model, trace, _ = traced(name, tmp_path, judged())
    batch, case = trace.batch, TokenCase(model, judged(), live=False)
    rows = (batch.active & batch.plan.needs_teacher.flatten()).nonzero()[:, 0].tolist()
    taught, length = batch.plan.needs_teacher.flatten(), batch.sampled.shape[1]
    record = TokenTrace(rows, taught, length=length, candidates=V)
    model.trace(questions_of(judged()), observe=record)
    seen = []
    for row in rows:
        (q, g), kept = divmod(row, G), record.columns(row, batch.sampled[row])
        factor = kept["scale"] * kept["token_weight"] * kept["importance"]
        for t in range(len(factor)):
            # The teacher's log-probs are those that the record holds of the whole vocabulary.
            order = kept["top_ids"][t][:V].argsort()
            log_t = kept["top_teacher_probs"][t][:V][order].log()
            log_s = case.log_s(q, g, t)
            m = (log_s.exp() + log_t.exp()) / 2
            value = sum((p.exp() * (p - m.log())).sum() / 2 for p in (log_s, log_t))
            (gradient,) = torch.autograd.grad(value, case.z[q, g, t])
            assert float(kept["jsd"][t]) == pytest.approx(value.item(), rel=1e-9)
            assert float(kept["credit"][t]) == pytest.approx(
                float(-factor[t] * gradient[case.y(q, g, t)]), rel=1e-9, abs=1e-15
            )
            seen.append((float(kept["token_weight"][t]), float(kept["importance"][t])))
    assert len(set(seen)) > 1  # these methods have such factors


def test_a_trace_shows_log_probs_of_both_sides_where_they_were_computed(tmp_path):
    model, trace, _ = traced("sc-sdpo", tmp_path, judged())
    case = Case(model, judged())
    read = ~trace.teacher_logprob.isnan()
    assert torch.equal(read, ~trace.credit.isnan())
    for q, g, t in read.nonzero().tolist():
        first = next(h for h in range(SUCCESSES[q]) if h != g)
        told = f"\nCorrect solution:\n\nresponse {q} {first}\n\n"
        y = case.y(q, g, t)
        assert float(trace.logprob[q, g, t]) == pytest.approx(case.log_s(q, g, t)[y].item())
        assert float(trace.teacher_logprob[q, g, t]) == pytest.approx(
            float(case.log_t(q, g, t, told)[y])
        )


def test_a_trace_from_python_needs_no_trainer_and_changes_nothing(qwen3):
    from scsdpo.advantage import GroupRelative, RateWithin, Route, Routed
    from scsdpo.teacher import NoTeacher
    from scsdpo.weighting import Uniform

    where = RateWithin(low=0.0, high=1.0, rates=DecayedBeta())
    model = toy_module(
        qwen3,
        advantage=Routed(routes=(Route(advantage=GroupRelative(), where=where),)),
        teacher=NoTeacher(),
        weighting=Uniform(),
        verification=Verification(workers=0),
    )
    questions = data()
    questions.set_up_for(model)
    batch = next(iter(questions.train_dataloader()))
    before = {name: value.clone() for name, value in model.state_dict().items()} or None
    first = model.trace(batch)
    assert all_remembered(model)["memory.0"] == {"batches": 0, "kept": {}}
    second = model.trace(batch)
    assert first.batch.judged.responses.texts == second.batch.judged.responses.texts
    torch.testing.assert_close(first.credit, second.credit, rtol=0, atol=0, equal_nan=True)
    assert all(p.grad is None for p in model.parameters())
    for name, value in (before or {}).items():
        assert torch.equal(model.state_dict()[name], value), name
    assert first.credit.shape == first.batch.judged.responses.sampled.shape


def test_validation_questions_can_be_had_without_a_trainer_too(policy):
    questions = data(Toys(8), Toys(3))
    questions.set_up_for(strategies(policy.chat), "validate")
    assert [p.key for batch in questions.val_dataloader() for p in batch] == [
        f"toy/{i}" for i in range(3)
    ]
