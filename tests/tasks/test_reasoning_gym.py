"""Every task of reasoning-gym that is not denied: `make test-tasks`."""

import os
import pickle
import re
import subprocess
import sys

import pytest
from reasoning_gym.factory import DATASETS

from scsdpo.data import ReasoningGym
from scsdpo.verifiers import Verification, VerifierPool
from scsdpo.verifiers.reasoning_gym import DENIED, ReasoningGymAnswer

TASKS = sorted(set(DATASETS) - set(DENIED))
CONSTANTS = ("", "garbage", "0", "1", "-", "[]", "[1]", "True", "Yes", "x" * 50)
QUESTIONS = 4

# The package leaves files of its own open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def prompts():
    source = ReasoningGym({task: {} for task in TASKS}, "train", size=QUESTIONS * len(TASKS))
    by_task = {task: [] for task in TASKS}
    for prompt in source.prompts:
        by_task[prompt.category].append(prompt)
    return by_task


def reward(prompt, answer):
    return prompt.verifier.verify(prompt, f"So it is\n<answer>{answer}</answer>").reward


def test_the_denied_are_tasks_and_most_tasks_are_not_denied():
    assert set(DENIED) <= set(DATASETS)
    assert len(TASKS) >= 95


@pytest.mark.parametrize("task", TASKS)
def test_the_gold_answer_scores_1_and_no_constant_does_for_all_questions(prompts, task):
    asked = prompts[task]
    assert [reward(prompt, prompt.answer) for prompt in asked] == [1] * QUESTIONS
    assert [prompt.verifier.verify(prompt, prompt.answer).reward for prompt in asked] == [
        0
    ] * QUESTIONS
    for answer in CONSTANTS:
        for prompt in asked:
            if answer != prompt.answer and not re.fullmatch(r"\S{1,4}", prompt.answer):
                assert reward(prompt, answer) < 1, (answer, prompt.answer)
        assert sum(reward(prompt, answer) >= 1 for prompt in asked) < QUESTIONS or {
            prompt.answer for prompt in asked
        } == {answer}


@pytest.mark.parametrize("task", TASKS)
def test_another_questions_answer_is_wrong(prompts, task):
    first, *others = prompts[task]
    wrong = [other for other in others if other.answer != first.answer]
    scores = [reward(first, other.answer) for other in wrong]
    # A route or a placement has several solutions, and few possibilities.
    several = {"sokoban", "n_queens", "jugs", "maze", "rearc"}
    assert sum(score >= 1 for score in scores) <= (1 if task in several else 0), task


def test_questions_do_not_depend_on_the_process():
    program = (
        "import pickle, sys; from scsdpo.data import ReasoningGym; from reasoning_gym.factory "
        "import DATASETS; from scsdpo.verifiers.reasoning_gym import DENIED; "
        "s = ReasoningGym(dict.fromkeys(sorted(set(DATASETS) - set(DENIED)), {}), 'val', size=200);"
        "sys.stdout.buffer.write(pickle.dumps([(p.key, p.messages, p.answer) for p in s.prompts]))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert pickle.loads(runs[0]) == pickle.loads(runs[1])
    assert len({key for key, _, _ in pickle.loads(runs[0])}) > 190


def test_training_and_validation_hold_different_questions():
    tasks = {"chain_sum": {}, "basic_arithmetic": {}, "zebra_puzzles": {}}
    train, val = (ReasoningGym(tasks, split, size=60) for split in ("train", "val"))
    assert not {p.key for p in train.prompts} & {p.key for p in val.prompts}
    assert [p.key for p in train.prompts][:30] == [
        p.key for p in ReasoningGym(tasks, "train", size=30).prompts
    ]


def test_settings_reach_the_task():
    (easy,) = ReasoningGym({"chain_sum": {"min_terms": 2, "max_terms": 2}}, "train", size=1).prompts
    (hard,) = ReasoningGym({"chain_sum": {"min_terms": 9, "max_terms": 9}}, "train", size=1).prompts
    assert len(re.findall(r" [-+] ", hard.messages[-1]["content"])) == 8
    assert len(re.findall(r" [-+] ", easy.messages[-1]["content"])) == 1


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        ({"chain_sums": {}}, "'chain_sums': there is no such task"),
        ({"chain_sum": {"min_term": 2}}, "min_term"),
        ({"chain_sum": {"min_terms": 9, "max_terms": 2}}, "'chain_sum': "),
    ],
)
def test_a_wrong_task_or_setting_is_named(tasks, says):
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        len(ReasoningGym(tasks, "train").prompts)
    assert "ReasoningGym(tasks=" in str(caught.value)


HOSTILE = {
    "binary_matrix": ["__import__('os').system('touch {mark}')", "[[open('{mark}', 'w')]]"],
    "spiral_matrix": ["[__import__('pathlib').Path('{mark}').touch()]"],
    "string_insertion": ["(lambda: open('{mark}', 'w'))()"],
    "n_queens": ["[open('{mark}','w') for _ in [1]]"],
    "simple_integration": [
        "__import__('os').system('touch {mark}')",
        "sqrt(\"open('{mark}','w')\")",
    ],
    "intermediate_integration": ["x.__class__.__init__.__globals__['os'].system('touch {mark}')"],
    "polynomial_multiplication": ["eval(\"open('{mark}','w')\")"],
    "countdown": ["open('{mark}','w').close() or 24"],
}


@pytest.mark.parametrize("task", HOSTILE)
def test_no_code_of_an_answer_runs(prompts, task, tmp_path):
    mark = tmp_path / "mark"
    for answer in HOSTILE[task]:
        assert reward(prompts[task][0], answer.format(mark=mark)) == 0
    assert not mark.exists()


def test_naming_the_integral_is_not_solving_it(prompts):
    for task in ("simple_integration", "intermediate_integration"):
        for prompt in prompts[task]:
            entry = pickle.loads(prompt.verifier.entry)["metadata"]
            asked = f"Integral({entry['integrand']}, {entry['variable']})"
            assert reward(prompt, asked) == 0


def test_the_pool_judges_every_task(prompts):
    asked = [group[0] for group in prompts.values()]
    pool = VerifierPool(Verification(deadline=5.0))
    try:
        texts = [[p.verifier.written(p), "<answer>9**9**9**9</answer>"] for p in asked]
        verdicts = pool.verify(asked, texts)
    finally:
        pool.close()
    assert [gold.reward for gold, _ in verdicts] == [1] * len(asked)
    assert all(bomb.reward < 1 for _, bomb in verdicts)
    assert all(isinstance(p.verifier, ReasoningGymAnswer) for p in asked)
