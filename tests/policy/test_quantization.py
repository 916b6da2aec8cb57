"""QLoRA: a frozen base in 4 bits has the numbers of a plain model with the dequantised weights."""

import importlib.util
import json
import shutil

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.qwen3 import modeling_qwen3

from batches import exact_norm
from models import qwen3_folder
from runs import data, module, trainer
from scsdpo.cli.export import export
from scsdpo.errors import ConfigurationError
from scsdpo.metrics import GapCheck
from scsdpo.policy import NF4, CausalLM, FullFineTune, Lora, OtherModel, Unquantized
from scsdpo.policy.quantization import (
    plain_layer,
    plain_weight,
    quantized_layers,
    scales_of,
)
from scsdpo.policy.row_path import RowPath
from scsdpo.rollout import Colocated, HFRollout
from scsdpo.rollout.hf import rollout as hf_rollout
from scsdpo.rollout.weights.hashing import weights_digest
from scsdpo.rollout.weights.stream import base_weights, merged_weights, share_kept
from scsdpo.teacher import EMA, Frozen, PlainPrompt
from scsdpo.training import self_check
from scsdpo.types import Prompt, Sampling
from scsdpo.verifiers import ExactMatch
from test_lora_adapter import Noting as NotingSink
from test_lora_adapter import layers, send
from test_planning import planned
from test_shared_prompts import learn, nested

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes: pip install -e '.[dev]'")


def make(folder, *, quantization=NF4(), std=0.05, **settings):
    """A policy whose factors matter; float32 on CPU."""
    lora = {"r": 4, "seed": 0} | settings.pop("lora", {})
    policy = CausalLM(str(folder), adapter=Lora(**lora), quantization=quantization, **settings)
    policy.configure_model()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return policy


def oracle(folder, policy):
    """Plain transformers and peft in float64: the dequantised base, and the policy's factors."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    weights = dict(base_weights(policy, torch.float64))
    assert not plain.load_state_dict(weights, strict=False).unexpected_keys
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # peft's, of tied tables
        wrapped = get_peft_model(plain, policy.adapter._config())
    own = dict(policy.wrapped.named_parameters())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = own[name].double()
    return wrapped


def plain_gradient(wrapped, rows):
    """Hidden states of each row and the gradient of `learn`'s loss, by autograd, row by row."""
    states = {}
    for row, prompt in enumerate(rows.prompts):
        n = int(rows.present[row].sum())
        ids = torch.tensor([[*prompt, *rows.ids[row, :n].tolist()]])
        hidden = wrapped.get_base_model().get_decoder()(input_ids=ids).last_hidden_state[0]
        part = hidden[len(prompt) - 1 : -1]
        told = torch.sin(torch.arange(part.numel(), dtype=part.dtype) + 7.0 * row)
        ((part.flatten() * told).sum() + part.square().sum()).backward()
        states[row] = part.detach()
    return states, {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quantization": NF4(double_quant=False)},
        {"gradient_checkpointing": True},
        {"attn_implementation": "eager"},
        {"lora": {"use_dora": True}},
        {"lora": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]}},
    ],
    ids=["packed", "single", "checkpointed", "padded", "dora", "few layers"],
)
def test_gradients_are_those_of_plain_autograd_over_the_dequantised_weights(
    settings, qwen3, monkeypatch
):
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", exact_norm)
    policy, rows = make(qwen3, **settings), nested()
    expected, grads = plain_gradient(oracle(qwen3, policy), rows)
    for budget in (60, 10**6):
        policy.zero_grad()
        states, _ = learn(policy.runner(rows, range(len(rows.prompts)), budget), rows)
        for row, state in expected.items():
            torch.testing.assert_close(states[row].double(), state, rtol=1e-4, atol=1e-4)
        own = dict(policy.wrapped.named_parameters())
        scale = max(float(grad.abs().max()) for grad in grads.values())
        assert {n for n, p in own.items() if p.grad is not None} == grads.keys()
        for name, grad in grads.items():  # float32 against float64
            assert (own[name].grad - grad).abs().max() <= 2e-5 * scale, (budget, name)


