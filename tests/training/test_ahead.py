"""Sampling ahead: which weights drew what is learned from, and that a resumed run is the same."""

import json
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch

import worlds
from runs import Toys, assert_same, data, module, trainer
from scsdpo import interrupt
from scsdpo.advantage import GroupRelative
from scsdpo.callbacks import RunRecords
from scsdpo.callbacks.rollouts import RolloutCallback
from scsdpo.errors import ConfigurationError
from scsdpo.loss import NoImportance, SamplerImportance, TokenImportance
from scsdpo.metrics import GapCheck
from scsdpo.policy import CausalLM
from scsdpo.rollout.weights.hashing import weights_digest
from scsdpo.selection import InformativePool
from scsdpo.teacher import EMA, NoTeacher, PlainPrompt
from scsdpo.training import Ahead
from scsdpo.training.ahead import DrawnAhead, _share, _whole
from scsdpo.types import Moment, Prompt, Responses, Sampling
from scsdpo.verifiers import ExactMatch, Verification
from scsdpo.weighting import Uniform

STOP = tuple("aeiou0123456789")
"""A random model says one of these soon, so that its turns end."""
TWICE = {"updates_per_rollout": 2}
GRPO = {"advantage": GroupRelative(), "teacher": NoTeacher()}


def learner(folder, batches, **settings):
    torch.manual_seed(0)
    defaults = {
        "ahead": Ahead(batches=batches),
        "importance": TokenImportance(),
        "sampling": Sampling(n=4, max_new_tokens=5),
        "verification": Verification(workers=1),
        # Every batch takes its step.
        "teacher": EMA(context=PlainPrompt()),
        "weighting": Uniform(),
    }
    policy = CausalLM(str(folder), self_check=False)
    return module(folder, policy, **(defaults | settings))


class Watch(RolloutCallback):
    """By batch: the weights that it was learned with, what it was drawn with, its figures."""

    def __init__(self):
        self.weights, self.learned, self.figures = {}, {}, {}

    def on_batch(self, trainer, module, batch):
        self.weights[int(module.batches)] = weights_digest(module.policy.language_model)
        self.learned[int(module.batches)] = batch

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        names = [name for name in module.recorder.logged if name.startswith("train/")]
        known = {name[6:]: float(trainer.callback_metrics[name]) for name in names}
        self.figures[int(module.batches)] = known


def fit(model, folder, steps, *, questions=None, callbacks=(), **more):
    torch.manual_seed(0)
    limits = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0}
    run = trainer(folder, callbacks=list(callbacks), **limits)
    run.fit(model, questions or data(), **more)
    return run


def labels(batch):
    """The weights that drew a batch, by label."""
    responses = batch.judged.responses
    used = responses.versions[responses.sampled].unique().tolist()
    return {responses.labels[number] for number in used}


@pytest.mark.parametrize("updates", [1, 2])
def test_a_batch_is_drawn_with_the_weights_of_its_time_and_learned_from_k_batches_later(
    qwen3, tmp_path, updates
):
    watch = Watch()
    model = learner(qwen3, 2, updates_per_rollout=updates)
    fit(model, tmp_path, 6 * updates, callbacks=[watch])  # 3 batches are an epoch
    assert len(set(watch.weights.values())) == 6
    for number, batch in watch.learned.items():
        age = min(number - 1, 2)
        assert labels(batch) == {watch.weights[number - age]}
        assert batch.ages[batch.sampled].unique(dim=0).tolist() == [[age * updates, age]]
        figures = watch.figures[number]
        assert figures["age_batches"] == figures["age_batches_max"] == age
        assert figures["age_steps"] == figures["age_steps_max"] == age * updates
        assert figures["other_versions"] == (age > 0)
        assert figures["asked_again"] == 0
        assert 0 < figures["importance_ess"] <= 1 and 0 < figures["ratio_ess"] <= 1
        assert ("logprob_drift" in figures) == (age > 0)


