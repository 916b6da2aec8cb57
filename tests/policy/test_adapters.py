"""Every kind of adapter on every place: the student is peft's own, and everybody else follows it.

A row of the table is a kind of LoRA on a place of a model. What is trained, what a teacher is an
average of, what is exported, sampled and delivered is in each the forward of the adapted model.
"""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from expert_models import expert_folder
from scsdpo.cli.export import write_policy
from scsdpo.errors import ConfigurationError
from scsdpo.loss import TokenLogits
from scsdpo.policy import CausalLM, Lora, Rows
from scsdpo.policy.adapter import STUDENT, factors, with_head
from scsdpo.rollout.hf.rollout import merged_adapters
from scsdpo.rollout.weights.files import write_adapter
from scsdpo.rollout.weights.stream import adapter_weights, merged_weights, rank_for


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    model: str
    adapter: Lora
    alone: bool = False
    """vLLM has adapters of this kind and place."""
    merged: bool = True
    """vLLM can hold the merged weights."""

    def policy(self, folder):
        policy = CausalLM(str(folder), adapter=self.adapter)
        policy.configure_model()
        return policy


KINDS = {
    "lora": {"lora_alpha": 6},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "dora": {"lora_alpha": 6, "use_dora": True},
}
PLACES = {
    "linear": ("tied", "all-linear"),
    "embedding": ("untied", ["embed_tokens", "q_proj"]),
    "tied embedding": ("tied", ["embed_tokens", "down_proj"]),
    "head": ("untied", ["lm_head"]),
    "tied head": ("tied", "(.*lm_head)|(.*q_proj)"),
    "both ends": ("tied", ["embed_tokens", "lm_head"]),
}
CASES = {
    f"{kind}, {place}": Case(
        model,
        Lora(r=3, target_modules=modules, **settings),
        alone=place == "linear" and kind != "dora",
        merged=not (model == "tied" and place != "linear"),
    )
    for kind, settings in KINDS.items()
    for place, (model, modules) in PLACES.items()
    if kind != "dora" or ("head" not in place and place != "both ends")  # refused, below
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES |= {
    f"{kind}, experts{beside}": Case(
        "experts",
        Lora(r=3, target_modules=modules, target_parameters=EXPERTS, **KINDS[kind]),
    )
    for kind in ("lora", "rslora")
    for beside, modules in (("", []), (" and attention", "all-linear"))
}
OFTEN = [name for name in CASES if name.startswith("lora")]
OFTEN += ["rslora, linear", "rslora, experts", "dora, linear", "dora, embedding"]
EACH = pytest.mark.parametrize("name", CASES if os.environ.get("ADAPTERS") == "all" else OFTEN)
"""`make test-configs` goes through the whole table."""
EXACT = 2e-5
"""Logits are up to 10; float32 products in another order differ by less."""


@pytest.fixture(scope="module")
def folders(qwen3, qwen3_untied, tmp_path_factory):
    moe = expert_folder(tmp_path_factory.mktemp("moe"), "qwen3_moe")
    return {"tied": qwen3, "untied": qwen3_untied, "experts": moe}


def shake(policy, seed=0):
    """Factors far from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in factors(policy.wrapped, STUDENT).values():
            factor.add_(torch.randn(factor.shape, generator=generator) * 0.3)


IDS = torch.arange(3, 63).view(3, 20)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def made(case, folders, seed=0):
    policy = case.policy(folders[case.model])
    shake(policy, seed)
    return policy


def rows():
    prompts = [tuple(row[:12].tolist()) for row in IDS]
    every = torch.ones(3, 8, dtype=torch.bool)
    return Rows(prompts=prompts, ids=IDS[:, 12:], present=every, sampled=every, pad_id=0)


def said(policy, weights=None):
    """Logits of the responses' tokens, as the update and a teacher make them; with a gradient."""
    runner = policy.runner(rows(), [0, 1, 2], 10**6, weights)
    hidden, head = runner.run([0, 1, 2], lambda hidden, head: (hidden, head))
    return runner, hidden @ head.weight.T


def peft_own(case, folders, policy):
    """peft's model, made without this package, with the policy's factors written into it."""
    adapter = case.adapter
    settings = {
        name: getattr(adapter, name)
        for name in ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora")
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONWARNINGS", "ignore")
        config = LoraConfig(
            task_type="CAUSAL_LM", target_parameters=adapter.target_parameters or None, **settings
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folders[case.model]), config)
    state = {k: v for k, v in policy.wrapped.state_dict().items() if STUDENT in k.split(".")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not any("lora_" in name for name in missing)
    return model


pytestmark = [  # of peft itself, as a user calls it
    pytest.mark.filterwarnings(f"ignore:{start}")
    for start in (
        "Model has `tie_word_embeddings=True`",
        "Found keys that are in the model state",
        "The following (rank|alpha)_pattern keys",
        ".*use_rslora=True",
    )
]


@EACH
def test_the_update_is_pefts_own_forward_and_gradient(name, folders):
    case = CASES[name]
    policy = made(case, folders)
    reference = peft_own(case, folders, policy)
    expected = reference.train()(IDS).logits[:, 11:-1].flatten(0, 1)
    runner, found = said(policy)
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)
    probe = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    (expected * probe).sum().backward()
    (found * probe).sum().backward()
    runner.done([0, 1, 2])
    mine, theirs = factors(policy.wrapped, STUDENT), factors(reference, STUDENT)
    assert mine.keys() == theirs.keys()
    for key, factor in mine.items():
        scale = theirs[key].grad.abs().max()
        torch.testing.assert_close(factor.grad / scale, theirs[key].grad / scale, rtol=0, atol=2e-5)
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert len(trained) == len(mine)


@EACH
def test_a_teacher_follows_every_factor(name, folders):
    case = CASES[name]
    policy = made(case, folders)
    teacher = policy.adapter.moving(policy.wrapped, "teacher")
    before = {key: value.clone() for key, value in factors(policy.wrapped, "teacher").items()}
    start = said(policy)[1].detach()
    torch.testing.assert_close(said(policy, teacher)[1], start, rtol=0, atol=EXACT)
    shake(policy, seed=1)
    torch.testing.assert_close(said(policy, teacher)[1], start, rtol=0, atol=EXACT)
    teacher.follow(policy.wrapped, 0.25)
    own, student = factors(policy.wrapped, "teacher"), factors(policy.wrapped, STUDENT)
    assert len(list(teacher.pairs(policy.wrapped))) == len(own) == len(student) > 0
    for key, value in own.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, 0.75 * before[key] + 0.25 * student[key])
    teacher.follow(policy.wrapped, 1.0)
    now = said(policy)[1].detach()
    torch.testing.assert_close(said(policy, teacher)[1], now, rtol=0, atol=EXACT)
    assert (now - start).abs().max() > 0.1
    plain = AutoModelForCausalLM.from_pretrained(folders[case.model])
    initial = said(policy, policy.adapter.initial(policy.wrapped))[1]
    expected = logits(plain)[:, 11:-1].flatten(0, 1)
    torch.testing.assert_close(initial, expected, rtol=0, atol=EXACT)


