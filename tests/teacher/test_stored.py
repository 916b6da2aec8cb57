"""A teacher's copy kept in bf16 or on the host: what it loses, and that it runs as the student."""

import copy
import math

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import runs
from models import qwen3_folder
from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM, Lora, Stored
from scsdpo.policy.stored import mix, stochastically_rounded
from scsdpo.teacher import EMA, Frozen, Restart, TrustRegion
from test_teacher import configured, move

HALF = Stored(dtype="bfloat16")
HOST = Stored(on_host=True)
BOTH = Stored(dtype="bfloat16", on_host=True)
IDS = torch.arange(2, 22).view(2, 10)


def drawn(value, seeds):
    return torch.stack([stochastically_rounded(value, seed).double() for seed in range(seeds)])


def test_rounding_gives_one_of_two_neighbours_and_the_value_on_average():
    value = torch.tensor([0.02, -0.02, 1.0, 3e-5, -7.3, 0.0, 1e30, 0.0199])
    rounds = drawn(value, 1500)
    exact = value.double()
    spacing = 2.0 ** (exact.abs().log2().floor().nan_to_num(neginf=-126) - 7)
    assert ((rounds - exact).abs() < spacing).all()
    assert all(len(column.unique()) <= 2 for column in rounds.T)
    # A mean of 1500 draws with a standard deviation of at most half a spacing.
    assert ((rounds.mean(0) - exact).abs() <= 5 * spacing / 2 / math.sqrt(1500)).all()
    assert (rounds[:, [2, 5]] == exact[[2, 5]]).all()


def test_what_is_not_finite_stays_so():
    value = torch.tensor([torch.inf, -torch.inf, torch.nan])
    rounded = stochastically_rounded(value, 3)
    assert rounded[:2].tolist() == [torch.inf, -torch.inf] and bool(rounded[2].isnan())


def test_shards_round_as_the_whole_and_seeds_differ():
    value = torch.randn(1001) / 50
    whole = stochastically_rounded(value, 7)
    parts = [stochastically_rounded(value[a:b], 7, a) for a, b in ((0, 300), (300, 1001))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(stochastically_rounded(value, 8), whole)


def test_an_average_in_bf16_follows_the_one_in_float32_where_nearest_stands_still():
    rate, steps = 0.05, 200
    torch.manual_seed(0)
    start = 0.02 + 0.0005 * torch.rand(20000)
    student = start + 0.0005
    exact, own, nearest = start.clone(), start.bfloat16(), start.bfloat16()
    exact.copy_(own)
    first = exact.clone()
    for step in range(steps):
        exact.lerp_(student, rate)
        mix(own, student, rate, seed=step, start=0)
        nearest = torch.lerp(nearest.float(), student, rate).bfloat16()
    spacing = 2.0**-13  # of bf16 at 0.02
    assert torch.equal(nearest.float(), first)  # rate * distance is below half a spacing
    torch.testing.assert_close(exact, student, rtol=0, atol=1e-6)
    # Each step adds an independent error of mean 0 and at most half a spacing, which decays.
    rms = spacing / 2 / math.sqrt(1 - (1 - rate) ** 2)
    error = own.double() - exact.double()
    assert error.square().mean().sqrt() <= rms
    assert error.mean().abs() <= 5 * rms / math.sqrt(len(error))


def logits(policy, teacher):
    with torch.no_grad():
        return policy.run(teacher.weights, lambda model: model(IDS).logits)


@pytest.fixture(scope="module")
def bf16_policy(tmp_path_factory):
    """Of a checkpoint in bf16, trained in float32."""
    folder = qwen3_folder(tmp_path_factory.mktemp("bf16"), dtype=torch.bfloat16)
    policy = CausalLM(str(folder))
    policy.configure_model()
    return policy


@pytest.mark.parametrize("stored", [HALF, HOST, BOTH])
@pytest.mark.parametrize("kind", [Frozen, TrustRegion, EMA, Restart])
def test_a_copy_of_a_bf16_checkpoint_runs_in_float32_whatever_it_is_kept_in(
    bf16_policy, kind, stored
):
    plain, kept = configured(kind(), bf16_policy), configured(kind(stored=stored), bf16_policy)
    before = [parameter.data for parameter in kept.weights.parameters()]
    dtype = torch.bfloat16 if stored.dtype == "bfloat16" else torch.float32
    assert {parameter.dtype for parameter in kept.weights.parameters()} == {dtype}
    out = logits(bf16_policy, kept)
    assert out.dtype == torch.float32
    assert torch.equal(out, logits(bf16_policy, plain))
    with pytest.raises(ZeroDivisionError):
        bf16_policy.run(kept.weights, lambda model: model(IDS).logits / (1 // 0))
    for parameter, data in zip(kept.weights.parameters(), before, strict=True):
        assert parameter.data.data_ptr() == data.data_ptr()


def test_a_head_that_was_kept_outlives_the_loan(bf16_policy):
    kept = configured(Frozen(stored=HALF), bf16_policy)
    head = bf16_policy.run(kept.weights, lambda m: m.get_output_embeddings().weight.detach())
    assert head.dtype == torch.float32
    torch.testing.assert_close(head, kept.weights.copy.get_output_embeddings().weight.float())


def test_an_average_on_the_host_is_the_one_on_the_device(policy):
    plain, host = configured(EMA(), policy), configured(EMA(stored=HOST), policy)
    move(policy)
    for teacher in (plain, host):
        teacher.after_step(policy)
    for one, other in zip(plain.parameters(), host.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_bf16_average_goes_on_after_a_resume_as_if_it_had_not_stopped(policy):
    straight = configured(EMA(stored=HALF), policy)
    move(policy)
    straight.after_step(policy)
    resumed = configured(EMA(stored=HALF), policy)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for teacher in (straight, resumed):
        teacher.after_step(policy)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert int(resumed.weights.moves) == 2


def test_the_run_s_seed_decides_the_rounding(policy, monkeypatch):
    teachers = [configured(EMA(stored=HALF), policy) for _ in range(3)]
    move(policy)
    for teacher, seed in zip(teachers, "001", strict=True):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        teacher.after_step(policy)
    one, same, other = (torch.cat([p.flatten() for p in t.parameters()]) for t in teachers)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_lora_teacher_has_nothing_to_keep_otherwise(qwen3):
    policy = CausalLM(str(qwen3), adapter=Lora(r=2))
    policy.configure_model()
    for kind in (EMA, Frozen):
        with pytest.raises(ConfigurationError, match="leave `stored` out"):
            configured(kind(stored=HALF), policy)


@pytest.mark.parametrize("stored", [HOST, Stored()])
def test_ddp_takes_a_policy_whose_teacher_lies_on_another_device(qwen3, tmp_path, stored):
    """Here the teacher's is `meta`, for the GPU that the policy would be on is not there."""
    module = runs.module(qwen3, teacher=EMA(stored=stored))
    module.configure_model()
    module.teacher.weights.copy.to("meta")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    try:
        if stored == HOST:
            DistributedDataParallel(module)
        else:
            with pytest.raises(ValueError, match="same type of devices"):
                DistributedDataParallel(module)
    finally:
        dist.destroy_process_group()