def test_questions_seeds_and_figures_are_those_of_a_run_that_draws_at_once(qwen3, tmp_path):
    """Without steps that move weights nothing else differs: each batch has its own draws."""
    still = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    seen = []
    for batches in (0, 3):
        watch = Watch()
        fit(learner(qwen3, batches, **still), tmp_path, 5, callbacks=[watch])
        seen.append(watch)
    for number, batch in seen[0].learned.items():
        ours, theirs = seen[1].learned[number].judged, batch.judged
        assert ours.keys == theirs.keys
        assert torch.equal(ours.responses.ids, theirs.responses.ids)
        figures = seen[1].figures[number]
        for name in ("loss", "pass_rate", "response_length", "objective"):
            assert figures.get(name) == seen[0].figures[number].get(name)
        assert "age_steps" not in seen[0].figures[number]
        assert not theirs.responses.drawn_at


def test_a_run_without_it_does_not_take_its_path(qwen3, tmp_path, monkeypatch):
    monkeypatch.setattr("scsdpo.training.ahead.DrawnAhead.responses", None)
    fit(learner(qwen3, 0), tmp_path, 1).save_checkpoint(tmp_path / "x.ckpt")
    assert "ahead" not in torch.load(tmp_path / "x.ckpt", weights_only=True)


def halves(folder, path, settings, *, steps, **world):
    """A whole run, and one that was resumed from the checkpoint of a third."""

    def run(steps, **more):
        model, watch = learner(folder, 2, **settings()), Watch()
        questions = data(Toys(**world))
        return fit(model, path, steps, questions=questions, callbacks=[watch], **more), watch

    run(2)[0].save_checkpoint(path / "half.ckpt")
    return run(steps), run(steps, ckpt_path=path / "half.ckpt")


def test_a_resumed_run_is_the_same_to_the_bit(qwen3, tmp_path):
    """With a pool that waits for groups, and several updates a batch."""

    def settings():
        pool = InformativePool(questions=3, max_batches=2)
        return GRPO | {"selection": pool, "importance": SamplerImportance()} | TWICE

    (whole, seen), (resumed, again) = halves(qwen3, tmp_path, settings, steps=6)
    states = [dict(run.lightning_module.state_dict()) for run in (resumed, whole)]
    assert_same(*states, "state")
    assert again.learned and again.figures.keys() < seen.figures.keys()
    for number, figures in again.figures.items():
        timed = ("seconds/", "memory", "tokens/")
        mine, theirs = (
            {n: v for n, v in each.items() if not n.startswith(timed)}
            for each in (figures, seen.figures[number])
        )
        assert mine == theirs


def test_an_episode_that_waits_keeps_its_turns_and_the_verdict_of_its_world(qwen3, tmp_path):
    def settings():  # in which order worlds answer moves rounding, hence no step
        still = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
        return still | {"sampling": Sampling(n=2, max_new_tokens=40, stop=STOP)}

    world = {"verifier": worlds.Echo(turns=2, words=1)}
    (_, seen), (_, again) = halves(qwen3, tmp_path, settings, steps=3, **world)
    (number,) = again.learned  # was drawn before the checkpoint
    mine, theirs = again.learned[number].judged, seen.learned[number].judged
    for name in ("ids", "present", "sampled", "turns"):
        assert torch.equal(getattr(mine.responses, name), getattr(theirs.responses, name))
    assert mine.responses.episodes == theirs.responses.episodes
    assert mine.verdicts == theirs.verdicts and mine.texts == theirs.texts
    played = [each for group in mine.responses.episodes for each in group if each.parts]
    assert played and all(each.verdict for each in played)
    for ours, other in zip(mine.prompts, theirs.prompts, strict=True):
        assert (ours.key, ours.messages, ours.ids) == (other.key, other.messages, other.ids)


