"""Each method file's loss and gradient against its paper's formula, by hand, in plain loops.

The policy is a table of logits; `Case` gives what a paper's formula is written in: probabilities of
student and teacher after a prefix, rewards, lengths. The formulas below share no code with the
package.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

import scsdpo.lab  # noqa: F401
from formulas import (
    PACED,
    Case,
    ad_opsd,
    agreement,
    all_wrong,
    anchored,
    another_attempt,
    centred,
    dapo,
    distil,
    dr_grpo,
    drift,
    forward_kl,
    gain,
    geosd,
    gold,
    grpo,
    horizon,
    hybrid,
    i_sdpo,
    leave_one_out,
    maxrl,
    mixed,
    normalised,
    of_another_model,
    paced,
    policy_gradient,
    position,
    purified,
    remembered_attempts,
    reverse_kl,
    rlcsd,
    rlsd_factor,
    sc_grpo,
    sdar,
    sequence_mean,
    sequence_mean_active,
    sibling,
    sibling_or_feedback,
    srpo,
    token_mean_active,
    trusted_hybrid,
    turn_grpo,
)
from scsdpo.cli.config_types import arguments
from scsdpo.training import PolicyOptimizer
from scsdpo.types import Sampling
from scsdpo.weighting.frozen import FORMAT, fingerprint
from table_policy import G, TablePolicy, judged, with_a_tool

METHODS = Path(__file__).resolve().parents[1] / "configs" / "methods"
INF = math.inf


def module(name, tmp_path, **changes):
    """The method file's strategies around a table policy whose teacher is a little behind."""
    policy = TablePolicy()
    axes = yaml.safe_load((METHODS / f"{name}.yaml").read_text())["model"] | changes
    axes.pop("optimizer", None)  # the paper's rate, without a class
    if name == "gkd":
        axes["teacher"]["init_args"]["name_or_path"] = "tiny"  # the table policy's other table
    if name == "sdpo-paced":
        axes["weighting"]["init_args"]["path"] = str(rates_file(tmp_path, policy))
    parser = ArgumentParser(exit_on_error=False)
    for axis in axes:
        parser.add_argument(f"--{axis}", type=arguments(PolicyOptimizer)[axis])
    made = parser.instantiate_classes(parser.parse_object(axes))
    model = PolicyOptimizer(policy, sampling=Sampling(n=G), **{axis: made[axis] for axis in axes})
    model.configure_model()
    with torch.no_grad():
        policy.table += 0.3 * torch.randn(policy.table.shape, generator=generator(1)).double()
    return model


def generator(seed):
    return torch.Generator().manual_seed(seed)


def rates_file(folder, policy):
    rates = {f"toy/{q}": [4 * p, 4] for q, p in enumerate(PACED)}
    content = {"format": FORMAT, "policy": "table", "fingerprint": fingerprint(policy)}
    (folder / "rates.json").write_text(json.dumps(content | {"rates": rates}))
    return folder / "rates.json"


LIVE = {"grpo-agree", "sc-grpo", "rlsd", "sdar", "geosd"}
"""Methods whose teacher has the student's weights."""

