"""The front door: what a command line can be told before anything heavy is imported."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from scsdpo.cli.catalog import FILE, catalog
from scsdpo.cli.cataloging import build
from scsdpo.cli.commands import COMMANDS
from scsdpo.cli.front import check
from scsdpo.cli.helping import help_for
from scsdpo.errors import ConfigurationError

FIT = "fit --config good.yaml"
AT_ONCE = {
    "--help": 0,
    "fit --help": 0,
    "export --help": 0,
    "fit --model.weighting.help": 0,
    "fit --model.advantage.routes.where.help=Failed": 0,
    "fitt": 2,
    f"{FIT} --model.weighting.help=PassRte": 2,
    f"{FIT} --modl.weighting=PassRate": 2,
    "fit --config none.yaml": 2,
    "rates --config none.yaml --out x": 2,
    "validate --config broken.yaml": 2,
    "fit --config section.yaml": 2,
}
_ALL = """
import sys, time
from scsdpo.__main__ import main
for line in sys.argv[1:]:
    sys.argv = ["scsdpo", *line.split()]
    print(f"== {line} {main()}")
assert not {"torch", "lightning", "jsonargparse"} & sys.modules.keys()
print(time.process_time())
"""


def test_help_and_coarse_mistakes_take_less_than_a_second_and_no_torch(tmp_path):
    (tmp_path / "good.yaml").write_text("model: {weighting: Uniform}")
    (tmp_path / "broken.yaml").write_text("model: [")
    (tmp_path / "section.yaml").write_text("modl: {weighting: Uniform}")
    done = subprocess.run(
        [sys.executable, "-c", _ALL, *AT_ONCE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert not done.returncode, done.stderr
    *shown, seconds = done.stdout.strip().split("\n")
    assert [line for line in shown if line.startswith("== ")] == [
        f"== {line} {code}" for line, code in AT_ONCE.items()
    ]
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert float(seconds) < 1.0  # of the processor, all of them together


def test_the_catalog_is_what_the_parser_takes():
    """If not: `make catalog`."""
    shipped = json.loads(FILE.read_text())
    assert shipped == json.loads(json.dumps(asdict(build())))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_on_two_screens(command):
    lines = help_for(command, ["--help"]).splitlines()
    assert len(lines) < 120
    assert max(map(len, lines)) <= 100


def test_model_and_data_come_first_and_lightning_s_keys_on_request():
    shown = help_for("fit", ["--help"])
    places = [shown.index(f"\n{section}: ") for section in ("model", "data", "trainer")]
    assert places == sorted(places)
    assert "trainer.barebones" not in shown
    assert "trainer.barebones" in help_for("fit", ["--help", "trainer"])
    assert "  --model.val_sampling.n               16 " in help_for(
        "fit", ["-h", "model.val_sampling"]
    )


def test_every_strategy_of_every_key_is_explained_by_its_docstring():
    known = catalog()
    pending, explained = [f"model.{name}" for name in known.section_arguments()["model"]], set()
    while pending:
        key = pending.pop()
        names = [path for kind in _kinds(key) for path in known.classes[kind].choices]
        for path in (path for path in names if path in known.classes and path not in explained):
            explained.add(path)
            name = path.rpartition(".")[2]
            shown = help_for("fit", [f"--{key}.help={name}"])
            assert shown == help_for("fit", [f"--{key}.help", path])
            assert shown.startswith(known.classes[path].doc)
            for argument, told in known.classes[path].arguments.items():
                assert f"--{key}.{argument} " in shown
                pending += [f"{key}.{argument}"] if told.kinds else []
    assert {"scsdpo.advantage.Failed", "scsdpo.advantage.TopK", "scsdpo.state.Ramp"} <= explained


def _kinds(key):
    from scsdpo.cli.helping import _argument

    return _argument(catalog(), key).kinds


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["--model.weighting.help"], ["default: Uniform", "PassRate ", "HardFilter "]),
        (["--model.teacher.help"], ["EMA ", "TrustRegion "]),
        (["--model.advantage.routes.help"], ["One route of a `Routed`.", "routes.where "]),
        (["--model.advantage.routes.where.help"], ["Failed ", "RateWithin "]),
        (["--model.advantage.clip_low.help"], ["eps_low of the PPO clip"]),
        (["--model.optimizer.help"], ["of torch and Lightning: ", "AdamW"]),
        (["--model.rollout.help"], ["HFRollout ", "VLLMRollout "]),
    ],
)
def test_a_bare_help_lists_what_a_key_can_name(args, shown):
    text = help_for("fit", args)
    assert all(part in text for part in shown), text


def test_help_on_a_class_of_the_user_s_is_left_to_the_parser():
    assert help_for("fit", ["--model.weighting.help=mine.Band"]) is None
    assert help_for("fit", ["--model.optimizer.help=AdamW"]) is None
    assert help_for("fit", ["--config", "x.yaml"]) is None


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--help", "modl"], "modl: no such key; did you mean `model`?"),
        (["--help", "model.wighting"], "model.wighting: no such key; did you mean `weighting`?"),
        (
            ["--model.advantage.routes.were.help"],
            "model.advantage.routes.were: no such key; did you mean `where`?",
        ),
    ],
)
def test_help_on_what_is_not_there_says_so(args, said):
    with pytest.raises(ConfigurationError) as caught:
        help_for("fit", args)
    assert str(caught.value) == said


def test_options_of_a_command_s_own_are_known(tmp_path):
    check("rates", ["--out", "x", "--data.val=[]", "--trainer.devices=1"])
    check("analyze", ["--no-plot", "--rollouts=2"])
    with pytest.raises(ConfigurationError, match="rolouts: no such key; did you mean `rollouts`"):
        check("analyze", ["--rolouts=2"])


def test_what_can_be_no_configuration_is_named(tmp_path):
    for name, content, said in (
        ("folder", None, "config: .*folder: Is a directory"),
        ("bytes", b"\xff\xfe", ".*bytes: not a text file"),
        ("control", b"a: \x00", ".*control: not a text file"),
    ):
        path = Path(tmp_path / name)
        path.mkdir() if content is None else path.write_bytes(content)
        with pytest.raises(ConfigurationError, match=said):
            check("fit", ["--config", str(path)])
