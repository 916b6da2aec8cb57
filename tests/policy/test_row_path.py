"""Which path an architecture takes, and rows apart: those of plain transformers, sampled alike."""

import pytest
import torch
from transformers import (
    DistilBertConfig,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OlmoHybridConfig,
    Phi3Config,
    Phi3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

import models
from scsdpo.policy import CausalLM, Rows
from scsdpo.policy.row_path import RowPath, known_path
from scsdpo.rollout import HFRollout
from scsdpo.types import Prompt, Sampling

SIZE = {
    "vocab_size": models.TOKENS + 5,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
}
SHORT = {"max_position_embeddings": 16}
FAMILIES = {
    "lfm2": (Lfm2ForCausalLM, Lfm2Config(**SIZE, layer_types=["conv", "full_attention"])),
    "stablelm": (StableLmForCausalLM, StableLmConfig(**SIZE)),
    "mpt": (
        MptForCausalLM,
        MptConfig(
            d_model=32,
            n_heads=2,
            n_layers=2,
            vocab_size=models.TOKENS + 5,
            max_seq_len=64,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.2,
        ),
    ),
    "longrope": (
        Phi3ForCausalLM,
        Phi3Config(
            **SIZE,
            max_position_embeddings=64,
            original_max_position_embeddings=16,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "short_factor": [1.0] * 8,
                "long_factor": [3.0] * 8,
                "original_max_position_embeddings": 16,
            },
        ),
    ),
    "dynamic": (
        LlamaForCausalLM,
        LlamaConfig(
            **SIZE,
            **SHORT,
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
        ),
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request, tmp_path_factory):
    kind, config = FAMILIES[request.param]
    folder = models._save(
        tmp_path_factory.mktemp(request.param), kind, config, dtype=torch.float32, seed=0
    )
    policy = CausalLM(str(folder))
    policy.configure_model()
    return policy


def rows(lengths=((5, 4), (9, 6), (12, 9), (3, 2), (14, 7))):
    generator = torch.Generator().manual_seed(1)
    width = max(n for _, n in lengths)
    present = torch.arange(width) < torch.tensor([n for _, n in lengths])[:, None]
    ids = torch.randint(3, 250, present.shape, generator=generator) * present
    prompts = [tuple(torch.randint(3, 250, (n,), generator=generator).tolist()) for n, _ in lengths]
    return Rows(prompts=prompts, ids=ids, present=present, sampled=present, pad_id=0)


@torch.no_grad()
def plain(policy, rows, row):
    """What transformers says of a row alone: log-probabilities of its response."""
    n = int(rows.present[row].sum())
    ids = torch.tensor([[*rows.prompts[row], *rows.ids[row, :n].tolist()]])
    fresh = type(policy.language_model)(policy.language_model.config).eval()
    fresh.load_state_dict(policy.language_model.state_dict())
    z = fresh(input_ids=ids[:, :-1]).logits[0].log_softmax(-1)
    return z.gather(1, ids[0, 1:, None])[-n:, 0]


@pytest.mark.parametrize("budget", [1, 30, 10**6])
def test_rows_apart_say_what_plain_transformers_says_of_each_row(policy, budget):
    batch = rows()
    chosen = list(range(len(batch.prompts)))
    policy.eval()
    with torch.no_grad():
        runner = policy.runner(batch, chosen, budget)
        for micro in runner.micro_batches():
            z = runner.run(micro, lambda hidden, head: head(hidden)).log_softmax(-1)
            ids = batch.ids[micro][batch.sampled[micro]]
            found = z.gather(1, ids[:, None])[:, 0]
            expected = torch.cat([plain(policy, batch, row) for row in micro])
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_the_sampler_draws_from_what_the_trainer_says(policy):
    prompts = [
        Prompt(key=str(i), messages=(), ids=ids, verifier=None, answer="")
        for i, ids in enumerate([tuple(range(5, 12)), tuple(range(30, 37)), tuple(range(9, 19))])
    ]
    responses = HFRollout(max_rows=3).sample(policy, prompts, Sampling(n=2, max_new_tokens=9))
    flat = Rows(
        prompts=[p.ids for p in prompts for _ in range(2)],
        ids=responses.ids.flatten(0, 1),
        present=responses.sampled.flatten(0, 1),
        sampled=responses.sampled.flatten(0, 1),
        pad_id=0,
    )
    said = responses.policy_logprobs.flatten(0, 1)
    length_dependent = policy.known.is_length_dependent
    for row in range(6):
        n = int(flat.present[row].sum())
        # A token is drawn under the frequencies of the row so far, learned under those of the row.
        for t in range(n) if length_dependent else [n - 1]:
            part = Rows(
                prompts=[flat.prompts[row]],
                ids=flat.ids[row : row + 1, : t + 1],
                present=flat.present[row : row + 1, : t + 1],
                sampled=flat.sampled[row : row + 1, : t + 1],
                pad_id=0,
            )
            expected = plain(policy, part, 0)
            first = t if length_dependent else 0
            torch.testing.assert_close(
                said[row, first : t + 1], expected[first:], atol=1e-3, rtol=0
            )


def test_only_rows_up_to_the_original_length_share_a_forward():
    config = FAMILIES["longrope"][1]
    known = known_path(config, "sdpa")
    assert known.path is RowPath.SHARED and known.longest == 16
    assert (known.of(16), known.of(17)) == (RowPath.SHARED, RowPath.ALONE)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (FAMILIES["lfm2"][1], ""),
        (OlmoHybridConfig(), "layers of type linear_attention"),
        (StableLmConfig(), "does not attend through"),
        (MptConfig(), "has no sdpa attention"),
        (LlamaConfig(), ""),
    ],
)
def test_what_cannot_share_a_forward_is_known_from_the_configuration(config, reason):
    known = known_path(config, "sdpa")
    assert reason in known.reason
    assert known.path is (RowPath.PADDED if reason else RowPath.SHARED)


def test_eager_attention_that_was_asked_for_runs_rows_apart():
    known = known_path(LlamaConfig(), "eager")
    assert (known.path, known.implementation) == (RowPath.PADDED, "eager")


def test_a_model_that_sees_what_comes_after_is_refused():
    with pytest.raises(ValueError, match=r"not causal .*\(use_bidirectional_attention"):
        known_path(Gemma3TextConfig(use_bidirectional_attention=True), "sdpa")


def test_an_architecture_without_a_causal_model_is_refused():
    with pytest.raises(ValueError, match=r"no causal language model .* distilbert"):
        known_path(DistilBertConfig(), "sdpa")
