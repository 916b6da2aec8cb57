"""Servers draw the next batches while one is learned from: what overlaps, and what fails."""

import json
import time
from functools import partial

import pytest
import torch

from canned_vllm import Paced, serving
from runs import Toys, data, trainer
from scsdpo.errors import ConfigurationError
from scsdpo.metrics import GapCheck
from scsdpo.rollout import Download, Servers, VLLMRollout
from scsdpo.training import Ahead
from test_ahead import Watch, learner

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

    def on_batch(self, trainer, module, batch):
        super().on_batch(trainer, module, batch)
        begin = time.monotonic()
        time.sleep(self.seconds)
        self.spans.append((begin, time.monotonic()))


def fitted(folder, path, batches, urls, steps, callbacks=(), patience=20.0, model=None, **more):
    torch.manual_seed(0)
    if model is None:
        rollout = VLLMRollout(Servers(urls, Download(), patience=patience, timeout=20.0))
        model = learner(folder, batches, rollout=rollout, gap=LOOSE)
    settings = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0}
    given = {name: more.pop(name) for name in list(more) if name in ("limit_val_batches",)}
    given |= {name: more.pop(name) for name in list(more) if name == "val_check_interval"}
    run = trainer(path, callbacks=list(callbacks), **(settings | given))
    run.fit(model, data(Toys(24)), **more)
    return run


def overlap(one, others):
    """Seconds of an interval that lie in others."""
    return sum(max(0.0, min(one[1], o[1]) - max(one[0], o[0])) for o in others)


@pytest.mark.parametrize("batches", [0, 1])
def test_servers_draw_while_the_trainer_learns_if_it_is_ahead(qwen3, tmp_path, server, batches):
    # To bring weights and ask may take most of a second on a busy machine.
    paced, learning = Paced(server, 0.3), Learning(1.5 if batches else 0.1)
    fitted(qwen3, tmp_path, batches, [server.url], 2, [learning])
    begins = sorted({round(begin, 1): (begin, end) for begin, end, *_ in paced.drew}.values())
    shared = [overlap(span, begins) for span in learning.spans]
    if batches:
        assert min(shared) > 0.1
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
    rollout = VLLMRollout(Servers(urls, Download(), patience=20.0, timeout=20.0))
    model = learner(qwen3, 2, rollout=rollout, gap=LOOSE, ahead=ahead)
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
        with pytest.raises(ConfigurationError, match=r"within_responses: .* only where servers"):
            trainer(tmp_path).fit(model, data())


def test_without_it_servers_are_never_paused(qwen3, tmp_path, server):
    Paced(server, 0.02)
    fitted(qwen3, tmp_path, 0, [server.url], 2)
    asked = [path for path, _ in server.asked]
    assert not any("pause" in path for path in asked) and asked.count("/resume") == 1
