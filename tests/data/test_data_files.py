"""Rows as people have them: every format gives the same prompts, and every cell a defined text."""

import bz2
import csv
import gzip
import io
import json
import lzma
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import datasets
import pandas
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from coins import Coin
from scsdpo.data import Math, Records
from scsdpo.data.files import read_rows
from scsdpo.data.table import spelled
from scsdpo.verifiers import ExactMatch, ToolCall

ROWS = [{"question": f"{n}, or\n“{n}”?", "answer": f"{n}"} for n in range(12)]


def written(path, rows=ROWS):
    """A file of the format that its name tells."""
    name = path.name.lower()
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}
    pack = next((pack for suffix, pack in packers.items() if name.endswith(suffix)), bytes)
    for suffix in packers:
        name = name.removesuffix(suffix)
    path.write_bytes(pack(_bytes(name.rpartition(".")[2], rows)))
    return str(path)


def _zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def _bytes(kind, rows):
    if kind == "json":
        return json.dumps(rows).encode()
    if kind in ("jsonl", "ndjson"):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind in ("csv", "tsv"):
        text = io.StringIO(newline="")
        out = csv.DictWriter(text, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
        out.writeheader()
        out.writerows(rows)
        return text.getvalue().encode()
    table = pyarrow.Table.from_pylist(rows)
    sink = pyarrow.BufferOutputStream()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, sink)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, sink)
    elif kind == "arrow":
        with pyarrow.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
    return sink.getvalue().to_pybytes()


def told(path, **settings):
    """Question and gold answer of each prompt, the same at once and as a stream."""
    settings = {"prompt": "question", "name": "x"} | settings
    verifier = settings.pop("verifier", Coin())
    once, stream = (
        Records(str(path), verifier, streaming=streaming, **settings) for streaming in (False, True)
    )
    assert [(p.key, p.messages) for p in once.read()] == [
        (p.key, p.messages) for p in stream.read()
    ]
    return [(prompt.messages[-1]["content"], prompt.answer) for prompt in once.read()]


FORMATS = ["csv", "tsv", "json", "jsonl", "ndjson", "parquet", "arrow", "feather"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("packing", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_every_format_gives_the_same_prompts_packed_or_not_whatever_the_case(
    tmp_path, kind, packing
):
    name = f"x.{kind}{packing}"
    for path in (tmp_path / name, tmp_path / f"Y{name.upper()}"):
        assert told(written(path)) == [(row["question"], row["answer"]) for row in ROWS]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/x.jsonl", "x"),
        ("a/x.csv.gz", "x"),
        ("a/X.PARQUET", "X"),
        ("a/train-*.parquet", "train"),
        ("a/*.csv", "a"),
        ("org/set", "set"),
        ("*.csv", "records"),
    ],
)
def test_a_task_is_named_after_its_file(path, name):
    assert Records(path, Coin()).name == name


# --- several files --------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["shards", "shards/*.jsonl", "shards/part-?*.jsonl"])
def test_shards_are_read_in_the_natural_order_of_their_names(tmp_path, where):
    (tmp_path / "shards").mkdir()
    for part in range(12):
        written(tmp_path / "shards" / f"part-{part}.jsonl", ROWS[part : part + 1])
    (tmp_path / "shards" / "README.md").write_text("#")
    (tmp_path / "shards" / "_SUCCESS").write_text("")
    (tmp_path / "shards" / "part-99.jsonl").write_text("")  # a shard may be empty
    assert [answer for _, answer in told(tmp_path / where)] == [str(n) for n in range(12)]


def test_a_broken_row_is_named_with_its_own_file(tmp_path):
    for part in range(3):
        written(tmp_path / f"{part}.jsonl", ROWS[:2])
    (tmp_path / "2.jsonl").write_text(json.dumps(ROWS[0]) + "\n{")
    for streaming in (False, True):
        source = Records(f"{tmp_path}/*.jsonl", Coin(), prompt="question", streaming=streaming)
        with pytest.raises(ValueError, match=r"/2.jsonl.* line 2 is not JSON"):
            list(source.read())
    written(tmp_path / "1.jsonl", [{"question": "?", "gold": 1}])
    with pytest.raises(ValueError, match=r"1.jsonl has no column 'answer', only 'question', 'gold"):
        list(Records(f"{tmp_path}/*.jsonl", Coin(), prompt="question", streaming=True).read())


