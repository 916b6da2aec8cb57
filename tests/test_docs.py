"""The code in README and docs runs as printed, and the site holds all pages and keys."""

import gzip
import json
import os
import re
import runpy
import shlex
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from scsdpo.advantage import Advantage, Blend, Plan, Routed
from scsdpo.cli.catalog import catalog
from scsdpo.cli.front import check
from scsdpo.cli.helping import help_for
from scsdpo.data import Source
from scsdpo.loss import Chunk, DenseCredit, SparseCredit, SumCredit
from scsdpo.types import Judged, Responses

ROOT = Path(__file__).resolve().parents[1]


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_every_file_that_the_docs_name_exists():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            made = page.parent == ROOT / "docs" and target.startswith("reference/")
            assert made or (page.parent / target).exists(), (page.name, target)
        for target in re.findall(
            r"(?:configs|benchmarks|tests)/[\w/-]+\.(?:yaml|py)", page.read_text()
        ):
            assert (ROOT / target).exists(), (page.name, target)


def test_the_strategies_of_extending_train_from_the_command_line(tmp_path, monkeypatch, qwen3):
    from scsdpo.__main__ import main

    (tmp_path / "mine.py").write_text("\n".join(blocks("docs/extending.md", "python")))
    (text,) = [text for text in blocks("docs/extending.md", "yaml") if "mine.Contains" in text]
    data = yaml.safe_load(text)
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(
            "\n".join(f'{{"prompt": "{split} {i}?", "answer": "{i}"}}' for i in range(4))
        )
    config = {
        "model": {
            "policy": {"name_or_path": str(qwen3)},
            "teacher": {"class_path": "EMA", "init_args": {"context": "mine.GoldAnswer"}},
            "rollout": "mine.OneByOne",
            "weighting": {"class_path": "mine.MiddleBand", "init_args": {"low": 0.0, "high": 1.0}},
            "advantage": {
                "class_path": "Blend",
                "init_args": {
                    "parts": [
                        {"advantage": "SelfDistillation", "weight": 1.0},
                        {"advantage": "mine.Curiosity", "weight": 1.0},
                        {"advantage": "mine.OverMedian", "weight": 1.0},
                    ]
                },
            },
            "sampling": {"n": 2, "max_new_tokens": 4},
            "val_sampling": {"n": 2, "max_new_tokens": 4},
        },
        "trainer": {"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu"},
        "data": data["data"] | {"questions_per_batch": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scsdpo", "fit", "--config", "config.yaml"])
    assert main() in (0, None)


def test_the_tutorial_makes_a_task_of_20_lines_of_python_and_6_of_yaml(tmp_path, monkeypatch):
    from scsdpo.__main__ import main

    for language, suffix, most in (("python", "py", 20), ("yaml", "yaml", 6)):
        head = f"# sums.{suffix}\n"
        (text,) = [b for b in blocks("docs/extending.md", language) if b.startswith(head)]
        assert len([line for line in text.removeprefix(head).splitlines() if line]) <= most
        (tmp_path / f"sums.{suffix}").write_text(text)
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.limit_train_batches=2", "--trainer.enable_progress_bar=false"]
    short += ["--data.val.size=4", "--model.val_sampling.n=2", "--trainer.accelerator=cpu"]
    configs = ["--config", str(ROOT / "configs" / "tiny.yaml"), "--config", "sums.yaml"]
    monkeypatch.setattr(sys, "argv", ["scsdpo", "fit", *configs, *short])
    assert main() in (0, None)
    (result,) = tmp_path.glob("runs/tiny/*/before_after.json")
    assert "mean@2" in result.read_text()


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("guessing", [{"prompt": f"Guess {i}.", "number": i} for i in range(4)]),
        ("vault", [{"prompt": "Open it.", "secret": i, "digits": 4} for i in range(4)]),
    ],
)
def test_the_worlds_of_environments_md_are_trained_in(name, rows, tmp_path, monkeypatch):
    from scsdpo.__main__ import main

    for language, suffix, most in (("python", "py", 30), ("yaml", "yaml", 20)):
        head = f"# {name}.{suffix}\n"
        (text,) = [b for b in blocks("docs/environments.md", language) if b.startswith(head)]
        assert len([line for line in text.removeprefix(head).splitlines() if line]) <= most
        (tmp_path / f"{name}.{suffix}").write_text(text)
    place = {"guessing": "numbers", "vault": "vaults"}[name]
    (tmp_path / f"{place}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.limit_train_batches=1", "--trainer.enable_progress_bar=false"]
    short += ["--model.val_sampling.n=2", "--trainer.accelerator=cpu", "--model.sampling.n=2"]
    short += ["--data.questions_per_batch=2", "--model.sampling.max_new_tokens=200"]
    configs = ["--config", str(ROOT / "configs" / "tiny.yaml"), "--config", f"{name}.yaml"]
    monkeypatch.setattr(sys, "argv", ["scsdpo", "fit", *configs, *short])
    assert main() in (0, None)
    (file,) = tmp_path.glob("runs/tiny/*/rollouts/train_000001.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    roles = [[turn["role"] for turn in record["turns"]] for record in records]
    assert all(each[0] == "assistant" for each in roles)
    if name == "guessing":  # it answers whatever is said
        assert any("user" in each for each in roles)
    else:  # what `reset` says is shown
        assert records[0]["messages"][0]["content"].endswith("shows the digits 1 to 4.")


@pytest.mark.parametrize("name", ["README.md"])
def test_python_of_the_readme_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(name, "python")
    code = code.replace("L.Trainer(", 'L.Trainer(accelerator="cpu", enable_progress_bar=False, ')
    exec(compile(code.replace("max_steps=10", "max_steps=1"), name, "exec"), {})


def test_python_of_runs_md_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/pass_rate": 0.5}\n')
    record, figure, batch = blocks("docs/runs.md", "python")
    scope = {}
    for code in (record, figure, batch):
        exec(compile(code, "docs/runs.md", "exec"), scope)
    assert scope["pass_rates"] == [(1, 0.5)]
    assert scope["trace"].credit.shape == scope["batch"].judged.responses.ids.shape
    assert "nan" in capsys.readouterr().out


def test_every_figure_of_a_run_is_in_the_table_of_runs_md(qwen3, tmp_path):
    from runs import data, module, trainer

    table = (ROOT / "docs/runs.md").read_text()
    run = trainer(tmp_path)
    run.fit(module(qwen3), data())
    for name in run.callback_metrics:
        if name.startswith("train/"):
            *_, last = name.removeprefix("train/").split("/")
            spelled = last.replace("logprob_gap_max", "_max")
            assert f"`{spelled}`" in table or f"/{spelled}`" in table, name


PAGES = [Path("README.md"), *(p.relative_to(ROOT) for p in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_the_docs_name_files_and_keys_that_exist(page, monkeypatch):
    """All but running them: a key of any depth, a section, a file of configs/."""
    monkeypatch.chdir(ROOT)
    for line in "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "scsdpo" not in words:
            continue
        command, *args = words[words.index("scsdpo") + 1 :]
        shipped = [arg for arg in args if not arg.endswith(".yaml") or os.path.exists(arg)]
        ours = [arg for arg in args if arg not in shipped]
        assert not [arg for arg in ours if arg.startswith("configs/")], line
        if help_for(command, args) is None and "=NAME" not in line and not ours:
            check(command, args)
        for arg in args:
            key = arg.removeprefix("--").partition("=")[0]
            if arg.startswith("--model.") and not key.endswith(".help") and "KEY" not in key:
                assert "mine." in line or help_for("fit", ["--help", key]), line


def words():
    """What stands in backticks under "here" in the tables of docs/words.md."""
    ours = False
    for line in (ROOT / "docs/words.md").read_text().splitlines():
        cell = line.split("|")[1].strip() if line.startswith("|") else ""
        ours = cell == "here" or (ours and bool(cell))
        if ours and cell not in ("here", "---", "none"):
            assert re.sub(r"`[^`]+`", "", cell).strip(", ") == "", line
            yield from re.findall(r"`([^`]+)`", cell)


def test_every_key_and_argument_that_words_md_has_beside_trl_and_verl_exists():
    known, seen = catalog(), 0
    classes = {path.rpartition(".")[2]: one for path, one in known.classes.items()}
    for word in words():
        name, _, arguments = word.rstrip(")").partition("(")
        if word.startswith("--"):
            assert word[2:] in known.commands["fit"].options, word
        elif "." in word:
            assert help_for("fit", ["--help", word]), word
        else:
            assert name in classes, word
            taken = classes[name].arguments
            assert all(argument in taken for argument in arguments.split(", ") if argument), word
        seen += 1
    assert seen > 70


def advantages():
    for page in ("docs/methods.md", "docs/extending.md", "docs/words.md"):
        for text in blocks(page, "yaml"):
            content = yaml.safe_load(text)
            content = content.get("model", content)
            if "advantage" in content:
                yield pytest.param({"advantage": content["advantage"]}, id=page)


@pytest.mark.parametrize("content", list(advantages()))
def test_an_advantage_in_the_docs_is_constructed(content):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--advantage", type=Advantage)
    assert isinstance(parser.instantiate(parser.parse_object(content)).advantage, Blend | Routed)


def test_the_scalar_advantage_of_extending_is_the_distance_from_the_median():
    (text,) = [text for text in blocks("docs/extending.md", "python") if "OverMedian" in text]
    made: dict[str, object] = {"__name__": "mine"}
    exec(text, made)
    advantages = made["OverMedian"]().advantages(torch.tensor([[0.0, 0.2, 1.0], [1.0, 1.0, 1.0]]))
    torch.testing.assert_close(
        advantages, torch.tensor([[-0.2, 0.0, 0.8], [0.0, 0.0, 0.0]]).double(), atol=1e-7, rtol=0
    )


def test_the_fields_that_extending_md_names_exist():
    kinds = [Judged, Responses, Chunk, Plan, DenseCredit, SparseCredit, SumCredit]
    named = {kind.__name__: kind for kind in kinds}
    seen, kind = set(), None
    for line in (ROOT / "docs/extending.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) < 3:
            continue
        kind = named.get(cells[0].strip("`"), None if cells[0] else kind)
        if kind is None:
            continue
        assert is_dataclass(kind)
        for name in re.findall(r"`([a-z_]+)(?:\([a-z]*\))?`", cells[1]):
            assert name in {f.name for f in fields(kind)} or hasattr(kind, name), (kind, name)
            seen.add(kind)
    assert seen == set(kinds)


def test_the_site_has_every_page_and_every_key():
    site = yaml.safe_load((ROOT / "docs" / "site.yml").read_text())
    inner = [entry for entry in site["nav"] if isinstance(next(iter(entry.values())), list)]
    entries = [*site["nav"], *(page for entry in inner for page in next(iter(entry.values())))]
    listed = {next(iter(entry.values())) for entry in entries if entry not in inner}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= listed
    assert site["theme"]["font"] is False
    known = catalog()
    page = runpy.run_path(str(ROOT / "docs" / "build_site.py"))["command_line"](known)
    for command in known.commands:
        assert f"## scsdpo {command}\n" in page
    for section, arguments in known.section_arguments().items():
        for name in arguments:
            assert f"| `{section}.{name}` |" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


def sources():
    """Rows, settings and what is asked, of each form in docs/data.md."""
    page = (ROOT / "docs" / "data.md").read_text()
    pattern = r"```(csv|jsonl)\n(.*?)```.*?```yaml\n(.*?)```.*?```text\n(.*?)```"
    for _, rows, settings, asked in re.findall(pattern, page, re.DOTALL):
        yield pytest.param(rows, settings, asked, id=yaml.safe_load(settings)["path"])


@pytest.mark.parametrize(("rows", "settings", "asked"), list(sources()))
def test_each_form_of_data_in_the_docs_asks_what_they_say(
    rows, settings, asked, tmp_path, monkeypatch
):
    assert len(settings.splitlines()) <= 10
    given = yaml.safe_load(settings)
    path = tmp_path / given["path"].replace("*", "0")
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        table = pyarrow.Table.from_pylist([json.loads(line) for line in rows.splitlines()])
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(rows.encode()))
    else:
        path.write_text(rows)
    monkeypatch.chdir(tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--train", type=Source)
    described = {"train": {"class_path": "Records", "init_args": given}}
    (prompt,) = parser.instantiate(parser.parse_object(described)).train.read()
    said = [f"{turn['role']}: {turn['content']}" for turn in prompt.messages]
    said += [f"gold: {prompt.answer}"]
    said += [f"category: {prompt.category}"] if "category" in given else []
    assert "\n".join(said) + "\n" == asked


def test_the_docs_have_an_example_of_each_form_of_data():
    assert len(list(sources())) == 6
