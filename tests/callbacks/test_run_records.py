"""Responses and tokens that a run leaves behind: what they say, and what they never change."""

import json
import os
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runs import Always, Toys, data, module, trainer, weights
from scsdpo.advantage import GroupRelative
from scsdpo.callbacks import RunRecords
from scsdpo.loss import kernel
from scsdpo.policy import CausalLM, Lora
from scsdpo.records import BatchFiles, HealthRecord, RolloutRecord, TokenRecord
from scsdpo.teacher import NoTeacher
from scsdpo.training import Limits
from scsdpo.types import Sampling
from scsdpo.weighting import Uniform

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = {"questions": "all", "traces": 1000, "trace_every": 1}


def records(folder, name="*"):
    """The lines of each file."""
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob(f"{name}.jsonl"))
    }


def recorded(qwen3, folder, questions=8, settings=EVERYTHING, policy=None, **changes):
    """(weights, files of responses, files of tokens) of a short run."""
    run = trainer(folder, callbacks=[RunRecords(**settings)])
    model = module(qwen3, policy=policy, **changes)
    run.fit(model, data(Toys(questions), Toys(3)))
    return weights(model.policy), records(folder / "rollouts"), records(folder / "tokens")


GRPO = {"advantage": GroupRelative(), "teacher": NoTeacher(), "weighting": Uniform()}


def test_every_response_is_a_line_and_every_token_with_credit_a_column_entry(qwen3, tmp_path):
    _, rollouts, tokens = recorded(qwen3, tmp_path)
    assert set(rollouts) == {"train_000001", "train_000002", "val_000002"}
    assert [len(lines) for lines in rollouts.values()] == [16, 16, 6]
    one = rollouts["train_000001"][0]
    assert one.keys() == RolloutRecord.__annotations__.keys()
    assert one["samples"] == 4 and one["batch"] == 1 and one["step"] == 0
    assert one["messages"][0]["content"] == one["key"].removeprefix("toy/") + "?"
    for name, lines in tokens.items():
        by_place = {(r["key"], r["sample"]): r for r in rollouts[name]}
        traced = {place for place, r in by_place.items() if r["active"]}
        assert traced == {place for place, r in by_place.items() if r["traced"]} != set()
        assert {(r["key"], r["sample"]) for r in lines} == traced
        for line in lines:
            assert line.keys() == TokenRecord.__annotations__.keys()
            response = by_place[line["key"], line["sample"]]
            columns = [v for k, v in line.items() if isinstance(v, list)]
            assert {len(column) for column in columns} == {response["n_tokens"]}
            assert line["weight"] == pytest.approx(response["weight"])
            assert "<|im_end|>" in response["teacher_prompt"]
            specials = re.compile(r"<\|(im_start|im_end|endoftext)\|>")
            if not specials.search("".join(line["text"][:-1])):
                assert specials.sub("", "".join(line["text"])) == response["response"]
            assert max(map(abs, line["gap"])) < 1e-3
            for ids, s, t in zip(
                line["top_ids"], line["top_probs"], line["top_teacher_probs"], strict=True
            ):
                assert s[:5] == sorted(s[:5], reverse=True) and len(set(ids)) == len(ids) >= 5
                assert max(t) >= 1 / 264 and {str(i) for i in ids} <= line["vocabulary"].keys()


def test_nothing_that_is_learned_depends_on_what_is_recorded(qwen3, tmp_path):
    off, rollouts, tokens = recorded(qwen3, tmp_path / "off", settings={"questions": 0})
    assert not rollouts and not tokens and not (tmp_path / "off" / "rollouts").exists()
    on, _, _ = recorded(qwen3, tmp_path / "on")
    assert all(torch.equal(on[name], off[name]) for name in off)


def same_numbers(found, expected):
    for name, lines in expected.items():
        assert len(found[name]) == len(lines)
        for a, b in zip(found[name], lines, strict=True):
            for column in ("credit", "objective", "logprob", "teacher_logprob", "reverse_kl"):
                for x, y in zip(a[column], b[column], strict=True):
                    assert x == pytest.approx(y, rel=2e-3, abs=2e-6), (name, column)


def test_traces_do_not_depend_on_micro_batches_and_chunks(qwen3, tmp_path, monkeypatch):
    _, _, expected = recorded(qwen3, tmp_path / "whole", questions=4)
    monkeypatch.setitem(kernel.CHUNK_BYTES, "cpu", 4 * 264 * 7)
    monkeypatch.setattr(kernel, "FEWEST_ROWS", 7)
    monkeypatch.setitem(kernel.BLOCK_BYTES, "cpu", 4 * 264 * 3)
    small = Limits(max_tokens=60)
    _, _, found = recorded(qwen3, tmp_path / "parts", questions=4, limits=small)
    same_numbers(found, expected)