def test_a_folder_whose_files_tell_splits_gives_the_one_that_is_asked_for(tmp_path):
    for name, rows in (("train-0", ROWS[:2]), ("train-1", ROWS[2:4]), ("test-0", ROWS[4:5])):
        written(tmp_path / f"{name}-of-2.parquet", rows)
    assert len(told(tmp_path)) == 4
    assert told(tmp_path, split="test") == [(ROWS[4]["question"], "4")]
    with pytest.raises(
        ValueError, match="no files of the split 'validation': their names tell test, train"
    ):
        told(tmp_path, split="validation")


@pytest.mark.parametrize("streaming", [False, True])
def test_paths_that_mean_nothing_are_refused_in_one_line(tmp_path, streaming):
    def refused(path, kind, match, **settings):
        source = Records(str(path), Coin(), prompt="question", streaming=streaming, **settings)
        with pytest.raises(kind, match=match) as caught:
            next(source.read())
        assert "\n" not in str(caught.value)

    written(tmp_path / "x.jsonl")
    refused(
        tmp_path / "x.jsonl",
        ValueError,
        "a single file has no splits, and `split` is",
        split="test",
    )
    refused(tmp_path / "*.jsonl", ValueError, "file has no splits", split="train[:9]")
    refused(
        tmp_path, ValueError, "no files of the split 'test': their names tell no s", split="test"
    )
    refused(tmp_path / "*.csv", FileNotFoundError, "no file is named like")
    refused("no/such.csv.gz", FileNotFoundError, "does not exist")
    refused("no/SUCH.PARQUET", FileNotFoundError, "does not exist")
    written(tmp_path / "x.csv")
    refused(tmp_path, ValueError, r"files of several formats \(.csv, .jsonl\); name those")
    (tmp_path / "outer" / "data").mkdir(parents=True)
    written(tmp_path / "outer" / "data" / "x.csv")
    refused(tmp_path / "outer", FileNotFoundError, "there are some in data; name a file")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    refused(tmp_path / "saved", ValueError, "saved without splits, and `split` is", split="test")


# --- cells ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.00001, "0.00001"),
        (1e22, "10000000000000000000000"),
        (-2.5e-7, "-0.00000025"),
        (42.0, "42"),
        (-0.0, "0"),
        (0.1, "0.1"),
        (1 / 3, "0.3333333333333333"),
        (7, "7"),
        (10**30, "1" + "0" * 30),
        (Decimal("12.50"), "12.5"),
        (Decimal("100"), "100"),
        (Decimal("1E+3"), "1000"),
        (Decimal("3.14159265358979323846264338327950288"), "3.14159265358979323846264338327950288"),
        (float("inf"), ""),
        (Decimal("1e999999999"), ""),
    ],
)
def test_numbers_are_spelled_in_full_and_shortest(number, text):
    assert spelled(number) == text


def golds(path, **settings):
    return [answer for _, answer in told(path, **settings)]


NUMBERS = [0.00001, 42.0, 0.1, 1e16, -3.0, 1e-7, 2.5]
SPELLED = ["0.00001", "42", "0.1", "10000000000000000", "-3", "0.0000001", "2.5"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "feather"])
def test_numbers_mean_the_same_in_every_format(tmp_path, kind):
    rows = [{"question": "?", "answer": number} for number in NUMBERS]
    assert golds(written(tmp_path / f"x.{kind}", rows)) == SPELLED


