"""Sources: files and hub rows give the same prompts, mistakes are named, configs parse."""

import json
import re
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from jsonargparse import ArgumentParser

from scsdpo.data import ReasoningGym, Records, SciKnowEval, TaskDataModule, ToolUse
from scsdpo.data.sciknoweval import hub_split
from scsdpo.verifiers import ExactMatch, ReasoningGymAnswer, ToolCall
from scsdpo.verifiers.reasoning_gym import is_harmless
from shared import SHARED, needs_shared

SCIENCE = SHARED / "data" / "sciknoweval"
TOOLUSE = SHARED / "data" / "tooluse" / "test_a.json"
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


# --- sources --------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    ("domain", "split", "size"),
    [
        ("biology", "train", 450),
        ("biology", "test", 50),
        ("chemistry", "train", 1890),
        ("chemistry", "test", 210),
    ],
)
def test_every_science_row_becomes_a_prompt(domain, split, size):
    source = SciKnowEval(domain, split, source=str(SCIENCE / domain))
    lines = (SCIENCE / domain / f"{split}.json").read_text().splitlines()
    assert len(source) == len(lines) == size
    assert source.name == domain
    for prompt, row in zip(source.prompts, map(json.loads, lines), strict=True):
        assert [m["role"] for m in prompt.messages] == ["system", "user"]
        assert [m["content"] for m in prompt.messages] == [row["system"], row["prompt"]]
        assert (prompt.answer, prompt.category) == (row["answer"], domain)
    assert len({prompt.key for prompt in source.prompts}) == size


def hub_rows(domain):
    """The hub's rows that the published files were made of, and some that were left out."""
    rows = [
        json.loads(line)
        for split in ("train", "test")
        for line in (SCIENCE / domain / f"{split}.json").read_text().splitlines()
    ]
    for row in sorted(rows, key=lambda row: row["idx"]):
        question, options = (
            row["prompt"].removesuffix("\nPlease reason step by step.").rsplit("\n\nA: ", 1)
        )
        labels, texts = zip(*(o.split(": ", 1) for o in f"A: {options}".split("\n")), strict=True)
        hub = {
            "question": question,
            "choices": {"text": list(texts), "label": list(labels)},
            "answerKey": row["answer"],
            "type": f"mcq-{len(labels)}-choices",
            "domain": domain.capitalize(),
            "details": {"level": "L3", "task": "t", "subtask": "s", "source": "x"},
        }
        yield hub
        yield hub | {"details": {"level": "L1"}}
        yield hub | {"type": "open-ended-qa"}
        yield hub | {"domain": "Material"}


@needs_shared
@pytest.mark.parametrize("domain", ["biology", "chemistry"])
def test_hub_and_files_give_the_same_prompts_in_the_same_splits(domain, monkeypatch):
    rows = list(hub_rows(domain))
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: rows)
    for split in ("train", "test"):
        ours = SciKnowEval(domain, split).prompts
        theirs = SciKnowEval(domain, split, source=str(SCIENCE / domain)).prompts
        assert [(p.key, p.messages, p.answer) for p in ours] == [
            (p.key, p.messages, p.answer) for p in theirs
        ]


def test_the_split_has_the_published_sizes():
    for domain, train, test in (("physics", 720, 80), ("materials", 841, 94)):
        row = {
            "question": "q",
            "choices": {"text": ["x", "y"], "label": ["A", "B"]},
            "answerKey": "A",
            "type": "mcq-2-choices",
            "domain": {"physics": "Physics", "materials": "Material"}[domain],
            "details": {"level": "L3"},
        }
        rows = [row | {"question": str(i)} for i in range(train + test)]
        parts = [hub_split(rows, domain, split) for split in ("train", "test")]
        assert [len(part) for part in parts] == [train, test]
        assert len({row["prompt"] for part in parts for row in part}) == train + test


@needs_shared
def test_every_tool_use_row_becomes_a_prompt():
    source = ToolUse(str(TOOLUSE))
    assert len(source) == 34
    for prompt in source.prompts:
        assert [m["role"] for m in prompt.messages] == ["user"]
        assert (prompt.verifier, prompt.category) == (ToolCall(), "tooluse")


