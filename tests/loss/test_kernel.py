"""The chunked kernel against plain autograd, and its limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kernel_inputs import identity_head, run, tokens
from oracle import clipped_gradient, divergence, supported
from scsdpo.advantage import (
    Blend,
    Divergence,
    Full,
    GroupRelative,
    LeaveOneOut,
    ReferenceAnchor,
    Sampled,
    SelfDistillation,
    TopK,
    Unscaled,
    Weighted,
)
from scsdpo.loss import (
    DenseCredit,
    Head,
    HeadGradient,
    TokenImportance,
    TokenLogits,
    kernel,
    logits,
)

SUPPORTS = {
    "full": (Full(), {"k": None, "tail": False}),
    "top": (TopK(k=3, tail=False), {"k": 3, "tail": False}),
    "top+tail": (TopK(k=3, tail=True), {"k": 3, "tail": True}),
    "top>V": (TopK(k=50, tail=True), {"k": 50, "tail": True}),
}


def problem(n=5, hidden=4, vocabulary=7, *, bias=True, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    head = nn.Linear(hidden, vocabulary, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(draw(*parameter.shape))
    student, teacher = draw(n, hidden).requires_grad_(), draw(n, hidden)
    ids = torch.randint(vocabulary, (n,), generator=generator)
    scale = torch.rand(n, generator=generator, dtype=torch.float64)
    return head, student, teacher, ids, scale


def gradients(loss, head, student):
    wanted = [student, *[p for p in head.parameters() if p.requires_grad]]
    return torch.autograd.grad(loss, wanted)


@given(
    alpha=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    support=st.sampled_from(sorted(SUPPORTS)),
    bias=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7]),
    chunk=st.integers(1, 6),
    n=st.integers(0, 6),
    cap=st.sampled_from([0.5, 2.0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_divergences_equal_autograd_in_any_chunking(
    alpha, support, bias, temperature, chunk, n, cap, seed
):
    head, student, teacher, ids, scale = problem(n=n, bias=bias, seed=seed)
    strategy, view = SUPPORTS[support]
    sampled = -torch.rand(n, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernel.CHUNK_BYTES, "cpu", 4 * 7 * chunk)
        patch.setattr(kernel, "FEWEST_ROWS", 1)
        patch.setitem(kernel.BLOCK_BYTES, "cpu", 4 * 7 * 2)
        output = run(
            SelfDistillation(divergence=Divergence(alpha=alpha), support=strategy),
            student,
            teacher,
            tokens(ids, scale=scale, sampling_logprob=sampled),
            head=head,
            importance=TokenImportance(cap=cap),
            temperature=temperature,
        )
    z_s, z_t = head(student) / temperature, head(teacher).detach() / temperature
    logprob = z_s.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    factor = (logprob - sampled).exp().clamp(max=cap).detach()
    value = divergence(alpha, *supported(z_s, z_t, **view))
    expected = (scale * factor * value).sum()

    # The mass of a tail is 1 - that of the others: of a tail of 1e-7 nine digits are known.
    torch.testing.assert_close(output.loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(output.objective, value.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(output.logprob, logprob.detach(), rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(
        gradients(output.loss, head, student), gradients(expected, head, student), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@given(seed=st.integers(0, 10**6), first=st.booleans())
@settings(max_examples=40, deadline=None)
def test_policy_gradient_equals_autograd_with_the_clip_live(seed, first):
    head, student, teacher, ids, scale = problem(n=6, seed=seed)
    rewards = torch.tensor([[1.0, 0, 1, 1, 0, 0.25]])
    z = head(student)
    logprob = z.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    generator = torch.Generator().manual_seed(seed)
    old = logprob.detach() + 0.5 * torch.randn(6, generator=generator, dtype=torch.float64)
    batch = tokens(ids, scale=scale) if first else tokens(ids, scale=scale, old_logprob=old)
    advantage = GroupRelative(clip_low=0.2, clip_high=0.3)

    output = run(advantage, student, teacher, batch, head=head, rewards=rewards)
    log_ratio = logprob - (logprob.detach() if first else old)
    a = advantage.advantages(rewards)[0]
    expected = (scale * clipped_gradient(log_ratio, a, 0.2, 0.3)).sum()

    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(
        gradients(output.loss, head, student), gradients(expected, head, student), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_blend_is_the_weighted_sum_of_its_parts():
    head, student, teacher, ids, scale = problem(n=4)
    rewards = torch.tensor([[1.0, 0, 0, 1]])
    parts = [
        (GroupRelative(), 0.9),
        (SelfDistillation(support=TopK(k=3)), 0.1),
        (ReferenceAnchor(support=Full()), -2.0),
    ]
    blend = Blend(parts=tuple(Weighted(advantage=a, weight=w) for a, w in parts))

    def grad(advantage):
        output = run(
            advantage, student, teacher, tokens(ids, scale=scale), head=head, rewards=rewards
        )
        return torch.stack([output.loss.detach(), gradients(output.loss, head, student)[0].sum()])

    expected = sum(w * grad(a) for a, w in parts)
    torch.testing.assert_close(grad(blend), expected, rtol=1e-10, atol=1e-12)


def test_a_frozen_head_gets_no_gradient():
    head, student, teacher, ids, scale = problem()
    head.requires_grad_(False)
    output = run(SelfDistillation(), student, teacher, tokens(ids, scale=scale), head=head)
    output.loss.backward()
    assert head.weight.grad is None
    assert student.grad.abs().sum() > 0


def test_zero_tokens_give_zero_loss_and_zero_gradients():
    head, student, teacher, ids, scale = problem(n=0)
    output = run(SelfDistillation(), student, teacher, tokens(ids, scale=scale), head=head)
    output.loss.backward()
    assert output.loss.item() == 0
    assert head.weight.grad.abs().sum() == 0


def test_zero_scale_gives_exactly_zero_gradient():
    head, student, teacher, ids, scale = problem()
    batch = tokens(ids, scale=torch.zeros_like(scale))
    run(SelfDistillation(), student, teacher, batch, head=head).loss.backward()
    assert student.grad.abs().sum() == 0


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("support", [Full(), TopK(k=2), TopK(k=2, tail=False)])
def test_forbidden_tokens_leave_everything_finite(alpha, support):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 6, generator=generator).double() for _ in range(2))
    student[:, 4] = teacher[:, 4] = -torch.inf
    # With infinities on the diagonal's other side an identity head would make nan: use logits.
    from scsdpo.loss import TokenLogits

    credit = support.credit(
        Divergence(alpha=alpha),
        TokenLogits(student),
        TokenLogits(teacher),
        torch.zeros(3, dtype=torch.long),
    )
    gradient = credit.logits_gradient(TokenLogits(student))
    assert gradient.isfinite().all() and credit.objective.isfinite().all()
    assert (gradient[:, 4] == 0).all()
    assert TokenLogits(student).entropy().isfinite().all()


def test_bf16_logits_keep_a_float32_normaliser():
    """A bf16 model's loss stays within bf16 rounding of its logits, tail included."""
    head, student, teacher, ids, scale = problem(
        n=64, hidden=32, vocabulary=500, bias=False, dtype=torch.bfloat16
    )
    head.weight.data.mul_(0.3)
    batch = tokens(ids, scale=scale / 64)
    narrow = run(SelfDistillation(support=TopK(k=20)), student, teacher, batch, head=head)
    assert narrow.objective.dtype == torch.float32
    # The same bf16 logits, then everything in float64.
    z_s, z_t = head(student).double(), head(teacher).double()
    value = divergence(0.5, *supported(z_s, z_t, k=20, tail=True))
    torch.testing.assert_close(narrow.objective.double(), value.detach(), rtol=1e-3, atol=1e-5)
    exact = torch.autograd.grad((scale / 64 * value).sum(), student)[0].double()
    ours = torch.autograd.grad(narrow.loss, student)[0].double()
    assert (ours - exact).norm() / exact.norm() < 0.01