@pytest.mark.parametrize("kind", ["float", "halffloat", "double", "dictionary", "decimal"])
def test_numbers_of_every_type_of_arrow_are_spelled_as_they_would_be_written(tmp_path, kind):
    plain = pyarrow.array([0.5, 0.1, 42.0])
    column = {
        "float": plain.cast(pyarrow.float32()),
        "halffloat": plain.cast(pyarrow.float16()),
        "double": plain,
        "dictionary": plain.cast(pyarrow.float32()).dictionary_encode(),
        "decimal": pyarrow.array([Decimal("0.50"), Decimal("0.10"), Decimal("42.00")]),
    }[kind]
    columns = {
        "question": ["?"] * 3,
        "answer": column,
        "in": pyarrow.StructArray.from_arrays([column], ["it"]),
    }
    pyarrow.feather.write_feather(pyarrow.table(columns), str(tmp_path / "x.feather"))
    for answer in ("answer", "in.it"):
        assert golds(tmp_path / "x.feather", answer=answer) == ["0.5", "0.1", "42"]


def test_a_column_that_pandas_made_float_for_a_gap_has_whole_numbers(tmp_path):
    frame = pandas.DataFrame(
        {"question": list("abc"), "answer": [1, None, 3], "s": [None, "x", None]}
    )
    for kind in ("csv", "parquet", "json"):
        path = tmp_path / f"x.{kind}"
        {
            "csv": lambda p: frame.to_csv(p, index=False),
            "parquet": frame.to_parquet,
            "json": lambda p: frame.to_json(p, orient="records"),
        }[kind](path)
        with pytest.raises(
            ValueError, match=r"(row 2|line 3), column 'answer' must be .*, got None"
        ):
            len(Records(str(path), Coin(), prompt="question"))
        stream = Records(str(path), Coin(), prompt="question", system="s", streaming=True)
        assert [(p.answer, len(p.messages)) for p in stream.read()] == [("1", 1), ("3", 1)]


@pytest.mark.parametrize("column", ["question", "answer", "system"])
@pytest.mark.parametrize("kind", ["parquet", "json", "csv"])
def test_nan_is_missing_and_never_the_text_nan(tmp_path, column, kind):
    row = {"question": "?", "answer": "7", "system": "Brief!"} | {column: float("nan")}
    path = written(tmp_path / f"x.{kind}", [row])
    source = Records(path, Coin(), prompt="question", system="system")
    if column == "system":
        (prompt,) = source.prompts
        assert [turn["role"] for turn in prompt.messages] == ["user"]
    else:
        with pytest.raises(ValueError, match=rf"column '{column}' must be a text or a number, got"):
            len(source)


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("007", "007"),
        ("1,000", "1,000"),
        ("42.0", "42"),
        ("42.00", "42.00"),
        ("1e-05", "0.00001"),
        ("2E3", "2000"),
        ("1e999", None),
        ("12345678901234567890123", "12345678901234567890123"),
        ("0.30000000000000004", "0.30000000000000004"),
        ("true", "true"),
        ("2024-01-05", "2024-01-05"),
        ("e5", "e5"),
        ('say ""7""', 'say "7"'),
    ],
)
def test_a_cell_of_text_keeps_its_spelling_but_for_floats_as_machines_write_them(
    tmp_path, cell, text
):
    (tmp_path / "x.csv").write_text(f'question,answer\n?,"{cell}"\n')
    if text is None:
        with pytest.raises(ValueError, match=r"line 2, column 'answer' must be a text or a number"):
            golds(tmp_path / "x.csv")
    else:
        assert golds(tmp_path / "x.csv") == [text]