BY_HAND = {
    "grpo": lambda c: policy_gradient(c, grpo),
    "grpo-no-norm": lambda c: policy_gradient(c, centred),
    "rloo": lambda c: policy_gradient(c, leave_one_out, reduce=sequence_mean),
    "dr-grpo": lambda c: policy_gradient(c, centred, reduce=dr_grpo),
    "maxrl": lambda c: policy_gradient(c, maxrl),
    "dapo": dapo,
    "sdpo": distil,
    "sc-sdpo": lambda c: distil(c, weight=normalised(0.5)),
    "sc-sdpo-anchor": anchored,
    "sc-sdpo-1": lambda c: distil(c, weight=normalised(1)),
    "sdpo-drop-degenerate": lambda c: distil(c, weight=lambda p: float(0 < p < 1)),
    "sdpo-hard-filter": lambda c: distil(c, weight=lambda p: float(0.2 <= p <= 0.8)),
    "sdpo-paced": paced,
    "sdpo-feedback": lambda c: distil(c, tell=sibling_or_feedback),
    "sdpo-solve": lambda c: distil(c, tell=sibling_or_feedback, divergence=reverse_kl),
    "sdpo-hybrid": hybrid,
    "sc-hybrid": lambda c: hybrid(c, normalised(0.5)),
    "stable-sdpo": distil,
    "srpo": srpo,
    "sc-srpo": lambda c: srpo(c, normalised(0.5)),
    "opsd": lambda c: distil(
        c, tell=gold, divergence=forward_kl(0.05), reduce=sequence_mean_active
    ),
    "pw-opsd": lambda c: distil(
        c, tell=gold, divergence=forward_kl(0.05), reduce=sequence_mean_active, token=position
    ),
    "sdft": lambda c: distil(c, tell=gold, divergence=forward_kl(INF), reduce=token_mean_active),
    "rlsd": lambda c: policy_gradient(c, grpo, tell=sibling, modulation=rlsd_factor),
    "drift": drift,
    "dash": lambda c: distil(c, tell=gold, divergence=forward_kl(0.05), token=horizon),
    "pmd": lambda c: distil(c, tell=remembered_attempts),
    "oasis": lambda c: distil(
        c, tell=another_attempt, divergence=forward_kl(0.05), reduce=sequence_mean_active
    ),
    "ad-opsd": ad_opsd,
    "sdar": sdar,
    "geosd": geosd,
    "demopsd": lambda c: distil(c, divergence=mixed),
    "purified-opsd": lambda c: distil(
        c, tell=gold, divergence=purified, reduce=sequence_mean_active
    ),
    "i-sdpo": i_sdpo,
    "rlcsd": rlcsd,
    "gkd": lambda c: distil(
        c,
        tell=lambda *_: "the question",
        divergence=of_another_model,
        reduce=sequence_mean_active,
    ),
    "sc-grpo": sc_grpo,
    "grpo-agree": lambda c: policy_gradient(c, grpo, tell=sibling, modulation=agreement),
    "trusted-hybrid": trusted_hybrid,
    "sdpo-all-wrong": all_wrong,
    "turn-grpo": turn_grpo,
}


BATCHES = {"one turn": judged, "episodes": lambda: with_a_tool(judged(), (1, 2))}


def one_step(model, batch):
    """Loss and gradient of the table, through the package."""
    if hasattr(model.selection, "questions"):
        model.selection.questions = 2
    (chosen,) = model.selection.select(batch)
    batch = model.prepare(chosen)
    rows = list(range(len(chosen.prompts) * G))
    model.policy.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for output, _ in model.steps.update.losses(model.policy, batch, rows, 40):
        output.loss.backward()
        loss += output.loss.detach()
    return loss, model.policy.table.grad


def test_every_method_file_is_checked_by_hand():
    assert set(BY_HAND) == {path.stem for path in METHODS.glob("*.yaml")}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", BY_HAND)
def test_a_step_equals_the_papers_formula(name, kind, tmp_path):
    """In episodes over the tokens that the policy drew, as if the tool's were part of a prompt."""
    model, batch = module(name, tmp_path), BATCHES[kind]()
    case = Case(model, batch, live=name in LIVE)
    expected = BY_HAND[name](case)
    (gradient,) = torch.autograd.grad(expected, case.table)
    loss, ours = one_step(model, batch)
    assert gradient.abs().max() > 1e-7
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(ours, gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("threshold", "trusted"), [(-1.0, True), (0.0, False)])
def test_the_gate_opens_where_the_gain_is_above_the_threshold(threshold, trusted, tmp_path):
    file = yaml.safe_load((METHODS / "trusted-hybrid.yaml").read_text())["model"]["advantage"]
    file["init_args"]["parts"][1]["advantage"]["init_args"]["threshold"] = threshold
    model = module("trusted-hybrid", tmp_path, advantage=file)
    case = Case(model, judged())
    assert (gain(case, 0) > threshold) == trusted
    expected = trusted_hybrid(case, threshold)
    (gradient,) = torch.autograd.grad(expected, case.table)
    loss, ours = one_step(model, judged())
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(ours, gradient, rtol=1e-10, atol=1e-13)