def test_inputs_are_not_modified_and_the_teacher_gets_no_gradient():
    head, student, teacher, ids, scale = problem()
    teacher.requires_grad_()
    before = [x.detach().clone() for x in (student, teacher, scale)]
    run(SelfDistillation(), student, teacher, tokens(ids, scale=scale), head=head).loss.backward()
    assert teacher.grad is None
    for now, then in zip((student, teacher, scale), before, strict=True):
        torch.testing.assert_close(now.detach(), then, rtol=0, atol=0)


def test_sampled_support_is_unbiased_for_the_reverse_kl():
    """sum_y S(y) credit-gradient(y) = autograd of KL(S || T), by enumeration of y."""
    vocabulary = 6
    generator = torch.Generator().manual_seed(1)
    z, target = (torch.randn(1, vocabulary, generator=generator).double() for _ in range(2))
    z.requires_grad_()
    probs = z.softmax(-1)[0].detach()
    total_loss, total_gradient = 0.0, torch.zeros(1, vocabulary, dtype=torch.float64)
    for y in range(vocabulary):
        output = run(
            SelfDistillation(divergence=Divergence(alpha=1), support=Sampled()),
            z,
            target,
            tokens(torch.tensor([y])),
            head=identity_head(vocabulary),
        )
        total_loss += probs[y] * output.loss.detach()
        total_gradient += probs[y] * torch.autograd.grad(output.loss, z)[0]
    kl = divergence(1.0, z.log_softmax(-1), target.log_softmax(-1)).sum()
    torch.testing.assert_close(total_loss, kl.detach())
    torch.testing.assert_close(total_gradient, torch.autograd.grad(kl, z)[0])


