"""The check before the first step: what it finds wrong, and what a run does then."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

import models
import runs
from scsdpo.errors import ConfigurationError
from scsdpo.metrics import GapCheck
from scsdpo.policy import CausalLM, Lora
from scsdpo.policy.decoder import _SCALES
from scsdpo.policy.row_path import RowPath
from scsdpo.rollout import Colocated, HFRollout, VLLMRollout
from scsdpo.rollout.vllm.rollout import EngineAnswer
from scsdpo.teacher import EMA, Frozen
from scsdpo.training.self_check import examine
from test_row_path import FAMILIES, SIZE

FALCON = FalconH1Config(
    **SIZE,
    head_dim=16,
    mamba_d_ssm=64,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_d_state=8,
    mamba_chunk_size=8,
)
PHI_MOE = PhimoeConfig(**SIZE, num_local_experts=4)


def policy_of(folder, **settings):
    policy = CausalLM(str(folder), **settings)
    policy.configure_model()
    return policy


def made(tmp_path, kind, config, **settings):
    folder = models._save(tmp_path, kind, config, dtype=torch.float32, seed=0)
    return policy_of(folder, **settings)


def check(policy, teacher=None, rollout=None):
    teachers = {} if teacher is None else {"teacher": teacher}
    for each in teachers.values():
        each.configure(policy, "teacher")
    return examine(policy, teachers, rollout or HFRollout(), 1.0, GapCheck())[0]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("olmo3", {}),
        ("qwen3", {"adapter": Lora(r=2)}),
        ("qwen3", {"gradient_checkpointing": True}),
    ],
)
def test_attention_of_segments_passes_by_orders_of_magnitude(kind, settings, request):
    policy = policy_of(request.getfixturevalue(kind), **settings)
    findings = check(policy, EMA())
    assert {finding.weights for finding in findings} == {"student", "teacher", "sampler"}
    assert policy.known.path is policy.known.sampled is RowPath.SHARED
    for finding in findings:
        assert not finding.fault
        assert finding.others == 0 and max(finding.apart, finding.gradient) < 1e-5
    assert all(p.grad is None for p in policy.parameters())


def claim_shared(policy):
    """As if nothing were known of the architecture."""
    policy.known = replace(policy.known, path=RowPath.SHARED, sampled=RowPath.SHARED, reason="")
    policy.language_model.set_attn_implementation("scsdpo")
    return policy


def test_a_convolution_over_neighbouring_rows_is_found_and_rows_run_apart(tmp_path):
    policy = claim_shared(made(tmp_path, FalconH1ForCausalLM, FALCON))
    first, *_ = findings = check(policy)
    assert first.others > 1e-3 and "rows read each other" in first.fault
    assert policy.known.path is RowPath.PADDED and "rows read each other" in policy.known.reason
    assert [f.fault for f in findings if f.path == RowPath.PADDED.value] == ["", ""]


def test_layers_that_do_not_hand_the_layout_on_are_found(tmp_path):
    policy = claim_shared(made(tmp_path, *FAMILIES["stablelm"]))
    assert check(policy)[0].fault
    assert policy.known.path is policy.known.sampled is RowPath.PADDED


def test_positions_that_do_not_begin_anew_are_found(qwen3, monkeypatch):
    """No row reads another: only each alone tells."""
    policy = policy_of(qwen3)
    decoder = policy.language_model.get_decoder()
    forward = decoder.forward

    def shifted(*args, position_ids=None, layout=None, **kwargs):
        if layout is not None:
            position_ids = torch.arange(position_ids.shape[1])[None]
            kwargs["layout"] = layout
        return forward(*args, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(decoder, "forward", shifted)
    first = check(policy)[0]
    assert first.others == 0 and "differ from rows run alone" in first.fault
    assert policy.known.path is RowPath.PADDED


def test_a_gradient_that_does_not_reach_the_prompt_is_found(qwen3, monkeypatch):
    from scsdpo.policy import runner

    monkeypatch.setattr(runner._Running, "backward", lambda self: None)
    first = check(policy_of(qwen3))[0]
    assert first.apart < 1e-5 and "the gradient differs" in first.fault


def test_a_teacher_that_is_wrong_makes_rows_run_apart(qwen3):
    policy, teacher = policy_of(qwen3), Frozen()
    teacher.configure(policy, "teacher")
    copy = teacher.weights_to_run(policy)[0].copy
    plain = copy.model.layers[1].self_attn
    forward = plain.forward
    plain.forward = lambda *args, layout=None, **kwargs: forward(*args, **kwargs)
    findings = check(policy, teacher)
    assert [bool(f.fault) for f in findings if f.weights == "teacher"] == [True, False]
    assert policy.known.path is RowPath.PADDED and policy.known.reason.startswith("teacher: ")


def test_a_model_that_sees_the_future_is_refused(tmp_path):
    size = {k: v for k, v in SIZE.items() if k != "num_key_value_heads"}
    policy = made(tmp_path, BertLMHeadModel, BertConfig(**size, is_decoder=False))
    head = policy.language_model.cls.predictions
    head.transform = torch.nn.Identity()
    with pytest.raises(ConfigurationError, match="BertLMHeadModel is not causal: a token reads"):
        check(policy)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (CohereForCausalLM, CohereConfig(**SIZE, logit_scale=0.5)),
        (GraniteForCausalLM, GraniteConfig(**SIZE, logits_scaling=8.0)),
        (HyperCLOVAXForCausalLM, HyperCLOVAXConfig(**SIZE, logits_scaling=0.5)),
    ],
    ids=["cohere", "granite", "hyperclovax"],
)
def test_a_constant_behind_the_head_is_that_of_the_class(tmp_path, kind, config):
    policy = made(tmp_path, kind, config)
    assert not any(finding.fault for finding in check(policy))
    assert policy.known.path is policy.known.sampled is RowPath.SHARED


def test_logits_that_are_scaled_otherwise_behind_the_head_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(_SCALES, "CohereForCausalLM", lambda config: 1.0)
    policy = made(tmp_path, CohereForCausalLM, CohereConfig(**SIZE, logit_scale=0.5))
    with pytest.raises(ConfigurationError, match="logits of CohereForCausalLM are not its head"):
        check(policy)


def test_a_sampler_that_reads_a_wrong_cache_samples_without_one(tmp_path, monkeypatch):
    policy = made(tmp_path, *FAMILIES["stablelm"])
    layer = policy.language_model.model.layers[0].self_attn
    forward = layer.forward

    def forgetful(*args, past_key_values=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", forgetful)
    findings = [f for f in check(policy) if f.weights == "sampler"]
    assert [f.path for f in findings] == [RowPath.PADDED.value, RowPath.ALONE.value]
    assert findings[0].fault and not findings[1].fault
    assert policy.known.path is RowPath.PADDED and policy.known.sampled is RowPath.ALONE


@pytest.mark.parametrize("seed", range(6))
def test_a_model_that_draws_random_numbers_in_training_is_judged_without_them(tmp_path, seed):
    """Phi-MoE draws its experts at random in training, with no dropout anywhere."""
    policy = made(tmp_path, PhimoeForCausalLM, PHI_MOE)
    torch.manual_seed(seed)
    state = torch.get_rng_state()
    findings = [f for f in check(policy) if f.weights == "student"]
    assert [f.fault for f in findings] == [""]
    assert policy.known.path is RowPath.SHARED and findings[0].gradient < 1e-5
    assert findings[0].random
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in policy.wrapped.modules())


def test_every_check_runs_however_slow_the_machine_is_and_one_line_tells(
    qwen3, tmp_path, monkeypatch, caplog
):
    policy = policy_of(qwen3)
    now = iter(range(0, 10**6, 20))
    slow = SimpleNamespace(monotonic=lambda: next(now))
    monkeypatch.setattr("scsdpo.training.self_check.time", slow)
    logger = CSVLogger(tmp_path, version=0)
    trainer = runs.trainer(
        tmp_path, logger=logger, log_every_n_steps=1, max_steps=1, limit_val_batches=0
    )
    trainer.fit(runs.module(qwen3, policy), runs.data())
    assert "self-check: took 20 s; model.policy.self_check=false turns it off" in caplog.text
    said = json.loads((tmp_path / "lightning_logs/version_0/self_check.json").read_text())
    assert {f["weights"] for f in said["findings"]} == {"student", "teacher", "sampler"}
    assert said["left_out"] == "" and said["seconds"] >= 20


def other_engine(monkeypatch, says):
    """`VLLMRollout` on an engine that draws token 5 everywhere, and `says` its log-prob."""
    engine = Colocated()

    def generate(policy, requests, version):
        answers = [
            EngineAnswer(
                ids=[5] * request.parameters["max_tokens"],
                logprobs=says(policy, request),
                finish_reason="length",
                versions=frozenset({version}),
            )
            for request in requests
        ]
        return [[answer, answer] for answer in answers]

    monkeypatch.setattr(engine, "generate", generate)
    monkeypatch.setattr(engine, "hold_weights", lambda *_, **__: nullcontext())
    monkeypatch.setattr(engine, "check_installed", lambda: None)
    return VLLMRollout(engine)


def plain_logprobs(policy, request, off=0.0):
    drawn = [5] * request.parameters["max_tokens"]
    ids = torch.tensor([[*request.ids, *drawn]])
    with torch.no_grad():
        logits = policy.language_model(ids).logits[0, len(request.ids) - 1 : -1]
    return (logits.log_softmax(-1)[:, 5] + off).tolist()


@pytest.mark.parametrize("off", [0.0, 0.1])
def test_another_engine_is_asked_for_a_few_tokens(qwen3, monkeypatch, off):
    rollout = other_engine(monkeypatch, partial(plain_logprobs, off=off))
    found = check(policy_of(qwen3), rollout=rollout)[-1]
    assert (found.weights, found.path) == ("sampler", "VLLMRollout")
    assert found.apart == pytest.approx(off, abs=1e-5) and not found.fault


def test_an_engine_with_other_weights_is_refused_before_the_first_step(qwen3, monkeypatch):
    rollout = other_engine(monkeypatch, partial(plain_logprobs, off=1.0))
    message = (
        r"model\.rollout: VLLMRollout and the trainer differ by 1 nats a token on made-up rows"
    )
    module = runs.module(qwen3, policy_of(qwen3), rollout=rollout)
    trainer = runs.trainer(qwen3, max_steps=1, limit_val_batches=0, logger=False)
    with pytest.raises(ConfigurationError, match=message):
        trainer.fit(module, runs.data())
    assert trainer.global_step == 0
    gap = GapCheck(stop=math.inf)
    assert not examine(policy_of(qwen3), {}, rollout, 1.0, gap)[0][-1].fault


def test_an_engine_without_room_for_the_rows_is_not_asked(qwen3):
    rollout = VLLMRollout(Colocated(max_model_len=40))
    findings, missed = examine(policy_of(qwen3), {}, rollout, 1.0, GapCheck())
    assert missed == "the sampler was not checked: it has room for 40 tokens, 57 are needed"
    assert {finding.weights for finding in findings} == {"student"}


def test_what_was_found_is_in_the_runs_records_and_the_key_turns_it_off(tmp_path, capsys):
    kind, config = FAMILIES["stablelm"]
    folder = models._save(tmp_path / "model", kind, config, dtype=torch.float32, seed=0)
    for on in (True, False):
        policy = CausalLM(str(folder), self_check=on)
        logger = CSVLogger(tmp_path, version=int(on))
        trainer = runs.trainer(
            tmp_path, logger=logger, log_every_n_steps=1, max_steps=1, limit_val_batches=0
        )
        trainer.fit(runs.module(folder, policy), runs.data())
        assert trainer.global_step == 1
        file = tmp_path / "lightning_logs" / f"version_{int(on)}" / "self_check.json"
        assert file.exists() is on
    said = json.loads((tmp_path / "lightning_logs" / "version_1" / "self_check.json").read_text())
    assert said["model"] == "StableLmForCausalLM" and said["path"] == "rows apart, padded"
    assert [f["weights"] for f in said["findings"]] == ["student", "teacher", "sampler"]
    assert not any(f["fault"] for f in said["findings"])