def test_with_several_updates_each_response_is_traced_in_its_own(qwen3, tmp_path):
    settings = {"updates_per_rollout": 2, "sampling": Sampling(n=4, max_new_tokens=8)}
    _, rollouts, tokens = recorded(qwen3, tmp_path, questions=4, **settings)
    (name,) = tokens
    active = [r for r in rollouts[name] if r["active"]]
    assert len(tokens[name]) == len(active) > 4
    moved = [
        max(abs(g - (s - p)) for g, s, p in zip(*columns, strict=True))
        for line in tokens[name]
        for columns in [(line["gap"], line["logprob"], line["sampler_logprob"])]
    ]
    # The second update's log-probs are of other weights; the gap is of those before the first.
    assert min(moved) < 1e-5 < max(moved)
    assert max(abs(g) for line in tokens[name] for g in line["gap"]) < 1e-3


def test_a_policy_with_lora_factors_is_traced_too(qwen3, tmp_path):
    policy = CausalLM(str(qwen3), adapter=Lora(r=4))
    _, _, tokens = recorded(qwen3, tmp_path, questions=4, policy=policy)
    assert all(c is not None for line in tokens["train_000001"] for c in line["credit"])


def test_grpo_shows_its_flat_credit_and_no_teacher(qwen3, tmp_path):
    _, rollouts, tokens = recorded(qwen3, tmp_path, questions=4, **GRPO)
    rewards = {(r["key"], r["sample"]): r for r in rollouts["train_000001"]}
    for line in tokens["train_000001"]:
        response = rewards[line["key"], line["sample"]]
        p = response["pass_rate"]
        advantage = (response["reward"] - p) / ((p * (1 - p)) ** 0.5 + 1e-6)
        factor = line["coefficient"] * line["weight"] * advantage
        assert line["coefficient"] == pytest.approx(1 / (16 * response["n_tokens"]), rel=1e-5)
        for credit, logprob in zip(line["credit"], line["logprob"], strict=True):
            off = 1 - torch.tensor(logprob).double().exp().item()
            assert credit == pytest.approx(factor * off, rel=1e-3, abs=1e-9)
        assert {*line["teacher_logprob"], *line["jsd"], *line["teacher_entropy"]} == {None}
        assert response["teacher_prompt"] is None


def test_a_few_responses_are_traced_wrong_and_right_of_every_question(qwen3, tmp_path):
    settings = {"questions": 2, "traces": 3, "trace_every": 2}
    _, rollouts, tokens = recorded(qwen3, tmp_path, questions=12, settings=settings, **GRPO)
    assert set(tokens) == {"train_000001", "train_000003"}
    for name, lines in rollouts.items():
        assert len({r["key"] for r in lines}) == 2, name
    for name, lines in tokens.items():
        by_place = {(r["key"], r["sample"]): r for r in rollouts[name]}
        assert len(lines) == 3
        verdicts = [by_place[r["key"], r["sample"]]["success"] for r in lines]
        assert set(verdicts) == {True, False}


def test_of_a_batch_that_teaches_nothing_responses_are_written_alone(qwen3, tmp_path):
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(module(qwen3), data(Toys(verifier=Always(1.0))))
    assert len(records(tmp_path / "rollouts")) == 3 and not records(tmp_path / "tokens")


def test_a_question_that_is_twice_in_a_batch_is_recorded_twice(qwen3, tmp_path):
    """Where one pass over the questions ends and the next begins."""
    run = trainer(tmp_path, max_epochs=2, callbacks=[RunRecords(**EVERYTHING)])
    run.fit(module(qwen3), data(Toys(5), Toys(3)))
    rollouts, tokens = records(tmp_path / "rollouts"), records(tmp_path / "tokens")
    lines = rollouts["train_000002"]
    # Its responses are numbered on: four and four of one question.
    assert len(lines) == len({(line["key"], line["sample"]) for line in lines}) == 16
    assert Counter(Counter(line["key"] for line in lines).values()) == {4: 2, 8: 1}
    assert {line["sample"] for line in lines} == set(range(8))
    assert len(tokens["train_000002"]) == sum(line["active"] for line in lines)