def test_policy_gradient_is_unbiased_for_the_expected_reward():
    """Enumerated over y: with a constant baseline, E[gradient] = -d E[r] / dz."""
    vocabulary = 5
    z = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(2)).double()
    z.requires_grad_()
    reward = torch.tensor([0.0, 1.0, 0.5, 0.0, 0.3], dtype=torch.float64)
    total = torch.zeros_like(z)
    for y in range(vocabulary):
        # A group of two, the other one of fixed reward 0: leave-one-out's baseline is 0.
        output = run(
            GroupRelative(baseline=LeaveOneOut(), scale=Unscaled()),
            z,
            z.detach(),
            tokens(torch.tensor([y])),
            rewards=torch.tensor([[reward[y], 0.0]]),
        )
        total += z.softmax(-1)[0, y].detach() * torch.autograd.grad(output.loss, z)[0]
    expected = -(z.softmax(-1)[0] * reward).sum()
    torch.testing.assert_close(total, torch.autograd.grad(expected, z)[0], rtol=1e-6, atol=1e-8)


def test_as_an_advantage_the_jsd_is_log_m_over_s_not_its_negative():
    """The sign trap: d JSD / dS = 1/2 log(S/M) descends; the credit must raise what T prefers."""
    z = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[2.0, 0.0, -2.0]], dtype=torch.float64)
    run(SelfDistillation(support=Full()), z, target, tokens(torch.tensor([0]))).loss.backward()
    assert z.grad[0, 0] < 0 < z.grad[0, 2]  # descending raises z of the teacher's token


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("support", [Full(), TopK(k=3), TopK(k=3, tail=False)])
def test_divergence_is_zero_at_equality_and_positive_elsewhere(alpha, support):
    _, student, teacher, ids, scale = problem(hidden=7)
    advantage = SelfDistillation(divergence=Divergence(alpha=alpha), support=support)
    same = run(advantage, student, student.detach(), tokens(ids, scale=scale))
    same.loss.backward()
    torch.testing.assert_close(
        same.objective, torch.zeros(5, dtype=torch.float64), atol=1e-14, rtol=0
    )
    assert student.grad.abs().max() < 1e-14
    assert (run(advantage, student, teacher, tokens(ids, scale=scale)).objective > 0).all()


