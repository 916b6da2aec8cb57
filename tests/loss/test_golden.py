"""Loss and gradient of the reference implementation, to 1e-10 in float64."""

import json

import pytest
import torch
from safetensors import safe_open

from kernel_inputs import run, tokens
from scsdpo.advantage import Divergence, Full, Sampled, SelfDistillation, TopK
from scsdpo.loss import NoImportance, TokenImportance
from scsdpo.reduction import TokenMean
from shared import SHARED, needs_shared

FILES = sorted((SHARED / "golden").glob("*.safetensors"))


@needs_shared
def test_all_golden_files_are_here():
    assert len(FILES) == 25


@needs_shared
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_loss_and_gradient(path):
    with safe_open(path, "pt") as file:
        data = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        setting = {name: json.loads(value) for name, value in file.metadata().items()}
    support = {
        "full": Full(),
        "sampled": Sampled(),
        "topk": TopK(k=setting["topk"] or 1, tail=setting["tail"]),
    }[setting["support"]]
    importance = TokenImportance(cap=setting["is_clip"]) if setting["is_clip"] else NoImportance()
    mask = (data["response_mask"] * data["sequence_mask"][:, None]).bool()
    coefficients = TokenMean(over="active").coefficients(
        data["response_mask"].sum(-1), data["sequence_mask"].bool()
    )
    logits = data["student_logits"].requires_grad_()

    output = run(
        SelfDistillation(divergence=Divergence(alpha=setting["alpha"]), support=support),
        logits[mask],
        data["teacher_logits"][mask],
        tokens(
            data["response_ids"][mask],
            scale=coefficients[:, None].expand(mask.shape)[mask],
            sampling_logprob=data["old_logprobs"][mask],
        ),
        importance=importance,
    )
    output.loss.backward()

    expected = data["expected_loss"][0]
    if setting["support"] == "sampled":
        # The reference reports its surrogate, sg(log S - log T) log S; ours is log S - log T.
        surrogate = coefficients[0] * (output.objective * output.logprob).sum()
        torch.testing.assert_close(surrogate, expected, rtol=0, atol=1e-10)
    else:
        torch.testing.assert_close(output.loss.detach(), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits.grad, data["expected_grad"], rtol=0, atol=1e-10)
