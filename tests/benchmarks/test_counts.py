"""Kernels and attention calls of an update, counted on CPU as a GPU would run it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from batches import ALL, METHODS, parts
from scsdpo.policy import CausalLM, FullFineTune, Lora
from scsdpo.policy.runner import SharedPrompts

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import counts
from work_order import Order


@pytest.fixture
def task(tmp_path):
    """Questions after one common turn of a system, as long as a level of its own takes."""
    system = "Answer with one letter, and think before you do. " * 2
    rows = [{"system": system, "prompt": f"{i} " + chr(97 + i) * 60} for i in range(8)]
    path = tmp_path / "task.json"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def loaded(folder, layers):
    policy = CausalLM(str(folder))
    policy.configure_model()
    return counts.without_layers(policy, layers)


def counted(folder, task, questions, layers, **order):
    """Of responses of 6 tokens each, unless `order` says otherwise; in one micro-batch."""
    settings = {"questions": questions, "rollouts": 8, "tokens": 6, "budget": 10**6} | order
    return counts.count(loaded(folder, layers), task, Order(**settings))


def test_a_layer_takes_at_most_650_kernels_and_a_call_for_each_level(qwen3, task):
    one, two = (counted(qwen3, task, 8, layers) for layers in (1, 2))
    assert one.micro_batches == 1
    assert 400 < two.kernels - one.kernels <= 650
    # The system's turn, the questions, what the teacher is told, responses. Of each call one is of
    # tokens to their own segment, and the others go through the levels above.
    student, teacher = (1 + 1) + (1 + 2), (1 + 2) + (1 + 3)
    assert one.calls == {"forward": student + teacher, "backward": student}
    assert two.calls == {name: 2 * calls for name, calls in one.calls.items()}
    assert len(one.shapes) <= 16


def test_calls_do_not_grow_with_the_questions(qwen3, task):
    few, many = (counted(qwen3, task, questions, 1) for questions in (3, 8))
    assert few.calls == many.calls


def test_shapes_are_few_whatever_the_lengths_of_256_responses(qwen3, task):
    """The order of work of the 8B configurations, with shorter responses."""
    found = counted(qwen3, task, 32, 1, tokens=24, natural=True, mean=5)
    assert found.micro_batches == 1
    assert len(found.shapes) <= sum(found.calls.values()) <= 16 + 5
    assert len(found.shapes) <= 16


def test_a_decoding_step_takes_at_most_90_kernels_a_layer(qwen3, task):
    order = Order(questions=4, rollouts=4)
    one, two = (counts.count_decoding(loaded(qwen3, n), task, order) for n in (1, 2))
    assert 40 < two - one <= 90


@pytest.mark.parametrize("adapter", [FullFineTune(), Lora(r=2)], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["sc-sdpo", "hybrid+anchor+entropy"])
def test_a_model_goes_into_eval_mode_and_back_once_a_teachers_turn(
    adapter, method, qwen3, monkeypatch
):
    """Each way is a walk over all modules, however many forwards of prompts the turn has."""
    policy = CausalLM(str(qwen3), adapter=adapter)
    policy.configure_model()
    advantage, rest = METHODS[method]()
    batch, update = parts(policy, advantage, **rest)
    walks, turns, forwards = [], [], []

    def note(kind, name, notes, of):
        plain = getattr(kind, name)
        noting = lambda self, *args: (notes.append(of(self)), plain(self, *args))[1]  # noqa: E731
        monkeypatch.setattr(kind, name, noting)

    note(torch.nn.Module, "train", walks, lambda module: isinstance(module, Qwen3ForCausalLM))
    note(SharedPrompts, "run", turns, lambda runner: runner._within is not policy)
    note(CausalLM, "run", forwards, lambda _: True)
    micro_batches = 0
    for output, _ in update.losses(policy, batch, ALL, 1):
        output.loss.backward()
        micro_batches += 1
    assert micro_batches > 2 and len(forwards) > sum(turns) >= micro_batches
    assert sum(walks) == 2 * sum(turns)
    models = [m for m in (*policy.modules(), *update.teacher.modules()) if m is not policy]
    assert all(m.training for m in models)
