import json
import random
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from pretrain import Mixture, examples, lab_tokenizer, pretrain
from supervised import (
    RECORD,
    Example,
    accuracy,
    batches,
    build_policy,
    respond,
    response_loss,
    save,
    warm_up,
    well_formed,
    write_record,
)

from scsdpo.lab import LEVELS, LabTasks
from scsdpo.policy import TINY_FOLDER, CausalLM, Chat
from scsdpo.teacher.templates import Templates
from scsdpo.types import Sampling, stable_hash


@pytest.fixture(scope="module")
def tokenizer():
    return lab_tokenizer(questions=200)


@pytest.fixture(scope="module")
def chat(tokenizer):
    return Chat(tokenizer=tokenizer, eos_ids=(tokenizer.eos_token_id,))


@pytest.fixture(scope="module")
def shipped():
    return AutoTokenizer.from_pretrained(TINY_FOLDER)


def small(tokenizer):
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return build_policy(config, tokenizer)


# ------------------------------------------------------------------ tokenizer


def test_any_text_survives_the_tokenizer(tokenizer, shipped):
    rng = random.Random(0)
    texts = ["".join(chr(rng.randrange(0xD800)) for _ in range(40)) for _ in range(50)]
    texts += [
        "",
        " ",
        "\n\n  x\t\r\n",
        "naïve 東京 🧪 ²³ ٣",
        "</reasoning>\n<answer>7",
        "a <|end|> b",
    ]
    for each in (tokenizer, shipped):
        for text in texts:
            assert each.decode(each.encode(text, add_special_tokens=False)) == text


def test_a_digit_is_always_one_token(shipped):
    for text in ("7", " 7", "x7y", "1234567890", "7*6=42", '": 300}', "<answer>57"):
        tokens = [shipped.decode([i]) for i in shipped.encode(text, add_special_tokens=False)]
        assert [t for t in tokens if any(c.isdigit() for c in t)] == [
            c for c in text if c.isdigit()
        ]


def test_the_template_opens_the_assistants_turn_and_keeps_every_role(shipped):
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    text = shipped.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>s<|end|><|user|>u<|end|><|assistant|>a<|end|><|assistant|>"


def test_prompts_and_responses_are_short(shipped):
    chat = Chat(tokenizer=shipped, eos_ids=(shipped.eos_token_id,))
    tasks = LabTasks("train")
    questions = [tasks.question(i) for i in range(400)]
    prompts = [len(chat.render(q.messages)) for q in questions]
    responses = [len(chat.encode(q.response(wording=1))) + 1 for q in questions]
    assert sum(prompts) / 400 < 45 and max(prompts) < 90
    assert sum(responses) / 400 < 35 and max(responses) < 64


# ------------------------------------------------------------------ warm-up


def test_only_the_response_is_learned(tokenizer, chat):
    example = Example(
        messages=[{"role": "user", "content": "a"}], prefix="Action: x", response="42"
    )
    ((ids, learned),) = batches(chat, iter([example]), 4)
    assert tokenizer.decode(ids[0]) == "<|user|>a<|end|><|assistant|>Action: x42<|end|>"
    assert tokenizer.decode(ids[learned]) == "42<|end|>"


def test_batches_hold_every_example_once_whatever_the_padding(chat):
    drawn = list(islice(examples(Mixture(), 0), 50))
    got = [
        row[row != chat.pad_id].tolist() for ids, _ in batches(chat, iter(drawn), 8) for row in ids
    ]
    wanted = [
        [*chat.render(e.messages), *chat.encode(e.prefix), *chat.encode(e.response), *chat.eos_ids]
        for e in drawn
    ]
    assert sorted(got) == sorted(wanted)


def test_response_loss_is_the_mean_over_learned_tokens(tokenizer, chat):
    model = small(tokenizer)
    drawn = list(islice(examples(Mixture(), 1), 5))
    ((ids, learned),) = batches(chat, iter(drawn), 5)
    terms = []
    for row, mask in zip(ids, learned, strict=True):  # rows alone and unpadded
        row, mask = row[row != chat.pad_id], mask[row != chat.pad_id]
        logits = model(row[None]).logits[0, :-1]
        terms.append(cross_entropy(logits, row[1:], reduction="none")[mask[1:]])
    torch.testing.assert_close(response_loss(model, ids, learned), torch.cat(terms).mean())


def test_shares_of_the_pitfalls_are_avoided_or_fatal_and_the_others_keep_their_range():
    names = [f"pitfall {i}" for i in range(1000)]
    mixture = Mixture(avoided=0.5, fatal=0.1)
    rates = {name: mixture.rate(name) for name in names}
    assert sum(rate == 0.01 for rate in rates.values()) == pytest.approx(500, abs=50)
    assert sum(rate == 0.95 for rate in rates.values()) == pytest.approx(100, abs=30)
    between = [rate for rate in rates.values() if rate not in (0.01, 0.95)]
    assert 0.1 <= min(between) < 0.12 and 0.68 < max(between) <= 0.7
    plain = {name: Mixture().rate(name) for name in names}
    assert min(plain.values()) >= 0.1 and max(plain.values()) <= 0.7
    assert sorted(names, key=plain.__getitem__)[-1] in {n for n, r in rates.items() if r == 0.95}