def test_a_disk_that_is_full_costs_records_and_not_the_run(qwen3, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BatchFiles, "write", full)
    run = trainer(tmp_path, limit_val_batches=0)
    with pytest.warns(UserWarning, match="the record of responses failed, the run goes on"):
        run.fit(module(qwen3), data())
    assert run.global_step > 0


def test_files_are_whole_cut_and_set_aside(tmp_path):
    files = BatchFiles(tmp_path / "rollouts", most_bytes=1e6)
    for batch in range(1, 5):
        files.write("train", batch, [{"n": batch}, {"n": float("nan")}])
    files.write("val", 4, [{"n": 0}])
    (files.folder / "train_000005.part").write_text('{"n":')
    files.write("train", 2, [{"n": "again"}])
    files.cut(3)
    assert records(files.folder) == {
        "train_000001": [{"n": 1}, {"n": None}],
        "train_000002": [{"n": "again"}],
        "train_000003": [{"n": 3}, {"n": None}],
    }
    assert len(os.listdir(files.folder)) == 3
    copy = BatchFiles(tmp_path / "new" / "rollouts", most_bytes=1e6)
    copy.begin(1, tmp_path / "checkpoints" / "x.ckpt")
    assert list(records(copy.folder)) == ["train_000001"] and len(records(files.folder)) == 3
    for _ in range(2):
        files.begin(0, None)
        files.write("train", 1, [{"n": 9}])
    assert sorted(os.listdir(tmp_path)) == ["new", "rollouts", "rollouts.1", "rollouts.2"]


def test_what_outgrows_its_bound_is_thinned_out_evenly(tmp_path):
    files = BatchFiles(tmp_path, most_bytes=10 * 9)
    for batch in range(1, 201):
        files.write("train", batch, [{"n": 10}])  # 10 bytes
        files.write("val", batch, [{"n": 10}]) if batch == 1 or batch % 100 == 0 else None
    kept = {
        split: [int(name[-6:]) for name in records(tmp_path, f"{split}*")]
        for split in ("train", "val")
    }
    assert kept["val"] == [1, 100, 200] and len(kept["train"]) == 6
    assert kept["train"][0] == 1 and kept["train"][-1] == 200
    steps = [b - a for a, b in zip(kept["train"], kept["train"][1:], strict=False)]
    assert max(steps) <= 4 * min(steps[:-1])


def test_pieces_of_text_add_up_where_tokens_split_a_character(policy):
    chat = policy.chat
    text = "aé🙂 b"
    ids = [*chat.encode(text), chat.eos_ids[0]]
    pieces = chat.pieces(ids)
    assert pieces == ["a", "", "é", "", "", "", "🙂", " ", "b", "<|im_end|>"]
    broken = chat.encode("🙂")[:2] + chat.encode("x") + chat.encode("🙂")[:3]
    assert "".join(chat.pieces(broken)) == chat.tokenizer.decode(broken)
    assert chat.pieces([chat.encode("z")[0], 10**6]) == ["z", ""]
    for seed in range(200):  # characters behind bytes that are none
        drawn = random.Random(seed).choices(chat.encode("aé🙂η"), k=12)
        assert "".join(chat.pieces(drawn)) == chat.tokenizer.decode(drawn)


def test_docs_name_every_field():
    page = (ROOT / "docs" / "records.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    for kind in (RolloutRecord, TokenRecord, HealthRecord):
        assert not set(kind.__annotations__) - named, kind


@pytest.mark.parametrize(
    "settings", [{"traces": -1}, {"questions": -1}, {"candidates": 0}, {"max_megabytes": 0}]
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RunRecords(**settings)


def test_a_record_is_of_a_frozen_batch(qwen3, tmp_path):
    """What callbacks are shown is weighed and planned in training alone."""
    from scsdpo.callbacks import RolloutCallback

    class Looking(RolloutCallback):
        def __init__(self):
            self.seen, self.learned = [], []

        def on_rollouts(self, trainer, module, judged):
            self.seen.append(replace(judged))

        def on_batch(self, trainer, module, batch):
            self.learned.append(replace(batch))

    looking = Looking()
    trainer(tmp_path, callbacks=[looking]).fit(module(qwen3), data(Toys(4), Toys(2)))
    assert [judged.split for judged in looking.seen].count("train") == 1
    (learned,) = looking.learned
    active = learned.active.view_as(learned.judged.rewards)
    assert torch.equal(active, learned.plan.needs_teacher & (learned.weights > 0))
