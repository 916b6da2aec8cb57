"""Servers draw the next batches while one is learned from: what overlaps, and what fails."""

import gc
import json
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import count

import pytest
import torch

from canned_vllm import Paced, serving
from coins import Coin
from runs import Toys, data, trainer
from scsdpo.errors import ConfigurationError
from scsdpo.metrics import GapCheck
from scsdpo.rollout import Download, Servers, VLLMRollout
from scsdpo.rollout.servers.request_queue import RequestQueue
from scsdpo.selection import InformativePool
from scsdpo.training import Ahead
from scsdpo.types import Prompt, Sampling
from test_ahead import GRPO, Watch, labels, learner
from worlds import Echo

LOOSE = GapCheck(warn=float("inf"), stop=float("inf"))
"""What canned servers say of log-probs is made up."""


@pytest.fixture(autouse=True)
def trusting(monkeypatch):
    """Canned servers load nothing."""
    monkeypatch.setattr("scsdpo.rollout.servers.server.refusal", lambda *_: "")


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def other():
    with serving() as server:
        yield server


class Learning(Watch):
    """Each batch takes a while longer to learn from, and it is noted when."""

    def __init__(self, seconds=0.0):
        super().__init__()
        self.seconds, self.spans = seconds, []
        self.begun = threading.Event()

    def on_batch(self, trainer, module, batch):
        super().on_batch(trainer, module, batch)
        begin = time.monotonic()
        self.begun.set()
        time.sleep(self.seconds)
        self.spans.append((begin, time.monotonic()))


def asking(urls, patience=20.0):
    """A rollout that asks servers."""
    return VLLMRollout(Servers(urls, Download(), patience=patience, timeout=20.0))


def fitted(folder, path, batches, urls, steps, callbacks=(), patience=20.0, model=None, **more):
    torch.manual_seed(0)
    questions = more.pop("questions", None) or Toys(24)
    if model is None:
        model = learner(folder, batches, rollout=asking(urls, patience), gap=LOOSE)
    settings = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0}
    given = {name: more.pop(name) for name in list(more) if name in ("limit_val_batches",)}
    given |= {name: more.pop(name) for name in list(more) if name == "val_check_interval"}
    run = trainer(path, callbacks=list(callbacks), **(settings | given))
    run.fit(model, data(questions), **more)
    return run


def overlap(one, others):
    """Seconds of an interval that lie in others."""
    return sum(max(0.0, min(one[1], o[1]) - max(one[0], o[0])) for o in others)


@pytest.mark.parametrize("batches", [0, 1])
def test_servers_draw_while_the_trainer_learns_if_it_is_ahead(qwen3, tmp_path, server, batches):
    paced, learning, number = Paced(server, 0.3), Learning(1.0 if batches else 0.1), count(1)

    def draw(handler):
        if batches and next(number) > 4:  # a question of the second batch
            learning.begun.wait(20)
        time.sleep(0.3)

    paced.draw = draw
    fitted(qwen3, tmp_path, batches, [server.url], 2, [learning])
    begins = sorted({round(begin, 1): (begin, end) for begin, end, *_ in paced.drew}.values())
    shared = [overlap(span, begins) for span in learning.spans]
    if batches:
        assert shared[0] > 0.1
    else:
        assert max(shared) == 0.0
    ages = [learning.figures[n].get("age_batches") for n in (1, 2)]
    assert ages == ([0, 1] if batches else [None] * 2)
    assert all(first == last for *_, first, last in paced.drew)


def test_a_slow_server_draws_several_batches_none_of_them_older_than_the_bound(
    qwen3, tmp_path, server, other
):
    """It holds requests of one batch while others come; weights wait until it has ended them."""
    quick, slow, learning = Paced(server, 0.02), Paced(other, 0.4), Learning()
    fitted(qwen3, tmp_path, 2, [server.url, other.url], 6, [learning])
    assert slow.drew and quick.drew
    assert all(first == last for *_, first, last in [*slow.drew, *quick.drew])
    for number, batch in learning.learned.items():
        assert learning.figures[number]["age_batches_max"] <= 2
        assert int(batch.ages[..., 1].max()) <= min(number - 1, 2)
    assert max(figures["age_batches_max"] for figures in learning.figures.values()) > 0
    assert learning.figures[6]["asked_again"] == 0


def test_weights_may_change_amid_responses_whose_tokens_say_which_drew_them(
    qwen3, tmp_path, server, other
):
    """The third batch is asked for in the first step, and drawn until the second publishes."""
    both, third = [Paced(server, 0.02), Paced(other, 0.02)], set()

    class Noting(Learning):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if not third:
                third.update(prompt.ids for prompt in trainer.datamodule.upcoming[1])

    def draw(paced, handler):
        if tuple(json.loads(handler.body)["token_ids"]) in third:
            paced.frozen.clear()  # at its first weights it may be paused, with nothing to draw
            paced.frozen.wait(10)

    for paced in both:
        paced.draw = partial(draw, paced)
    learning = Noting()
    urls, ahead = [server.url, other.url], Ahead(batches=2, within_responses=True)
    model = learner(qwen3, 2, rollout=asking(urls), gap=LOOSE, ahead=ahead)
    fitted(qwen3, tmp_path, 2, urls, 3, [learning], model=model)
    batch = learning.learned[3]
    ages = batch.ages[..., 1]
    assert batch.sampled.all() and (ages.diff(dim=1) <= 0).all()  # later tokens are younger
    assert ages.unique(dim=0).tolist() == [[2, 2, 1, 1, 1]]
    assert learning.figures[3]["age_batches"] == pytest.approx(7 / 5)
    assert not any("mode=wait" in path for each in (server, other) for path, _ in each.asked)