def rows_file(path, rows, kind):
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "list":
        path.write_text("\n " + json.dumps(rows, indent=1), encoding="utf-8")
    else:
        text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("\ufeff" + text + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.jsonl", "lines"), ("a.json", "list"), ("a.parquet", "parquet")]
)
def test_records_reads_json_lines_json_lists_and_parquet(tmp_path, name, kind):
    rows = [{"q": "what\u2028é?", "a": 7, "s": "be brief"}, {"q": "why?", "a": 8, "s": None}]
    path = rows_file(tmp_path / name, rows, kind)
    source = Records(path, ExactMatch(), prompt="q", answer="a", system="s")
    first, second = source.prompts
    assert source.name == "a"
    assert [m["content"] for m in first.messages] == ["be brief", "what\u2028é?"]
    assert [m["content"] for m in second.messages] == ["why?"]
    assert (first.answer, first.verifier) == ("7", ExactMatch())


def test_keys_tell_questions_apart_and_do_not_depend_on_order_or_process(tmp_path):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "2"}]
    rows += [{"prompt": "b", "answer": "1"}]
    forth = Records(rows_file(tmp_path / "f", rows, "lines"), ExactMatch(), name="x")
    back = Records(rows_file(tmp_path / "b", rows[::-1], "lines"), ExactMatch(), name="x")
    assert [p.key for p in forth.prompts] == [p.key for p in back.prompts[::-1]]
    assert len({p.key for p in forth.prompts}) == 3
    assert forth[0].key == "x/4dd7178ee889e012"


def test_construction_opens_no_file():
    Records("/nowhere", ExactMatch())
    ToolUse("/nowhere")
    SciKnowEval("physics", "train", source="/nowhere")


GOOD = {"prompt": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", {}, r"`Records\(path='.*x.json'\)`: .*x.json has no rows"),
        ("[]", {}, r"x.json has no rows"),
        (
            '{"prompt": "q", "answer": "a"}\n{"prompt"',
            {},
            r"cannot read .*x.json: line 2 is not JSON",
        ),
        ('{"prompt": "q", "answer": "a"}\n\n3', {}, r"line 3 is not a JSON object .* but int"),
        ("[{]", {}, r"cannot read .*x.json: "),
        ("[" * 9999, {}, r"cannot read .*x.json: "),
        ("\xff", {}, r"not UTF-8 text"),
        (
            json.dumps(GOOD),
            {"prompt": "promt"},
            r"`Records\(prompt='promt'\)`: .* has no column 'promt', only 'prompt', 'answer'; "
            r"did you mean 'prompt'\?",
        ),
        (json.dumps(GOOD), {"answer": "zzz"}, r"`Records\(answer='zzz'\)`: .*'answer'$"),
        (json.dumps(GOOD), {"system": "sys"}, r"`Records\(system='sys'\)`: .*'answer'$"),
        (json.dumps([GOOD, GOOD | {"answer": None}]), {}, r"row 2, column 'answer' must be a text"),
        (json.dumps([GOOD | {"prompt": " "}]), {}, r"row 1, column 'prompt' must be .*, got ' '"),
        (json.dumps([GOOD, {"prompt": "q"}]), {}, r"row 2, column 'answer' must be .*, got None"),
        (json.dumps([GOOD | {"answer": True}]), {}, r"row 1, column 'answer' must be .*, got True"),
    ],
)
def test_a_bad_file_is_named_with_the_argument_and_the_place(tmp_path, text, arguments, message):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as caught:
        len(Records(str(path), ExactMatch(), **arguments))
    assert "\n" not in str(caught.value)


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"`Records\(path=.*cannot read"):
        len(Records(str(tmp_path / "x.parquet"), ExactMatch()))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`ToolUse\(path='/no/x'\)`: /no/x does not exist"):
        len(ToolUse("/no/x"))
    with pytest.raises(FileNotFoundError, match="is a folder; name a file in it"):
        len(ToolUse(str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"train.json does not exist"):
        len(SciKnowEval("biology", "train", source=str(tmp_path)))
    with pytest.raises(
        FileNotFoundError, match=r"`SciKnowEval\(source='/no'\)`: .* no such folder"
    ):
        len(SciKnowEval("biology", "train", source="/no"))


def test_a_set_that_the_hub_does_not_give_is_named(monkeypatch):
    def fail(name, split):
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(
        ValueError, match=r"`SciKnowEval\(source='a/b'\)`: neither .*offline.*folder"
    ):
        len(SciKnowEval("biology", "train", source="a/b"))


def test_a_bad_gold_answer_is_named_before_training(tmp_path):
    rows = [GOOD | {"answer": '[{"Action": "f", "Action_Input": "{}"}]'}, GOOD]
    with pytest.raises(ValueError, match=r"`ToolUse\(path=.*line 3: the gold answer .* must read"):
        len(ToolUse(rows_file(tmp_path / "x.json", rows, "lines")))
    rows_file(tmp_path / "train.json", [GOOD | {"system": "s"}], "lines")
    with pytest.raises(ValueError, match=r"line 1: the answer must be the letter .* got 'a'"):
        len(SciKnowEval("biology", "train", source=str(tmp_path)))


def test_unknown_domains_and_splits_are_refused():
    with pytest.raises(ValueError, match=r"`SciKnowEval\(domain=...\)` must be of .* got 'bio'"):
        SciKnowEval("bio", "train")
    with pytest.raises(ValueError, match=r"`SciKnowEval\(split=...\)` must be of .* got 'val'"):
        SciKnowEval("biology", "val")
    with pytest.raises(ValueError, match=r"`SciKnowEval\(level=...\)` must be of .* got 'L9'"):
        SciKnowEval("biology", "test", level="L9")


@needs_shared
def test_another_level_comes_from_the_hub_only(monkeypatch):
    with pytest.raises(ValueError, match=r"level='L1'\)`: the files in .* hold level L3; for ano"):
        len(SciKnowEval("biology", "test", level="L1", source=str(SCIENCE / "biology")))
    rows = list(hub_rows("biology"))
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: rows)
    assert len(SciKnowEval("biology", "test", level="L1")) == 50


