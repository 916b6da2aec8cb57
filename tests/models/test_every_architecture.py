"""Every causal language model of transformers: right, or refused before it learns."""

import pytest
import torch
from outcomes import PAGE, outcome, page, plain_logprobs
from step import both_gradients
from table import NAMES, SKIPPED, model_folder
from transformers import AutoModelForCausalLM

import runs
from scsdpo.cli.export import write_policy
from scsdpo.policy import CausalLM
from scsdpo.weighting import Uniform

OUTCOMES = {}
FAMILIES = (
    *("llama", "qwen2", "gemma", "gpt2", "gpt_neox", "opt", "phi3", "stablelm", "nemotron"),
    *("mamba", "lfm2", "falcon_h1", "qwen3_next", "mixtral", "gpt_oss"),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_it_is_right_by_the_path_that_it_takes_or_refused(name):
    OUTCOMES[name], policy = outcome(name)
    if name in SKIPPED:
        pytest.skip(SKIPPED[name])
    if policy is None:
        assert OUTCOMES[name].path == "refused" and OUTCOMES[name].reason
        return
    found, plain = plain_logprobs(policy)
    torch.testing.assert_close(found, plain, atol=2e-3, rtol=0)
    grads, expected = both_gradients(policy)
    scale = max(float(grad.norm()) for grad in expected.values())
    assert scale > 0
    ours = {
        key.removeprefix(
            "model.",
        ): grad
        for key, grad in grads.items()
    }
    for key, grad in expected.items():
        if key in ours:
            assert float((ours[key] - grad).norm()) <= 2e-3 * scale, key
        else:
            assert float(grad.norm()) <= 2e-3 * scale, key


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_goes_on_from_a_checkpoint_and_is_exported(name, tmp_path):
    folder = model_folder(tmp_path / "model", name)

    def fit(steps, root, **settings):
        module = runs.module(folder, CausalLM(str(folder)), weighting=Uniform())
        trainer = runs.trainer(root, max_steps=steps, limit_val_batches=0, **settings)
        trainer.fit(module, runs.data(), **({"ckpt_path": root / "x.ckpt"} if steps == 3 else {}))
        return module, trainer

    module, trainer = fit(1, tmp_path)
    assert trainer.global_step == 1
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed, trainer = fit(3, tmp_path)
    assert trainer.global_step == 3
    moved = runs.weights(resumed.policy)
    assert any(not torch.equal(moved[key], was) for key, was in runs.weights(module.policy).items())
    write_policy(resumed.policy, tmp_path / "out", adapter=False, dtype="float32")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(5, 25)[None]
    model = resumed.policy.language_model.eval()
    with torch.no_grad():
        assert torch.allclose(exported(ids).logits, model(ids).logits, atol=1e-4)


def test_at_least_100_run_and_at_most_15_are_skipped():
    paths = [each.path for each in OUTCOMES.values()]
    assert len(paths) == len(NAMES)
    assert paths.count("skipped") == len(SKIPPED) <= 15
    assert len(paths) - paths.count("skipped") - paths.count("refused") >= 100


def test_the_committed_page_is_what_this_run_writes():
    assert PAGE.read_text(encoding="utf-8") == page(OUTCOMES)
