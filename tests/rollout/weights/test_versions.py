"""When weights have the same label, which answers are learned from, and what hashes see."""

import copy

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from scsdpo.errors import TrainingStopped
from scsdpo.policy import CausalLM, Lora
from scsdpo.rollout.vllm.rollout import EngineAnswer, answers_without_faults
from scsdpo.rollout.weights.hashing import StreamHash, refusal, tensor_hash, weights_digest
from scsdpo.rollout.weights.versions import Versions


@pytest.fixture(params=["full", "lora"])
def policy(request, qwen3):
    made = CausalLM(str(qwen3), **({"adapter": Lora(r=2)} if request.param == "lora" else {}))
    made.configure_model()
    return made


def trained(policy):
    return [p for p in policy.parameters() if p.requires_grad]


def step(policy, **settings):
    optimizer = torch.optim.AdamW(trained(policy), lr=1e-6, **settings)
    for parameter in trained(policy):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def parts(label):
    run, content, moves = label.split(".")
    return run, content, int(moves)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_count_and_the_digest_is_taken_every_so_many(policy, fused):
    versions = Versions(digest_every=3)
    labels = [versions.of(policy)]
    for _ in range(4):
        step(policy, fused=fused)
        labels.append(versions.of(policy))
        assert versions.of(policy) == labels[-1]
    runs, contents, moves = zip(*map(parts, labels), strict=True)
    assert len(set(runs)) == 1
    assert [m - moves[0] for m in moves] == [0, 1, 2, 3, 4]
    assert contents[0] == contents[1] == contents[2] != contents[3] == contents[4]
    assert contents[3] != weights_digest(policy) and contents[0] != weights_digest(policy)


def test_two_runs_never_share_a_label(policy):
    assert Versions().of(policy) != Versions().of(policy)


def test_a_load_is_noticed_and_the_digest_taken_anew(policy):
    versions = Versions()
    first = versions.of(policy)
    state = copy.deepcopy(policy.state_dict())
    step(policy)
    policy.load_state_dict(state, strict=False)
    again = versions.of(policy)
    assert parts(again)[1] == parts(first)[1] == weights_digest(policy)
    assert parts(again)[2] == parts(first)[2] + 2


def test_weights_written_by_hand_get_another_label(policy):
    """As callbacks that swap in averages do, past the counters of in-place writes."""
    versions = Versions()
    first = versions.of(policy)
    for parameter in trained(policy):
        parameter.data.mul_(1.001)
    assert versions.of(policy) != first


def test_a_single_element_is_seen_by_the_digest_and_told_to_the_label(policy):
    versions = Versions()
    weight = trained(policy)[0]
    first = versions.of(policy), weights_digest(policy)
    with torch.no_grad():
        weight.view(-1)[1] += 1
    assert weights_digest(policy) != first[1]
    versions.moved()
    assert versions.of(policy) != first[0]


def test_another_policy_is_never_taken_for_the_last_one(policy):
    """The other one's step counts too, and this one's digest is that of the last label."""
    versions, other = Versions(), copy.deepcopy(policy)
    versions.of(policy)
    step(other)
    assert versions.of(other) != versions.of(policy)


def test_ranks_agree_on_the_run_without_a_collective(policy):
    store = dist.HashStore()
    dist.init_process_group("fake", rank=1, world_size=2, store=store)
    try:
        one, other = Versions().of(policy), Versions().of(policy)
    finally:
        dist.destroy_process_group()
    assert one == other


def test_digits_below_one_are_refused():
    with pytest.raises(
        ValueError, match=r"`VLLMRollout\(digest_every=\.\.\.\)` must be >= 1, got 0"
    ):
        Versions(digest_every=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(2, 3), (3, 7), (70, 130), (1030, 4100)])
