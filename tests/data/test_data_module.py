"""The data module: prompts are rendered, the order is seeded, and no question is lost."""

import itertools
import logging
import pickle
import warnings
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Callback, LightningModule, Trainer

from models import tokenizer
from runs import strategies
from scsdpo.data import PromptList, SciKnowEval, TaskDataModule, make_prompt
from scsdpo.data.loader import EpochSampler
from scsdpo.data.rendered import Rendered
from scsdpo.data.shuffled import Mixture, ShuffledSource, interleave
from scsdpo.policy import Chat
from scsdpo.teacher import NoTeacher
from scsdpo.verifiers import ExactMatch
from scsdpo.weighting import Uniform
from shared import SHARED, needs_shared
from streams import Lines

# Lightning's own, with torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


class Numbers(PromptList):
    """Questions `0`, `11`, `222`, ...: question i has i + 1 letters, so its length tells it."""

    def __init__(self, size, name="numbers"):
        self.size, self._name = size, name

    @property
    def name(self):
        return self._name

    def load(self):
        for i in range(self.size):
            yield make_prompt(self.name, question="x" * (i + 1), answer="", verifier=ExactMatch())


def rendered(source, chat, limit):
    return Rendered(source, source.name, chat, limit)


def feed(chat, source, seed=0, limit=10_000):
    return ShuffledSource.of(source, chat, limit, seed)


def number(prompt):
    return len(prompt.messages[-1]["content"]) - 1


@pytest.fixture(scope="module")
def chat():
    return Chat(tokenizer=tokenizer(), eos_ids=(2, 0))


# --- rendering and the limit on length ------------------------------------------------------------


def test_prompts_carry_the_rendered_ids(chat):
    source = Numbers(3)
    for prompt, plain in zip(rendered(source, chat, 100), source.prompts, strict=True):
        assert prompt.ids == chat.render(plain.messages)
        assert (prompt.key, prompt.messages) == (plain.key, plain.messages)


def test_prompts_over_the_limit_are_dropped_counted_and_logged(chat, caplog):
    limit = len(chat.render(Numbers(5)[3].messages))
    with caplog.at_level(logging.WARNING):
        prompts = rendered(Numbers(5), chat, limit)
    assert [number(prompt) for prompt in prompts] == [0, 1, 2, 3]
    assert caplog.messages == [
        f"numbers: 1 of 5 prompts are longer than max_prompt_tokens={limit} and were dropped"
    ]


def test_nothing_is_logged_when_every_prompt_fits(chat, caplog):
    rendered(Numbers(5), chat, 10_000)
    assert caplog.messages == []


def test_a_source_of_which_no_prompt_fits_is_refused(chat):
    with pytest.raises(ValueError, match=r"max_prompt_tokens, which is 3: 5 prompts of 'numbers'"):
        rendered(Numbers(5), chat, 3)


# --- order ----------------------------------------------------------------------------------------


class Draws(Mixture):
    """Two feeds of 12 and 11 questions, of which nothing but the number is known."""

    def __init__(self):
        super().__init__([range(12), range(11)])


def samplers(ranks, weights=(12, 11), batch=4):
    return [
        EpochSampler(Draws(), weights, batch_size=batch, num_replicas=ranks, rank=rank)
        for rank in range(ranks)
    ]


def draws(sampler):
    """Those of the places that it gives."""
    return [batch[place] for batch, place in sampler]


def test_the_questions_of_a_step_do_not_depend_on_the_number_of_ranks():
    alone = draws(samplers(1)[0])
    assert len(alone) == len(set(alone)) == len(samplers(1)[0]) == 20
    for ranks in (2, 4):
        shares = [draws(sampler) for sampler in samplers(ranks)]
        each = 4 // ranks
        for step in range(5):
            together = {i for share in shares for i in share[step * each : (step + 1) * each]}
            assert together == set(alone[4 * step : 4 * step + 4])


def test_epochs_follow_each_other_without_a_gap():
    sampler = samplers(1)[0]
    found = []
    for _ in range(4):
        found += draws(sampler)
        sampler.asked = len(found)
    assert found == list(islice(interleave((12, 11)), 80))


def test_a_run_resumed_with_other_batches_leaves_no_batch_half_full():
    sampler = samplers(1, batch=8)[0]
    assert len(list(sampler)) == 16
    sampler.asked = 4
    assert len(list(sampler)) == 8
    sampler.asked = 12
    assert len(list(sampler)) == 16


WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@settings(deadline=None, database=None)
@given(WEIGHTS, st.integers(0, 300))
def test_the_schedule_can_start_anywhere_and_keeps_the_proportions(weights, start):
    period = sum(weights)
    draws = list(islice(interleave(weights), start + 2 * period))
    assert list(islice(interleave(weights, start), 2 * period)) == draws[start:]
    for feed, weight in enumerate(weights):
        numbers = [number for chosen, number in draws if chosen == feed]
        assert numbers == list(range(len(numbers)))
        # Exactly its share in any period, and within a few questions of it at any time.
        stretch = [chosen for chosen, _ in draws[start : start + period]]
        assert stretch.count(feed) == weight
        for n in range(len(draws)):
            behind = n * weight / period - sum(chosen == feed for chosen, _ in draws[:n])
            assert abs(behind) < len(weights)
            if n > 60:
                break


# --- the data module ------------------------------------------------------------------------------


class Recorder(LightningModule):
    """Notes the questions that it is given."""

    def __init__(self, chat):
        super().__init__()
        self.policy, self.teacher = SimpleNamespace(chat=chat), NoTeacher()
        self.weightings = Uniform()
        self.layer = torch.nn.Linear(1, 1)
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        assert type(batch) is tuple
        assert all(prompt.ids for prompt in batch)
        self.trained.append([number(prompt) for prompt in batch])
        return self.layer(torch.ones(1, dtype=self.layer.weight.dtype)).sum()

    def validation_step(self, batch, batch_idx):
        assert type(batch) is tuple
        self.validated.append([(prompt.category, number(prompt)) for prompt in batch])

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)
        return len(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


class SaveEachStep(Callback):
    """What `ModelCheckpoint` does at the end of a step, for every step."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")


def train(chat, steps, checkpoints=None, resume=None, *, workers=0, **arguments):
    data = TaskDataModule(
        [Numbers(12), Numbers(11, "more")],
        [Numbers(3, "val"), Numbers(2, "other")],
        questions_per_batch=4,
        val_questions_per_batch=2,
        num_workers=workers,
    )
    callbacks = [SaveEachStep(checkpoints)] if checkpoints else []
    trainer = quiet(max_steps=steps, callbacks=callbacks, **arguments)
    module = Recorder(chat)
    trainer.fit(module, data, ckpt_path=resume, weights_only=False if resume else None)
    return module, trainer


def quiet(**arguments):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **arguments,
    )


def test_each_pass_asks_every_question_once_and_the_next_one_follows_at_once(chat):
    asked = [i for batch in train(chat, 23)[0].trained for i in batch]
    assert len(asked) == 4 * 23
    passes = [asked[23 * n : 23 * n + 23] for n in range(4)]
    for questions in passes:
        # Questions 0 to 10 are in both sources, 11 in the first one only.
        assert Counter(questions) == {**dict.fromkeys(range(11), 2), 11: 1}
    assert len(set(map(tuple, passes))) == 4


def test_a_seed_has_an_order_of_its_own(chat):
    orders = [[number(feed(chat, Numbers(9), seed)[i]) for i in range(9)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_validation_test_and_prediction_see_each_question_of_each_source_once(chat):
    asked = [[("val", 0), ("val", 1)], [("val", 2), ("other", 0)], [("other", 1)]]
    data = TaskDataModule(
        Numbers(4), [Numbers(3, "val"), Numbers(2, "other")], val_questions_per_batch=2
    )
    for run in ("validate", "test", "predict"):
        module = Recorder(chat)
        getattr(quiet(), run)(module, data)
        assert module.validated == asked


def test_a_run_resumed_at_any_step_goes_on_with_the_questions_that_were_next(chat, tmp_path):
    whole = train(chat, 12, tmp_path)[0].trained
    for step in (1, 4, 5, 6, 10):  # 5 and 10 end an epoch
        resumed, _ = train(chat, 12, resume=tmp_path / f"step={step}.ckpt")
        assert resumed.trained == whole[step:]


def test_a_run_that_ended_within_an_epoch_can_be_extended(chat, tmp_path):
    whole = train(chat, 12)[0].trained
    for step in (3, 5, 8):
        _, trainer = train(chat, step)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        assert train(chat, 12, resume=tmp_path / "end.ckpt")[0].trained == whole[step:]


def test_workers_change_no_order_and_lose_no_question(chat, tmp_path):
    whole = train(chat, 7)[0].trained
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # fork in a threaded process
        first, trainer = train(chat, 2, workers=2, limit_val_batches=0)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        resume = tmp_path / "end.ckpt"
        second, _ = train(chat, 7, resume=resume, workers=2, limit_val_batches=0)
    assert first.trained + second.trained == whole


def test_a_limit_on_batches_skips_no_question(chat):
    assert train(chat, 5, limit_train_batches=2)[0].trained == train(chat, 5)[0].trained


def test_overfitting_repeats_the_first_batches(chat):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert train(chat, 3, overfit_batches=1)[0].trained == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_prompts_pass_precision_plugins_untouched(chat, precision):
    assert train(chat, 2, precision=precision)[0].trained == train(chat, 2)[0].trained


def test_prompts_are_picklable(chat):
    prompt = rendered(Numbers(1), chat, 100)[0]
    again = pickle.loads(pickle.dumps(prompt))
    assert (again.key, again.ids, again.verifier) == (prompt.key, prompt.ids, prompt.verifier)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"questions_per_batch": 0}, r"`TaskDataModule\(questions_per_batch=...\)` must be >= 1"),
        ({"val_questions_per_batch": 0}, r"val_questions_per_batch=...\)` must be >= 1, got 0"),
        ({"max_prompt_tokens": 0}, r"max_prompt_tokens=...\)` must be >= 1"),
        ({"num_workers": -1}, r"num_workers=...\)` must be >= 0"),
        ({"train": []}, r"`TaskDataModule\(train=...\)` must hold a source, got none"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        TaskDataModule(**({"train": Numbers(9), "val": []} | arguments))


def test_fewer_questions_than_a_batch_are_refused(chat):
    data = TaskDataModule(Numbers(9), [], questions_per_batch=10)
    with pytest.raises(ValueError, match=r"questions_per_batch: must be at most 9, .* got 10"):
        quiet(max_steps=1).fit(Recorder(chat), data)


def trainer_of(chat, world_size):
    """As much of a trainer as the data module asks for."""
    module = strategies(chat)
    return SimpleNamespace(
        world_size=world_size, global_rank=0, overfit_batches=0, lightning_module=module
    )


def test_a_batch_that_ranks_cannot_share_evenly_is_refused(chat):
    data = TaskDataModule(Numbers(9), [], questions_per_batch=3)
    data.trainer = trainer_of(chat, world_size=2)
    data.setup("fit")
    with pytest.raises(
        ValueError, match=r"data.questions_per_batch: must be a multiple of the 2 ranks, got 3"
    ):
        data.train_dataloader()


@needs_shared
def test_the_shared_files_come_in_full_batches_and_every_held_out_question_once(chat):
    folder = str(SHARED / "data" / "sciknoweval" / "biology")
    train, test = (SciKnowEval("biology", split, source=folder) for split in ("train", "test"))
    # The tokenizer here spells out bytes, so that prompts are long.
    data = TaskDataModule(train, test, max_prompt_tokens=20_000)
    data.trainer = trainer_of(chat, world_size=1)
    data.setup("fit")
    assert [len(batch) for batch in data.train_dataloader()] == [32] * 14
    held_out = [prompt.key for batch in data.val_dataloader() for prompt in batch]
    assert held_out == [prompt.key for prompt in test.prompts]


# --- the same question several times --------------------------------------------------------------


class Letters(PromptList):
    """A question each letter; the same letter is the same question."""

    name = "letters"

    def __init__(self, letters):
        self.letters = letters

    def load(self):
        for letter in self.letters:
            yield make_prompt("letters", question=letter, answer="", verifier=ExactMatch())


def shares(chat, source, ranks, **arguments):
    """What each rank asks in each batch: (question, which copy)."""
    found = []
    for rank in range(ranks):
        data = TaskDataModule(source, source, **{"questions_per_batch": 4} | arguments)
        data.trainer = SimpleNamespace(
            world_size=ranks, global_rank=rank, overfit_batches=0, lightning_module=strategies(chat)
        )
        data.setup("fit")
        loader = data.train_dataloader()
        epochs = itertools.chain.from_iterable(itertools.repeat(loader))
        batches = (islice(epochs, 8), data.val_dataloader())
        found.append(
            [[[(p.messages[-1]["content"], p.copy) for p in b] for b in bs] for bs in batches]
        )
    return found


@pytest.mark.parametrize("letters", ["abacab", "aaaaaaaa", "abcde", "ab" * 9])
@pytest.mark.parametrize("window", [0, 3])
def test_copies_of_a_question_in_a_batch_are_numbered_on_any_number_of_ranks(
    chat, letters, window, tmp_path
):
    source = Letters(letters)
    if window:
        (tmp_path / "letters.txt").write_text("\n".join(letters))
        source = Lines(str(tmp_path / "letters.txt"), size=len(letters), window=window)
    (alone,) = shares(chat, source, 1)
    for batch in alone[0]:
        for letter, times in Counter(letter for letter, _ in batch).items():
            assert sorted(copy for other, copy in batch if other == letter) == list(range(times))
    # In validation, all of it counts: its draws are the same in every batch.
    asked = [question for batch in alone[1] for question in batch]
    assert len(set(asked)) == len(asked) == len(letters)
    for ranks in (2, 4):
        many = shares(chat, source, ranks)
        for kind in (0, 1):
            for step, batch in enumerate(alone[kind]):
                together = [question for share in many for question in share[kind][step]]
                assert Counter(together) == Counter(batch)


def test_where_passes_meet_a_question_that_is_asked_twice_is_numbered(chat):
    (alone,) = shares(chat, Letters("abcde"), 1)
    seams = [batch for batch in alone[0] if any(copy for _, copy in batch)]
    assert seams and all({copy for _, copy in batch} == {0, 1} for batch in seams)


def test_double_rows_are_counted_at_start(chat, caplog):
    train(chat, 1)
    assert not [line for line in caplog.messages if "duplicates" in line]
    quiet(max_steps=1, limit_val_batches=0).fit(
        Asked(chat), TaskDataModule(Letters("abacab"), Letters("xyx"), questions_per_batch=4)
    )
    said = [line for line in caplog.messages if "duplicates" in line]
    key = Letters("a")[0].key
    assert [line.partition(":")[0] for line in said] == ["data.val", "data.train"]
    assert f"data.train: 3 of 6 questions are duplicates; {key}, for example, is there" in said[1]
    assert "data.val: 1 of 3 questions are duplicates" in said[0]


# --- data that change before a resume -------------------------------------------------------------


class Asked(Recorder):
    """Notes the words of the questions."""

    def training_step(self, batch, batch_idx):
        self.trained += [prompt.messages[-1]["content"].strip() for prompt in batch]
        return self.layer(torch.ones(1)).sum()


def asked(chat, sources, steps, save=None, resume=None, **arguments):
    """The questions of a run, up to step `steps`."""
    data = TaskDataModule(sources, [], **{"questions_per_batch": 4} | arguments)
    trainer, module = quiet(max_steps=steps, limit_val_batches=0), Asked(chat)
    trainer.fit(module, data, ckpt_path=resume, weights_only=False if resume else None)
    if save:
        trainer.save_checkpoint(save)
    return module.trained


OLD = "abcdefghij"
CHANGED = {"more": OLD + "xyz", "fewer": OLD[:-3], "reordered": OLD[::-1], "other": "zbcdefghij"}


def source(tmp_path, letters, kind):
    if kind == "list":
        return Letters(letters)
    (tmp_path / "letters.txt").write_text("\n".join(letters))
    return Lines(str(tmp_path / "letters.txt"), size=10, window=3)


@pytest.mark.parametrize("kind", ["list", "stream"])
@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("steps", [3, 4])
def test_a_source_that_changed_is_named_and_begins_a_pass_of_its_own(
    chat, tmp_path, caplog, kind, change, steps
):
    letters = CHANGED[change]
    old = source(tmp_path, OLD, kind)
    first = asked(chat, old, steps, save=tmp_path / "end.ckpt")
    assert sorted(first[:10]) == sorted(OLD)
    caplog.clear()
    found = asked(chat, source(tmp_path, letters, kind), steps + 20, resume=tmp_path / "end.ckpt")
    said = [line for line in caplog.messages if "have changed since the checkpoint" in line]
    assert len(said) == 1 and said[0].startswith("data.train: ")
    assert f"so the {4 * steps} questions that" in said[0] and "restore the old rows" in said[0]
    for start in range(0, len(found) - len(letters), len(letters)):
        assert sorted(found[start : start + len(letters)]) == sorted(letters)


def test_rows_behind_what_a_stream_has_read_change_nothing(chat, tmp_path, caplog):
    old = source(tmp_path, OLD, "stream")
    first = asked(chat, old, 1, save=tmp_path / "end.ckpt")
    new = source(tmp_path, OLD + "xyz", "stream")
    found = asked(chat, new, 8, resume=tmp_path / "end.ckpt")
    assert not [line for line in caplog.messages if "have changed since the checkpoint" in line]
    assert sorted(first + found[:9]) == sorted(OLD + "xyz")


@pytest.mark.parametrize("kind", ["list", "stream"])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_did_not_change_goes_on_beside_what_did(chat, tmp_path, caplog, kind, workers):
    """Sources take turns by their sizes: another size of one must not move the other's place."""
    other = Numbers(9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # fork beside threads
        first = asked(chat, [source(tmp_path, OLD, kind), other], 6, save=tmp_path / "end.ckpt")
        caplog.clear()
        changed = [source(tmp_path, OLD + "yz", kind), other]
        found = asked(chat, changed, 24, resume=tmp_path / "end.ckpt", num_workers=workers)
    said = [line for line in caplog.messages if "have changed since the checkpoint" in line]
    assert len(said) == 1 and said[0].startswith("data.train[0]: ")
    numbers = [word for word in first + found if word.startswith("xx") or word == "x"]
    for start in range(0, len(numbers) - 9, 9):
        assert len(set(numbers[start : start + 9])) == 9
    letters = [word for word in found if word in OLD + "yz"]
    assert sorted(letters[:12]) == sorted(OLD + "yz")


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({"seed": 7}, 1),
        ({"max_prompt_tokens": 5}, 1),
        ({"questions_per_batch": 2}, 0),
        ({"num_workers": 1}, 0),
    ],
)
def test_settings_that_change_the_order_are_noticed_and_others_are_not(
    chat, tmp_path, caplog, settings, lines
):
    before = asked(chat, Numbers(9), 1, save=tmp_path / "end.ckpt", seed=3)
    caplog.clear()
    if "max_prompt_tokens" in settings:
        settings = {"max_prompt_tokens": len(chat.render(Numbers(9)[6].messages))}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # fork beside threads
        after = asked(chat, Numbers(9), 8, resume=tmp_path / "end.ckpt", **{"seed": 3} | settings)
    said = [line for line in caplog.messages if "have changed since the checkpoint" in line]
    assert len(said) == lines
    if not lines:
        assert len({*before, *after[:5]}) == 9


