import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scsdpo import lab
from scsdpo.lab import LEVELS, Arithmetic, LabTasks
from scsdpo.lab.tasks import SHAPES


def verdict(tasks, index, response):
    prompt = tasks[index]
    return prompt.verifier.verify(prompt, response)


def test_every_gold_response_is_right_in_every_wording():
    for split in ("train", "val"):
        tasks = LabTasks(split, seed=3)
        for i in range(400):
            question = tasks.question(i)
            for wording in range(question.wordings):
                assert verdict(tasks, i, question.response(wording=wording)).reward == 1


def test_a_single_mistake_is_wrong_and_still_well_formed():
    tasks = LabTasks("train")
    for i in range(400):
        question = tasks.question(i)
        for step in range(len(question.pitfalls)):
            judged = verdict(tasks, i, question.response(mistakes=[step]))
            assert judged.reward == 0
            assert judged.answer is not None


def test_corrupted_responses_are_wrong():
    tasks = LabTasks("train")
    for i in range(100):
        gold = tasks.question(i).response()
        last = max(j for j, character in enumerate(gold) if character.isdigit())
        other = gold[:last] + str((int(gold[last]) + 1) % 10) + gold[last + 1 :]
        for bad in ("", other, gold.replace("<answer>", "").replace("Action", "Act")):
            assert verdict(tasks, i, bad).reward == 0


def test_level_is_the_number_of_steps():
    tasks = LabTasks("train")
    for i in range(200):
        assert tasks[i].category == f"level{len(tasks.question(i).pitfalls)}"


def test_work_joins_to_the_response_and_shows_a_mistake_from_its_step_on():
    tasks = LabTasks("train")
    for i in range(100):
        question = tasks.question(i)
        right = question.work()
        assert "".join(right) == question.response()
        assert len(right) == len(question.pitfalls) + 2
        for step in range(len(question.pitfalls)):
            wrong = question.work(mistakes=[step])
            assert wrong[: step + 1] == right[: step + 1]
            assert wrong[step + 1] != right[step + 1]


def test_train_and_validation_share_no_question_whatever_the_seeds():
    def texts(split, seed):
        tasks = LabTasks(split, seed=seed)
        return {tasks[i].messages[-1]["content"] for i in range(2000)}

    train = texts("train", 0) | texts("train", 1)
    assert not train & (texts("val", 0) | texts("val", 2))


def test_any_stretch_is_balanced_over_levels_and_shapes():
    tasks = LabTasks("val")
    seen = [(tasks[i].category, tasks.question(i).shape) for i in range(8, 24)]
    assert all(seen.count(cell) == 2 for cell in seen)
    assert len(set(seen)) == len(LEVELS) * len(SHAPES)


def test_prompts_are_the_same_in_another_process():
    code = (
        "from scsdpo.lab import LabTasks; p = LabTasks('train', seed=7)[123];"
        "import json; print(json.dumps([p.key, p.messages, p.answer]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    prompt = LabTasks("train", seed=7)[123]
    assert json.loads(out) == [prompt.key, list(prompt.messages), prompt.answer]


def test_seeds_give_other_questions_and_keys_are_unique():
    first, second = LabTasks("train", seed=0), LabTasks("train", seed=1)
    assert [first[i].messages for i in range(20)] != [second[i].messages for i in range(20)]
    keys = {tasks[i].key for tasks in (first, second, LabTasks("val")) for i in range(200)}
    assert len(keys) == 600


def test_levels_and_shapes_can_be_chosen():
    tasks = LabTasks("val", levels=[4], shapes=["tool"])
    assert tasks.name == "lab-tool"
    assert {tasks[i].category for i in range(10)} == {"level4"}
    assert "Action" in tasks[0].answer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split"),
        ({"split": "val", "size": 0}, "size"),
        ({"split": "val", "levels": [5]}, "levels"),
        ({"split": "val", "levels": []}, "levels"),
        ({"split": "val", "shapes": ["poem"]}, "shapes"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=rf"LabTasks\({message}="):
        LabTasks(**arguments)


def test_arithmetic_questions_are_split_by_pair_and_judged_by_their_last_number():
    train, val = Arithmetic("train", most=6), Arithmetic("val", most=6)

    def pairs(tasks):
        return {(key[1], *sorted(key[2:4])) for p in tasks.read() for key in [p.key.split("/")]}

    assert len(train) + len(val) == 2 * 6 * 6
    assert not pairs(train) & pairs(val)
    assert Arithmetic("val", most=6, seed=1)[0].key != val[0].key
    for prompt in val.read():
        numbers = [int(n) for n in re.findall(r"\d+", prompt.messages[-1]["content"])]
        product = prompt.category == "product"
        gold = numbers[0] * numbers[1] if product else sum(numbers)
        assert prompt.answer == str(gold)
        for right in (f"{gold}", f"{numbers} give {gold}.", f"It is {gold}.0 apples"):
            assert prompt.verifier.verify(prompt, right).reward == 1
        for wrong in ("", "many", f"{gold}.5", f"{gold} - 1", f"-{gold}", f"1{gold}"):
            assert prompt.verifier.verify(prompt, wrong).reward == 0


def test_mistakes_in_arithmetic_are_told():
    for settings in ({"split": "test"}, {"most": 1}, {"operations": ()}, {"operations": ["root"]}):
        with pytest.raises(ValueError, match=r"`Arithmetic\("):
            Arithmetic(**{"split": "train", **settings})


def test_the_package_holds_the_tasks_and_not_the_making_of_the_shipped_policies():
    """benchmarks/ makes them: no module of the lab imports what trains a model."""
    modules = [path.read_text() for path in Path(lab.__file__).parent.glob("*.py")]
    assert len(modules) > 5
    imports = re.findall(r"^(?:import|from) ([\w.]+)", "\n".join(modules), re.MULTILINE)
    assert "random" in imports
    assert not {name.split(".")[0] for name in imports} & {"torch", "transformers", "tokenizers"}
