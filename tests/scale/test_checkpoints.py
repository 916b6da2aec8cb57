"""Checkpoints of sharded runs: any number of ranks goes on from them, and nothing tears them."""

import os

import pytest
import torch
from resuming import CASES
from transformers import AutoModelForCausalLM

from conftest import HERE, ranks
from runs import Toys, data, module, trainer
from scsdpo.checkpoints import Saved, newest, shards
from scsdpo.cli.export import export
from test_training import figures

CHAIN = ["fsdp-4", "fsdp-2", "one-1", "fsdp-4"]
SHORT = ["fsdp-2", "one-1", "fsdp-2"]
"""What CI runs: SCALE=share."""


@pytest.fixture(scope="module")
def chain():
    return SHORT if os.environ.get("SCALE") == "share" else CHAIN


@pytest.fixture(scope="module")
def ends(folders, tmp_path_factory, chain):
    """Folders of one process that never stopped, and of the chain's links."""
    straight = tmp_path_factory.mktemp("straight")
    ranks([HERE / "resuming.py"], 1, folders, straight, "one-1", 2 * len(chain))
    links = []
    for number, kind in enumerate(chain, start=1):
        links.append(tmp_path_factory.mktemp(f"link-{number}"))
        source = links[-2:-1]
        ranks([HERE / "resuming.py"], int(kind[-1]), folders, links[-1], kind, 2 * number, *source)
    return straight, links


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_with_any_number_of_ranks(ends, chain, name):
    straight, links = ends
    for link, kind in zip(links, chain, strict=True):
        last = link / name / "checkpoints" / "last.ckpt"
        assert last.is_dir() == kind.startswith("fsdp")
    expected = torch.load(straight / name / "weights.pt")
    weights = torch.load(links[-1] / name / "weights.pt")
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        assert ((weights[key] - value).abs() <= room(name, key, value)).all(), key
    tolerance = 10 if name == "half" else 1
    for record, wanted in zip(figures(links[-1] / name), figures(straight / name), strict=True):
        assert record == pytest.approx(wanted, rel=1e-4 * tolerance, abs=1e-5 * tolerance)


def room(name, key, value):
    """Where an average in bf16 differs in float32's last bit, it may be rounded to another one."""
    if name != "half":
        return torch.tensor(1e-5)
    return 2.0**-7 * value.abs() if key.startswith("teacher") else torch.tensor(1e-4)


def test_nothing_that_is_saved_is_lost(ends):
    """What one process keeps in a file is in a folder of shards too, tensor by tensor."""
    straight, links = ends
    for name in CASES.keys() - {"half"}:
        file = torch.load(straight / name / "checkpoints" / "last.ckpt", weights_only=True)
        folder = shards.read(links[-1] / name / "checkpoints" / "last.ckpt", optimizer=True)
        assert folder.keys() == file.keys()
        assert folder["remembered"].keys() == file["remembered"].keys()
        assert bool(folder["remembered"]) == (name == "memory")
        assert folder["lr_schedulers"] == file["lr_schedulers"]
        assert folder["loops"] == file["loops"]
        torch.testing.assert_close(folder["state_dict"], file["state_dict"], rtol=1e-4, atol=1e-5)
        (mine,), (wanted,) = folder["optimizer_states"], file["optimizer_states"]
        assert mine["param_groups"] == wanted["param_groups"]
        torch.testing.assert_close(mine["state"], wanted["state"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["ema", "lora"])
def test_one_process_exports_a_folder_of_shards(ends, name, tmp_path):
    _, links = ends
    export(links[-1] / name / "checkpoints" / "last.ckpt", tmp_path / "out", dtype="float32")
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    saved = torch.load(links[-1] / name / "weights.pt")
    key = "model.layers.0.mlp.up_proj"
    if name == "ema":
        expected = saved[f"policy.model.{key}.weight"]
    else:
        start = f"policy.model.base_model.model.{key}"
        down, up = (saved[f"{start}.lora_{side}.default.weight"] for side in "AB")
        expected = saved[f"{start}.base_layer.weight"] + 16 * up @ down  # lora_alpha / r
    torch.testing.assert_close(exported[f"{key}.weight"], expected)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("background", [False, True])
def test_a_refusing_disk_costs_a_checkpoint_and_a_kill_none(folders, tmp_path, background):
    with pytest.raises(AssertionError, match="SIGKILL"):
        ranks([HERE / "hurt_saving.py"], 2, folders, tmp_path, background)
    left = tmp_path / "checkpoints"
    names = {path.name for path in left.iterdir()}
    assert names == {"last.ckpt", "previous.ckpt", "last.ckpt.part"}
    assert not shards.is_folder(left / "last.ckpt.part")
    assert Saved.read(left / "previous.ckpt").step == 1
    saved = newest(left, Saved.read(left / "last.ckpt").config, whole_run=True)
    assert saved.path == left / "last.ckpt" and saved.step == 3
    model = module(folders / "tied")
    trainer(tmp_path / "on", max_steps=4, max_epochs=-1).fit(
        model, data(Toys(40)), ckpt_path=saved.path
    )
    assert model.trainer.global_step == 4