def test_weights_that_change_amid_responses_need_servers(qwen3, tmp_path):
    for batches in (0, 1):
        model = learner(qwen3, batches, ahead=Ahead(batches=batches, within_responses=True))
        with pytest.raises(ConfigurationError, match=r"within_responses: .* only if servers"):
            trainer(tmp_path).fit(model, data())


def test_without_it_servers_are_never_paused(qwen3, tmp_path, server):
    Paced(server, 0.02)
    fitted(qwen3, tmp_path, 0, [server.url], 2)
    asked = [path for path, _ in server.asked]
    assert not any("pause" in path for path in asked) and asked.count("/resume") == 1


def test_what_was_drawn_is_let_go_however_long_a_server_has_something_to_draw(policy, server):
    """Each batch is asked for while the one before is being drawn; none remembers that for ever."""
    gates = [threading.Event() for _ in range(8)]
    paced, rollout = Paced(server, 0.0), asking([server.url])
    paced.draw = lambda handler: gates[json.loads(handler.body)["token_ids"][0]].wait(60)
    before = None
    try:
        for number in range(len(gates)):
            rollout.versions.moved()
            prompt = Prompt(key=f"{number}", messages=(), verifier=None, answer="", ids=(number, 7))
            drawing = rollout.begin(policy, [prompt], Sampling(n=2, max_new_tokens=4))
            if before is not None:
                gates[number - 1].set()
                assert before.responses().prompts[0].key == f"{number - 1}"
            before = drawing
        assert len(rollout.engine._published) == 2
        gates[-1].set()
        before.responses()
        del before, drawing
        gc.collect()
        assert sum(type(each) is RequestQueue for each in gc.get_objects()) <= 2
    finally:
        for gate in gates:
            gate.set()
        rollout.close()


class HalfPlayed(Toys):
    """Every other question has several turns."""

    def __getitem__(self, index):
        one = super().__getitem__(index)
        return replace(one, verifier=Echo(turns=2, words=1) if index % 2 else Coin())


def test_questions_of_one_turn_are_drawn_beside_the_trainer_and_episodes_when_they_are_asked(
    qwen3, tmp_path, server
):
    class Order(Learning):
        def __init__(self):
            super().__init__(0.3)
            self.asked = {}

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.asked[int(module.batches) + 1] = [prompt.key for prompt in batch]

    paced, watch = Paced(server, 0.1), Order()
    paced.longest = 4
    model = learner(
        *(qwen3, 1),
        rollout=asking([server.url]),
        gap=LOOSE,
        sampling=Sampling(n=2, max_new_tokens=60),
    )
    fitted(qwen3, tmp_path, 1, [], 3, [watch], model=model, questions=HalfPlayed(12))
    turns = set()
    for number, batch in watch.learned.items():
        judged = batch.judged
        assert list(judged.keys) == watch.asked[number]
        age = min(number - 1, 1)
        assert batch.ages[batch.sampled].unique(dim=0).tolist() == [[age, age]]
        for prompt, group in zip(judged.prompts, judged.responses.episodes, strict=True):
            assert all(bool(each.parts) == prompt.has_turns for each in group)
            turns |= {prompt.has_turns}
    assert turns == {True, False}
    assert all(first == last for *_, first, last in paced.drew)
    paused = [path for path, _ in server.asked].count("/pause?mode=wait")
    assert paused >= 2  # at each weights but the first, also where nothing is drawn just then


def test_groups_that_a_pool_holds_back_are_of_several_versions_within_the_bound(
    qwen3, tmp_path, server
):
    """Batches that only fill the pool take no step, and make nothing older."""
    Paced(server, 0.02)
    watch = Learning()
    pool = InformativePool(questions=5, max_batches=3)
    model = learner(qwen3, 1, **GRPO, selection=pool, rollout=asking([server.url]), gap=LOOSE)
    fitted(qwen3, tmp_path, 1, [], 3, [watch], model=model)
    assert any(len(labels(batch)) > 1 for batch in watch.learned.values())
    for batch in watch.learned.values():
        assert int(batch.ages.max()) <= 1
        assert torch.equal(batch.ages[..., 0], batch.ages[..., 1])


@pytest.mark.parametrize("batches", [1, 5])
def test_a_run_goes_on_with_fewer_and_with_more_batches_ahead(qwen3, tmp_path, server, batches):
    Paced(server, 0.02)

    class Late(Learning):
        def on_train_batch_end(self, trainer, module, *_):
            super().on_train_batch_end(trainer, module, *_)
            time.sleep(0.3)  # what is asked for is drawn

    run = fitted(qwen3, tmp_path, 3, [server.url], 4, [Late()])
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["ahead"]
    assert sorted(saved["batches"]) == [5, 6, 7]  # with the weights of 1, 2 and 3 steps, or younger
    watch = Learning()
    fitted(qwen3, tmp_path, batches, [server.url], 8, [watch], ckpt_path=tmp_path / "x.ckpt")
    assert max(each["age_batches_max"] for each in watch.figures.values()) <= batches
    assert watch.figures[5]["asked_again"] == (3 if batches == 1 else 0)


def test_more_batches_ahead_than_the_run_or_an_epoch_has(qwen3, tmp_path, server):
    Paced(server, 0.02)
    watch = Learning()
    fitted(qwen3, tmp_path, 9, [server.url], 4, [watch], questions=Toys(8))  # 2 are an epoch
    asked = [watch.learned[n].judged.keys for n in (1, 2, 3, 4)]
    assert {*asked[0], *asked[1]} == {*asked[2], *asked[3]} == {f"toy/{q}" for q in range(8)}
    assert [watch.figures[n]["age_batches_max"] for n in (1, 2, 3, 4)] == [0, 1, 2, 3]
    assert watch.figures[4]["asked_again"] == 0