@pytest.mark.parametrize(
    "value",
    [True, b"7", date(2024, 1, 5), datetime(2024, 1, 5, 12), ["7"], {"a": "7"}, float("inf")],
    ids=str,
)
def test_what_no_answer_would_spell_is_refused_in_one_line(tmp_path, value):
    path = written(tmp_path / "x.parquet", [{"question": "?", "answer": value}])
    with pytest.raises(ValueError, match=r"row 1, column 'answer' must be a text or a n") as caught:
        len(Records(path, Coin(), prompt="question"))
    assert "\n" not in str(caught.value)
    assert list(Records(path, Coin(), prompt="question", streaming=True).read()) == []


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_verifier_that_reads_json_is_given_lists_as_json(tmp_path, kind):
    call = [{"Action": "f", "Action_Input": '{"x": 1}'}]
    path = written(tmp_path / f"x.{kind}", [{"question": "?", "answer": call}])
    (answer,) = golds(path, verifier=ToolCall())
    assert json.loads(answer) == call


def test_columns_within_others_are_named_by_dots_and_elements_by_their_numbers(tmp_path):
    row = {"question": "?", "a": {"b": {"c": 7.0}}, "many": [{"x": "1"}, {"x": "2"}], "d.e": "8"}
    for kind in ("jsonl", "json", "parquet", "feather", "arrow"):
        path = written(tmp_path / f"x.{kind}", [row])
        for column, gold in (("a.b.c", "7"), ("many.1.x", "2"), ("d.e", "8")):
            assert golds(path, answer=column) == [gold]
        with pytest.raises(ValueError, match=r"no column 'a.b.d', only .*'a.b.c'.*mean 'a.b.c'"):
            golds(path, answer="a.b.d")
        with pytest.raises(ValueError, match=r"no column 'many.7.x'"):
            golds(path, answer="many.7.x")


# --- faults ---------------------------------------------------------------------------------------

