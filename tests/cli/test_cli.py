"""The command: every kind of mistake is one line with its key and exit code 2."""

import re
import subprocess
import sys

import pytest
import torch
import yaml

from runs import Toys
from scsdpo.__main__ import main as command
from scsdpo.callbacks import PredictionWriter, prediction_writer
from scsdpo.cli.commands import COMMANDS
from scsdpo.errors import ConfigurationError, TrainingStopped, blamed_on
from scsdpo.training import PolicyOptimizer

VALID = {
    "model": {
        "advantage": {"class_path": "SelfDistillation"},
        "teacher": {"class_path": "EMA", "init_args": {"context": "PlainPrompt"}},
        "sampling": {"n": 2, "max_new_tokens": 2},
        "val_sampling": {"n": 2, "max_new_tokens": 2},
    },
    "data": {
        "train": "runs.Toys",
        "val": {"class_path": "runs.Toys", "init_args": {"size": 2}},
        "questions_per_batch": 2,
    },
    "trainer": {
        "max_steps": 3,
        "val_check_interval": 2,
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}
"""Every rollout gets credit, so that steps are steps."""


@pytest.fixture
def scsdpo(qwen3, monkeypatch, tmp_path, capsys):
    """Runs the command in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    policy = {"policy": {"name_or_path": str(qwen3)}}
    written = yaml.safe_dump(VALID | {"model": VALID["model"] | policy})
    (tmp_path / "valid.yaml").write_text(written)

    def run(*args, base=("--config=valid.yaml",)):
        monkeypatch.setattr(sys, "argv", ["scsdpo", args[0], *base, *map(str, args[1:])])
        capsys.readouterr()
        try:
            code = command()
        except SystemExit as stop:
            code = stop.code
        return code or 0, *capsys.readouterr()

    return run


def refused(result):
    """The one line of a refusal, without its prefix."""
    code, _, error = result
    assert code == 2, error
    _, prefix, line = error.partition("scsdpo: error: ")
    assert prefix, error
    assert line.endswith("\n")
    assert line.count("\n") == 1, line
    assert "Traceback" not in error
    return line.rstrip("\n")


def without_choices(line):
    """They grow with the package, and with the classes that other tests define."""
    return line.partition(" (choices: ")[0]


COMMAND_LINE = {
    "--model.weighting=PassRate --model.weighting.powr=1": "model.weighting.powr: PassRate has no "
    "such argument; did you mean `power`? (it takes: power)",
    "--model.weighting=PassRate --model.weighting.pow=1": "model.weighting.pow: PassRate has no "
    "such argument; did you mean `power`? (it takes: power)",
    "--model.weighting.power=1": "model.weighting.power: Uniform has no such argument "
    "(it takes: none)",
    "--model.weighting=PassRte": "model.weighting: PassRte is not a known Weighting; did you mean "
    "`PassRate`?",
    "--model.weighting=scsdpo.weighting.PassRte": "model.weighting: scsdpo.weighting.PassRte is "
    "not a known Weighting: module scsdpo.weighting has no 'PassRte'; did you mean `PassRate`?",
    "--model.weighting=nowhere.Mine": "model.weighting: nowhere.Mine is not a known Weighting: "
    "there is neither nowhere.py in this folder nor a module nowhere on PYTHONPATH",
    "--records.path=x.jsonl": "records.path: RunRecords has no such argument; `records` sets what "
    "a run writes. To read questions, set `data.train: Records`",
    "--model.weighting=TopK": "model.weighting: TopK is not a known Weighting",
    "--model.weighting=scsdpo.advantage.TopK": "model.weighting: scsdpo.advantage.TopK is a class, "
    "but not a subclass of Weighting",
    "--model.weighting=scsdpo.types.stable_hash": "model.weighting: scsdpo.types.stable_hash is "
    "not a class but a function",
    "--model.sampling.num_generations=4": "model.sampling.num_generations: no such key; TRL's "
    "num_generations is here model.sampling.n (docs/words.md)",
    "--max_completion_length=4": "max_completion_length: no such key; TRL's max_completion_length "
    "is here model.sampling.max_new_tokens (docs/words.md)",
    "--model.warmup_steps=4": "model.warmup_steps: no such key; TRL's warmup_steps is here "
    "model.lr_scheduler, such as LinearLR (docs/words.md)",
    "--actor_rollout_ref.actor.ppo_epochs=2": "actor_rollout_ref.actor.ppo_epochs: no such key; "
    "verl's ppo_epochs has no counterpart: no rollout is learned from twice (docs/words.md)",
    "--trainer.strategy=fsdp": "trainer.strategy: FSDPStrategy is not supported: use auto, ddp, or "
    "scsdpo.checkpoints.FullySharded for sharded weights (configs/scale)",
    "--trainer.devices=2 --trainer.strategy=ddp --data.questions_per_batch=7": "data."
    "questions_per_batch: must be a multiple of the 2 ranks, got 7: set it to 6 or 8",
    "--model.weighting=Weighting": "model.weighting: Weighting is abstract",
    "--model.weighting=PassRate --model.weighting.power=high": "model.weighting.power: must be "
    "float, got high",
    "--model.weighting=PassRate --model.weighting.power=-1": "model.weighting.power: "
    "must be >= 0, got -1.0",
    "--model.weighting.help=PassRte": "model.weighting.help: PassRte is not a known Weighting; "
    "did you mean `PassRate`?",
    "--model.weigting=PassRate": "model.weigting: no such key; did you mean `model.weighting`?",
    "--weighting=PassRate": "weighting: no such key; did you mean `model.weighting`?",
    "--modl.weighting=PassRate": "modl.weighting: no such key; did you mean `model`?",
    "--ckpt_pth=x": "ckpt_pth: no such key; did you mean `ckpt_path`?",
    "--trainer.max_step=3": "trainer.max_step: no such key; did you mean `trainer.max_steps`?",
    "--model.sampling.m=1": "model.sampling.m: Sampling has no such argument (it takes: n, "
    "max_new_tokens, temperature, top_p, top_k, min_p, stop, seed)",
    "word": "word: not an option; write options as --key=value",
    "--model.sampling.n=many": "model.sampling.n: must be int, got many",
    "--model.val_sampling=many": "model.val_sampling: must be Sampling, got many",
    "--model.val_sampling.n=0": "model.val_sampling.n: must be >= 1, got 0",
    "--model.updates_per_rollout=1.5": "model.updates_per_rollout: must be int, got 1.5",
    "--seed_everything=x": "seed_everything: must be bool or int, got x",
    "--model.policy.dtype=fp16": "model.policy.dtype: must be one of auto, float32, bfloat16, "
    "got fp16",
    "--model.advantage.support.k=x": "model.advantage.support.k: must be int, got x",
    "--model.advantage.suport=TopK": "model.advantage.suport: SelfDistillation has no such "
    "argument; did you mean `support`? (it takes: divergence, support, target)",
    "--model.advantage.support=TopN": "model.advantage.support: TopN is not a known Support; did "
    "you mean `TopK`?",
    "--model.advantage.support.k=0": "model.advantage.support.k: must be >= 1, got 0",
    "--model.reduction=TokenSum": "model.reduction.constant: not set, and TokenSum needs it",
    "--model.optimizer=AdamX": "model.optimizer: AdamX is not a known Optimizer; did you mean "
    "`Adam`?",
    "--model.optimizer.lr=x": "model.optimizer.lr: must be float or Tensor, got x",
    "--model.optimizer.lrr=1": "model.optimizer.lrr: AdamW has no such argument; did you mean "
    "`lr`? (it takes: lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, "
    "differentiable, fused)",
    "--model.lr_scheduler=StepLR": "model.lr_scheduler.step_size: not set, and StepLR needs it",
    "--model.teacher=NoTeacher": "model.advantage: SelfDistillation needs a teacher, but "
    "model.teacher is NoTeacher: choose one, such as EMA (--model.teacher.help)",
    "--trainer.devices=x": "trainer: `devices` selected with `CPUAccelerator` should be an int "
    "> 0.",
    "--trainer.callbacks+=Foo": "trainer.callbacks: Foo is not a known Callback",
    "--checkpoint.save_top_k=-5": "checkpoint: Invalid value for save_top_k=-5. Must be >= -1",
    "--ckpt_path=nofile": "ckpt_path: nofile does not exist",
    "--model.teacher.context=null": "model.teacher.context: must be Context, got null",
    "--config": "config: expected one argument",
}


@pytest.mark.parametrize("args", COMMAND_LINE)
def test_a_mistake_on_the_command_line_is_one_line_with_its_key(args, scsdpo):
    assert without_choices(refused(scsdpo("fit", *args.split()))) == COMMAND_LINE[args]


FILES = {
    "model: {weighting: {class_path: PassRate, init_args: {powr: 1}}}": "model.weighting.powr: "
    "PassRate has no such argument; did you mean `power`? (it takes: power)",
    "model: {weighting: {class_path: PassRate, power: 1}}": "model.weighting: write the arguments "
    "of a class under `init_args:`, beside `class_path:`",
    "model: {weighting: 3}": "model.weighting: 3 is not a known Weighting",
    "model: {weigting: PassRate}": "model.weigting: no such key; did you mean `model.weighting`?",
    "model: {sampling: {m: 1}}": "model.sampling.m: Sampling has no such argument (it takes: n, "
    "max_new_tokens, temperature, top_p, top_k, min_p, stop, seed)",
    "model: {sampling: null}": "model.sampling: must be Sampling, got null",
    "modl: {weighting: PassRate}": "modl.weighting: no such key; did you mean `model`? (in "
    "wrong.yaml)",
    "fit: {model: {weighting: PassRate}}": "fit.model.weighting: no such key; did you mean "
    "`model.weighting`? (in wrong.yaml)",
    "model: {advantage: {class_path: Blend, init_args: {parts: [{advantage: {class_path: "
    "GroupRelative, init_args: {clip_lo: 1}}}]}}}": "model.advantage.parts.advantage.clip_lo: "
    "GroupRelative has no such argument; did you mean `clip_low`? (it takes: baseline, scale, "
    "clip_low, clip_high, level, modulator)",
    "data: {train: [{class_path: LabTaks}]}": "data.train: LabTaks is not a known Source; did you "
    "mean `LabTasks`?",
    "data: {train: [{class_path: LabTasks, init_args: {spit: train}}]}": "data.train.spit: "
    "LabTasks has no such argument; did you mean `split`? (it takes: split, seed, size, levels, "
    "shapes)",
    "data: {train: [{class_path: LabTasks, init_args: {split: tran}}]}": "data.train.split: must "
    "be one of train, val, got tran",
    "data: {train: [runs.Toys, {class_path: LabTasks, init_args: {split: train, size: 0}}]}": ""
    "data.train[1].size: must be >= 1, got 0",
    "model: {teacher: {class_path: EMA, init_args: {context: {class_path: SiblingDemonstration, "
    "init_args: {templates: {trun: x}}}}}}": "model.teacher.context.templates.trun: Templates has "
    "no such argument; did you mean `turn`? (it takes: turn, solution, feedback)",
    "model: {teacher: {class_path: EMA, init_args: {context: {class_path: SiblingDemonstration, "
    "init_args: {templates: {turn: x}}}}}}": "model.teacher.context.templates.turn: "
    "must contain {prompt}",
    "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {save_top_k: -5}}]}": ""
    "trainer.callbacks[0]: Invalid value for save_top_k=-5. Must be >= -1",
    "model:\n  weighting: [PassRate\n  teacher: }": "wrong.yaml, line 3: not YAML: expected ',' "
    "or ']', but got ':'",
    "- model\n- data": "wrong.yaml: must hold keys such as `model:` and `data:`, got "
    "['model', 'data']",
    "": "wrong.yaml: is empty; it must hold keys such as `model:`",
    "# nothing": "wrong.yaml: is empty; it must hold keys such as `model:`",
    "model:\n  weighting: Uniform\ndata: {seed: 1}\nmodel:\n  teacher: Live": "wrong.yaml, line 4: "
    "model is in line 1 too; YAML keeps the last one only: join them, or remove one",
    "model:\n  sampling:\n    n: 2\n    n: 4": "wrong.yaml, line 4: model.sampling.n is in line 3 "
    "too; YAML keeps the last one only: join them, or remove one",
    "data: {train: [runs.Toys, {class_path: runs.Toys, init_args: {size: 3, size: 4}}]}": ""
    "wrong.yaml, line 1: data.train[1].init_args.size is in line 1 too; YAML keeps the last one "
    "only: join them, or remove one",
    "model:": "model: is empty; give it keys, or leave it out (its keys in other files stay) (in "
    "wrong.yaml)",
    "model: 3": "model: must hold keys, such as `model: {...}`, got 3 (in wrong.yaml)",
    "trainer: [max_steps]": "trainer: must hold keys, such as `trainer: {...}`, got ['max_steps'] "
    "(in wrong.yaml)",
    "model: {sampling: [1]}": "model.sampling: must be Sampling, got [1]",
    "model:\n\tsampling: {n: 2}": "wrong.yaml, line 2: not YAML: found character '\\t' that cannot "
    "start any token; indent with spaces and not with tabs",
    "model: {on: 3}": "wrong.yaml, line 1: model.on: YAML reads on as bool, where a name must "
    "stand; write it in quotes",
    "data: {1: 2}": "wrong.yaml, line 1: data.1: YAML reads 1 as int, where a name must stand; "
    "write it in quotes",
    "model: {sampling: {n: 010}}": "wrong.yaml, line 1: model.sampling.n: YAML reads 010 as 8; "
    "write that number, or the text in quotes",
    "trainer: {max_time: 12:30:00}": "wrong.yaml, line 1: trainer.max_time: YAML reads 12:30:00 as "
    "45000; write that number, or the text in quotes",
    "model: {sampling: {stop: [no, yes]}}": "model.sampling.stop: must be tuple of str, got False; "
    "YAML reads yes, no, on and off as booleans: write the word in quotes",
    "model: {policy: {name_or_path: 7}}": "model.policy.name_or_path: must be str, got 7; write it "
    "in quotes",
    "model: &a {sampling: *a}": "wrong.yaml, line 1: model.sampling: this YAML alias names a "
    "mapping that contains the alias; write the keys out instead",
    "model: {sampling: *a}": "wrong.yaml, line 1: not YAML: found undefined alias 'a'",
    "model: {}\n---\ndata: {}": "wrong.yaml, line 2: not YAML: but found another document",
}


@pytest.mark.parametrize("content", FILES)
def test_a_mistake_in_a_file_is_one_line_with_its_key(content, scsdpo, tmp_path):
    (tmp_path / "wrong.yaml").write_text(content)
    assert without_choices(refused(scsdpo("fit", "--config=wrong.yaml"))) == FILES[content]


def test_choices_are_the_public_concrete_subclasses(scsdpo):
    line = refused(scsdpo("fit", "--model.weighting=x"))
    listed = re.fullmatch(r"model.weighting: x is not a known Weighting \(choices: (.*)\)", line)
    assert {"PassRate", "Uniform"} <= set(listed[1].split(", "))
    assert "Weighting" not in listed[1]


def test_keys_that_are_not_set_are_named(scsdpo, tmp_path):
    assert refused(scsdpo("fit", base=["--data.val=[]"])) == (
        "model.policy, model.advantage, data.train: not set; give a --config that sets them "
        "(configs/tiny.yaml)"
    )
    missing = {"model": {"policy": {"name_or_path": "x"}}, "data": VALID["data"]}
    (tmp_path / "missing.yaml").write_text(yaml.safe_dump(missing))
    line = refused(scsdpo("fit", base=["--config=missing.yaml"]))
    listed = re.match(r"model\.advantage: not set \(choices: ([^)]*)\)", line)[1].split(", ")
    # Beside classes that other tests of this process made.
    assert {"Blend", "EntropyBonus", "GatedGap", "GroupRelative", "Routed"} <= set(listed)
    assert listed == sorted(listed)


def test_a_file_that_cannot_be_read_is_named(scsdpo, tmp_path):
    line = refused(scsdpo("fit", "--config", "none.yaml"))
    assert line == "config: none.yaml does not exist"
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00")
    assert refused(scsdpo("fit", "--config=weights.bin")) == "weights.bin: not a text file"


@pytest.mark.parametrize(
    ("args", "start"),
    [
        (["--model.policy.name_or_path=./none"], "model.policy: `CausalLM(name_or_path='./none')`"),
        (["--model.optimizer.lr=-1"], "model.optimizer: Invalid learning rate: -1"),
        (
            ["--data.train=ToolUse", "--data.train.path=none.json"],
            "data.train: `ToolUse(path='none.json')`: none.json",
        ),
        (["--data.questions_per_batch=100"], "data.questions_per_batch: must be at most 12, "),
    ],
)
def test_what_only_the_run_can_find_out_is_one_line_too(args, start, scsdpo):
    assert refused(scsdpo("fit", *args)).startswith(start)


def test_a_run_that_stops_itself_says_why_and_exits_with_3(scsdpo, monkeypatch):
    def stop(*args):
        raise TrainingStopped("5 steps in a row\nwere not finite")

    monkeypatch.setattr(PolicyOptimizer, "training_step", stop)
    code, _, error = scsdpo("fit")
    assert code == 3
    assert error.endswith("scsdpo: error: 5 steps in a row were not finite\n")


def test_a_bug_keeps_its_traceback(scsdpo, monkeypatch):
    def bug(*args):
        raise ValueError("a bug")

    monkeypatch.setattr(PolicyOptimizer, "training_step", bug)
    with pytest.raises(ValueError, match="a bug"):
        scsdpo("fit")
    monkeypatch.setattr(Toys, "__init__", lambda self, **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scsdpo("fit")


def test_configurations_compose_and_print_config_round_trips(scsdpo, tmp_path):
    (tmp_path / "a.yaml").write_text("model: {weighting: Uniform, limits: {max_tokens: 7}}")
    (tmp_path / "b.yaml").write_text("model: {weighting: {class_path: PassRate}}")
    layers = ["--config=a.yaml", "--config=b.yaml", "--model.weighting.power=1"]
    code, printed, _ = scsdpo("fit", *layers, "--print_config")
    config = yaml.safe_load(printed)
    assert code == 0
    assert config["model"]["limits"]["max_tokens"] == 7
    assert config["model"]["weighting"] == {
        "class_path": "scsdpo.weighting.PassRate",
        "init_args": {"power": 1.0},
    }
    (tmp_path / "c.yaml").write_text(printed)
    assert scsdpo("fit", "--config=c.yaml", "--print_config", base=[])[1] == printed


def test_configurations_hold_public_paths(scsdpo):
    code, printed, _ = scsdpo("fit", "--model.policy.adapter=Lora", "--print_config")
    paths = [line.split()[-1] for line in printed.splitlines() if "class_path: scsdpo" in line]
    assert code == 0
    assert len(paths) >= 10
    assert all(len(path.split(".")) == 3 and "_" not in path.split(".")[2] for path in paths), paths


def test_help_of_a_strategy_is_its_docstring(scsdpo):
    code, shown, _ = scsdpo("fit", "--model.weighting.help=PassRate", base=[])
    assert code == 0
    assert shown.startswith("SC-SDPO's curriculum. W_j = w_j / mean_{l in I} w_l")
    assert "Source:\n    SC-SDPO, arXiv:2605.27765v1, eq. (16)." in shown
    assert "--model.weighting.power  0.5  exponent a >= 0." in shown


def test_an_unknown_command_is_one_line():
    result = subprocess.run(
        [sys.executable, "-m", "scsdpo", "fitt"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "scsdpo: error: fitt: no such command; did you mean `fit`? (commands: "
        f"{', '.join(COMMANDS)})\n"
    )


def last(tmp_path, run="runs"):
    return torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)


def test_last_ckpt_is_the_last_state_and_the_command_line_wins_over_it(scsdpo, tmp_path):
    assert scsdpo("fit")[0] == 0
    saved = last(tmp_path)
    assert saved["global_step"] == 3  # validation was at 2
    assert set(saved["metrics"]) > {"val/mean@2", "train/loss"}
    kept = {path.name for path in (tmp_path / "runs" / "checkpoints").iterdir()}
    assert kept == {"last.ckpt", "previous.ckpt"}
    restored = PolicyOptimizer.load_from_checkpoint(tmp_path / "runs" / "checkpoints" / "last.ckpt")
    assert restored.sampling.n == 2
    for name, value in restored.state_dict().items():
        assert torch.equal(value, saved["state_dict"][name])

    ckpt = "--ckpt_path=runs/checkpoints/last.ckpt"
    more = ["--trainer.max_steps=4", "--model.sampling.n=3", "--trainer.default_root_dir=more"]
    assert scsdpo("fit", ckpt, *more)[0] == 0
    assert last(tmp_path, "more")["global_step"] == 4
    assert last(tmp_path, "more")["hyper_parameters"]["sampling"]["n"] == 3
    shown = yaml.safe_load((tmp_path / "more" / "config.yaml").read_text())
    assert shown["model"]["sampling"]["n"] == 3


def test_last_ckpt_is_written_at_each_validation_not_only_at_a_new_best(
    scsdpo, tmp_path, monkeypatch
):
    step = PolicyOptimizer.training_step

    def crash_at_5(self, prompts, index):
        return 1 / 0 if index == 4 else step(self, prompts, index)

    monkeypatch.setattr(PolicyOptimizer, "training_step", crash_at_5)
    best = [
        "--checkpoint.monitor=val/mean@2",
        "--checkpoint.mode=max",
        "--checkpoint.save_top_k=1",
        "--data.val.verifier=runs.Always",
    ]
    with pytest.raises(ZeroDivisionError):
        scsdpo("fit", "--trainer.max_steps=6", *best)
    assert last(tmp_path)["global_step"] == 4
    kept = {path.name for path in (tmp_path / "runs" / "checkpoints").iterdir()}
    assert kept == {"last.ckpt", "previous.ckpt", "epoch=0-step=2.ckpt"}


def test_checkpointing_can_be_turned_off(scsdpo, tmp_path):
    assert scsdpo("fit", "--trainer.enable_checkpointing=false")[0] == 0
    assert not (tmp_path / "runs" / "checkpoints").exists()


def test_a_mistake_is_blamed_on_its_key_once():
    with pytest.raises(ConfigurationError, match=r"^data: no$"), blamed_on("data"):
        raise FileNotFoundError("no")
    with (
        pytest.raises(ConfigurationError, match=r"^model\.weighting: no$"),
        blamed_on("data"),
        blamed_on("model.weighting"),
    ):
        raise ValueError("no")
    with pytest.raises(ZeroDivisionError), blamed_on("data"):
        raise ZeroDivisionError


def printed(scsdpo, *args):
    code, shown, error = scsdpo("fit", *args, "--print_config")
    assert code == 0, error
    return yaml.safe_load(shown)


def test_numbers_anchors_and_merge_keys_of_a_file_mean_what_they_say(scsdpo, tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model:\n"
        "  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1e-5, eps: 1E-9}}\n"
        "  sampling: &drawn {n: 1_0, temperature: 0.5}\n"
        "  val_sampling: {<<: *drawn, n: 3}\n"
        "  policy: {gradient_checkpointing: on, chat_template_kwargs: {rate: 1e-5}}\n"
    )
    model = printed(scsdpo, "--config=a.yaml")["model"]
    assert model["optimizer"]["init_args"]["lr"] == 1e-5
    assert model["optimizer"]["init_args"]["eps"] == 1e-9
    assert (model["sampling"]["n"], model["val_sampling"]["n"]) == (10, 3)
    assert model["val_sampling"]["temperature"] == 0.5
    assert model["policy"]["init_args"]["gradient_checkpointing"] is True
    assert model["policy"]["init_args"]["chat_template_kwargs"] == {"rate": 1e-5}


@pytest.mark.parametrize(
    "args",
    [
        ["--model.weighting.power=1", "--config", "a.yaml"],
        ["--model.weighting.power", "1", "-c", "a.yaml"],
        ["--config=a.yaml", "--model.weighting.power=1"],
    ],
)
def test_an_option_wins_over_every_file_wherever_it_stands(args, scsdpo, tmp_path):
    (tmp_path / "a.yaml").write_text("model: {weighting: {class_path: PassRate}}")
    (tmp_path / "b.yaml").write_text("model: {weighting: {init_args: {power: 3}}}")
    config = printed(scsdpo, *args, "--config=b.yaml")
    assert config["model"]["weighting"]["init_args"] == {"power": 1.0}


def test_files_keep_their_order_and_options_theirs(scsdpo, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(f"seed_everything: {ord(name)}")
    options = ["--trainer.max_steps=1", "--config=b.yaml", "--trainer.max_steps=2", "-c", "a.yaml"]
    config = printed(scsdpo, *options)
    assert (config["seed_everything"], config["trainer"]["max_steps"]) == (97, 2)


def test_what_a_replaced_class_leaves_behind_is_said(scsdpo, tmp_path):
    (tmp_path / "a.yaml").write_text(
        "model:\n  teacher: {class_path: EMA, init_args: {rate: 0.1, context: {class_path: "
        "SiblingDemonstration, init_args: {max_tokens: 77}}}}\n"
        "  lr_scheduler: {class_path: LinearLR, init_args: {total_iters: 9}}"
    )
    (tmp_path / "b.yaml").write_text(
        "model:\n  teacher: {class_path: Frozen, init_args: {context: {class_path: Feedback}}}\n"
        "  lr_scheduler: {class_path: PolynomialLR}"
    )
    idle = ["--trainer.limit_train_batches=0"]
    over = scsdpo("fit", "--config=a.yaml", "--config=b.yaml", *idle)[2]
    assert (
        "model.teacher.context.max_tokens: keeps the value 77, which a.yaml sets for "
        "SiblingDemonstration, although model.teacher.context is now Feedback. To change it, set "
        "model.teacher.context.max_tokens too\n"
    ) in over
    assert (
        "model.lr_scheduler.total_iters: keeps the value 9, which a.yaml sets for LinearLR, "
        in over
    )
    swapped = scsdpo("fit", "--config=a.yaml", "--model.teacher=Frozen", *idle)[2]
    assert (
        "model.teacher.context: keeps the value SiblingDemonstration, which a.yaml sets for EMA, "
        "although model.teacher is now Frozen. "
    ) in swapped
    (tmp_path / "c.yaml").write_text("model: {teacher: {init_args: {rate: 0.2}}}")
    assert ": keeps the value " not in scsdpo("fit", "--config=a.yaml", "--config=c.yaml", *idle)[2]


def test_a_mistake_that_a_leftover_makes_names_the_value_and_its_file(scsdpo, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    (tmp_path / "lab.yaml").write_text(
        "data: {val: {class_path: LabTasks, init_args: {split: val}}}"
    )
    args = ["--data.val=Records", "--data.val.path=rows.jsonl", "--data.val.verifier=MathAnswer"]
    code, _, said = scsdpo("fit", "--config=lab.yaml", *args)
    line = said.strip().splitlines()[-1]
    assert code == 2
    assert "a single file has no splits, and `split` is 'val': set `split` to `train`" in line
    assert (
        "(data.val.split: keeps the value 'val', which lab.yaml sets for LabTasks, although "
        "data.val is now Records. To change it, set data.val.split too"
    ) in line


def test_a_policy_that_is_not_there_is_said_before_anything_else(scsdpo):
    for name in ("./nothere", "some/where/nothere"):
        line = refused(scsdpo("validate", f"--policy={name}"))
        assert line == f"--policy: {name} is not a run or checkpoint, and there is no such folder"


@pytest.mark.parametrize("name", ["kind", "self_", "cls", "config", "name", "type", "key", "args"])
def test_an_argument_of_the_user_s_may_have_any_name(name, scsdpo, tmp_path, monkeypatch):
    module = f"names_{name}"
    (tmp_path / f"{module}.py").write_text(
        "from scsdpo.weighting import Uniform\n\n\nclass Mine(Uniform):\n"
        f"    def __init__(self, {name}: int = 1):\n        assert {name} == 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    weighting = f"{{class_path: {module}.Mine, init_args: {{{name}: 2}}}}"
    (tmp_path / "mine.yaml").write_text(f"model: {{weighting: {weighting}}}")
    assert scsdpo("fit", "--config=mine.yaml", "--trainer.limit_train_batches=0")[0] == 0


def test_an_argument_that_is_the_command_line_s_own_is_named(scsdpo, tmp_path, monkeypatch):
    (tmp_path / "helped.py").write_text(
        "from scsdpo.weighting import Uniform\n\n\nclass Mine(Uniform):\n"
        "    def __init__(self, help: int = 1):\n        pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert refused(scsdpo("fit", "--model.weighting=helped.Mine")) == (
        "model.weighting: helped.Mine has an argument `help`, and --model.weighting.help is the "
        "command line's own: give the argument another name"
    )


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["predict", "--out=x.csv"], "name it x.jsonl or x.parquet"),
        (["predict", "--out=x.json"], "name it x.jsonl or x.parquet"),
        (["validate", "--out=x.html"], "name it x.json"),
        (["rates", "--out=x.csv"], "name it x.json"),
        (["check", "--out=x.txt"], "name it x.json"),
        (["compare", "--out=x.csv", "a", "b"], "name it x.json"),
    ],
)
def test_a_file_holds_what_its_name_says_or_is_not_written(command, said, scsdpo):
    name = command[1].partition("=")[2]
    base = () if command[0] == "compare" else ("--config=valid.yaml",)
    line = refused(scsdpo(*command, base=base))
    assert line == f"--out: {name} has the suffix of another format; {said}"


def test_a_table_that_cannot_be_written_is_refused_before_anything_is_asked(monkeypatch):
    monkeypatch.setattr(prediction_writer, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs pyarrow: install it"):
        PredictionWriter("x.parquet")
    with pytest.raises(ValueError, match=r"must end in \.jsonl or \.parquet"):
        PredictionWriter("x.xlsx")
