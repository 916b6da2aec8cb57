"""Mixtures of experts: packing, shared prompts, sampling, files, and what a run measures."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from expert_models import CONFIGS, expert_folder
from runs import Toys, data, module, trainer
from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM, Lora, Rows
from scsdpo.policy.experts import balance_loss, differ, per_token, recorded_logits, routers
from scsdpo.policy.shard_loading import as_stored, load_shards
from scsdpo.rollout import HFRollout
from scsdpo.rollout.weights.stream import base_weights, merged_weights
from scsdpo.training import Limits
from scsdpo.types import Prompt, Sampling
from scsdpo.verifiers import ExactMatch

EACH = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: expert_folder(tmp_path_factory.mktemp(kind), kind) for kind in CONFIGS}


def load(folder, **settings):
    policy = CausalLM(str(folder), **settings)
    policy.configure_model()
    return policy


@EACH
def test_weights_go_out_by_the_names_of_the_checkpoint_and_come_in_by_them(kind, folders):
    stored = load_file(folders[kind] / "model.safetensors")
    policy = load(folders[kind], adapter=Lora(r=2))
    full = load(folders[kind])
    for weights in (
        merged_weights(full),
        merged_weights(policy, torch.float32),
        base_weights(policy, torch.float32),
    ):
        sent = dict(weights)
        assert sent.keys() == stored.keys()
        assert all(torch.equal(sent[name], stored[name]) for name in stored)
    empty = AutoModelForCausalLM.from_config(CONFIGS[kind])
    load_shards(empty, str(folders[kind]))
    for name, value in full.language_model.named_parameters():
        assert torch.equal(dict(empty.named_parameters())[name], value)
    assert as_stored(full.language_model, [])


def rows():
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        return tuple(torch.randint(3, 250, (n,), generator=generator).tolist())

    prompts = [draw(40), draw(5), draw(18)]
    lengths = torch.tensor([6, 2, 1, 5, 3])
    mask = torch.arange(6) < lengths[:, None]
    ids = torch.randint(3, 250, (5, 6), generator=generator) * mask
    return Rows(
        prompts=[prompts[i] for i in (0, 1, 0, 2, 0)], ids=ids, present=mask, sampled=mask, pad_id=0
    )


def alone(policy, batch):
    """Logits of the sampled tokens and of the routers there, each row by itself in transformers."""
    model, logits, routed = policy.language_model, [], []
    k = routers(model)
    ours = model.config._attn_implementation
    model.set_attn_implementation(policy.known.implementation)
    for prompt, ids, present in zip(batch.prompts, batch.ids, batch.present, strict=True):
        n = int(present.sum())
        row = torch.tensor([[*prompt, *ids[:n].tolist()]])
        with recorded_logits(k) as seen:
            logits.append(model(row, use_cache=False).logits[0, len(prompt) - 1 : -1])
        places = slice(len(prompt) - 1, len(prompt) - 1 + n)
        routed.append(torch.stack([each[places] for each in seen], dim=1))
    model.set_attn_implementation(ours)
    return torch.cat(logits), torch.cat(routed)


def together(policy, batch, budget):
    """The same as the update runs them, with the loss of `learned` going back each micro-batch."""
    chosen = list(range(len(batch.prompts)))
    runner = policy.runner(batch, chosen, budget, watches=True)
    for micro in runner.micro_batches():
        logits = runner.run(micro, lambda hidden, head: head(hidden))
        yield micro, logits, runner.routes
        runner.done(micro)


def learned(logits, routes, lengths, k):
    """A function of all that a step learns from."""
    return logits.log_softmax(-1)[:, 7].sum() + 3 * balance_loss(routes, lengths, k)


@EACH
@pytest.mark.parametrize("budget", [10**6, 50, 8])
def test_rows_together_are_rows_alone_whatever_the_micro_batches(kind, budget, folders):
    """Logits, router logits and the gradient, with the load-balancing loss in it."""
    policy, batch = load(folders[kind]), rows()
    lengths, k = batch.sampled.sum(-1).tolist(), per_token(policy.language_model)
    logits, routes = alone(policy, batch)
    learned(logits, routes, lengths, k).backward()
    wanted = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    starts = [sum(lengths[:row]) for row in range(len(lengths))]
    for micro, found, routed in together(policy, batch, budget):
        at = [t for row in micro for t in range(starts[row], starts[row] + lengths[row])]
        torch.testing.assert_close(found, logits[at], rtol=0, atol=3e-5)
        torch.testing.assert_close(routed, routes[at], rtol=0, atol=1e-5)
        learned(found, routed, [lengths[row] for row in micro], k).backward()
    assert len(wanted) > 10
    for name, parameter in policy.named_parameters():
        if name in wanted:
            error = (parameter.grad - wanted[name]).abs().max() / wanted[name].abs().max()
            assert error < 2e-5, name


@EACH
def test_a_row_moves_others_by_the_rounding_of_grouped_products_and_no_more(kind, folders):
    policy, batch = load(folders[kind]), rows()
    ids, prompts = batch.ids.clone(), list(batch.prompts)
    ids[3] = (ids[3] + 17) % 250 * batch.present[3]
    prompts[3] = tuple((token + 29) % 250 for token in prompts[3])
    changed = replace(batch, ids=ids, prompts=prompts)
    with torch.no_grad():
        ((_, before, _),) = together(policy, batch, 10**6)
        ((_, after, _),) = together(policy, changed, 10**6)
    here = torch.arange(5).repeat_interleave(batch.sampled.sum(-1)) == 3
    assert (before - after)[~here].abs().max() < 1e-5
    assert (before - after)[here].abs().max() > 1


@EACH
def test_experts_share_prompts_and_so_do_attention_sinks(kind, folders):
    assert load(folders[kind]).share_prefixes


@EACH
def test_the_sampler_says_the_log_probs_and_the_experts_of_the_trainer(kind, folders):
    policy = load(folders[kind])
    prompts = [
        Prompt(key=str(n), messages=(), ids=ids, verifier=ExactMatch(), answer="")
        for n, ids in enumerate(rows().prompts[:2])
    ]
    made = HFRollout(note_experts=True).sample(policy, prompts, Sampling(n=2, max_new_tokens=5))
    batch = Rows(
        prompts=[prompt.ids for prompt in prompts for _ in range(2)],
        ids=made.ids.flatten(0, 1),
        present=made.present.flatten(0, 1),
        sampled=made.sampled.flatten(0, 1),
        pad_id=0,
    )
    with torch.no_grad():
        logits, routes = alone(policy, batch)
    here = made.sampled.flatten(0, 1)
    own = logits.log_softmax(-1).gather(-1, batch.ids[here][:, None])[:, 0]
    torch.testing.assert_close(own, made.policy_logprobs.flatten(0, 1)[here], rtol=0, atol=3e-5)
    noted = made.experts.flatten(0, 1)[here]
    assert noted.shape[1:] == (2, 2)
    assert not differ(routes, noted).any()
    assert not differ(routes, noted.flip(-1)).any()  # their order is none
    moved = noted.clone()
    moved[3, 1, 0] = next(e for e in range(6) if e not in noted[3, 1])
    assert differ(routes, moved).nonzero().tolist() == [[3]]
    assert HFRollout().sample(policy, prompts, Sampling(n=1)).experts.shape[-2] == 0


def test_balance_is_one_for_even_routers_and_e_over_k_for_one_sided_ones():
    """sum_e f_e P_e: f = 1 and P = 1 / E everywhere; or f = E / k and P = 1 / k on k experts."""
    even = torch.eye(6)[torch.arange(12) % 6][:, None].repeat(1, 3, 1) * 1e-4
    assert balance_loss(even, [12], 1).item() == pytest.approx(1, abs=1e-4)
    one_sided = torch.zeros(5, 3, 6)
    one_sided[..., :2] = 50.0
    assert balance_loss(one_sided, [5], 2).item() == pytest.approx(3)
    assert balance_loss(torch.cat([even, one_sided]), [12, 5], 1) > 1
    assert balance_loss(torch.zeros(0, 3, 6), [], 2) == 0
    assert balance_loss(one_sided, [0, 5, 0], 2).item() == pytest.approx(3)


def test_balance_has_the_gradient_of_its_probabilities_alone():
    """d/dz of sum_e f_e P_e at fixed f: f_e dP_e / dz, by hand for a response of one token."""
    z = torch.tensor([[[2.0, 1.0, -1.0]]], dtype=torch.float64, requires_grad=True)
    balance_loss(z, [1], 1).backward()
    p = z.detach().softmax(-1)[0, 0]
    expected = 3 * p[0] * (torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64) - p)
    torch.testing.assert_close(z.grad[0, 0], expected)


def test_a_step_learns_balance_and_logs_whether_experts_differ(folders, tmp_path):
    """With weight 0 the step is another."""
    ends = []
    for weight, budget in ((0.0, 10**5), (5.0, 40)):
        policy = CausalLM(str(folders["qwen3_moe"]), expert_balance=weight)
        model = module(
            None,
            policy=policy,
            rollout=HFRollout(note_experts=True),
            limits=Limits(max_tokens=budget),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
        fit = trainer(tmp_path / f"{weight}", max_steps=1, max_epochs=-1, limit_val_batches=0)
        fit.fit(model, data(Toys(8), Toys(4)))
        assert fit.logged_metrics["train/experts_differ"] == 0
        ends.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert (ends[0] - ends[1]).abs().max() > 1e-4


def test_a_model_without_experts_has_nothing_to_balance(qwen3):
    with pytest.raises(
        ConfigurationError, match=r"expert_balance: Qwen3ForCausalLM has no experts"
    ):
        load(qwen3, expert_balance=0.1)
    with pytest.raises(ValueError, match=r"expert_balance=.* must be >= 0"):
        CausalLM(str(qwen3), expert_balance=-1.0)
