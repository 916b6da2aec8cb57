"""Judges the working of a science question of the lab; `benchmarks/solve.py` asks for it."""

import re

from scsdpo.prompt import Verdict

STEP = re.compile(r"(-?[0-9]+[-+*][0-9]+)=(-?[0-9]+)")
ANSWER = re.compile(r"<answer>\s*(-?[0-9]+)\s*</answer>")


def judged(prompt, response):
    """Right iff every step gives the result that it should, and the answer is the last one's.

    Args:
        prompt: whose answer is the results, with spaces between them.
        response: all of it.
    """
    wanted = prompt.answer.split()
    steps, answers = STEP.findall(response), ANSWER.findall(response)
    if not steps or not answers:
        return Verdict(reward=0.0, feedback="There are no steps, or there is no answer.")
    results = [result for _, result in steps]
    found = " ".join([*results, answers[-1]])
    for (step, result), right in zip(steps, wanted, strict=False):
        if result != right:
            return Verdict(reward=0.0, answer=found, feedback=f"{step}={result} is not right.")
    if len(results) != len(wanted):
        few = "few" if len(results) < len(wanted) else "many"
        return Verdict(reward=0.0, answer=found, feedback=f"There are too {few} steps.")
    if answers[-1] != wanted[-1]:
        return Verdict(reward=0.0, answer=found, feedback=f"{answers[-1]} is not right.")
    return Verdict(reward=1.0, answer=found)
