"""Streams: each question once a pass, whatever stops, resumes or shares the run."""

import json
import logging
import pickle
import warnings
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import datasets
import pytest

from coins import Coin
from models import tokenizer
from runs import Toys, strategies
from scsdpo.data import Math, Records, TaskDataModule
from scsdpo.data import shuffled as shuffled_module
from scsdpo.data.shuffled import ShuffledSource
from scsdpo.policy import Chat
from scsdpo.verifiers import MathAnswer
from streams import Counting, Lines, lines, rows, run

LIMIT = 64
"""In tokens: the long questions of `Counting` are over it."""


@pytest.fixture(scope="module")
def chat():
    return Chat(tokenizer=tokenizer(), eos_ids=(2, 0))


def words(prompt):
    return prompt.messages[-1]["content"].split()[0].rstrip("?")


def asked(feed, count, start=0):
    return [int(words(feed[i])) for i in range(start, start + count)]


# --- feeds ----------------------------------------------------------------------------------------


def test_a_pass_over_a_stream_asks_each_question_once_shuffled_within_windows(chat, tmp_path):
    source = Lines(lines(tmp_path / "x", range(10)), window=4)
    feed = ShuffledSource.of(source, chat, LIMIT, seed=0)
    passes = [asked(feed, 10, 10 * n) for n in range(3)]
    for order in passes:
        assert [sorted(order[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(set(map(tuple, passes))) == 3
    assert asked(ShuffledSource.of(source, chat, LIMIT, seed=0), 30) == [
        *passes[0],
        *passes[1],
        *passes[2],
    ]
    assert asked(ShuffledSource.of(source, chat, LIMIT, seed=1), 10) != passes[0]


def test_a_stream_can_be_asked_from_any_number_on_and_back_again(chat):
    feed = ShuffledSource.of(Counting(), chat, LIMIT, seed=0)
    order = asked(feed, 40)
    assert asked(feed, 20, 20) == order[20:]
    assert asked(pickle.loads(pickle.dumps(feed)), 10, 30) == order[30:]
    assert asked(feed, 3) == order[:3]


def test_long_questions_of_a_stream_are_left_out_counted_and_logged(chat, caplog):
    with caplog.at_level(logging.WARNING):
        order = asked(ShuffledSource.of(Counting(), chat, LIMIT, seed=0), 40)
    assert sorted(order) == [n for n in range(50) if n % 5 != 4]
    assert len(caplog.messages) == 4  # the 1st, 2nd, 4th and 8th of 10
    assert caplog.messages[-1].startswith("counting: 8 of ")
    assert caplog.messages[-1].endswith("longer than max_prompt_tokens=64 and were dropped")


def test_a_large_source_asks_each_question_that_fits_once_a_pass(chat, monkeypatch):
    monkeypatch.setattr(shuffled_module, "FILTER_AHEAD", 4)
    feed = ShuffledSource.of(Toys(12), chat, len(chat.render(Toys(1)[0].messages)), seed=0)
    assert sorted(asked(feed, 10)) == list(range(10))  # 10 and 11 have one token more
    assert sorted(asked(feed, 10, 10)) == list(range(10))


def test_a_stream_of_which_nothing_fits_or_that_is_empty_is_refused(chat, tmp_path):
    with pytest.raises(
        ValueError, match=r"data.max_prompt_tokens, .*1000 prompts of 'counting' in"
    ):
        ShuffledSource.of(Counting(), chat, 3, seed=0)[0]
    with pytest.raises(ValueError, match=r"data.max_prompt_tokens, .*2 prompts of 'y' in a row"):
        ShuffledSource.of(Lines(lines(tmp_path / "y", range(2))), chat, 3, seed=0)
    with pytest.raises(ValueError, match="'x' has no prompts"):
        ShuffledSource.of(Lines(lines(tmp_path / "x", [])), chat, LIMIT, seed=0)[0]


@pytest.mark.parametrize("name", ["size", "window"])
def test_sizes_below_1_are_refused(name):
    with pytest.raises(ValueError, match=rf"`Counting\({name}=...\)` must be >= 1, got 0"):
        Counting(**{name: 0})


# --- runs -----------------------------------------------------------------------------------------


def mixture(tmp_path, **arguments):
    """A finite stream, a file at once and an endless stream."""
    sources = [
        Lines(lines(tmp_path / "x", "abcdefg"), size=7, window=3),
        Records(rows(tmp_path / "r.jsonl", 5), Coin(), prompt="question"),
        Counting(size=12, window=5),
    ]
    settings = {"questions_per_batch": 4, "max_prompt_tokens": LIMIT} | arguments
    return TaskDataModule(sources, [], **settings)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("weights", [(), (3, 1, 2)])
def test_a_mixture_of_streams_resumes_at_any_step_with_the_question_that_was_next(
    chat, tmp_path, workers, weights
):
    def data(workers=workers):
        return mixture(tmp_path, num_workers=workers, train_weights=weights)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # fork beside threads
        whole = run(chat, data(0), 14)
        for step in (1, 6, 9):
            first = run(chat, data(), step, save=tmp_path / "end.ckpt")
            assert first == whole[:step]
            assert run(chat, data(), 14, resume=tmp_path / "end.ckpt") == whole[step:]


def test_weights_are_the_shares_of_the_sources_in_every_stretch_of_batches(chat, tmp_path):
    batches = run(chat, mixture(tmp_path, train_weights=(1, 2, 1)), 12)
    for batch in batches:
        kinds = Counter("letters" if q.isalpha() else q.endswith("?") for q in batch)
        assert kinds == {"letters": 1, True: 2, False: 1}
    # Every question of the file comes once before any comes again.
    from_file = [q for batch in batches for q in batch if q.endswith("?")]
    assert all(len(set(from_file[i : i + 5])) == 5 for i in range(0, 20, 5))


def test_ranks_share_the_questions_of_a_step_of_a_mixture(chat, tmp_path):
    def batches(ranks, rank):
        data = mixture(tmp_path)
        module = strategies(chat)
        data.trainer = SimpleNamespace(
            world_size=ranks, global_rank=rank, overfit_batches=0, lightning_module=module
        )
        data.setup("fit")
        return [[prompt.key for prompt in batch] for batch in data.train_dataloader()]

    alone = batches(1, 0)
    assert len(alone) == 6
    shares = [batches(2, rank) for rank in (0, 1)]
    for step, keys in enumerate(alone):
        assert Counter(keys) == Counter(shares[0][step] + shares[1][step])


def test_validation_of_a_stream_asks_its_first_questions_in_order(chat):
    data = TaskDataModule(Toys(), Counting(size=7), max_prompt_tokens=LIMIT)
    module = strategies(chat)
    data.trainer = SimpleNamespace(
        world_size=1, global_rank=0, overfit_batches=0, lightning_module=module
    )
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert [int(words(prompt)) for prompt in batch] == [0, 1, 2, 3, 5, 6]
    assert {prompt.category for prompt in batch} == {"counting"}


def test_several_validation_sources_have_metrics_under_their_own_names(chat):
    data = TaskDataModule(Toys(), [Toys(2), Counting(size=2)], max_prompt_tokens=LIMIT)
    module = strategies(chat)
    data.trainer = SimpleNamespace(
        world_size=1, global_rank=0, overfit_batches=0, lightning_module=module
    )
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert [prompt.category for prompt in batch] == ["toys/even", "toys/odd", *["counting"] * 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_weights": [1]}, r"must hold one weight for each of the 2 sources .*, got \[1\]"),
        ({"train_weights": [1, 0]}, r"train_weights=...\)` must be > 0 .*, got \[1, 0\]; remove"),
        ({"val": [Toys(), Toys()]}, "2 sources are called 'toys'; give one another `name`"),
    ],
)
def test_weights_and_names_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TaskDataModule(**({"train": [Toys(), Counting()], "val": []} | arguments))


# --- records --------------------------------------------------------------------------------------

ROWS = [{"question": f"{n}?", "answer": str(n)} for n in range(6)]


def places(tmp_path):
    """The same rows in each form that `Records` reads."""
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    saved = datasets.Dataset.from_list(ROWS)
    saved.to_parquet(tmp_path / "a.parquet")
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "splits")
    return [tmp_path / name for name in ("a.jsonl", "a.json", "a.parquet", "saved", "splits")]


def test_every_form_gives_the_same_prompts_at_once_and_as_a_stream(tmp_path):
    for path in places(tmp_path):
        whole = Records(str(path), Coin(), prompt="question", name="x")
        stream = Records(str(path), Coin(), prompt="question", name="x", streaming=True, size=4)
        assert [p.key for p in whole.read()] == [p.key for p in stream.read()]
        assert [p.messages for p in whole.read()] == [p.messages for p in stream.read()]
        assert (len(whole), len(stream)) == (6, 4)
        assert whole[5].key == stream[5].key
        assert Counter(p.key for p in stream.shuffled(1)) == Counter(p.key for p in whole.prompts)
        assert (whole.sequential, stream.sequential) == (False, True)


def test_a_set_on_the_hub_is_asked_for_as_configured(monkeypatch):
    calls = []

    def load(*name, **settings):
        calls.append((name, settings))
        found = datasets.Dataset.from_list(ROWS)
        return found.to_iterable_dataset() if settings["streaming"] else found

    builder = SimpleNamespace(info=SimpleNamespace(features=None), config=None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *name: builder)
    sets = {"split": "test", "prompt": "question"}
    assert len(Records("org/set", Coin(), **sets)) == 6
    stream = Records("org/set", Coin(), subset="main", streaming=True, **sets)
    assert len(list(stream.read())) == 6
    assert calls == [
        (("org/set",), {"split": "test", "streaming": False}),
        (("org/set", "main"), {"split": "test", "streaming": True}),
    ]
    assert stream.name == "set"


def test_bad_rows_of_a_stream_are_left_out_counted_and_logged(tmp_path, caplog):
    bad = [ROWS[0], {"question": None, "answer": "1"}, {"question": " ", "answer": "2"}, ROWS[3]]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, bad)))
    source = Records(str(tmp_path / "x.jsonl"), Coin(), prompt="question", streaming=True)
    with caplog.at_level(logging.WARNING, logger="scsdpo"):
        assert [words(prompt) for prompt in source.read()] == ["0", "3"]
    assert [m.partition(", the last")[0] for m in caplog.messages] == [
        "x: 1 of 2 rows left out",
        "x: 2 of 3 rows left out",
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_mistakes_are_named_at_once_and_in_a_stream(tmp_path, streaming):
    def first(path, **arguments):
        return next(Records(str(path), Coin(), streaming=streaming, **arguments).read())

    path = rows(tmp_path / "r.jsonl", 2)
    with pytest.raises(ValueError, match=r"`Records\(prompt='qestion'\)`.* did you mean 'question"):
        first(path, prompt="qestion")
    for missing in (tmp_path / "no.jsonl", "no.jsonl", "./no/set", "no/file.json"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            first(missing)
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is a folder without files of rows \(.jsonl"):
        first(tmp_path / "none")
    places(tmp_path)
    with pytest.raises(ValueError, match="splits has no split 'test', only train"):
        first(tmp_path / "splits", split="test")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no rows"):
        first(tmp_path / "empty.jsonl")


def test_math_asks_for_a_boxed_answer_and_reads_results_after_worked_solutions(tmp_path):
    (tmp_path / "m.jsonl").write_text(
        json.dumps({"problem": "How many?", "answer": "3 + 4 = 7\n#### 7"})
    )
    source = Math(str(tmp_path / "m.jsonl"))
    (prompt,) = source.prompts
    assert prompt.answer == "7"
    assert prompt.verifier == MathAnswer()
    assert prompt.messages[-1]["content"].startswith("How many?\n\nPlease reason")
    assert prompt.messages[-1]["content"].endswith("\\boxed{}.")
    (streamed,) = islice(Math(str(tmp_path / "m.jsonl"), streaming=True).read(), 1)
    assert streamed.key == prompt.key
