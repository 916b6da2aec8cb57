"""Servers that draw ahead are lost, stopped amid a batch, left paused and asked to validate."""

import threading
import time

import pytest
import torch

from canned_vllm import GENERATE, Paced, error, ready
from scsdpo import interrupt
from scsdpo.errors import TrainingStopped
from scsdpo.rollout import Servers, VLLMRollout
from test_ahead import learner
from test_servers import AtOnce
from test_servers_ahead import LOOSE, Learning, fitted, other, server, trusting

__all__ = ["other", "server", "trusting"]  # fixtures


def test_what_a_server_that_dies_has_begun_another_does(qwen3, tmp_path, server, other):
    """It answers a few requests, then none."""
    Paced(server, 0.05)
    dying = Paced(other, 0.05)

    def die(handler):
        return error(500, "died") if len(dying.drew) > 3 else dying.generate(handler)

    other.before[GENERATE] = die
    learning = Learning()
    fitted(qwen3, tmp_path, 1, [server.url, other.url], 5, [learning])
    assert len(dying.drew) >= 3
    assert [learning.figures[n]["age_batches"] for n in range(1, 6)] == [0, 1, 1, 1, 1]


def test_servers_that_are_gone_while_nobody_waits_for_them_end_no_run(qwen3, tmp_path, server):
    """Longer than `patience`, and back when the batch is due."""
    paced, back = Paced(server, 0.05), threading.Event()

    def answer(handler):
        gone = len(paced.drew) >= 4 and not back.is_set()  # from the second batch on
        return error(500, "gone") if gone else paced.generate(handler)

    class Return(Learning):
        def on_batch(self, trainer, module, batch):
            super().on_batch(trainer, module, batch)
            if not back.is_set():
                time.sleep(3.0)
                back.set()

    server.before[GENERATE] = answer
    watch = Return()
    fitted(qwen3, tmp_path, 1, [server.url], 3, [watch], patience=0.5)
    assert [watch.figures[n]["age_batches"] for n in (1, 2, 3)] == [0, 1, 1]


def test_a_run_whose_servers_are_all_gone_stops_and_keeps_what_is_drawn(qwen3, tmp_path, server):
    paced, gone = Paced(server, 0.05), threading.Event()
    server.before[GENERATE] = lambda handler: (
        error(500, "gone") if gone.is_set() else paced.generate(handler)
    )

    class Leave(Learning):
        def on_batch(self, trainer, module, batch):
            super().on_batch(trainer, module, batch)
            if int(module.batches) == 3:
                time.sleep(0.3)  # batch 4 is drawn
                gone.set()

        def on_exception(self, trainer, module, exception):
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    with pytest.raises(TrainingStopped, match="no vLLM server could be used"):
        fitted(qwen3, tmp_path, 1, [server.url], 9, [Leave()], patience=0.5)
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert saved["global_step"] == 4  # batch 4 was learned from, and 5 never came
    assert saved["ahead"]["batches"] == {} and saved["ahead"]["asked_again"] == 1


def test_questions_in_flight_at_a_stop_are_asked_again_and_counted(qwen3, tmp_path, server):
    paced = Paced(server, 0.05)

    class Stop(Learning):
        def on_batch(self, trainer, module, batch):
            super().on_batch(trainer, module, batch)
            if int(module.batches) == 2:
                paced.seconds = 1.5  # batch 3 was drawn in time, 4 will not be

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if int(module.batches) == 3:
                threading.Timer(0.3, interrupt.ask, [15]).start()

        def on_exception(self, trainer, module, exception):
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    start = time.monotonic()
    with pytest.raises(interrupt.Interrupted):
        fitted(qwen3, tmp_path, 1, [server.url], 9, [Stop()])
    assert time.monotonic() - start < 15
    interrupt.reset()
    paced.seconds = 0.05
    learning = Learning()
    fitted(*(qwen3, tmp_path, 1, [server.url], 5, [learning]), ckpt_path=tmp_path / "x.ckpt")
    assert min(learning.learned) == 4 and learning.figures[4]["asked_again"] == 1
    assert [learning.figures[n]["age_batches"] for n in (4, 5)] == [0, 1]


def test_a_validation_is_of_the_newest_weights_while_others_are_being_drawn(
    qwen3, tmp_path, server
):
    paced, learning = Paced(server, 0.1), Learning()
    labels, of_val = [], []

    class Validation(Learning):
        def on_rollouts(self, trainer, module, judged):
            if judged.split == "val":
                of_val.append(judged.responses.labels)
                labels.append(module.rollout.versions.of(module.policy))

    watch = Validation()
    fitted(
        *(qwen3, tmp_path, 1, [server.url], 4, [watch]), limit_val_batches=1, val_check_interval=2
    )
    assert len(of_val) == 2 and of_val == [(label,) for label in labels]
    assert all(first == last for *_, first, last in paced.drew)
    assert learning.figures == {} and watch.figures[4]["age_batches"] == 1


def test_weights_that_the_last_server_lost_are_published_again_when_the_batch_is_due(
    qwen3, tmp_path, server
):
    """It is restarted while it draws a later batch, and gets weights only when all do."""
    paced, learning, restarts = Paced(server, 0.05), Learning(0.3), []

    def restart(handler):
        if len(paced.drew) >= 4 and not restarts:  # the first request of the second batch
            restarts.append(paced.label)
            server.answers |= ready("default")
            return error(500, "going down")
        return paced.generate(handler)

    server.before[GENERATE] = restart
    delivery = AtOnce()
    delivery.at_once = True
    rollout = VLLMRollout(Servers([server.url], delivery, patience=20.0, timeout=20.0))
    model = learner(qwen3, 1, rollout=rollout, gap=LOOSE)
    fitted(qwen3, tmp_path, 1, [], 4, [learning], model=model)
    assert restarts and delivery.published == 4
    assert [learning.figures[n]["age_batches_max"] for n in (1, 2, 3, 4)] == [0, 0, 1, 1]


def test_a_server_that_a_killed_run_left_paused_is_resumed(qwen3, tmp_path, server):
    paced = Paced(server, 0.02)
    paced.paused = True
    fitted(qwen3, tmp_path, 0, [server.url], 1)
    assert paced.drew and not paced.paused