@EACH
@pytest.mark.parametrize("adapter", [False, True], ids=["merged", "adapter"])
def test_an_exported_folder_is_the_policy(name, adapter, folders, tmp_path):
    case = CASES[name]
    policy = made(case, folders)
    policy.adapter.moving(policy.wrapped, "teacher")
    expected = logits(policy.language_model)
    write_policy(policy, tmp_path / "out", adapter=adapter, dtype="float32")
    if adapter:
        read = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folders[case.model]), tmp_path / "out"
        )
    else:
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert not any("lora_" in key for key in read.state_dict())
    torch.testing.assert_close(logits(read), expected, rtol=0, atol=1e-4)


@EACH
def test_merged_sampling_is_the_policy(name, folders):
    policy = made(CASES[name], folders)
    expected = logits(policy.language_model)

    def drawn_from(model):
        hidden = model.get_decoder()(IDS, use_cache=False).last_hidden_state
        return TokenLogits.of(*flat(with_head(model, hidden)), 1.0).logits.view_as(expected)

    with policy.sampling_mode() as model:
        torch.testing.assert_close(drawn_from(model), expected, rtol=0, atol=EXACT)
        with merged_adapters(model):
            torch.testing.assert_close(drawn_from(model), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(policy.language_model), expected, rtol=0, atol=0)


