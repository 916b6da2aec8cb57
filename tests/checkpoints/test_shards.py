"""A folder of shards is a checkpoint like a file: read, compared, exported, gone on from."""

import os
import pickle
import shutil

import pytest
import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM

from runs import ARGUMENTS, assert_same, weights
from scsdpo.checkpoints import Saved, newest, shards
from scsdpo.cli.export import export
from test_export import scsdpo

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log"),  # summed already
    pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict"),
]

SHARDED = ["--trainer.strategy.class_path=scsdpo.checkpoints.FullySharded", "--trainer.devices=1"]


def fit(folder, root, *args):
    policy = f"--model.policy.name_or_path={folder}"
    code = scsdpo("fit", *ARGUMENTS, policy, f"--trainer.default_root_dir={root}", *args)
    if dist.is_initialized():
        dist.destroy_process_group()
    assert code == 0
    return root / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def folder(qwen3, root):
    """The last of three states of a run on one rank, which is a world like any other."""
    return fit(qwen3, root, *SHARDED)


@pytest.fixture(scope="module")
def file(qwen3, tmp_path_factory):
    return fit(qwen3, tmp_path_factory.mktemp("file"))


def test_a_folder_holds_what_a_file_does(folder, file):
    in_folder = shards.read(folder, optimizer=True)
    in_file = torch.load(file, weights_only=True)
    assert in_folder.keys() == in_file.keys()
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "remembered"):
        assert_same(in_folder[part], in_file[part], part)
    assert {path.name for path in folder.parent.iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_a_folder_written_in_the_background_is_the_same(folder, qwen3, tmp_path):
    args = [*SHARDED, "--trainer.strategy.background=true", "--checkpoint.every_minutes=0"]
    written = shards.read(fit(qwen3, tmp_path, *args), optimizer=True)
    expected = shards.read(folder, optimizer=True)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "remembered"):
        assert_same(written[part], expected[part], part)
    left = tmp_path / "checkpoints"
    assert {path.name for path in left.iterdir()} == {"last.ckpt", "previous.ckpt"}
    assert Saved.read(left / "previous.ckpt").step < 3


def test_a_folder_is_read_by_its_table_without_its_tensors(folder, file):
    saved, expected = Saved.read(folder), Saved.read(file)
    assert (saved.step, saved.resumable) == (3, True)
    assert saved.metrics.keys() == expected.metrics.keys() != set()
    shapes = {name: tensor.shape for name, tensor in expected.weights.items()}
    assert {name: tensor.shape for name, tensor in saved.weights.items()} == shapes
    assert all(tensor.is_meta for tensor in saved.weights.values())
    assert newest(folder.parent, saved.config, whole_run=True).path == folder


def test_optimizer_states_stay_in_the_folder_unless_training_goes_on(folder):
    content = shards.read(folder, optimizer=False)
    assert content["optimizer_states"][0]["state"] == {}
    assert not any(tensor.is_meta for tensor in content["state_dict"].values())


def test_a_folder_exports_as_a_file_does(folder, file, tmp_path):
    for source, out in ((folder, tmp_path / "folder"), (file, tmp_path / "file")):
        export(source, out)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("folder", "file"))
    for name, value in weights(one).items():
        assert torch.equal(value, weights(other)[name]), name


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_one_process_evaluates_a_folder_whatever_the_teacher(command, folder, qwen3, tmp_path):
    args = [
        arg for arg in ARGUMENTS if not arg.startswith(("--model.teacher", "--model.advantage"))
    ]
    args += ["--model.advantage=GroupRelative", f"--trainer.default_root_dir={tmp_path}"]
    args += [f"--model.policy.name_or_path={qwen3}", f"--ckpt_path={folder}"]
    assert scsdpo(command, *args) == 0


@pytest.mark.parametrize(("way", "now"), [("folder", SHARDED), ("file", SHARDED), ("folder", [])])
def test_a_new_learning_rate_takes_effect_from_either(way, now, folder, file, qwen3, tmp_path):
    source = {"folder": folder, "file": file}[way]
    more = ["--model.optimizer.lr=0", "--model.optimizer.weight_decay=0", "--trainer.max_steps=4"]
    on = fit(qwen3, tmp_path, f"--ckpt_path={source}", *more, *now)
    content = shards.read(on, optimizer=True) if now else torch.load(on, weights_only=True)
    (optimizer,) = content["optimizer_states"]
    assert optimizer["param_groups"][0]["lr"] == 0
    assert optimizer["state"][0]["step"] == 4
    before = torch.load(file, weights_only=True)["state_dict"]
    trained = [name for name in before if name.startswith("policy.model")]
    assert all(torch.equal(content["state_dict"][name], before[name]) for name in trained)


def test_a_folder_of_another_optimizer_is_refused_in_one_line(folder, qwen3, tmp_path, capsys):
    other = [*SHARDED, f"--ckpt_path={folder}", f"--trainer.default_root_dir={tmp_path}"]
    policy = f"--model.policy.name_or_path={qwen3}"
    capsys.readouterr()
    sgd = "--model.optimizer.class_path=torch.optim.SGD"
    assert scsdpo("fit", *ARGUMENTS, policy, *other, sgd) == 2
    assert "model.optimizer: AdamW -> SGD" in capsys.readouterr().err


def torn(folder, to):
    shutil.copytree(folder, to)
    (part,) = to.glob("*.distcp")
    os.truncate(part, part.stat().st_size - 1)
    return to


def test_a_torn_folder_is_named_and_passed_over(folder, qwen3, tmp_path, capsys):
    whole = tmp_path / "previous.ckpt"
    shutil.copytree(folder, whole)
    last = torn(folder, tmp_path / "last.ckpt")
    with pytest.raises(
        ValueError, match=r"last\.ckpt is incomplete: .*distcp was not written to its"
    ):
        Saved.read(last)
    assert newest(tmp_path, Saved.read(whole).config, whole_run=True).path == whole
    (last / shards.META).unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt is incomplete"):
        Saved.read(last)
    policy = f"--model.policy.name_or_path={qwen3}"
    capsys.readouterr()
    assert scsdpo("fit", *ARGUMENTS, policy, f"--ckpt_path={last}") == 2
    assert f"{last} is incomplete: it was not written to its end; {whole} is complete" in (
        capsys.readouterr().err
    )


def test_a_table_that_would_run_something_is_refused(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    shutil.copytree(folder, tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"names posix\.mkdir"):
        Saved.read(tmp_path / "last.ckpt")
    assert not (tmp_path / "run").exists()


def test_lightnings_own_strategy_is_refused_where_it_would_save(qwen3, tmp_path, capsys):
    own = "--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy"
    said = f"--trainer.default_root_dir={tmp_path}"
    capsys.readouterr()
    code = scsdpo("fit", *ARGUMENTS, f"--model.policy.name_or_path={qwen3}", own, said)
    dist.destroy_process_group()
    assert code == 2
    assert "use scsdpo.checkpoints.FullySharded" in capsys.readouterr().err
