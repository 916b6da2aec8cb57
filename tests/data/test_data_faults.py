"""Faults in the user's data: each is caused here, and ends in one line that names its place."""

import json
import logging
import sys
import warnings

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from coins import Coin
from models import tokenizer
from runs import Toys
from scsdpo.__main__ import main as command
from scsdpo.data import Math, PromptList, Records, TaskDataModule, make_prompt
from scsdpo.data.shuffled import Mixture, ShuffledSource
from scsdpo.errors import ConfigurationError
from scsdpo.policy import Chat
from scsdpo.verifiers import MathAnswer
from streams import Counting, run

BROKEN = {
    "torn": (b'{"question": "4?", "ans', "line 5 is not JSON (Unterminated string starting at"),
    "bytes": (b'{"question": "\xff", "answer": 4}', "line 5 is not UTF-8 text (invalid start byte"),
    "number": (b"[4]", "line 5 is not a JSON object with columns, but list"),
    "digits": (
        b'{"question": "4?", "answer": ' + b"9" * 5000 + b"}",
        "line 5 is not JSON (Exceeds",
    ),
    "nested": (b"[" * 9999, "line 5 is not JSON (maximum recursion depth"),
    "surrogate": (
        rb'{"question": "It is \ud83d", "answer": 4}',
        "line 5, column 'question' must be a text, got half a surrogate pair, '\\ud83d' at char",
    ),
}
"""The fifth of ten rows, and what is said of it."""

LACKING = {
    "null": (b'{"question": "4?", "answer": null}', "column 'answer' must be a text or a number"),
    "column": (b'{"question": "4?", "anser": 4}', "column 'answer' must be a text or a number"),
    "blank": (b'{"question": " ", "answer": 4}', "column 'question' must be a text or a number"),
    "gold": (rb'{"question": "4?", "answer": "\\frac{1}{"}', "cannot be read as mathematics"),
}


def damaged(path, row, count=10, at=4):
    """`count` good rows but for the one at `at`."""
    good = [json.dumps({"question": f"{n}?", "answer": n}).encode() for n in range(count)]
    good[at] = row
    path.write_bytes(b"\n".join(good) + b"\n")
    return str(path)


def numbers(prompts):
    return [int(prompt.answer) for prompt in prompts]


OTHERS = [n for n in range(10) if n != 4]


@pytest.fixture(scope="module")
def chat():
    return Chat(tokenizer=tokenizer(), eos_ids=(2, 0))


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [*BROKEN, *LACKING])
def test_a_bad_row_of_what_is_read_at_once_is_an_error_with_file_and_line(tmp_path, fault):
    row, said = (BROKEN | LACKING)[fault]
    path = damaged(tmp_path / "x.jsonl", row)
    with pytest.raises(ValueError, match=r"^`Math\(path='.*x.jsonl'\)`: .*x.jsonl.* line 5") as why:
        len(Math(path, prompt="question", max_broken_rows=9))
    assert said in str(why.value)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_row_of_a_stream_ends_it_unless_the_limit_lets_it_be_left_out(
    tmp_path, fault, caplog
):
    row, said = BROKEN[fault]
    path = damaged(tmp_path / "x.jsonl", row)
    source = Math(path, prompt="question", streaming=True)
    with pytest.raises(ValueError, match=r"^`Math\(path='.*x.jsonl'\)`: .*x.jsonl, line 5") as why:
        list(source.read())
    assert said in str(why.value)
    assert str(why.value).endswith(
        "; fix it, or skip broken rows with `max_broken_rows`, which is 0"
    )
    assert caplog.messages == []
    source = Math(path, prompt="question", streaming=True, max_broken_rows=1)
    # The count starts again with each pass; what is logged does not.
    assert [numbers(source.read()) for _ in range(3)] == [OTHERS] * 3
    (line,) = caplog.messages
    assert line.startswith("x: 1 of 5 broken rows left out, the last because `Math(path=")
    assert said in line