def test_other_weights_move_no_place_in_any_source(chat, tmp_path):
    sources = [Letters(OLD), Numbers(9)]
    first = asked(chat, sources, 3, save=tmp_path / "end.ckpt")
    after = asked(chat, sources, 20, resume=tmp_path / "end.ckpt", train_weights=(3, 1))
    letters = [word for word in first + after if word in OLD]
    for start in range(0, len(letters) - 10, 10):
        assert sorted(letters[start : start + 10]) == sorted(OLD)


def test_a_second_resume_goes_on_where_the_changed_data_stood(chat, tmp_path, caplog):
    asked(chat, Letters(OLD), 2, save=tmp_path / "a.ckpt")
    whole = asked(chat, Letters(OLD + "xyz"), 12, resume=tmp_path / "a.ckpt")
    asked(chat, Letters(OLD + "xyz"), 5, save=tmp_path / "b.ckpt", resume=tmp_path / "a.ckpt")
    caplog.clear()
    assert asked(chat, Letters(OLD + "xyz"), 12, resume=tmp_path / "b.ckpt") == whole[12:]
    assert not [line for line in caplog.messages if "have changed since the checkpoint" in line]


def test_a_checkpoint_of_an_older_version_goes_on_by_its_count_alone(chat, tmp_path):
    whole = asked(chat, [Letters(OLD), Numbers(9)], 12)
    asked(chat, [Letters(OLD), Numbers(9)], 5, save=tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=False)
    (loader,) = state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    for name in [name for name in loader if name != "asked"]:
        del loader[name]
    torch.save(state, tmp_path / "end.ckpt")
    found = asked(chat, [Letters(OLD), Numbers(9)], 12, resume=tmp_path / "end.ckpt")
    assert found == whole[20:]