class Interrupting(L.Callback):
    """Asks the run to stop when a batch begins, once all of it is known."""

    def __init__(self, batch, path):
        self.batch, self.path = batch, path

    def on_exception(self, trainer, module, exception):
        trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if int(module.batches) == self.batch:
            interrupt.ask(15)


def test_a_batch_that_is_given_up_is_asked_again_with_what_waited(qwen3, tmp_path):
    whole = learner(qwen3, 2)
    fit(whole, tmp_path, 5)
    stopped, callback = learner(qwen3, 2), Interrupting(3, tmp_path / "stopped.ckpt")
    torch.manual_seed(0)
    run = trainer(tmp_path, max_steps=5, max_epochs=-1, limit_val_batches=0, callbacks=[callback])
    with pytest.raises(interrupt.Interrupted):
        run.fit(stopped, data())
    interrupt.reset()
    resumed = learner(qwen3, 2)
    fit(resumed, tmp_path, 5, ckpt_path=tmp_path / "stopped.ckpt")
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()), "state")


def test_what_is_too_old_or_answers_other_questions_or_sampling_is_asked_again_and_counted(
    qwen3, tmp_path
):
    fit(learner(qwen3, 3), tmp_path, 4).save_checkpoint(tmp_path / "old.ckpt")
    # Batches 5, 6 and 7 wait, drawn with the weights of 2, 3 and 4 steps.
    watch = Watch()
    fit(learner(qwen3, 1), tmp_path, 7, callbacks=[watch], ckpt_path=tmp_path / "old.ckpt")
    assert [watch.figures[n]["age_batches_max"] for n in (5, 6, 7)] == [0, 1, 1]
    assert [watch.figures[n]["asked_again"] for n in (5, 6, 7)] == [3, 3, 3]
    watch = Watch()
    for change in ({"n": 2}, {"max_new_tokens": 4}, {"top_p": 0.9}, {"stop": ("a",)}):
        watch = Watch()
        other = learner(qwen3, 3, sampling=Sampling(**{"n": 4, "max_new_tokens": 5} | change))
        fit(other, tmp_path, 5, callbacks=[watch], ckpt_path=tmp_path / "old.ckpt")
        assert watch.figures[5]["asked_again"] == 3 and watch.figures[5]["age_batches_max"] == 0
    watch, questions = Watch(), data(Toys(13))  # in another order
    fit(
        *(learner(qwen3, 3), tmp_path, 5),
        questions=questions,
        callbacks=[watch],
        ckpt_path=tmp_path / "old.ckpt",
    )
    assert watch.figures[5]["asked_again"] == 3


def test_groups_that_a_pool_holds_back_stay_within_the_bound(qwen3, tmp_path):
    watch = Watch()
    pool = InformativePool(questions=5, max_batches=3)
    fit(learner(qwen3, 1, **GRPO, selection=pool), tmp_path, 3, callbacks=[watch])
    assert any(len(labels(batch)) > 1 for batch in watch.learned.values())
    for batch in watch.learned.values():
        assert int(batch.ages.max()) <= 1
        assert torch.equal(batch.ages[..., 0], batch.ages[..., 1])


def test_the_gap_is_that_of_tokens_that_present_weights_drew(qwen3, tmp_path):
    """Older ones drift apart by learning; a sampler that lies is found where it is not that."""
    fast = {
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=100.0),
        "gap": GapCheck(warn=0.001, stop=0.01),
    }
    watch = Watch()
    fit(learner(qwen3, 1, **fast), tmp_path, 3, callbacks=[watch])
    figures = watch.figures
    assert figures[1]["logprob_gap"] < 1e-4
    assert "logprob_gap" not in figures[3]
    assert figures[3]["logprob_drift"] > 0.01  # a gap of that size would have stopped the run
    assert figures[3]["ratio_ess"] < 1


