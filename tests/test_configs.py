"""Every YAML parses, instantiates and takes a step; any method lies over any other."""

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from scsdpo.advantage import Rhythm
from scsdpo.cli.overlays import replaced_rate
from scsdpo.rollout import Rollout

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
BASES = sorted(CONFIGS.glob("*.yaml"))
METHODS = sorted((CONFIGS / "methods").glob("*.yaml"))
ROLLOUTS = sorted((CONFIGS / "rollouts").glob("*.yaml"))
SCALES = sorted((CONFIGS / "scale").glob("*.yaml"))
TASKS = sorted((CONFIGS / "tasks").glob("*.yaml"))

AXES = (
    "teacher",
    "advantage",
    "weighting",
    "token_weighting",
    "reduction",
    "importance",
    "reference",
    "selection",
)

LAB = [
    "--data.train=scsdpo.lab.LabTasks",
    "--data.train.split=train",
    "--data.val=scsdpo.lab.LabTasks",
    "--data.val.split=val",
    "--data.val.size=4",
]


@pytest.fixture
def scsdpo(monkeypatch, tmp_path):
    """Run the command in this process, in a folder of its own; returns its exit code."""
    from scsdpo.__main__ import main

    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["scsdpo", *map(str, args)])
        try:
            return main()
        except SystemExit as stop:
            return stop.code

    return run


def small(folder):
    """A base configuration, shrunk: a random model, few short rollouts, two steps."""
    return [
        f"--model.policy.name_or_path={folder}",
        "--model.sampling.max_new_tokens=6",
        "--model.sampling.n=4",
        "--model.val_sampling.max_new_tokens=6",
        "--model.val_sampling.n=2",
        "--checkpoint.monitor=val/mean@2",
        "--data.questions_per_batch=2",
        "--data.val_questions_per_batch=64",
        "--trainer.limit_train_batches=2",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--data.max_prompt_tokens=4000",
    ]


@pytest.mark.parametrize("base", BASES, ids=lambda p: p.stem)
def test_every_base_configuration_trains(base, qwen3, scsdpo):
    if "NF4" in base.read_text():
        pytest.importorskip("bitsandbytes", reason="bitsandbytes: pip install -e '.[dev]'")
    extra = [] if base.stem == "tiny" else LAB
    kwargs = ["--model.policy.chat_template_kwargs={}"]
    assert scsdpo("fit", "--config", base, *extra, *kwargs, *small(qwen3)) in (0, None)


def printed(scsdpo, capsys, *args):
    capsys.readouterr()
    assert scsdpo("fit", *args, "--print_config") in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("base", BASES, ids=lambda p: p.stem)
def test_a_configuration_for_gpus_has_a_fused_optimizer_and_a_large_model_is_checkpointed(base):
    config = yaml.safe_load(base.read_text())
    model = config["model"]
    if config["trainer"].get("precision") != "bf16-mixed":
        return  # for a CPU, too
    optimizer = model["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    weight = torch.nn.Parameter(torch.ones(3))
    made = torch.optim.AdamW([weight], **optimizer["init_args"])
    weight.grad = torch.ones(3)
    made.step()
    assert made.defaults["fused"] is True and (weight < 1).all()
    billions = float(re.search(r"-([\d.]+)B", model["policy"]["name_or_path"])[1])
    assert billions < 4 or model["policy"]["gradient_checkpointing"] is True


@pytest.mark.parametrize("task", TASKS, ids=lambda p: p.stem)
@pytest.mark.parametrize("base", ["qwen3", "olmo3", "qwen3-lora"])
def test_every_task_lies_over_every_model(base, task, scsdpo, capsys):
    config = printed(scsdpo, capsys, "--config", CONFIGS / f"{base}.yaml", "--config", task)
    own = yaml.safe_load(task.read_text())["data"]
    for split in ("train", "val"):
        source = config["data"][split]
        assert source["class_path"].endswith(own[split]["class_path"])
        arguments = source["init_args"]
        assert arguments.keys() == own[split]["init_args"].keys()  # it states every one
        for name, value in own[split]["init_args"].items():
            given = arguments[name]
            assert given == value or given["class_path"].endswith(f".{value}"), name
    assert config["data"].keys() == own.keys()


@pytest.mark.parametrize("base", BASES, ids=lambda p: p.stem)
def test_print_config_round_trips(base, scsdpo, capsys, tmp_path):
    first = printed(scsdpo, capsys, "--config", base)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(first))
    assert printed(scsdpo, capsys, "--config", tmp_path / "again.yaml") == first


