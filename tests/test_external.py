"""A teacher that is another model: its numbers, its vocabulary, where it lies and what it costs."""

import json
import shutil

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.olmo3 import modeling_olmo3
from transformers.models.qwen3 import modeling_qwen3

import scsdpo
from batches import ALL, G, Q, double_policy, exact_norm, gradient, parts
from models import TOKENS, larger_folder, olmo3_folder, qwen3_folder, tokenizer
from oracle import divergence
from runs import Toys, data, module, trainer, weights
from scsdpo.advantage import Blend, Divergence, Full, ReferenceAnchor, SelfDistillation, Weighted
from scsdpo.errors import ConfigurationError
from scsdpo.planning import memory_of
from scsdpo.policy import Lora
from scsdpo.policy.adapter import leave_out_of_ddp
from scsdpo.reduction import SequenceMean
from scsdpo.teacher import EMA, External, GoldSolution, PlainPrompt
from scsdpo.weighting import TeacherEntropy
from test_configs import CONFIGS, scsdpo as command  # noqa: F401 - a fixture
from test_planning import planned

FULL = {"support": Full()}


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    return larger_folder(tmp_path_factory.mktemp("larger"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, larger):
    """Sizes, architectures, ties, and rows of the head."""
    root = tmp_path_factory.mktemp("teachers")
    return {
        "larger": larger,
        "tied, more rows": larger_folder(root / "rows", tie=True, vocab=TOKENS + 16),
        "windows, more rows": olmo3_folder(root / "olmo3", vocab=TOKENS + 9),
    }


@pytest.fixture
def exact(monkeypatch):
    for norm in (modeling_qwen3.Qwen3RMSNorm, modeling_olmo3.Olmo3RMSNorm):
        monkeypatch.setattr(norm, "forward", exact_norm)


def log_probs(model, prompt, response, temperature, vocabulary):
    """[n, V] after a prompt, by transformers alone."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return (logits[:, :vocabulary] / temperature).log_softmax(-1)


def enumerated(student, teacher, judged, contexts, alpha):
    """Mean over rollouts of each one's mean divergence; one without a context or token counts 0."""
    total = torch.zeros((), dtype=torch.float64)
    rollouts, vocabulary = judged.responses, student.config.vocab_size
    for q, prompt in enumerate(judged.prompts):
        for g in range(G):
            response = rollouts.ids[q, g][rollouts.sampled[q, g]].tolist()
            told = contexts.ids[q][g]
            if response and told:
                pair = (
                    log_probs(model, ids, response, rollouts.temperature, vocabulary)
                    for model, ids in ((student, prompt.ids), (teacher, told))
                )
                total = total + divergence(alpha, *pair).mean() / (Q * G)
    return total


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["larger", "tied, more rows", "windows, more rows"])
def test_loss_and_gradient_are_autograds_of_two_transformers_models(
    qwen3, teachers, exact, name, alpha
):
    policy = double_policy(qwen3)
    teacher = External(str(teachers[name]))
    advantage = SelfDistillation(divergence=Divergence(alpha=alpha), **FULL)
    batch, update = parts(policy, advantage, teacher=teacher, reduction=SequenceMean(over="all"))
    teacher.double()
    loss, ours, count = gradient(policy, batch, update, budget=60)
    assert count > 1
    student, other = (
        AutoModelForCausalLM.from_pretrained(folder).double() for folder in (qwen3, teachers[name])
    )
    expected = enumerated(student, other.requires_grad_(False), batch.judged, batch.teacher, alpha)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    for key, value in student.named_parameters():
        torch.testing.assert_close(ours[f"model.{key}"], value.grad, rtol=1e-9, atol=1e-11)