def flat(pair):
    return pair[0].flatten(0, 1), pair[1]


@EACH
def test_vllm_gets_all_of_it_or_it_is_refused_by_name(name, folders, tmp_path):
    case = CASES[name]
    policy = made(case, folders)
    expected = logits(policy.language_model)
    if not case.merged:
        for way in ("auto", "merged", "alone"):
            with pytest.raises(ConfigurationError, match=r"target_modules: .* are one table"):
                rank_for(policy, way)
        return
    plain = AutoModelForCausalLM.from_pretrained(folders[case.model])
    write_weights(policy, tmp_path / "merged", plain)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(read), expected, rtol=0, atol=1e-4)
    if not case.alone:
        assert rank_for(policy, "auto") is None
        with pytest.raises(ConfigurationError, match=r"alone is not possible: .*"):
            rank_for(policy, "alone")
        return
    assert rank_for(policy, "auto") == 8
    write_adapter(dict(adapter_weights(policy, torch.float32)), tmp_path / "adapter")
    read = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(read), expected, rtol=0, atol=1e-4)


def write_weights(policy, folder, plain):
    """What servers get, as a checkpoint's folder."""
    from safetensors.torch import save_file

    plain.config.save_pretrained(folder)
    weights = {name: value.contiguous() for name, value in merged_weights(policy, torch.float32)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@EACH
def test_what_is_saved_comes_back_bit_for_bit(name, folders):
    case = CASES[name]
    policy = made(case, folders)
    teacher = policy.adapter.moving(policy.wrapped, "teacher")
    shake(policy, seed=2)
    teacher.follow(policy.wrapped, 0.5)
    state = policy.state_dict()
    assert len(state) == 2 * len(factors(policy.wrapped, STUDENT))
    again = case.policy(folders[case.model])
    other = again.adapter.moving(again.wrapped, "teacher")
    again.load_state_dict(state, strict=False)
    assert torch.equal(said(again)[1], said(policy)[1])
    assert torch.equal(said(again, other)[1], said(policy, teacher)[1])


def test_first_values_are_the_seeds_and_change_nothing(folders):
    for name in ("lora, linear", "dora, embedding", "lora, tied head", "rslora, experts"):
        case = CASES[name]
        policies = [
            replace(case, adapter=replace(case.adapter, seed=s)).policy(folders[case.model])
            for s in (1, 1, 2)
        ]
        one, same, other = (factors(policy.wrapped, STUDENT) for policy in policies)
        drawn = [k for k in one if "lora_A" in k or "embedding_B" in k]
        assert all(torch.equal(one[key], same[key]) for key in one)
        assert drawn and not any(torch.equal(one[key], other[key]) for key in drawn)
        plain = AutoModelForCausalLM.from_pretrained(folders[case.model])
        torch.testing.assert_close(
            logits(policies[0].language_model), logits(plain), rtol=0, atol=EXACT
        )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"target_modules": ["q_prj"]}, r"model\.policy\.adapter: .*q_prj"),
        ({"target_modules": ["q_proj", "q_prj"]}, r"target_modules: the .* no layer .* q_prj"),
        ({"target_parameters": ["mlp.experts.up"]}, r"model\.policy\.adapter: .*"),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.up"]},
            r"target_parameters: the model has no layer or parameter named mlp\.experts\.up",
        ),
        ({"target_parameters": ["lm_head.weight"]}, r"target_parameters: lm_head is a layer"),
        (
            {"target_modules": ["lm_head"], "use_dora": True},
            r"use_dora: DoRA divides by the norm",
        ),
    ],
)
def test_what_the_model_lacks_or_cannot_have_is_one_line(settings, line, folders):
    policy = CausalLM(str(folders["untied"]), adapter=Lora(**{"target_modules": []} | settings))
    with pytest.raises(ConfigurationError, match=line):
        policy.configure_model()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"target_parameters": ["a"], "use_dora": True}, "does not support use_dora"),
        ({"target_parameters": ["a"], "lora_dropout": 0.5}, "does not support lora_dropout"),
        ({"target_modules": []}, "are both empty: name layers"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(settings, line):
    with pytest.raises(ValueError, match=line):
        Lora(**settings)