def states_everything(mine, full, where):
    """Whether the file's `mine` names every argument that the printed `full` has."""
    if isinstance(mine, str) and isinstance(full, dict):  # a class without arguments
        assert not full.get("init_args"), where
    elif isinstance(full, list):
        for place, (one, other) in enumerate(zip(mine, full, strict=True)):
            states_everything(one, other, f"{where}[{place}]")
    elif isinstance(full, dict) and "class_path" not in full:  # a part, as `Route`
        assert set(mine) == set(full), where
        for name in mine:
            states_everything(mine[name], full[name], f"{where}.{name}")
    elif isinstance(full, dict):
        given, known = mine.get("init_args", {}), full.get("init_args", {})
        # The words, not a quantity; where a copy lies, not what it is.
        left = set(known) - set(given) - {"templates", "attempt_templates", "stored"}
        assert not left, f"{where} does not state {sorted(left)}"
        for name in given:
            states_everything(given[name], known[name], f"{where}.{name}")


@pytest.mark.parametrize("method", METHODS, ids=lambda p: p.stem)
def test_a_method_file_states_every_axis_and_every_argument(method, scsdpo, capsys):
    stated = yaml.safe_load(method.read_text())["model"]
    stated.pop("optimizer", None)  # a paper's rate: the tests below
    assert set(stated) == set(AXES)
    config = printed(scsdpo, capsys, "--config", CONFIGS / "tiny.yaml", "--config", method)["model"]
    for axis in AXES:
        states_everything(stated[axis], config[axis], f"{method.name}: {axis}")


RATES = {
    "sdpo-solve": 1e-6,
    "purified-opsd": 5e-6,
    "srpo": 5e-6,
    "sc-srpo": 5e-6,
    "dash": 5e-6,
    "sdar": 1e-6,
}
"""The papers' learning rates where they are not the 1e-5 of qwen3.yaml."""


def test_a_method_file_carries_its_papers_rate_where_the_base_has_another():
    for method in METHODS:
        optimizer = yaml.safe_load(method.read_text())["model"].get("optimizer")
        rate = RATES.get(method.stem)
        # No class: whatever optimizer the base file has, it keeps, and all its other arguments.
        assert optimizer == (rate and {"init_args": {"lr": rate}}), method.name
        assert ("# Rate: " in method.read_text()) == bool(rate), method.name


