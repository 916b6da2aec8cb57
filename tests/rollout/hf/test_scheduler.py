"""Scheduler: who is let in, by what memory it is expected to need."""

import pytest

from scsdpo.rollout.hf.kv_cache import Size
from scsdpo.rollout.hf.scheduler import Group, Scheduler


def groups(*sizes, tokens=100):
    """One prompt of `tokens` tokens for each number of responses; rows count on."""
    made, first = [], 0
    for size in sizes:
        made.append(Group(ids=(1,) * tokens, rows=list(range(first, first + size))))
        first += size
    return made


def scheduler(*sizes, max_tokens=10_000, max_rows=512, max_new_tokens=1025):
    return Scheduler(
        groups(*sizes), max_tokens=max_tokens, max_rows=max_rows, max_new_tokens=max_new_tokens
    )


def rows(requests):
    return [request.row for request in requests]


def test_the_first_are_expected_to_run_to_the_cap():
    # 1,024 tokens are held of a response that runs to 1,025: 10,000 - 2 x 100 has room for nine.
    assert rows(scheduler(6, 6).admit([], 0, Size())) == list(range(9))


def test_expectations_follow_the_responses_that_finished():
    queue = scheduler(6, 20)
    running = queue.admit([], 0, Size())
    for request in running[:4]:
        queue.finish(request, 50)
    # (4 x 50 + 5 x 50 + 1,025) / 5 = 295 tokens a response: 320 in blocks, and 384 of the five
    # that have 50. (10,000 - 200 - 5 x 384) / 320 = 24.6, more than wait.
    admitted = queue.admit([50] * 5, 5 * 64, Size(2, 100))
    assert rows(admitted) == list(range(9, 26))


def test_what_is_held_counts_where_it_is_more_than_expected():
    queue = scheduler(6, 20)
    for request in queue.admit([], 0, Size())[:8]:
        queue.finish(request, 10)
    # (80 + 500 + 1,025) / 9 = 178 tokens: 192. (10,000 - 200 - 9,300) / 192 = 2.6.
    assert rows(queue.admit([500], 9_300, Size(2, 100))) == [9, 10]


def test_rows_bound_what_runs():
    queue = scheduler(6, 6, max_rows=8)
    assert len(queue.admit([], 0, Size())) == 8
    assert queue.admit([3] * 7, 64 * 7, Size(2, 100)) == []  # one of eleven is not worth a pass
    assert len(queue.admit([3] * 6, 64 * 6, Size(2, 100))) == 2


def test_one_response_runs_whatever_the_budget():
    queue = scheduler(2, max_tokens=1)
    assert rows(queue.admit([], 0, Size())) == [0]
    assert queue.admit([5], 64, Size(1, 100)) == []


def test_who_gives_way_is_next_and_its_prompt_stays():
    queue = scheduler(2, 2, max_rows=3)
    first, second, third = queue.admit([], 0, Size())
    queue.put_back(third)
    queue.put_back(second)
    assert rows(queue.waiting) == [1, 2, 3]
    assert queue.needs_prompt(first.group) and not queue.needs_prompt(third.group)
    queue.finish(first, 3)
    assert queue.needs_prompt(second.group)


@pytest.mark.parametrize("tokens", [10, 300])
def test_a_longer_prompt_widens_every_prompts_place(tokens):
    queue = Scheduler(groups(1, 1, tokens=tokens), max_tokens=1_200, max_rows=9, max_new_tokens=501)
    # 500 each for the responses: 1,200 - 1,000 has room for two prompts of 10 tokens.
    assert len(queue.admit([], 0, Size())) == (2 if tokens == 10 else 1)