def test_the_base_is_in_4_bits_and_head_embedding_and_norms_are_not(qwen3_untied):
    policy = make(qwen3_untied)
    original = AutoModelForCausalLM.from_pretrained(qwen3_untied)
    found = dict(quantized_layers(policy.language_model))
    assert len(found) == 2 * 7 and not any("lm_head" in name for name in found)
    for name, layer in found.items():
        weight = original.get_submodule(name.removesuffix(".base_layer")).weight
        # Two to a byte; by the nearest of 16 numbers, whose widest gap is .31 of a block's largest.
        assert layer.weight.numel() * 2 == weight.numel()
        blocks = (plain_weight(layer.weight) - weight).view(-1, 64).abs().amax(1)
        assert bool((blocks <= 0.16 * weight.detach().view(-1, 64).abs().amax(1)).all())
        torch.testing.assert_close(plain_layer(layer).weight, plain_weight(layer.weight))
    plain = dict(original.named_parameters())
    for name, value in base_weights(policy, torch.float32):
        if not any(name.startswith(n.removesuffix(".base_layer")) for n in found):
            assert torch.equal(value, plain[name]), name


def test_a_forward_without_gradient_has_the_numbers_of_one_with_and_changes_no_weight(qwen3):
    """bitsandbytes repacks weights in place on some CPUs, and computes in bfloat16 from then on."""
    policy, ids = make(qwen3), torch.arange(3, 60)[None]
    before, stored = weights_digest(policy), storages(policy)
    with policy.sampling_mode() as model:
        sampled = model(ids).logits
    torch.testing.assert_close(policy.language_model(ids).logits, sampled, rtol=1e-5, atol=1e-5)
    assert weights_digest(policy) == before and storages(policy) == stored


def storages(policy):
    """Where the bytes of the base lie."""
    return {
        name: (layer.weight.data_ptr(), scales_of(layer.weight).absmax.data_ptr())
        for name, layer in quantized_layers(policy.language_model)
    }