def test_the_heads_gradient_is_summed_over_micro_batches_and_given_by_the_last():
    torch.manual_seed(0)
    hidden, target = torch.randn(2, 10, 4, dtype=torch.float64)
    ids = torch.randint(7, (10,))
    whole, split = (nn.Linear(4, 7, bias=True, dtype=torch.float64) for _ in range(2))
    split.load_state_dict(whole.state_dict())
    advantage = SelfDistillation()
    run(advantage, hidden, target, tokens(ids), head=whole).loss.backward()
    gradient = HeadGradient(2)
    for part in (slice(0, 6), slice(6, 10)):
        assert split.weight.grad is None
        output = run(
            advantage,
            hidden[part],
            target[part],
            tokens(ids[part]),
            head=split,
            gradient=gradient,
        )
        output.loss.backward()
    torch.testing.assert_close(split.weight.grad, whole.weight.grad)
    torch.testing.assert_close(split.bias.grad, whole.bias.grad)


def test_products_of_bf16_are_kept_in_float32_where_a_device_can(monkeypatch):
    """CUDA's two operators, emulated: a sum over chunks is not rounded to bf16 chunk by chunk."""
    library = torch.library.Library("aten", "IMPL")

    def product(left, right, dtype, *, out):
        return out.copy_(left.to(dtype) @ right.to(dtype))

    def sum_of(table, left, right, dtype, *, beta=1, alpha=1, out):
        assert table.dtype == dtype and beta == alpha == 1
        return out.copy_(table + left.to(dtype) @ right.to(dtype))

    library.impl("mm.dtype_out", product, "CPU")
    library.impl("addmm.dtype_out", sum_of, "CPU")
    monkeypatch.setattr(logits, "_keeps_sums", lambda narrow, out: out.dtype == torch.float32)
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((40, 64), (64, 30))
    )
    exact = left.double() @ right.double()
    try:
        out = torch.empty(40, 30)
        logits.multiply(left, right, out)
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
        for _ in range(3):
            logits.add_product(left, right, out)
        torch.testing.assert_close(out.double(), 4 * exact, rtol=1e-5, atol=1e-5)
        made = TokenLogits.of(left, Head(right.T.contiguous(), None), 1.0)
        torch.testing.assert_close(made.logits.double(), exact, rtol=1e-5, atol=1e-5)
        head, student, teacher, ids, scale = problem(hidden=8, bias=False, dtype=torch.float32)
        gradient = HeadGradient(1)
        with torch.autocast("cpu", torch.bfloat16):
            batch = tokens(ids, scale=scale)
            loss = run(SelfDistillation(), student, teacher, batch, head=head, gradient=gradient)
        assert gradient.weight.dtype == torch.float32
        assert (gradient.weight != gradient.weight.bfloat16()).any() and loss.loss.isfinite()
    finally:
        library._destroy()


@pytest.mark.parametrize(
    ("memory_gib", "table_gib"), [(141, 1), (128, 1), (80, 80 / 128), (24, 0.25)]
)
def test_a_chunk_on_cuda_has_a_gibibyte_or_its_share_of_a_smaller_device(memory_gib, table_gib):
    vocabulary = 151936
    rows = kernel.chunk_rows(vocabulary, "cuda", memory_gib * 2**30)
    assert rows * 4 * vocabulary <= table_gib * 2**30 < (rows + 1) * 4 * vocabulary


def test_a_forbidden_token_adds_nothing_to_the_entropy_and_a_spoiled_one_shows():
    z = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, torch.nan, 1.0], [0.0, torch.inf, 1.0]])
    entropy = TokenLogits(z).entropy()
    p = torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(entropy[0], -(p * p.log() + (1 - p) * (1 - p).log()))
    assert entropy[1:].isnan().all()


def test_where_a_weight_is_0_a_dense_credit_is_not_read():
    values = torch.tensor([[torch.nan, torch.inf], [1.0, 2.0]])
    credit = DenseCredit(values=values, objective=torch.zeros(2))
    gradient = torch.ones(2, 2)
    credit.subtract(gradient, torch.tensor([0.0, 3.0]), TokenLogits(torch.zeros(2, 2)))
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 1.0], [-2.0, -5.0]]))
