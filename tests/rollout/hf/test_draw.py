"""Drawing tokens: what each uniform is mapped to, and what the uniforms depend on."""

import pytest
import torch

from scsdpo.rollout.hf.draw import draw, uniforms
from scsdpo.types import Prompt, Sampling

PROBS = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2], dtype=torch.float64)


def prompt(key):
    return Prompt(key=key, messages=(), verifier=None, answer="", ids=(1,))


def frequencies(sampling, n=1000):
    """Share of each token over the midpoints of an even grid of uniforms, and the draw."""
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = draw(PROBS.log().expand(n, -1), grid, sampling)
    return drawn.ids.bincount(minlength=5) / n, drawn


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({}, [0.1, 0.4, 0.0, 0.3, 0.2]),
        ({"top_k": 5}, [0.1, 0.4, 0.0, 0.3, 0.2]),
        ({"top_k": 100}, [0.1, 0.4, 0.0, 0.3, 0.2]),
        # The two most likely, renormalised by 0.7.
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        # 0.4 + 0.3 reaches 0.65; 0.4 + 0.3 + 0.2 is the first to reach 0.75.
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.75}, [0, 4 / 9, 0, 3 / 9, 2 / 9]),
        ({"top_p": 1e-6}, [0, 1, 0, 0, 0]),
        # Top-p counts mass within the top-k: 4/9 < 0.5 <= 7/9.
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7, 0]),
        # 0.6 of the largest, 0.4: what has at least 0.24 stays.
        ({"min_p": 0.6}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
        ({"min_p": 0.25}, [0.1, 0.4, 0.0, 0.3, 0.2]),
        # Min-p comes first: of 0.4, 0.3, 0.2 the first has 4/9 < 0.5 <= 7/9.
        ({"min_p": 0.4, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"min_p": 0.4, "top_k": 1}, [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_their_probability_says(cut, expected):
    shares, drawn = frequencies(Sampling(**cut))
    expected = torch.tensor(expected, dtype=torch.float64)
    # Each token owns one interval of [0, 1): at most one grid point is gained or lost at its ends.
    assert (shares - expected).abs().max() <= 1.5e-3
    torch.testing.assert_close(drawn.sampling_logprobs, expected[drawn.ids].log())
    torch.testing.assert_close(drawn.policy_logprobs, PROBS[drawn.ids].log())


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 1e-9}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_of_probability_zero_is_never_drawn(cut, dtype):
    logits = torch.tensor([-torch.inf, 1.0, 0.5, 0.0, -torch.inf], dtype=dtype)
    edges = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64)
    drawn = draw(logits.expand(3, -1), edges, Sampling(**cut))
    assert drawn.ids[0] == 1
    assert drawn.ids[1] == 3 if cut != {"top_p": 0.9} else 2
    assert drawn.sampling_logprobs.isfinite().all()
    assert drawn.policy_logprobs.isfinite().all()


def test_nothing_cut_gives_equal_log_probs():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    uniform = torch.linspace(0, 0.999, 64, dtype=torch.float64)
    plain = draw(logits, uniform, Sampling())
    assert plain.sampling_logprobs is plain.policy_logprobs
    expected = logits.log_softmax(-1).gather(-1, plain.ids[:, None])[:, 0]
    torch.testing.assert_close(plain.policy_logprobs, expected, rtol=1e-6, atol=1e-6)
    # The most likely comes first here, so that uniforms map elsewhere; the log-probs agree.
    everything = draw(logits, uniform, Sampling(top_k=50))
    torch.testing.assert_close(everything.sampling_logprobs, everything.policy_logprobs)


def test_uniforms_depend_on_seed_key_and_number_only():
    sampling = Sampling(n=3, max_new_tokens=20, seed=5)
    together = uniforms([prompt("a"), prompt("b")], sampling)
    assert together.shape == (6, 20)
    assert torch.equal(together[3:], uniforms([prompt("b")], sampling))
    longer = uniforms([prompt("a")], Sampling(n=5, max_new_tokens=50, seed=5))
    assert torch.equal(together[:3], longer[:3, :20])
    assert len({tuple(row) for row in together.tolist()}) == 6
    other = uniforms([prompt("a")], Sampling(n=3, max_new_tokens=20, seed=6))
    assert not (other == together[:3]).any()
    assert together.min() >= 0 and together.max() < 1
    assert abs(uniforms([prompt("a")], Sampling(max_new_tokens=2048)).mean() - 0.5) < 0.01


@pytest.mark.parametrize("scale", [1.0, 4.0, 12.0])
def test_a_top_p_set_found_among_few_candidates_is_that_of_the_sorted_vocabulary(scale):
    """Flat rows (scale 1) do not reach 0.95 within 1,024 of 5,000 tokens, peaked ones do."""
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(16, 5000, generator=generator, dtype=torch.float64)
    uniform = torch.linspace(0, 0.999, 16, dtype=torch.float64)
    drawn = draw(logits, uniform, Sampling(top_p=0.95))
    everything = draw(logits, uniform, Sampling(top_p=0.95, top_k=5000))
    assert torch.equal(drawn.ids, everything.ids)
    torch.testing.assert_close(drawn.sampling_logprobs, everything.sampling_logprobs)
    reach = logits.softmax(-1).topk(1024).values.sum(-1)
    assert bool((reach > 0.95).all()) == (scale > 1)


@pytest.mark.parametrize("vocabulary", [5, 128, 1000, 1024])
def test_the_block_search_finds_the_place_of_the_whole_cumulative_sum(vocabulary):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, vocabulary, generator=generator)
    logits[:, ::3] = -torch.inf
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    ids = draw(logits, uniform, Sampling()).ids
    cumulative = logits.double().softmax(-1).cumsum(-1)
    after = cumulative.gather(-1, ids[:, None])[:, 0]
    before = torch.where(ids > 0, cumulative.gather(-1, (ids - 1).clamp(min=0)[:, None])[:, 0], 0)
    # Float32 probabilities and sums are right to a few of their last digits.
    assert (before - 1e-6 <= uniform).all() and (uniform <= after + 1e-6).all()
    assert (ids % 3 != 0).all()
