"""Benchmarks on SmolLM2: what they ask for, read and table; the runs themselves are too long."""

import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import check
import real
import real_report
import science_words
import variants

from real_rows import row
from scsdpo.cli.compare import job
from scsdpo.comparison import DONE

ROOT = Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------ variants

TEACHER = ("teacher", "class_path")
CONTEXT = ("teacher", "init_args", "context", "class_path")
SHOWN = {CONTEXT: "scsdpo.teacher.SiblingDemonstration"}
COOLER = {("sampling", "temperature"): 0.6}
FROZEN = {TEACHER: "scsdpo.teacher.Frozen", **SHOWN}
LR = ("optimizer", "init_args", "lr")
PARTS = ("advantage", "init_args", "parts")
ADAPTER = ("policy", "init_args", "adapter")
WARM = {
    ("warmup", "steps"): 30,
    ("warmup", "examples", "class_path"): "scsdpo.training.GoldAnswers",
    ("warmup", "examples", "init_args", "response"): "The answer is {answer}.",
}
CHANGED = {
    "warm-sc-sdpo": WARM | {TEACHER: "scsdpo.teacher.EMA"},
    "warm-grpo": WARM | {("advantage", "class_path"): "scsdpo.advantage.GroupRelative"},
    "warm-trusted-hybrid": WARM,
    "warm-only": WARM | {("warmup", "steps"): 60},
    "sc-sdpo-t06": COOLER | {TEACHER: "scsdpo.teacher.EMA"},
    "sc-sdpo-t06-frozen": COOLER | FROZEN,
    "sc-sdpo-topp": {("sampling", "top_p"): 0.9, ("sampling", "temperature"): 1.0},
    "sc-sdpo-frozen": FROZEN,
    "sc-sdpo-trust": SHOWN
    | {TEACHER: "scsdpo.teacher.TrustRegion", ("teacher", "init_args", "mix"): 0.01},
    "sc-sdpo-gold": {CONTEXT: "scsdpo.teacher.GoldSolution", TEACHER: "scsdpo.teacher.EMA"},
    "sc-sdpo-self": {("teacher", "init_args", "context", "init_args", "exclude_self"): False},
    "sc-sdpo-lr5e-6": {LR: 5e-6},
    "sc-sdpo-overlong": {("token_weighting", "class_path"): "scsdpo.weighting.Overlong"},
    "hybrid-50": {(*PARTS, 0, "weight"): 0.5, (*PARTS, 1, "weight"): 0.5},
    "hybrid-99": {(*PARTS, 0, "weight"): 0.99, (*PARTS, 1, "weight"): 0.01},
    "lora-5e-4": {
        LR: 5e-4,
        (*ADAPTER, "class_path"): "scsdpo.policy.Lora",
        **{(*ADAPTER, "init_args", key): value for key, value in variants.LORA.items()},
        (*PARTS, 0, "weight"): 0.9,
    },
}


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_variant_changes_what_its_name_says(name, monkeypatch, capsys, tmp_path):
    from scsdpo.__main__ import main

    words = (f"--config={ROOT / 'configs' / 'smollm2.yaml'}", *variants.words(name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scsdpo", "fit", *words, "--print_config"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None)
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    for path, expected in CHANGED[name].items():
        found = model
        for step in path:
            found = found[step]
        assert found == expected, path


# ------------------------------------------------------------------ runs


def test_words_go_to_every_run_after_the_methods_own(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.touch()
    word = "--model.limits.max_tokens=2048"
    given = ["--methods", "sdpo", "sc-sdpo-t06", str(mine), "--seeds", "2", "--out", str(tmp_path)]
    args = real.parsed([*given, word])
    assert args.words == [word]
    todo = real.jobs(args)
    assert [cell[0] for cell in todo.values()] == ["sdpo", "sc-sdpo-t06", "mine"] * 2
    for run, (name, seed) in todo.items():
        assert run.folder == tmp_path / name / f"seed{seed}"
    warmer = next(run for run, cell in todo.items() if cell == ("sc-sdpo-t06", 0)).words
    assert warmer.index("--model.sampling.temperature=0.6") + 1 == warmer.index(word)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "nonsense"], "nonsense is no file, none of configs/methods and none of sc-"),
        (["--methods", "grpo", "grpo"], "names must differ, got grpo, grpo"),
        (["--seed", "2"], "--seed: a word for every run is written --key=value"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_line(words, said, capsys):
    with pytest.raises(SystemExit):
        real.parsed(words)
    assert said in capsys.readouterr().err


def run_folder(folder, batches, *, done=True, device="NVIDIA A100-SXM4-80GB", warmup=0, task=None):
    folder.mkdir(parents=True)
    policy = {"init_args": {"name_or_path": "/some/where/smol"}}
    model = {"policy": policy, "warmup": {"steps": warmup}}
    data = {"train": {"init_args": {"name": task} if task else {}}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    (folder / "environment.json").write_text(json.dumps({"device": device}))
    log = [{"batch": 0, "val/mean@8": 0.25, "val/maj@8": 0.5}]
    for batch in range(1, batches + 1):
        train = dict.fromkeys(real_report.TRAINING, float(batch))
        log.append({"batch": batch} | {f"train/{name}": v for name, v in train.items()})
    log[-1] |= {"val/mean@8": 0.75, "val/maj@8": 1.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    spoken = [{"rule": "Agreement", "batch": batch} for batch in (4, 9)]
    (folder / "health.jsonl").write_text("".join(json.dumps(line) + "\n" for line in spoken))
    if done:
        (folder / DONE).write_text(json.dumps({"command": [], "cpu_seconds": 60}))
    return folder


def test_a_runs_row_is_read_from_its_folder(tmp_path):
    found = real.result(run_folder(tmp_path / "a", 30), "sdpo", 1, ["--x.y=1"])
    assert (found["method"], found["seed"], found["policy"]) == ("sdpo", 1, "smol")
    assert found["device"] == "A100" and found["words"] == ["--x.y=1"] and found["batches"] == 30
    assert (found["mean@8 before"], found["mean@8"], found["maj@8"]) == (0.25, 0.75, 1)
    assert found["entropy"] == [3, 28] and found["validation"] == {"0": 0.25, "30": 0.75}
    assert found["warnings"] == {"Agreement": 4} and real_report.is_complete(found)


@pytest.mark.parametrize(("warmup", "before"), [(10, 0.5), (60, 0.75)])
def test_a_run_with_a_warm_up_starts_where_that_ends(warmup, before, tmp_path):
    folder = run_folder(tmp_path / "a", 30, warmup=warmup)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in log[1:11]:
        line.pop("train/pass_rate")  # nothing is sampled in a warm-up step
    log[10] |= {"val/mean@8": 0.5, "val/maj@8": 0.5}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    found = real.result(folder, "warm-sc-sdpo", 0)
    assert (found["mean@8 before"], found["mean@8"]) == (before, 0.75)
    assert found["policy"] == "smol, warmed up" and found["batches"] == 20


def test_questions_of_a_named_source_stand_after_the_policys_name(tmp_path):
    plain, warm = (
        real.result(run_folder(tmp_path / str(n), 30, warmup=n, task="science"), "grpo", 0)
        for n in (0, 10)
    )
    assert plain["policy"] == "smol, science" and warm["policy"] == "smol, science, warmed up"


def test_the_science_questions_are_many_and_in_one_split_only():
    train, val = (science_words.questions(name, n) for name, n in science_words.SIZES.items())
    texts = [{row["prompt"] for row in rows} for rows in (train, val)]
    assert [len(each) for each in texts] == [448, 56] and not texts[0] & texts[1]
    assert {row["topic"] for row in train} == {row["topic"] for row in val} and len(val[0]) == 3


def test_a_run_that_was_cut_off_has_no_end(tmp_path):
    found = real.result(run_folder(tmp_path / "a", 8, done=False), "sdpo", 1)
    assert found["mean@8"] is found["cpu_seconds"] is None and found["batches"] == 8
    assert found["validation"] == {"0": 0.25, "8": 0.75} and not real_report.is_complete(found)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("cpu, 2 cores, 1 threads", "CPU"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_device_has_a_short_name(name, short):
    assert real.device(name) == short


def test_a_folder_with_a_run_of_another_command_ends_in_a_line(tmp_path, monkeypatch):
    run_folder(tmp_path / "grpo" / "seed0", 30)
    words = ["real.py", "--methods", "grpo", "--seeds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=r"is of another command \(--config=.*another --out"):
        real.main()


def test_runs_that_are_done_are_tabled_and_added_to_the_file_of_others(tmp_path, monkeypatch):
    words = ["--methods", "grpo", "--seeds", "1", "--out", str(tmp_path), "--x.y=1"]
    file = tmp_path / "runs.json"
    real_report.write([row("grpo", 0, 0.5, device="A100"), row("grpo", 1, 0.5)], file)
    (run,) = real.jobs(real.parsed(words))
    run_folder(run.folder, 30)
    (run.folder / DONE).write_text(json.dumps({"command": run.words, "cpu_seconds": 60}))
    monkeypatch.setattr(sys, "argv", ["real.py", *words, "--merge", str(file)])
    real.main()
    (own,) = real_report.read(tmp_path / "real.json")
    assert own["words"] == ["--x.y=1"]
    assert real_report.read(file) == [own, row("grpo", 1, 0.5)]
    assert "| `grpo` | 1 | 0 (A100): 75.0 |" in (tmp_path / "real.md").read_text()


# ------------------------------------------------------------------ check


def estimate(value, low=None, high=None):
    return {"value": value, "low": low, "high": high, "n": 8}


def looked(**changes):
    told = {"gain": estimate(0.5), "told": estimate(0.75), "without": estimate(0.25)}
    return {
        "policy": "/some/where/smol",
        "answers": {"pass_rate": estimate(0.25), "truncated": 0.5},
        "told": {"configured": told},
        "directions": {"step": estimate(0.25, -0.125, 0.625), "reward": None},
        "preference": 0.75,
        "verdict": [
            {"level": "stop", "text": "away: so"},
            {"level": "warning", "text": "cut off: 64 %"},
            {"level": "warning", "text": "out of reach: 9 %"},
            {"level": "good", "text": "told: 1 %"},
        ],
        **changes,
    }


def test_a_pairs_row_has_no_folder_of_this_machine_and_a_table_its_interval(tmp_path):
    words = [f"--config={ROOT}/configs/tiny.yaml", "--model.policy.name_or_path=/some/where/smol"]
    found = check.row("a", looked(), words, (0.25, 0.75))
    told = "scsdpo check --config=configs/tiny.yaml --model.policy.name_or_path=smol"
    assert found["command"] == told and found["policy"] == "smol"
    bare = looked(directions=None, preference=None, told={}, verdict=[])
    other = check.row("b", bare, [], (0.25, 0.25))
    check.write({"b": other, "a": found}, tmp_path / "check.json")
    assert len((tmp_path / "check.json").read_text().splitlines()) == 2 + 2
    first, second = check.markdown(check.read(tmp_path / "check.json")).splitlines()[2:]
    assert first == (
        "| a | 25 | 50 | +50 | - | 0.75 | +0.25 (-0.12 .. +0.62) | - | "
        "stop: away. warning: cut off; out of reach | 25 -> 75 | +50.0 |"
    )
    assert second == "| b | 25 | 50 | - | - | - | - | - | ready | 25 -> 25 | +0.0 |"


def test_what_another_command_said_is_not_taken_for_this_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(
        check, "execute", lambda words, out: (tmp_path / "check.json").write_text('{"a": 1}')
    )
    assert check.look(["--a=1"], tmp_path) == check.look(["--a=1"], tmp_path) == {"a": 1}
    with pytest.raises(ValueError, match=r"is of another command \(--a=2\): choose another --out"):
        check.look(["--a=2"], tmp_path)


def check_main(monkeypatch, out, *words):
    monkeypatch.setattr(sys, "argv", ["check.py", "--out", str(out), *words])
    check.main()


def test_pairs_are_added_to_those_of_before(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        check, "measured", lambda name, *_: check.row(name, looked(), [], (0.25, 0.5))
    )
    check_main(monkeypatch, tmp_path, "--pairs", "cap-24")
    check_main(monkeypatch, tmp_path, "--pairs", "gold", "cap-24")
    assert list(check.read(tmp_path / "check.json")) == ["cap-24", "gold"]
    assert (tmp_path / "check.md").read_text().count("\n") == 2 + 2


def test_a_pair_trained_with_another_command_ends_in_a_line(tmp_path, monkeypatch):
    run_folder(job(tmp_path, "gold", 0, []).folder, 4)
    with pytest.raises(SystemExit, match=r"is of another command .* choose another --out"):
        check_main(monkeypatch, tmp_path, "--pairs", "gold")
    (tmp_path / "check.json").write_text("{}")
    with pytest.raises(SystemExit, match="was written by an older version"):
        check_main(monkeypatch, tmp_path, "--pairs", "gold")


def test_pairs_of_another_policy_are_its_methods_and_variants():
    known = check.pairs(Path("/some/where/smol"), 40)
    pair = known["smol-sc-sdpo-t06"]
    assert pair.change == variants.words("sc-sdpo-t06") and pair.length == ()
    assert "--model.policy.name_or_path=/some/where/smol" in check.asked(pair, 8)
    assert set(check.CHANGES) < set(known)