def test_a_warm_up_goes_on_from_a_folder(tokenizer, tmp_path):
    save(small(tokenizer), tokenizer, tmp_path / "start")
    pretrain(tmp_path / "next", steps=0, start=tmp_path / "start")
    first, second = (CausalLM(str(tmp_path / name)) for name in ("start", "next"))
    first.configure_model()
    second.configure_model()
    mine = dict(second.language_model.named_parameters())
    for name, parameter in first.language_model.named_parameters():
        torch.testing.assert_close(mine[name], parameter, rtol=0, atol=0)


def test_a_few_steps_lower_the_loss_and_the_folder_loads(tokenizer, chat, tmp_path):
    model = small(tokenizer)
    losses = list(warm_up(model, chat, examples(Mixture(), 0), steps=3, batch_size=16))
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    save(model, tokenizer, tmp_path)
    policy = CausalLM(str(tmp_path))
    policy.configure_model()
    again = policy.language_model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_a_record_names_the_command_without_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--seed", "3", "--out", str(tmp_path), "--steps", "2"])
    write_record(tmp_path, "benchmarks/pretrain.py", [4.0, 2.0], seed=3, seconds=1.4)
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["command"] == "python benchmarks/pretrain.py --seed 3 --steps 2"
    assert (record["steps"], record["last_losses"], record["wall_seconds"]) == (2, 3.0, 1)


def test_warm_up_is_seeded(tokenizer, chat):
    runs = [
        list(warm_up(small(tokenizer), chat, examples(Mixture(), 0), steps=2, batch_size=8))
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_taught_examples_are_right_and_bare_ones_err_now_and_then():
    tasks = LabTasks("train", seed=stable_hash("pretrain", 0))
    bare = []
    for i, example in enumerate(islice(examples(Mixture(), 0), 300)):
        question, prompt = tasks.question(i), tasks[i]
        reward = prompt.verifier.verify(prompt, example.prefix + example.response).reward
        if tuple(example.messages) == question.messages:
            bare.append(reward)
            continue
        shown = [question.response(wording=w) for w in range(question.wordings)]
        assert any(text in example.messages[-1]["content"] for text in shown)
        assert reward == (0 if example.prefix else 1)
    assert 0.15 * 300 < len(bare) < 0.45 * 300
    assert 0.1 < sum(bare) / len(bare) < 0.9


# ------------------------------------------------------------------ the shipped policy


def test_the_shipped_folder_is_small_and_loads_as_any_checkpoint():
    assert sum(file.stat().st_size for file in TINY_FOLDER.iterdir()) < 5e6
    model = AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    assert model.num_parameters() < 1.5e6
    assert model.config.head_dim == 64
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.max_position_embeddings >= 1024
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    assert len(tokenizer) == model.config.vocab_size
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_record_names_how_the_weights_were_made():
    record = json.loads((TINY_FOLDER / RECORD).read_text())
    assert record["command"].startswith("python benchmarks/pretrain.py")
    assert {"seed", "steps", "wall_seconds", "versions", "parameters"} <= set(record)
    for figures in (record["accuracy"]["bare"], record["accuracy"]["bare_sharp"]):
        levels = [figures[f"level{level}"] for level in LEVELS]
        assert sum(levels) / len(levels) == pytest.approx(figures["all"], abs=1e-9)
        assert levels[0] > levels[-1] > 0
        assert 0.25 < figures["all"] < 0.5
    assert record["accuracy"]["well_formed"] > 0.95
    assert record["accuracy"]["teacher"]["all"] >= 0.95


def test_the_shipped_policy_is_what_the_record_says():
    """200 draws of the 0.4 that were recorded: within 4 standard errors."""
    record = json.loads((TINY_FOLDER / RECORD).read_text())["accuracy"]
    policy, tasks = CausalLM("tiny"), LabTasks("val", seed=11)
    policy.configure_model()
    prompts = [tasks[i] for i in range(100)]
    rollouts, verdicts = respond(policy, prompts, Sampling(n=2, max_new_tokens=64))
    assert accuracy(prompts, verdicts)["all"] == pytest.approx(record["bare"]["all"], abs=0.14)
    assert well_formed(rollouts, verdicts) > 0.93
    gold = [tasks.question(i).response() for i in range(100)]
    told = [
        replace(p, messages=tuple(Templates().fill(p.messages, demonstration=text)))
        for p, text in zip(prompts, gold, strict=True)
    ]
    _, taught = respond(policy, told, Sampling(n=1, max_new_tokens=64))
    assert accuracy(told, taught)["all"] > 0.88