def test_records_say_the_age_of_responses_and_tokens(qwen3, tmp_path):
    records = RunRecords(questions="all", trace_every=1)
    fit(learner(qwen3, 1), tmp_path, 3, callbacks=[records])
    (file,) = tmp_path.rglob("rollouts/train_000003.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(line["age_steps"], line["age_batches"]) for line in lines} == {(1, 1)}
    (file,) = tmp_path.rglob("tokens/train_000003.jsonl")
    for line in map(json.loads, file.read_text().splitlines()):
        assert line["age"] == [1] * len(line["ids"])
        assert line["version"] == [lines[0]["version"]] * len(line["ids"])


def mixed(number, drawn_at, names):
    """One response of three tokens, which the weights `number` drew."""
    shape = (1, 1, 3)
    one = Responses.of_one_turn(
        prompts=(Prompt(key="k", messages=(), verifier=ExactMatch(), answer=""),),
        ids=torch.zeros(shape, dtype=torch.int64),
        sampled=torch.ones(shape, dtype=torch.bool),
        sampling_logprobs=torch.zeros(shape),
        policy_logprobs=torch.zeros(shape),
        ended=torch.ones(1, 1, dtype=torch.bool),
        texts=(("",),),
        temperature=1.0,
    )
    versions = torch.tensor(number, dtype=torch.int32).view(shape)
    return replace(one, labels=names, drawn_at=drawn_at, versions=versions)


def test_ages_are_by_token_and_survive_batches_that_are_put_together():
    first = mixed([0, 0, 1], (Moment(2, 1), Moment(6, 3)), ("a", "c"))
    second = mixed([1, 0, 0], (Moment(4, 2), Moment(6, 3)), ("b", "c"))
    now = Moment(8, 4)
    assert first.ages(now)[0, 0].tolist() == [[6, 3], [6, 3], [2, 1]]
    both = second.cat([first])
    assert both.labels == ("a", "b", "c") and both.version == "c"
    assert both.ages(now)[:, 0, :, 0].tolist() == [[2, 4, 4], [6, 6, 2]]
    assert [both.version_of(q, 0) for q in (0, 1)] == ["c", "c"]
    assert mixed([0, 0, 0], (), ("",)).ages(now).sum() == 0


@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (2, 3), (3, 2)])
def test_what_waits_is_shared_out_anew_over_another_number_of_ranks(ranks):
    before, after = ranks
    rows = [mixed([q, 0, 1], (Moment(1, q), Moment(3, 3)), ("a", "b"))[[0]] for q in (0, 1) * 3]
    for q, row in enumerate(rows):
        prompt = replace(row.prompts[0], key=f"{q}", ids=(q,))
        rows[q] = replace(row, prompts=(prompt,), ids=row.ids + q, drawn_at=rows[0].drawn_at)
    shares = [rows[rank].cat(rows[rank + before :: before]) for rank in range(before)]
    stored = _whole(shares, Sampling())
    for rank in range(after):
        mine = slice(rank, None, after)
        prompts = tuple(replace(row.prompts[0], ids=()) for row in rows[mine])
        share = _share(stored, prompts, mine)
        assert [prompt.ids for prompt in share.prompts] == [(q,) for q in range(6)[mine]]
        assert share.ids[:, 0, 0].tolist() == list(range(6)[mine])
        expected = [[int(each) for each in row.versions[0, 0]] for row in rows[mine]]
        assert share.versions[:, 0].tolist() == expected
        assert share.drawn_at == rows[0].drawn_at and share.labels == ("a", "b")
    assert _share(stored, prompts[::-1], mine) is None or len(prompts) == 1