def test_a_tensor_hash_sees_order_and_signs(dtype, shape):
    value = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    changed = [value.flip(0), value.flip(-1)]
    for places in ([0], [0, 1], [0, -1], [-2, -1]):
        flipped = value.clone()
        flipped.view(-1)[places] *= -1
        changed.append(flipped)
    numbers = {int(tensor_hash(each)) for each in (value, *changed)}
    assert len(numbers) == 1 + len(changed)
    assert tensor_hash(value) == tensor_hash(value.clone())
    assert tensor_hash(value.t()) == tensor_hash(value.t().contiguous())


def test_a_tensor_hash_is_the_sum_that_it_says():
    """sum_rc bits u_c v_r in Python's integers, modulo 2^64."""
    from scsdpo.rollout.weights.hashing import _numbers

    value = torch.randn(9000, generator=torch.Generator().manual_seed(1))
    u, v = _numbers(4096, 0, value.device).tolist(), _numbers(3, 1, value.device).tolist()
    bits = value.view(torch.int32).tolist()
    total = sum(b * u[i % 4096] * v[i // 4096] for i, b in enumerate(bits)) % 2**64
    assert int(tensor_hash(value)) % 2**64 == total


def test_empty_and_scalar_tensors_have_a_hash():
    assert tensor_hash(torch.zeros(0, 4)) == 0
    assert tensor_hash(torch.tensor(1.0)) != tensor_hash(torch.tensor(-1.0))


def streamed(pairs):
    stream = StreamHash()
    assert [name for name, _ in stream.over(pairs)] == [name for name, _ in pairs]
    return stream.hexdigest()


def test_a_stream_hash_sees_what_happens_on_the_way(tmp_path):
    pairs = [("a", torch.arange(6.0).view(2, 3)), ("b", torch.ones(3))]
    sent = streamed(pairs)
    a, b = pairs
    harms = {
        "half": [a],
        "twice": [a, b, b],
        "renamed": [a, ("c", b[1])],
        "exchanged": [("a", a[1]), ("b", b[1] * 1.5)],
        "another shape": [("a", a[1].view(3, 2)), b],
        "another dtype": [a, ("b", b[1].double())],
    }
    assert len({sent, *map(streamed, harms.values())}) == 1 + len(harms)
    assert streamed([b, a]) == sent
    save_file(dict(pairs), tmp_path / "file")
    assert streamed(list(load_file(tmp_path / "file").items())) == sent


def test_other_or_missing_weights_are_refused():
    assert refusal({"hash": "x", "missing": []}, "x") == ""
    assert "received other weights (y) than were sent (x)" in refusal(
        {"hash": "y", "missing": []}, "x"
    )
    many = refusal({"hash": "x", "missing": ["a", "b", "c", "d"]}, "x")
    assert many == "got incomplete weights for 4 of its modules (a, b, c, ...)"


def answer(**changed):
    good = {"ids": [5], "logprobs": [-1.0], "finish_reason": "stop", "versions": frozenset("v")}
    return EngineAnswer(**(good | changed))


BAD = {
    "aborted": answer(finish_reason="abort"),
    "failed": answer(finish_reason="error"),
    "unfinished": answer(finish_reason=None),
    "empty": answer(ids=[], logprobs=[]),
    "unlabelled": answer(versions=frozenset()),
    "stale": answer(versions=frozenset("u")),
    "changed midway": answer(versions=frozenset("uv")),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_faulty_answers_are_sampled_again_and_a_few_times_only(bad):
    good, asked = answer(finish_reason="length"), []

    def ask(failures):
        def asks(requests):
            asked.append(list(requests))
            wrong = len(asked) <= failures
            return [[good, bad if wrong and request == "q1" else good] for request in requests]

        return asks

    assert answers_without_faults(ask(2), ["q0", "q1", "q2"], "v") == [[good, good]] * 3
    assert asked == [["q0", "q1", "q2"], ["q1"], ["q1"]]
    asked.clear()
    with pytest.raises(TrainingStopped, match=r"^vLLM .*, 3 times in a row; no step was taken"):
        answers_without_faults(ask(3), ["q0", "q1", "q2"], "v")
    assert len(asked) == 3
