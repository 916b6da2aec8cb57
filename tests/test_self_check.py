"""The check before the first step: what it finds wrong, and what a run does then."""

import json
from dataclasses import replace

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
)

import models
import runs
from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM, Lora
from scsdpo.policy.row_path import RowPath
from scsdpo.rollout import HFRollout
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
    return examine(policy, teachers, rollout or HFRollout(), 1.0)[0]


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
    assert first.others == 0 and "differ from each alone" in first.fault
    assert policy.known.path is RowPath.PADDED


def test_a_gradient_that_does_not_reach_the_prompt_is_found(qwen3, monkeypatch):
    from scsdpo.policy import runner

    monkeypatch.setattr(runner._Running, "backward", lambda self: None)
    first = check(policy_of(qwen3))[0]
    assert first.apart < 1e-5 and "the gradient differs" in first.fault


def test_a_teacher_that_is_wrong_makes_rows_run_apart(qwen3):
    policy, teacher = policy_of(qwen3), Frozen()
    teacher.configure(policy, "teacher")
    copy = teacher.trunks(policy)[0].copy
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
    with pytest.raises(ConfigurationError, match="BertLMHeadModel is not causal: a token sees"):
        check(policy)


def test_logits_that_are_scaled_behind_the_head_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("scsdpo.policy.loading._RESCALED", ())
    policy = made(tmp_path, CohereForCausalLM, CohereConfig(**SIZE, logit_scale=0.5))
    with pytest.raises(ConfigurationError, match="CohereForCausalLM makes its logits of hidden"):
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