def test_student_average_and_reference_read_one_base(qwen3):
    policy, ids = make(qwen3), torch.arange(3, 60)[None]
    before = storages(policy)
    bytes_before = sum(p.nbytes for n, p in policy.named_parameters() if "lora_" not in n)
    average, frozen = EMA(context=PlainPrompt(), rate=0.5), Frozen(PlainPrompt())
    average.configure(policy, "teacher")
    frozen.configure(policy, "reference")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B.default" in name:
                parameter.mul_(3)
    average.after_step(policy)
    student = dict(base_weights(policy, torch.float32))
    plain = AutoModelForCausalLM.from_pretrained(qwen3)
    plain.load_state_dict(student, strict=False)
    (weights,), (base,) = average.weights_to_run(policy), frozen.weights_to_run(policy)
    with torch.no_grad():
        for each, name in (
            (base, None),
            (weights, "teacher"),
            (policy.adapter.current(), "default"),
        ):
            found = policy.run(each, lambda model: model(ids).logits)
            if name is not None:  # by hand: W + scale B A of that adapter
                for at, layer in plain.named_modules():
                    if isinstance(layer, torch.nn.Linear) and "lm_head" not in at:
                        own = policy.language_model.get_submodule(at)
                        a, b = own.lora_A[name].weight, own.lora_B[name].weight
                        layer.weight.copy_(student[f"{at}.weight"] + own.scaling[name] * b @ a)
            torch.testing.assert_close(found, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert storages(policy) == before
    after = sum(p.nbytes for n, p in policy.named_parameters() if "lora_" not in n)
    assert after == bytes_before  # no second base, plain or packed


# ------------------------------------------------------------------ delivery


def test_engines_get_plain_weights_merged_or_the_base(qwen3_untied):
    policy, ids = (
        make(qwen3_untied, lora={"target_modules": ["q_proj", "down_proj"]}),
        torch.arange(3, 60)[None],
    )
    plain = AutoModelForCausalLM.from_pretrained(qwen3_untied)
    shapes = {name: (p.shape, torch.bfloat16) for name, p in plain.named_parameters()}
    for view in (merged_weights, base_weights):
        rounded = dict(view(policy, torch.bfloat16))
        assert {name: (v.shape, v.dtype) for name, v in rounded.items()} == shapes
        exact = dict(view(policy, torch.float32))
        for name, value in rounded.items():
            assert torch.equal(value, exact[name].bfloat16()), name
    with torch.no_grad():
        plain.load_state_dict(dict(merged_weights(policy)))
        found = policy.language_model.eval()(ids).logits
        torch.testing.assert_close(plain(ids).logits, found, rtol=1e-4, atol=1e-4)
    assert 0.9 < share_kept(layers(policy), torch.bfloat16) <= 1


def test_the_base_goes_over_once_and_the_adapter_alone_each_time(qwen3):
    policy, sink = make(qwen3, lora={"target_modules": ["q_proj"]}), NotingSink()
    count = len(list(AutoModelForCausalLM.from_pretrained(qwen3).named_parameters()))
    assert [n for _, n in send(policy, sink, "1")] == [count, "adapter"]
    assert send(policy, sink, "2") == [("2", "adapter")]
    assert send(policy, sink, "3", supported=None) == [("3", count)]


def test_an_engine_in_the_process_is_given_room_for_plain_weights(qwen3):
    policy = CausalLM(str(qwen3), adapter=Lora(r=4, seed=0))
    policy.configure_model()
    assert Colocated()._bytes(make(qwen3)) == Colocated()._bytes(policy)


def test_bases_with_other_scales_alone_are_told_apart(tmp_path):
    """Twice the matrices have the same 4 bits."""
    digests = []
    for factor in (1, 2):
        folder = qwen3_folder(tmp_path / str(factor))
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("proj.weight"):
                    parameter.mul_(factor)
        model.save_pretrained(folder)
        digests.append(weights_digest(make(folder)))
    assert digests[0] != digests[1]


# ------------------------------------------------------------------- sampling


def prompts(policy):
    return tuple(
        Prompt(
            key=str(n),
            messages=(message := ({"role": "user", "content": "x" * (3 + 5 * n)},)),
            verifier=ExactMatch(),
            answer="",
            ids=policy.chat.render(message),
        )
        for n in range(2)
    )


@pytest.mark.parametrize("room", [True, False], ids=["merged", "unmerged"])
def test_tokens_are_drawn_with_the_trainers_probabilities(room, qwen3, monkeypatch):
    policy = make(qwen3)
    kinds, free = [], 2**40 if room else 0
    monkeypatch.setattr(hf_rollout, "free_bytes", lambda device: free)
    taken = HFRollout._share

    def noting(self, model, groups, buffer):
        kinds.append(type(model.get_decoder().layers[0].mlp.down_proj))
        taken(self, model, groups, buffer)

    monkeypatch.setattr(HFRollout, "_share", noting)
    before = weights_digest(policy)
    drawn = HFRollout().sample(policy, prompts(policy), Sampling(n=2, max_new_tokens=6, seed=1))
    assert (kinds[0] is torch.nn.Linear) == room
    assert weights_digest(policy) == before
    for q, prompt in enumerate(drawn.prompts):
        for g in range(2):
            n = int(drawn.sampled[q, g].sum())
            ids = torch.tensor([[*prompt.ids, *drawn.ids[q, g, :n].tolist()]])
            with torch.no_grad():
                logits = policy.language_model.eval()(ids).logits[0, len(prompt.ids) - 1 : -1]
            said = logits.log_softmax(-1).gather(-1, ids[0, len(prompt.ids) :, None])[:, 0]
            found = drawn.policy_logprobs[q, g, :n]
            torch.testing.assert_close(found.float(), said, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("folder", ["qwen3_5", "qwen3_next", "lfm2", "olmo3"])
def test_other_layers_and_experts_beside_linear_ones_in_4_bits(folder, request):
    """Convolutions and fused experts stay plain, and so do the names and parts of checkpoints."""
    folder = request.getfixturevalue(folder)
    policy = make(folder)
    findings, _ = self_check.examine(policy, {}, HFRollout(), 1.0, GapCheck())
    assert findings and all(not finding.fault for finding in findings)
    plain = CausalLM(str(folder), adapter=Lora(r=4, seed=0))
    plain.configure_model()
    for view in (merged_weights, base_weights):
        expected, found = (
            {name: value.shape for name, value in view(each, torch.float32)}
            for each in (plain, policy)
        )
        assert found == expected


def test_the_self_check_finds_rows_and_sampler_right(qwen3):
    policy = make(qwen3)
    average = EMA(context=PlainPrompt())
    average.configure(policy, "teacher")
    findings, left_out = self_check.examine(
        policy, {"teacher": average}, HFRollout(), 1.0, GapCheck()
    )
    assert {(f.weights, f.path, f.fault) for f in findings if f.path == RowPath.SHARED.value} >= {
        ("student", RowPath.SHARED.value, ""),
        ("teacher", RowPath.SHARED.value, ""),
    }
    assert all(not finding.fault for finding in findings) and not left_out
    assert policy.known.path is RowPath.SHARED


# ------------------------------------------------------------ runs, checkpoints


def fresh(folder, **settings):
    torch.manual_seed(0)
    policy = CausalLM(str(folder), adapter=Lora(r=2), quantization=NF4(), self_check=False)
    return module(folder, policy, **settings)


def fit(model, tmp_path, steps, **kwargs):
    torch.manual_seed(0)
    run = trainer(tmp_path, max_steps=steps, max_epochs=-1, limit_val_batches=0)
    run.fit(model, data(), **kwargs)
    return run


@pytest.fixture(scope="module")
def whole(qwen3, tmp_path_factory):
    """A run of three steps, its module and its checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    model = fresh(qwen3)
    fit(model, folder, 3).save_checkpoint(folder / "three.ckpt")
    return model, folder / "three.ckpt"


def test_a_resumed_run_equals_an_uninterrupted_one(whole, qwen3, tmp_path):
    model, _ = whole
    fit(fresh(qwen3), tmp_path, 1).save_checkpoint(tmp_path / "half.ckpt")
    resumed = fresh(qwen3)
    fit(resumed, tmp_path, 3, ckpt_path=tmp_path / "half.ckpt")
    mine, theirs = resumed.state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name
    moved = [v for n, v in mine.items() if "lora_B.default" in n]
    assert all(bool(v.any()) for v in moved) and moved


def test_checkpoints_hold_factors_alone(whole):
    saved = torch.load(whole[1], weights_only=False)["state_dict"]
    tensors = [name for name in saved if name.startswith("policy.")]
    assert tensors and all("lora_" in name for name in tensors)


@torch.no_grad()
def test_what_is_exported_has_the_policys_logits(whole, qwen3, tmp_path, caplog):
    model, ckpt = whole
    saved = torch.load(ckpt, weights_only=False)
    policy = {"class_path": "CausalLM", "init_args": {"name_or_path": str(qwen3)}}
    policy["init_args"] |= {
        "adapter": {"class_path": "Lora", "init_args": {"r": 2}},
        "quantization": "NF4",
    }
    saved["hyper_parameters"] = saved.get("hyper_parameters", {}) | {"policy": policy}
    torch.save(saved, ckpt)
    ids = torch.arange(40).view(2, 20)
    with caplog.at_level("INFO"):
        export(ckpt, tmp_path / "out")
    assert "dequantised" in caplog.text
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    found = model.policy.language_model.eval()(ids).logits
    torch.testing.assert_close(read(ids).logits, found, rtol=1e-4, atol=1e-4)
    untrained = AutoModelForCausalLM.from_pretrained(qwen3).eval()(ids).logits
    assert (untrained - found).abs().max() > 0.01
    export(ckpt, tmp_path / "apart", adapter=True)
    assert "BitsAndBytesConfig" in (tmp_path / "apart" / "README.md").read_text()


# ------------------------------------------------------- checkpoints in 4 bits


@pytest.fixture(scope="module")
def stored(qwen3_untied, tmp_path_factory):
    """A folder that transformers has written in 4 bits."""
    folder = tmp_path_factory.mktemp("stored")
    policy = CausalLM(str(qwen3_untied), adapter=Lora(r=4), quantization=NF4())
    settings = policy.quantization.loading(torch.float32)
    model = AutoModelForCausalLM.from_pretrained(qwen3_untied, dtype=torch.float32, **settings)
    model.save_pretrained(folder)
    policy.chat.tokenizer.save_pretrained(folder)
    return folder


def test_a_folder_in_4_bits_is_the_same_policy(stored, qwen3_untied, tmp_path):
    made, read = make(qwen3_untied), make(stored, quantization=Unquantized())
    assert read.quantization == NF4(double_quant=True)
    for view in (merged_weights, base_weights):
        expected, found = (dict(view(p, torch.float32)) for p in (made, read))
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert weights_digest(made) == weights_digest(read)
    counted = [planned(f, p).counted for f, p in ((stored, read), (qwen3_untied, made))]
    assert counted[0].quantized == counted[1].quantized > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"adapter": FullFineTune()},
            r"model\.policy\.adapter: FullFineTune cannot train .* 4 bits",
        ),
        (
            {"adapter": Lora(), "quantization": NF4()},
            r"name_or_path: .* leave model\.policy\.quant",
        ),
    ],
)
def test_a_folder_in_4_bits_is_not_trained_whole_nor_quantised_again(stored, settings, said):
    with pytest.raises(ConfigurationError, match=said):
        CausalLM(str(stored), **settings)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq, but only bitsandbytes in 4 bits"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "quantised by bitsandbytes in 8 bits",
        ),
        ({"quant_method": "fp8"}, "quantised by fp8"),
    ],
)
def test_other_ways_to_quantise_are_refused_by_name(config, said, qwen3, tmp_path):
    folder = shutil.copytree(qwen3, tmp_path / "other")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    for adapter in (Lora(), FullFineTune()):
        with pytest.raises(ConfigurationError, match=rf"name_or_path: .*{said}"):
            CausalLM(str(folder), adapter=adapter)
    with pytest.raises(ValueError, match=said):
        OtherModel(name_or_path=str(folder)).quantization()


# ------------------------------------------------------------------- refusals


def test_a_full_fine_tune_of_4_bits_is_refused_in_one_line(qwen3):
    with pytest.raises(
        ConfigurationError, match=r"^model\.policy\.adapter: FullFineTune "
    ) as raised:
        CausalLM(str(qwen3), quantization=NF4())
    assert "\n" not in str(raised.value) and "Lora" in str(raised.value)


def test_shards_of_4_bits_are_refused_before_anything_is_loaded(qwen3):
    policy = CausalLM(str(qwen3), adapter=Lora(), quantization=NF4())
    with pytest.raises(
        ConfigurationError, match=r"^model\.policy\.quantization: .* sharded: use DDP"
    ):
        policy.configure_model(to_shard=True)
    assert policy.model is None


def test_the_library_that_is_missing_is_named(qwen3, monkeypatch):
    policy = CausalLM(str(qwen3), adapter=Lora(), quantization=NF4())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigurationError, match=r"^model\.policy\.quantization: .*scsdpo\[qlora\]"
    ):
        policy.configure_model()


def test_a_head_in_4_bits_is_refused(qwen3_untied, tmp_path):
    settings = NF4().loading(torch.float32)
    settings["quantization_config"].llm_int8_skip_modules = ["nothing"]
    model = AutoModelForCausalLM.from_pretrained(qwen3_untied, dtype=torch.float32, **settings)
    model.save_pretrained(tmp_path)
    CausalLM(str(qwen3_untied)).chat.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"head \(lm_head\) is in 4 bits"):
        make(tmp_path, quantization=Unquantized())