def test_one_broken_row_more_than_the_limit_ends_the_stream(tmp_path, caplog):
    path = damaged(tmp_path / "x.jsonl", b"\n".join([b"{"] * 4))
    assert numbers(
        Records(path, Coin(), prompt="question", streaming=True, max_broken_rows=4).read()
    )
    assert [line.partition(", the last")[0] for line in caplog.messages] == [
        f"x: {n} of {n + 4} broken rows left out" for n in (1, 2, 4)
    ]
    source = Records(path, Coin(), prompt="question", streaming=True, max_broken_rows=3)
    with pytest.raises(
        ValueError, match=r"line 8 is not .*, broken row 4 of this pass; fix.* is 3"
    ):
        list(source.read())


@pytest.mark.parametrize("kind", [Math, lambda *a, **k: Records(*a, Coin(), **k)])
def test_a_limit_below_0_is_refused(kind):
    with pytest.raises(ValueError, match=r"\(max_broken_rows=...\)` must be >= 0, got -1"):
        kind("x.jsonl", max_broken_rows=-1)


@pytest.mark.parametrize("fault", LACKING)
def test_a_row_of_a_stream_that_lacks_something_is_left_out_and_named_once(tmp_path, fault, caplog):
    row, said = LACKING[fault]
    source = Math(damaged(tmp_path / "x.jsonl", row), prompt="question", streaming=True)
    assert [numbers(source.read()) for _ in range(2)] == [OTHERS] * 2
    (line,) = caplog.messages
    assert line.startswith("x: 1 of 5 rows left out, the last because `Math(path=")
    assert ", line 5" in line
    assert said in line


def test_a_torn_line_in_the_middle_of_a_large_file_costs_that_line_only(tmp_path):
    filler = "x" * 1000
    rows = [json.dumps({"question": f"{n} {filler}", "answer": n}) for n in range(12_000)]
    whole = Records(_written(tmp_path / "whole.jsonl", rows), Coin(), prompt="question", name="x")
    rows[6000] = rows[6000][:500]
    path = _written(tmp_path / "torn.jsonl", rows)
    assert (tmp_path / "torn.jsonl").stat().st_size > 12e6
    torn = Records(path, Coin(), prompt="question", name="x", streaming=True, max_broken_rows=1)
    keys = [prompt.key for prompt in whole.prompts]
    assert [prompt.key for prompt in torn.read()] == keys[:6000] + keys[6001:]
    with pytest.raises(ValueError, match=r"torn.jsonl: line 6001 is not JSON"):
        len(Records(path, Coin(), prompt="question"))


