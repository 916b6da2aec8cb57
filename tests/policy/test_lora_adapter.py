"""The adapter by itself: its files, what vLLM cannot hold, and what merging loses."""

import json
from contextlib import closing

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM, FullFineTune, Lora
from scsdpo.rollout.hf.rollout import merged_adapters
from scsdpo.rollout.weights import files, stream
from scsdpo.rollout.weights.files import adapter_hash, folder_in_memory, write_adapter
from scsdpo.rollout.weights.hashing import StreamHash
from scsdpo.rollout.weights.stream import (
    MergeRounding,
    Sink,
    WeightStream,
    adapter_weights,
    base_digest,
    base_weights,
    check_targets,
    merged_weights,
    rank_for,
    share_kept,
)


def make(folder, dtype="auto", std=0.02, **settings):
    policy = CausalLM(str(folder), dtype=dtype, adapter=Lora(**{"r": 4, "seed": 0} | settings))
    policy.configure_model()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return policy


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True, "lora_alpha": 5}, {"target_modules": ["q_proj", "down_proj"]}],
)
def test_peft_reads_the_files_as_the_same_policy(qwen3, tmp_path, settings):
    policy = make(qwen3, **settings)
    write_adapter(dict(adapter_weights(policy, torch.float32)), tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(qwen3)
    ids = torch.arange(3, 60)[None]
    untouched = plain(ids).logits
    read = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    with policy.sampling_mode() as model:
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        assert (model(ids).logits - untouched).abs().max() > 0.1


def test_the_base_is_the_checkpoint_whatever_the_adapter_is(qwen3):
    policy = make(qwen3)
    before = base_digest(policy)
    plain = AutoModelForCausalLM.from_pretrained(qwen3)
    base = dict(base_weights(policy, torch.bfloat16))
    assert set(base) == {name for name, _ in plain.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert torch.equal(base[name], parameter.bfloat16())
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data.add_(1)
    assert base_digest(policy) == before


def test_the_hash_sees_every_factor_and_not_what_stands_before_the_layers(qwen3, tmp_path):
    weights = dict(adapter_weights(make(qwen3), torch.bfloat16))
    _, sent = write_adapter(weights, tmp_path / "adapter")
    assert adapter_hash(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == sent
    renamed = {f"base_model.model.{name}": value for name, value in weights.items()}
    assert adapter_hash(renamed) == sent
    name = next(iter(weights))
    assert adapter_hash({k: v for k, v in weights.items() if k != name}) != sent
    assert adapter_hash(weights | {name: weights[name] * 2}) != sent
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4


@pytest.mark.parametrize(("r", "rank"), [(1, 1), (2, 8), (8, 8), (9, 16), (512, 512)])
def test_vllm_gets_the_next_rank_that_it_knows(qwen3, r, rank):
    assert rank_for(make(qwen3, r=r), "auto") == rank


@pytest.mark.parametrize(
    ("adapter", "key"),
    [
        (FullFineTune(), r"model\.policy\.adapter is not a Lora"),
        (Lora(use_dora=True), r"DoRA \(model\.policy\.adapter\.use_dora\)"),
        (Lora(r=513), r"up to 512 \(model\.policy\.adapter\.r is 513\)"),
    ],
)
def test_what_vllm_cannot_hold_is_merged_or_refused(qwen3, adapter, key):
    policy = CausalLM(str(qwen3), adapter=adapter)
    policy.configure_model()
    assert rank_for(policy, "auto") is rank_for(policy, "merged") is None
    with pytest.raises(
        ConfigurationError, match=r"engine\.adapter: alone is not possible: .*" + key
    ):
        rank_for(policy, "alone")


def test_layers_without_adapters_in_vllm_are_refused(qwen3):
    weights = dict(adapter_weights(make(qwen3), torch.float32))
    check_targets(
        weights, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    with pytest.raises(
        ConfigurationError, match=r"target_modules: vLLM does not support adapters for down_proj, o"
    ):
        check_targets(weights, ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])


def layers(policy):
    return [m for m in policy.language_model.modules() if isinstance(m, LoraLayer)]


def test_the_share_kept_is_what_a_change_of_a_fraction_of_the_spacing_moves(qwen3):
    """W in bf16 and a change of f spacings move round(W + f) for no f < 1/2 and for all f > 1/2."""
    policy = make(qwen3, dtype="bfloat16", r=1, target_modules=["q_proj"])
    for layer in layers(policy):
        with torch.no_grad():
            layer.get_base_layer().weight.fill_(1.0)  # the next bf16 number is 1 + 2^-7
            layer.lora_A["default"].weight.fill_(1.0)
            layer.scaling["default"] = 1.0
            half = layer.lora_B["default"].weight.shape[0] // 4
            layer.lora_B["default"].weight.fill_(0.4 * 2**-7)
            layer.lora_B["default"].weight[:half] = 0.6 * 2**-7
    assert share_kept(layers(policy), torch.bfloat16) == 0.25
    assert share_kept(layers(policy), torch.float32) == 1


def test_small_changes_that_merging_loses_are_said_once(qwen3, monkeypatch):
    said = []
    monkeypatch.setattr(stream, "rank_zero_info", said.append)
    policy, rounding = make(qwen3, dtype="bfloat16", std=0.0), MergeRounding()
    rounding.look(policy, torch.bfloat16)
    assert not said  # nothing is changed yet
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-5)
    rounding.look(policy, torch.float32)
    assert not said
    for _ in range(2):
        rounding.look(policy, torch.bfloat16)
    assert len(said) == 1 and "set model.rollout.engine.adapter to alone" in said[0]
    clear = make(qwen3, dtype="bfloat16", std=1.0)
    MergeRounding().look(clear, torch.bfloat16)
    assert len(said) == 1


def test_files_lie_in_memory_where_there_is_room(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MEMORY", tmp_path)
    with folder_in_memory(1) as folder:
        assert folder.parent == tmp_path
    assert not folder.exists()
    with folder_in_memory(2**60) as folder:
        assert folder.parent != tmp_path


class Noting(Sink):
    """Notes what it is sent: the label and how many weights, or names of the adapter's factors."""

    def __init__(self):
        super().__init__()
        self.got = []

    def load(self, weights, version, dtype):
        self.got.append((version, len(list(weights(dtype)))))

    def load_adapter(self, weights, version):
        self.got.append((version, "adapter"))


def send(policy, sink, version, *, supported=("q_proj",), adapter="auto"):
    """What goes over."""
    del sink.got[:]
    names = None if supported is None else list(supported)
    with closing(WeightStream(policy, adapter, led=False)) as stream:
        sink.send(stream, version, torch.float32, names)
    return sink.got


def test_the_base_goes_over_once_and_an_adapter_each_time(qwen3):
    policy, sink = make(qwen3, target_modules=["q_proj"]), Noting()
    base, count = f"base-{base_digest(policy)}", len(list(base_weights(policy, torch.float32)))
    assert send(policy, sink, "1") == [(base, count), ("1", "adapter")]
    assert send(policy, sink, "2") == [("2", "adapter")]
    sink.forget()  # as after a failure, or when memory was given back
    assert send(policy, sink, "3") == [(base, count), ("3", "adapter")]
    sink.due = True  # an engine lost it
    assert send(policy, sink, "4") == [(base, count), ("4", "adapter")]
    sink.due = False
    with torch.no_grad():
        layers(policy)[0].get_base_layer().weight.add_(1)
    assert [version for version, _ in send(policy, sink, "5")] == [
        f"base-{base_digest(policy)}",
        "5",
    ]


def test_merged_weights_take_the_place_of_a_base(qwen3):
    policy, sink = make(qwen3, target_modules=["q_proj"]), Noting()
    count = len(list(base_weights(policy, torch.float32)))
    send(policy, sink, "1")
    assert send(policy, sink, "2", supported=None) == [("2", count)]
    assert len(send(policy, sink, "3")) == 2


def test_the_hash_of_a_base_is_that_of_what_was_sent(qwen3):
    policy, sink, sent = make(qwen3, target_modules=["q_proj"]), Noting(), StreamHash()
    send(policy, sink, "1")
    for name, value in base_weights(policy, torch.float32):
        sent.add(name, value)
    assert sink.base_hash.hexdigest() == sent.hexdigest()


def test_sampling_and_engines_get_the_same_merged_weights(qwen3):
    """One place merges: rounded to bf16 it is what the policy samples with."""
    policy = make(qwen3, dtype="bfloat16")
    sent = dict(merged_weights(policy, torch.bfloat16))
    with merged_adapters(policy.language_model):
        for name, value in policy.language_model.named_parameters():
            assert torch.equal(sent[name], value)