# --- configuration --------------------------------------------------------------------------------


def parsed(*arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TaskDataModule, "data")
    return parser.instantiate(parser.parse_args(list(arguments))).data


@pytest.mark.parametrize("domain", ["biology", "chemistry", "physics", "materials"])
def test_science_configs_take_a_folder_in_place_of_the_hub(domain, tmp_path):
    config = f"--config={CONFIGS}/tasks/{domain}.yaml"
    data = parsed(config, f"--data.train.source={tmp_path}", f"--data.val.source={tmp_path}")
    assert (data.questions_per_batch, data.max_prompt_tokens) == (32, 2048)
    for (source,), split in ((data.train_sources, "train"), (data.val_sources, "test")):
        assert (source.domain, source.split, source.source) == (domain, split, str(tmp_path))
        assert parsed(config).train_sources[0].source == "hicai-zju/SciKnowEval"


def test_the_tool_use_config_takes_paths():
    data = parsed(f"--config={CONFIGS}/tasks/tooluse.yaml", "--data.train.path=/x/y.json")
    assert str(data.train_sources[0].path) == "/x/y.json"
    assert data.val_sources[0].name == "tooluse"


def test_sources_can_be_listed_and_verifiers_named():
    train = [{"class_path": "Records", "init_args": {"path": "x.json", "verifier": "ExactMatch"}}]
    data = parsed(f"--data.train={json.dumps(train * 2)}", "--data.val=[]")
    assert [source.verifier for source in data.train_sources] == [ExactMatch()] * 2
    assert data.val_sources == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tasks": {}}, "must name a task"),
        ({"tasks": {"puzzle24": {}}}, "'puzzle24' cannot be trained on"),
        ({"tasks": {"gcd": {"seed": 3}}}, "'seed' is an argument of `ReasoningGym` itself"),
        ({"tasks": {"gcd": {}}, "size": 0}, "size=...)` must be >= 1"),
        ({"tasks": {"gcd": {}}, "split": "test"}, "must be 'train' or 'val'"),
    ],
)
def test_a_source_of_procedural_tasks_says_what_is_wrong_with_its_arguments(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        ReasoningGym(**{"split": "train", **arguments})


@pytest.mark.parametrize(
    ("task", "answer", "harmless"),
    [
        ("gcd", "__import__('os')", True),  # its scorer compares texts
        ("spiral_matrix", "[1, -2, 'a']", True),
        ("spiral_matrix", "1 2 3", True),
        ("string_insertion", "ABBA", True),
        ("spiral_matrix", "[print(1)]", False),
        ("n_queens", "[x for x in y]", False),
        ("countdown", "(3 + 4) * 2 / 7", True),
        ("simple_integration", "sin(x)**2/2 + C", True),
        ("simple_integration", "Integral(x, x)", False),
        ("simple_integration", "sqrt('open(1)')", False),
        ("countdown", "x.__class__", False),
        ("countdown", "lambda: 24", False),
        ("countdown", "3 +", False),
    ],
)
def test_an_answer_that_a_scorer_would_run_is_arithmetic_or_a_list(task, answer, harmless):
    assert is_harmless(task, answer) == harmless


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    verifier = ReasoningGymAnswer(task="gcd", settings="{}", entry=b"")
    with pytest.raises(ImportError, match=re.escape("pip install 'scsdpo[reasoning-gym]'")):
        verifier.prepare()