GOOD = b"question,answer\n?,7\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"", "has no rows"),
        ("x.csv", b"question,answer\n", "has no rows"),
        ("x.csv", GOOD + b"?,8,9\n", "line 3 has 3 cells and the first line 2 columns"),
        ("x.csv", GOOD + b"?\n", "line 3 has 1 cell and the first line 2 columns"),
        ("x.csv", GOOD + b'"?,8\n?,9\n', "line 3 cannot be read: its quotes are not closed"),
        ("x.csv", GOOD + b'"?"x,8\n', "line 3 cannot be read"),
        ("x.csv", GOOD + b"caf\xe9?,8\n", r"line 3 is not UTF-8 text \(byte 0xe9\)"),
        ("x.csv", b"question;answer\n?;7\n", "columns are separated by ';', not by ','"),
        ("x.csv", b"question,answer,answer\n?,7,8\n", "names the column 'answer' 2 times"),
        ("x.csv", b"question,gold\n?,7\n", "has no column 'answer', only 'question', 'gold'"),
        ("x.csv", "question,answer\n?,7\n".encode("utf-16"), "it is UTF-16 text; save it as UTF-8"),
        ("x.jsonl", '{"question": "?"}'.encode("utf-16"), "it is UTF-16 text; save it as UTF-8"),
        ("x.csv", b"PK\x03\x04....", "zip archive"),
        ("x.jsonl", gzip.compress(b"{}", mtime=0), "compressed by gzip; add .gz to its name"),
        ("x.csv.gz", GOOD, "Not a gzipped file"),
        (
            "x.jsonl.gz",
            gzip.compress(b'{"question": 1}' * 99, mtime=0)[:-9],
            "ended before|damaged",
        ),
        ("x.jsonl.xz", b"nonsense", "damaged"),
        ("x.jsonl.zst", b"nonsense", "cannot read"),
        ("x.parquet", b"", "cannot read"),
        ("x.feather", b"nonsense", "cannot read"),
        ("x.jsonl", b'{"question": "?", "answer": 7, "answer": 8}', "names 'answer' twice"),
        ("x.jsonl", b'{"question": "?", "answer": 1e99999999999999999999}', "out of range"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_is_not_what_it_should_be_is_named_in_one_line(
    tmp_path, name, content, message, streaming
):
    (tmp_path / name).write_bytes(content)
    source = Records(str(tmp_path / name), Coin(), prompt="question", streaming=streaming)
    with pytest.raises(ValueError, match=message) as caught:
        list(source.read())
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_columns_of_one_name_are_refused_where_they_are_asked_for_only(tmp_path):
    table = pyarrow.table([["?"], ["7"], ["8"]], names=["question", "answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="names the column 'answer' 2 times"):
        told(tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("question,answer,,\n?,7,,\n")
    assert told(tmp_path / "x.csv") == [("?", "7")]


def test_lines_end_as_on_any_machine_and_a_mark_of_byte_order_is_no_name(tmp_path):
    for name, end in (("unix", b"\n"), ("windows", b"\r\n"), ("mac", b"\r")):
        path = tmp_path / f"{name}.csv"
        path.write_bytes(b"\xef\xbb\xbf" + end.join([b"question,answer", b'"a\nb",7', b"c,8"]))
        assert told(path) == [("a\nb", "7"), ("c", "8")]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in ROWS))
    assert len(told(path)) == len(ROWS)


def test_a_broken_row_of_a_table_can_be_left_out_of_a_stream(tmp_path):
    (tmp_path / "x.csv").write_bytes(GOOD + b'?,8,9\ncaf\xe9?,8\n"?"x,8\n"?\n?",9\n')
    source = Records(
        str(tmp_path / "x.csv"), Coin(), prompt="question", streaming=True, max_broken_rows=3
    )
    assert [prompt.answer for prompt in source.read()] == ["7", "9"]


def test_a_cell_may_be_long(tmp_path):
    path = written(tmp_path / "x.csv", [{"question": "long " * 100_000, "answer": "7"}])
    assert told(path) == [("long " * 100_000, "7")]


# --- what is read ---------------------------------------------------------------------------------


def read_bytes():
    """Bytes that this process has asked the system for so far."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def with_images(path, count=200):
    """Rows with an image of 20,000 bytes each; and the place of the images in the file."""
    image = bytes(range(256)) * 78
    rows = [
        {"image": {"bytes": bytes([n]) + image}, "q": {"text": f"{n}?", "more": image}, "a": n}
        for n in range(count)
    ]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(
        table, path, compression="none", use_dictionary=False, row_group_size=50
    )


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts them")
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_are_not_asked_for_are_not_read(tmp_path, streaming):
    with_images(tmp_path / "x.parquet")
    source = Records(
        str(tmp_path / "x.parquet"), Coin(), prompt="q.text", answer="a", streaming=streaming
    )
    next(read_rows(tmp_path / "x.parquet", ["a"]).rows)  # imports
    before = read_bytes()
    assert len(list(source.read())) == 200
    assert read_bytes() - before < (tmp_path / "x.parquet").stat().st_size / 50


def test_damage_in_a_column_that_nobody_asks_for_costs_nothing(tmp_path):
    path = tmp_path / "x.parquet"
    with_images(path)
    data = bytearray(path.read_bytes())
    for group in range(4):
        column = pyarrow.parquet.ParquetFile(path).metadata.row_group(group).column(0)
        start = column.data_page_offset
        data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    assert len(told(path, prompt="q.text", answer="a")) == 200
    with pytest.raises(ValueError, match="cannot read"):
        told(path, prompt="image.bytes", answer="a")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "feather", "arrow", "json"])
def test_rows_hold_what_was_asked_for_and_nothing_else(tmp_path, kind):
    rows = [row | {"image": "x" * 1000} for row in ROWS]
    path = Path(written(tmp_path / f"x.{kind}", rows))
    found = read_rows(path, ["answer", "nothing"])
    assert [row for _, row in found.rows] == [{"answer": row["answer"]} for row in ROWS]
    assert list(found.names) == ["question", "answer", "image"]


def test_sets_of_datasets_are_asked_for_the_columns_that_are_wanted(tmp_path, monkeypatch):
    with_images(tmp_path / "train.parquet")
    asked = {"prompt": "q.text", "answer": "a", "name": "x"}
    plain = [
        (p.key, p.answer) for p in Records(f"{tmp_path}/train.parquet", Coin(), **asked).read()
    ]
    whole = datasets.Dataset.from_parquet(str(tmp_path / "train.parquet"), cache_dir=str(tmp_path))
    whole.save_to_disk(tmp_path / "saved")
    calls = []
    load, builder = datasets.load_dataset, datasets.load_dataset_builder

    def local(*name, **settings):
        calls.append(settings)
        return load(
            "parquet",
            data_files=str(tmp_path / "train.parquet"),
            cache_dir=str(tmp_path),
            **settings,
        )

    def local_builder(*name):
        made = builder(
            "parquet", data_files=str(tmp_path / "train.parquet"), cache_dir=str(tmp_path)
        )
        made.info.features = whole.features
        return made

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(datasets, "load_dataset_builder", local_builder)
    for path in ("org/set", str(tmp_path / "saved")):
        for streaming in (False, True):
            source = Records(path, Coin(), streaming=streaming, **asked)
            assert [(p.key, p.answer) for p in source.read()] == plain
            with pytest.raises(
                ValueError, match=r"no column 'b', only 'image', .*'q.text', 'q.more'"
            ):
                list(Records(path, Coin(), streaming=streaming, **asked | {"answer": "b"}).read())
    assert [call.get("columns") for call in calls if call["streaming"]] == [["q", "a"], ["q"]]


# --- questions ------------------------------------------------------------------------------------


def first(tmp_path, row, **settings):
    """The turns of a row, and its gold answer."""
    path = written(tmp_path / "x.parquet", [row])
    (prompt,) = Records(path, settings.pop("verifier", Coin()), **settings).prompts
    return [(turn["role"], turn["content"]) for turn in prompt.messages], prompt.answer


@pytest.mark.parametrize(
    ("instruction", "asked"),
    [
        ("Answer with a letter.", "A. 9\nB. 10\n\nAnswer with a letter."),
        ("\nAnswer.", "A. 9\nB. 10\nAnswer."),
        (" Answer.", "A. 9\nB. 10 Answer."),
        ("", "A. 9\nB. 10"),
    ],
)
def test_an_instruction_stands_apart_from_the_question(tmp_path, instruction, asked):
    row = {"prompt": "A. 9\nB. 10", "answer": "A"}
    assert first(tmp_path, row, instruction=instruction) == ([("user", asked)], "A")


def test_a_template_is_filled_from_columns_and_keeps_other_braces(tmp_path):
    row = {"q": "{x} in {A}?", "A": 9.0, "b": {"c": ""}, "answer": "A"}
    template = r"{q}\n{A}|{b.c}|\boxed{}|{{q}}|{{{ A }}}"
    assert first(tmp_path, row, template=template, instruction="Go.") == (
        [("user", r"{x} in {A}?\n9||\boxed{}|{q}|{9}" + "\n\nGo.")],
        "A",
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{q}{C}", r"`Records\(template=...\)`: .* has no column 'C', only 'q', 'answer'"),
        ("{q} {", r"`Records`: `template` has a single '{' at character 5; write '{{'"),
        ("{q} }", r"has a single '}' at character 5"),
        ("q", r"`template` must name a column in braces, got 'q'"),
        (r"{q} \frac{1}{2}", r"has no column '1'"),
    ],
)
def test_a_template_that_fits_no_row_is_refused_in_one_line(tmp_path, template, message):
    with pytest.raises(ValueError, match=message) as caught:
        first(tmp_path, {"q": "?", "answer": "A"}, template=template)
    assert "\n" not in str(caught.value)


def test_a_gap_in_a_template_refuses_the_row(tmp_path):
    row = {"q": "?", "D": None, "answer": "A"}
    with pytest.raises(ValueError, match=r"row 1, column 'D' must be a text or a number, got None"):
        first(tmp_path, row, template="{q} {D}")


def test_a_constant_system_prompt_comes_before_every_question(tmp_path):
    row = {"prompt": "?", "answer": "A", "system": "Row's."}
    said = [("system", "Be brief."), ("user", "?")]
    assert first(tmp_path, row, system_prompt="Be brief.") == (said, "A")
    with pytest.raises(
        ValueError, match="`system` names a column, 'system', and `system_prompt` is"
    ):
        first(tmp_path, row, system="system", system_prompt="Be brief.")


TURNS = [
    {"role": "system", "content": "Brief!"},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2 + 2?"},
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_a_conversation_is_asked_turn_by_turn(tmp_path, kind):
    row = {"prompt": TURNS, "completion": [{"role": "assistant", "content": "4"}]}
    path = written(tmp_path / f"x.{kind}", [row, row | {"prompt": TURNS[:2]}])
    long, short = Records(path, ExactMatch(), answer="completion", instruction="Say it.").prompts
    assert list(long.messages) == [*TURNS[:3], {"role": "user", "content": "And 2 + 2?\n\nSay it."}]
    assert long.answer == "4"
    # A question with its system turn is that question, however it is written down.
    flat = {"prompt": "1 + 1?", "system": "Brief!", "answer": 4}
    path = written(tmp_path / "flat.jsonl", [flat])
    (same,) = Records(path, ExactMatch(), system="system", instruction="Say it.", name="x").prompts
    assert (short.key, short.messages) == (same.key, same.messages)
    assert long.key != short.key


@pytest.mark.parametrize(
    ("turns", "settings", "message"),
    [
        ([], {}, "must be turns of which the last is the user's and has text; it has n"),
        (TURNS[:3], {}, "the last is the user's and has text; it ends with the assist"),
        ([{"role": "user", "content": " "}], {}, "has text"),
        (["hi"], {}, "list of turns with `role` and `content`, got 'hi' as turn 1"),
        ([{"from": "human", "value": "?"}], {}, "list of turns with `role` and `content`"),
        ([TURNS[1] | {"tool_calls": [{"x": 1}]}], {}, "turn 1 also holds 'tool_calls'"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            {},
            "turn 1 has a part of the type 'image'; only text is supported",
        ),
        (TURNS, {"system_prompt": "Hi."}, "system turn of its own; leave out `system_prompt`"),
        (TURNS, {"template": "{prompt}"}, "column 'prompt' must be a text or a number"),
        ([{"role": "user", "content": "\ud83d"}], {}, "half a surrogate pair"),
    ],
)
def test_a_conversation_that_cannot_be_asked_is_refused_with_its_row(
    tmp_path, turns, settings, message
):
    path = written(tmp_path / "x.jsonl", [{"prompt": turns, "answer": "4"}])
    with pytest.raises(ValueError, match=rf"line 1.*{message}") as caught:
        len(Records(path, Coin(), **settings))
    assert "\n" not in str(caught.value)


def test_parts_of_a_turn_that_are_texts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]
    row = {"prompt": [{"role": "user", "content": parts, "name": None}], "answer": 2}
    assert first(tmp_path, row) == ([("user", "1 + 1?")], "2")


def test_verl_s_rows_are_read_as_they_are(tmp_path):
    row = {
        "data_source": "openai/gsm8k",
        "prompt": TURNS[1:2],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 0, "split": "train"},
    }
    path = written(tmp_path / "x.parquet", [row])
    source = Math(path, prompt="prompt", answer="reward_model.ground_truth", category="data_source")
    (prompt,) = source.prompts
    assert (prompt.answer, prompt.category) == ("2", "openai/gsm8k")
    assert prompt.messages[0]["content"].startswith("1 + 1?\n\nPlease reason step by step")


def test_what_follows_a_mark_is_the_gold_answer(tmp_path):
    row = {"prompt": "?", "answer": "3 + 4 = 7\n#### 7"}
    assert first(tmp_path, row, answer_after="####")[1] == "7"
    assert first(tmp_path, row | {"answer": "7"}, answer_after="####")[1] == "7"
    with pytest.raises(ValueError, match="must say something after '####'"):
        first(tmp_path, row | {"answer": "3 ####"}, answer_after="####")