def test_a_rank_that_saves_alone_asks_nobody_and_what_another_has_lost_is_lost(monkeypatch):
    row = mixed([0, 0, 1], (Moment(1, 1), Moment(3, 3)), ("a", "b"))
    ahead = DrawnAhead(Ahead(batches=2))
    sampling = Sampling(n=1)
    batches = {number: _whole([row], sampling.at(number)) for number in (4, 5)}
    ahead.load({"moved": 3, "asked_again": 0, "batches": batches})
    host = SimpleNamespace(batches=torch.tensor(4), sampling=sampling, finish=None)
    ahead.responses(host, row.prompts, [row.prompts], step=3)  # batch 4; 5 waits
    assert ahead.saved(host, 3, under_way=False, alone=False)["batches"].keys() == {5}
    monkeypatch.setattr("scsdpo.training.ahead.rank_and_size", lambda: (0, 2))
    monkeypatch.setattr("scsdpo.training.ahead.all_gather", None)
    saved = ahead.saved(host, 3, under_way=False, alone=True)
    assert saved["batches"] == {} and saved["asked_again"] == 1
    monkeypatch.setattr("scsdpo.training.ahead.all_max", torch.ones_like)  # the other rank's word
    ahead.begin(3)
    assert ahead.asked_again == 1
    assert ahead.saved(host, 3, under_way=False, alone=True)["asked_again"] == 1


def test_a_module_that_is_fitted_again_with_other_data_learns_from_those(qwen3, tmp_path):
    model, watch = learner(qwen3, 1), Watch()
    fit(model, tmp_path, 1)
    torch.manual_seed(0)
    fit(model, tmp_path, 2, questions=data(Toys(13)), callbacks=[watch])
    own = Watch()
    fit(learner(qwen3, 0), tmp_path, 2, questions=data(Toys(13)), callbacks=[own])
    assert [watch.learned[n].judged.keys for n in (2, 3)] == [
        own.learned[n].judged.keys for n in (1, 2)
    ]
    assert watch.figures[2]["asked_again"] == 1


def test_upcoming_batches_are_those_that_come_also_over_the_end_of_an_epoch(qwen3):
    model = learner(qwen3, 2)
    questions = data(Toys(10), questions_per_batch=4)
    questions.ahead = 2
    questions.set_up_for(model)
    loader = questions.train_dataloader()
    epochs = [list(loader) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [2, 2, 2]
    batches = [batch for epoch in epochs for batch in epoch]
    keys = [[prompt.key for prompt in batch] for batch in batches]
    for number, batch in enumerate(batches):
        told = [[prompt.key for prompt in each] for each in batch.upcoming]
        assert len(told) == 2
        assert told[: len(keys) - number - 1] == keys[number + 1 : number + 3]
    plain = data(Toys(10), questions_per_batch=4)
    plain.set_up_for(model)
    others = plain.train_dataloader()
    assert [[p.key for p in b] for _ in range(3) for b in others] == keys
    assert next(iter(loader)).upcoming and not next(iter(others)).upcoming


def test_what_cannot_know_its_next_batches_is_refused(qwen3, tmp_path):
    with pytest.raises(ValueError, match=r"`Ahead\(batches=...\)` must be >= 0, got -1"):
        Ahead(batches=-1)
    with pytest.raises(ConfigurationError, match=r"trainer.overfit_batches: .*model.ahead.batches"):
        trainer(tmp_path, overfit_batches=1).fit(learner(qwen3, 1), data())
    loader = torch.utils.data.DataLoader([1])
    with pytest.raises(
        ConfigurationError, match=r"which NoneType does not give: use scsdpo.data.TaskDataModule"
    ):
        trainer(tmp_path, limit_val_batches=0).fit(learner(qwen3, 1), loader, loader)


@pytest.mark.parametrize("importance", [NoImportance(), SamplerImportance()])
def test_one_line_says_that_older_tokens_are_not_corrected(qwen3, tmp_path, caplog, importance):
    caplog.set_level("INFO")
    fit(learner(qwen3, 1, importance=importance), tmp_path, 1)
    said = "older weights sample some tokens, and model.importance is NoImportance" in caplog.text
    assert said == isinstance(importance, NoImportance)