@pytest.mark.parametrize("method", RATES)
def test_a_papers_rate_is_used_over_qwen3_and_nothing_else_of_the_optimizer_changes(
    method, scsdpo, capsys
):
    files = [CONFIGS / "qwen3.yaml", CONFIGS / "methods" / f"{method}.yaml"]
    base, both = (
        printed(scsdpo, capsys, *(w for f in these for w in ("--config", f)))["model"]["optimizer"]
        for these in (files[:1], files)
    )
    assert both["init_args"].pop("lr") == RATES[method]
    assert base["init_args"].pop("lr") == 1e-5 and both == base


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny", "methods/srpo"], r"model.optimizer.lr: 5e-06 from \S+srpo.yaml replaces 0.0001"),
        (["tiny", "methods/grpo"], None),
        (["tiny", "methods/srpo", "--model.optimizer.lr=1e-4"], None),
        (["tiny", "methods/srpo", "--model.optimizer.init_args.lr=3e-5"], None),
        (["tiny"], None),
    ],
    ids=["over tiny", "none of its own", "put back", "by hand", "alone"],
)
def test_a_rate_that_a_method_file_brings_over_another_models_is_said_with_the_remedy(words, said):
    files = [f"--config={CONFIGS / word}.yaml" for word in words if not word.startswith("-")]
    options = [word for word in words if word.startswith("-")]
    given = options[0].partition("=")[2] if options else None
    rates = [yaml.safe_load(Path(f.partition("=")[2]).read_text())["model"] for f in files]
    stated = [float(m["optimizer"]["init_args"]["lr"]) for m in rates if "optimizer" in m]
    line = replaced_rate([*files, *options], float(given) if given else stated[-1])
    if said is None:
        assert line == ""
    else:
        assert re.match(said, line) and "--model.optimizer.lr=0.0001" in line


@pytest.mark.parametrize("method", METHODS, ids=lambda p: p.stem)
def test_the_head_of_a_method_file_names_what_departs_from_its_paper(method):
    head = method.read_text().partition("model:\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    for label in ("Paper", "Command", "Reading", "Departs"):
        assert re.search(rf"^# {label}: +\S", head, re.MULTILINE), label


def test_the_head_of_drift_says_of_each_constant_that_it_is_ours():
    text = (CONFIGS / "methods" / "drift.yaml").read_text()
    departs = " ".join(re.search(r"# Departs:.*?(?=model:)", text, re.DOTALL)[0].split("#"))
    ours = departs.partition(" are ours")[0]
    for name in (f.name for f in fields(Rhythm)):
        assert name in ours, name


@pytest.mark.parametrize("rollout", ROLLOUTS, ids=lambda p: p.stem)
def test_a_rollout_file_states_every_argument_and_is_constructed(rollout, scsdpo, capsys):
    stated = yaml.safe_load(rollout.read_text())["model"]
    assert set(stated) == {"rollout"}
    args = ("--config", CONFIGS / "tiny.yaml", "--config", rollout)
    config = printed(scsdpo, capsys, *args)["model"]
    states_everything(stated["rollout"], config["rollout"], rollout.name)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rollout", type=Rollout)
    made = parser.instantiate(parser.parse_object(stated)).rollout
    assert type(made).__name__ == stated["rollout"]["class_path"]


@pytest.mark.parametrize("scale", SCALES, ids=lambda p: p.stem)
def test_a_scale_file_changes_where_weights_lie_and_no_number(scale, scsdpo, capsys):
    base = ("--config", CONFIGS / "qwen3.yaml")
    before, after = (printed(scsdpo, capsys, *a) for a in (base, (*base, "--config", scale)))
    trainer, changed = before["trainer"], after["trainer"]
    assert {key for key in trainer if trainer[key] != changed[key]} <= {
        "accelerator",
        "devices",
        "num_nodes",
        "strategy",
    }
    if scale.stem == "ddp":
        assert changed["strategy"] == "ddp"
    else:
        assert changed["strategy"]["class_path"] == "scsdpo.checkpoints.FullySharded"
    assert before["model"] == after["model"] and before["data"] == after["data"]


def test_the_default_rollout_trains(qwen3, scsdpo):
    files = ("--config", CONFIGS / "tiny.yaml", "--config", CONFIGS / "rollouts" / "hf.yaml")
    assert scsdpo("fit", *files, *small(qwen3)) in (0, None)


def test_class_paths_in_a_printed_configuration_are_public(scsdpo, capsys):
    text = json.dumps(printed(scsdpo, capsys, "--config", CONFIGS / "qwen3-lora.yaml"))
    paths = [p for p in text.split('"') if p.startswith("scsdpo.")]
    assert paths
    for path in paths:
        assert len(path.split(".")) == 3, path  # scsdpo.axis.Class, no private module
