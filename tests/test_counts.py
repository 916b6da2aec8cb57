"""Kernels and attention calls of an update, counted on CPU as a GPU would run it."""

import json
import sys
from pathlib import Path

import pytest

from scsdpo.policy import CausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

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


def counted(folder, task, questions, layers, budget=10**6):
    policy = CausalLM(str(folder))
    policy.configure_model()
    order = Order(questions=questions, rollouts=8, tokens=6, budget=budget)
    return counts.count(counts.without_layers(policy, layers), task, order)


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
