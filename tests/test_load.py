"""The names of the package's top level, and `scsdpo.load`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import scsdpo
from scsdpo.errors import ConfigurationError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = (
    "--data.questions_per_batch=2",
    "--model.sampling.n=4",
    "--model.sampling.max_new_tokens=48",
    "--data.val.init_args.size=4",
)


def test_every_name_of_the_top_level_is_what_its_own_package_has():
    for name in scsdpo.__all__:
        assert getattr(scsdpo, name).__name__ == name
    assert set(scsdpo.__all__) <= set(dir(scsdpo))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        scsdpo.Nothing  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    heavy = "{'torch', 'lightning', 'transformers'}"
    code = f"import sys, scsdpo; print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_configuration_is_loaded_and_traced():
    argv = list(sys.argv)
    method = CONFIGS / "methods" / "grpo.yaml"
    module, data = scsdpo.load(CONFIGS / "tiny.yaml", method, options=SMALL)
    assert isinstance(module.advantage, scsdpo.GroupRelative) and sys.argv == argv
    prompts = next(iter(data.train_dataloader()))
    trace = module.trace(prompts)
    module.teardown("trace")
    assert trace.credit.shape[:2] == (2, 4) and len(prompts) == 2


def test_a_run_is_loaded_with_its_weights_and_its_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["fit", f"--config={CONFIGS / 'tiny.yaml'}", *SMALL, "--trainer.logger=false"]
    limits = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--model.optimizer.lr=0.01"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0"]
    monkeypatch.setattr(sys, "argv", ["scsdpo", *args, *limits, *quiet])
    from scsdpo.__main__ import main

    assert main() == 0
    (state,) = tmp_path.rglob("last.ckpt")
    saved = torch.load(state, weights_only=True)["state_dict"]
    first, _ = scsdpo.load(CONFIGS / "tiny.yaml", options=SMALL)
    module, data = scsdpo.load(state.parents[1])
    own, before = module.state_dict(), first.state_dict()
    assert all(torch.equal(own[name], value) for name, value in saved.items())
    assert any(not torch.equal(own[name], before[name]) for name in saved)
    assert data.questions_per_batch == 2


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ((), (), "name a run, a checkpoint or configuration files"),
        (("nowhere",), (), "nowhere does not exist"),
        (("nowhere.yaml",), (), r"config: nowhere.yaml does not exist"),
        ((CONFIGS,), (), "is not a run, a checkpoint or a .yaml file"),
        ((CONFIGS, CONFIGS / "tiny.yaml"), (), "name one run or checkpoint, or"),
        ((CONFIGS / "tiny.yaml",), ("--modle.x=1",), "modle.*no such key"),
        ((CONFIGS / "tiny.yaml",), ("--model.weighting=Nonsense",), "model.weighting"),
    ],
)
def test_a_mistake_is_one_error_that_names_the_key(given, options, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        scsdpo.load(*given, options=options)
    assert "\n" not in str(caught.value)