def _written(path, lines):
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize("text", [b"", b"\n\n", b"[]", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_file_is_named(tmp_path, text, streaming):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"^`Records\(path='.*x.json'\)`: .*x.json has no rows"):
        next(Records(str(tmp_path / "x.json"), Coin(), streaming=streaming).read())


@pytest.mark.parametrize("streaming", [False, True])
def test_a_truncated_file_or_folder_is_named(tmp_path, streaming):
    rows = [{"question": f"{n}?", "answer": n} for n in range(2000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for path in (tmp_path / "x.parquet", arrow):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for name in ("x.parquet", "saved"):
        with pytest.raises(ValueError, match=rf"^`Records\(path='.*{name}'\)`: .*") as why:
            list(
                Records(str(tmp_path / name), Coin(), prompt="question", streaming=streaming).read()
            )
        assert "\n" not in str(why.value)


def test_a_cell_of_parquet_that_is_not_utf_8_is_one_broken_row(tmp_path):
    words = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": words, "answer": [0, 1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    for settings in ({}, {"streaming": True}):
        with pytest.raises(ValueError, match=r"x.parquet.* row 2 is not UTF-8 text"):
            list(Records(str(tmp_path / "x.parquet"), Coin(), **settings).read())
    source = Records(str(tmp_path / "x.parquet"), Coin(), streaming=True, max_broken_rows=1)
    assert numbers(source.read()) == [0, 2]


def test_a_damaged_block_of_parquet_is_named_with_the_last_row_before_it(tmp_path):
    path = tmp_path / "x.parquet"
    rows = [{"question": f"{n}?", "answer": n} for n in range(4000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1000)
    data = bytearray(path.read_bytes())
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0).dictionary_page_offset
    data[start : start + 2000] = b"\xff" * 2000
    path.write_bytes(data)
    for settings in ({}, {"streaming": True, "max_broken_rows": 9}):
        with pytest.raises(
            ValueError, match=r"^`Records\(path='.*'\)`: cannot read .*x.parquet"
        ) as why:
            list(Records(str(path), Coin(), prompt="question", **settings).read())
    assert "x.parquet after row 2000: " in str(why.value)


def test_a_set_that_cannot_be_made_is_named(monkeypatch):
    def fail(*args, **kwargs):
        raise datasets.exceptions.DatasetGenerationError("An error occurred")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        ValueError, match=r"^`Records\(path='org/set'\)`: there is no such .*An error occurr"
    ):
        len(Records("org/set", Coin()))


# --- start-up -----------------------------------------------------------------------------------


class Golds(PromptList):
    """A source of the user's, of mathematical questions."""

    name = "golds"

    def __init__(self, *golds):
        self.golds = golds

    def load(self):
        for gold in self.golds:
            yield make_prompt("x", question="?", answer=gold, verifier=MathAnswer())


@pytest.mark.parametrize(
    ("train", "val", "key"),
    [
        ([Golds("1", "}")], [], "data.train"),
        ([Golds("1"), Golds("1", "}")], [], r"data.train\[1\]"),
        ([Toys()], [Golds("1", "}")], "data.val"),
        ([Toys()], [Toys(2), Golds("1", "}")], r"data.val\[1\]"),
    ],
)
def test_an_unreadable_gold_answer_in_memory_is_an_error_at_start_up(chat, train, val, key):
    data = TaskDataModule(train, val, questions_per_batch=1)
    with pytest.raises(
        ConfigurationError, match=rf"^{key}: prompt 2 of 'golds': the gold answer '}}' cannot"
    ):
        run(chat, data, 1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("many", [False, True])
def test_a_broken_row_of_validation_names_val(chat, tmp_path, streaming, many):
    path = damaged(tmp_path / "x.jsonl", BROKEN["torn"][0])
    torn = Records(path, Coin(), prompt="question", streaming=streaming)
    data = TaskDataModule(Toys(), [Toys(2), torn] if many else torn, questions_per_batch=1)
    key = r"data.val\[1\]" if many else "data.val"
    with pytest.raises(ConfigurationError, match=rf"^{key}: `Records.* line 5 is not JSON"):
        run(chat, data, 1)


def test_a_stream_s_answers_after_the_first_20_000_are_not_checked(tmp_path, monkeypatch):
    monkeypatch.setattr("scsdpo.data.prompts.CHECK_AHEAD", 4)
    path = damaged(tmp_path / "x.jsonl", LACKING["gold"][0])
    with pytest.raises(ValueError, match="line 5: the gold answer"):
        len(Math(path, prompt="question"))
    assert len(list(Math(path, prompt="question", streaming=True).read())) == 10


# --- runs -----------------------------------------------------------------------------------------


def broken_mixture(tmp_path, limit, workers=0):
    """An endless stream, and one of nine questions whose fifth row of ten is incomplete."""
    path = damaged(tmp_path / "x.jsonl", BROKEN["torn"][0])
    torn = Records(
        path,
        Coin(),
        prompt="question",
        streaming=True,
        size=9,
        window=3,
        max_broken_rows=limit,
    )
    return TaskDataModule(
        [Counting(size=9, window=3), torn],
        [],
        questions_per_batch=2,
        max_prompt_tokens=64,
        num_workers=workers,
    )


LINE = (
    r"^data.train\[1\]: `Records\(path='.*x.jsonl'\)`: .*x.jsonl, line 5 is not JSON \(.*\); fix "
    r"it, or skip broken rows with `max_broken_rows`, which is 0$"
)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_with_broken_rows_resumes_with_the_question_that_was_next(chat, tmp_path, workers):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # fork beside threads
        whole = run(chat, broken_mixture(tmp_path, limit=1), 20)
        assert len({batch[1] for batch in whole[:9]}) == 9  # each once a pass
        for step in (2, 5, 11):
            data = broken_mixture(tmp_path, 1, workers)
            assert run(chat, data, step, save=tmp_path / "end.ckpt") == whole[:step]
            data = broken_mixture(tmp_path, 1, workers)
            assert run(chat, data, 20, resume=tmp_path / "end.ckpt") == whole[step:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_a_broken_row_ended_goes_on_once_the_limit_is_raised(chat, tmp_path, workers):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        whole = run(chat, broken_mixture(tmp_path, limit=1), 12)
        run(chat, broken_mixture(tmp_path, 0, workers), 3, save=tmp_path / "end.ckpt")
        for resume in (None, tmp_path / "end.ckpt"):
            with pytest.raises(ConfigurationError, match=LINE):
                run(chat, broken_mixture(tmp_path, 0, workers), 12, resume=resume)
        data = broken_mixture(tmp_path, 1, workers)
        assert run(chat, data, 12, resume=tmp_path / "end.ckpt") == whole[3:]


def test_whoever_goes_on_after_an_error_meets_it_again(chat, tmp_path):
    path = damaged(tmp_path / "x.jsonl", BROKEN["torn"][0])
    source = Records(path, Coin(), prompt="question", streaming=True, window=3)
    shuffled = ShuffledSource.of(source, chat, 64, seed=0)
    questions = Mixture([shuffled])

    def batch(*numbers):
        draws = tuple((0, number) for number in numbers)
        return questions.__getitems__([(draws, place) for place in range(len(draws))])

    assert len(batch(0, 1, 2)) == 3
    for _ in range(2):
        assert isinstance(batch(3, 4).fault, ConfigurationError)
    with pytest.raises(ConfigurationError, match=r"^data.train: .* line 5 is not JSON"):
        questions[0, 3]


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        (Toys(12), Toys(4), ["data.val: 4 of 4 questions, such as toy/0, are in data.train too: "]),
        (Counting(), Counting(size=4), ["data.val: 4 of 4 questions, such as counting/"]),
        (Toys(12), Counting(size=4), []),
        ([Toys(2), Golds("1")], [Golds("1", "2")], ["data.val: 1 of 2 questions, such as x/"]),
    ],
)
def test_questions_in_both_train_and_val_are_warned_of_once(chat, train, val, said, caplog):
    with caplog.at_level(logging.WARNING):
        run(chat, TaskDataModule(train, val, questions_per_batch=1), 1)
    lines = [line for line in caplog.messages if line.startswith("data.val")]
    assert len(lines) == len(said)
    assert all(map(str.startswith, lines, said))
    assert all(line.endswith("their figures are not those of held-out questions") for line in lines)


# --- the command ----------------------------------------------------------------------------------

COMMAND = [
    "--model.advantage.class_path=SelfDistillation",
    "--model.teacher.class_path=EMA",
    "--model.teacher.context=PlainPrompt",
    "--model.sampling={n: 2, max_new_tokens: 2}",
    "--model.verification.workers=0",
    "--data.val=[]",
    "--data.questions_per_batch=1",
    "--trainer.max_steps=9",
    "--trainer.limit_val_batches=0",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_command_ends_in_mid_training_with_one_line_and_code_2(
    qwen3, tmp_path, monkeypatch, capsys, workers
):
    monkeypatch.chdir(tmp_path)
    damaged(tmp_path / "x.jsonl", BROKEN["torn"][0])
    source = {"path": "x.jsonl", "verifier": "MathAnswer", "prompt": "question", "streaming": True}
    train = {"class_path": "Records", "init_args": source | {"window": 2}}
    settings = [f"--model.policy.name_or_path={qwen3}", f"--data.train={json.dumps(train)}"]
    settings += [*COMMAND, f"--data.num_workers={workers}"]
    monkeypatch.setattr(sys, "argv", ["scsdpo", "fit", *settings])
    assert command() == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith(
        "scsdpo: error: data.train: `Records(path='x.jsonl')`: x.jsonl, line 5 is not JSON (Unterm"
    )
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--data.train.max_broken_rows=1"])
    assert command() == 0
