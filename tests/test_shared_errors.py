"""One rank's error is all ranks', and what cannot be agreed on waits for nobody."""

import pytest
import torch
import torch.distributed as dist

from scsdpo import distributed, interrupt
from scsdpo.distributed import LocalError, RemoteError, share_errors
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.rollout.vllm.rollout import EngineAnswer, Request
from scsdpo.rollout.vllm.tensor_parallel import TensorParallelQueue

BROKEN = ZeroDivisionError("by zero")


@pytest.fixture
def told_by_others(monkeypatch):
    """Errors of a rank before and a rank behind this one; what this one says is kept."""
    others = {"before": None, "behind": None, "here": []}

    def gather(items):
        others["here"] += items
        return [others["before"], *items, others["behind"]]

    monkeypatch.setattr(distributed, "all_gather", gather)
    return others


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (ConfigurationError("lower it\nplease"), ConfigurationError, "lower it\nplease"),
        (TrainingStopped("went away"), TrainingStopped, "went away"),
        (torch.OutOfMemoryError("CUDA: no\nmore"), torch.OutOfMemoryError, "rank 0: CUDA: no"),
        (BROKEN, RuntimeError, "rank 0: ZeroDivisionError: by zero"),
        (interrupt.Interrupted(15), interrupt.Interrupted, "asked to stop by signal 15"),
    ],
    ids=["configuration", "stopped", "memory", "any", "asked to stop"],
)
def test_an_error_of_another_rank_is_raised_here(told_by_others, error, kind, said):
    told_by_others["behind"] = RemoteError.of(error)
    with pytest.raises(kind) as raised, share_errors():
        pass
    assert type(raised.value) is kind and str(raised.value) == said
    assert told_by_others["here"] == [None]


def test_an_own_error_is_raised_itself_and_told(told_by_others):
    with pytest.raises(ZeroDivisionError) as raised, share_errors():
        raise BROKEN
    assert raised.value is BROKEN and told_by_others["here"] == [RemoteError.of(BROKEN)]


def test_the_lowest_ranks_error_is_everyones(told_by_others):
    told_by_others["before"] = RemoteError.of(ConfigurationError("the first"))
    with pytest.raises(ConfigurationError, match="the first") as raised, share_errors():
        raise BROKEN
    assert raised.value.__cause__ is BROKEN


@pytest.mark.parametrize(
    "error", [LocalError("here"), interrupt.RankLost("gone"), KeyboardInterrupt()], ids=type
)
def test_what_cannot_be_agreed_on_is_raised_at_once(told_by_others, error):
    with pytest.raises(type(error)), share_errors():
        raise error
    assert told_by_others["here"] == []


@pytest.fixture
def group():
    """A group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


REQUEST = Request(ids=(1, 2), parameters={"max_tokens": 3})
ANSWER = EngineAnswer(ids=[5], logprobs=[-1.0], finish_reason="stop", versions=frozenset({"label"}))


def rounds(group, ask):
    return TensorParallelQueue(group, lambda requests: None, ask)


def test_a_round_deals_answers_back_and_leaving_ends(group):
    made = rounds(group, lambda requests: [[ANSWER] for _ in requests])
    assert made.answers("label", [REQUEST] * 2) == [[ANSWER]] * 2
    assert made.answers("label", ()) == []
    made.leave("label")


def test_an_engine_that_fails_in_a_round_fails_alone_and_takes_part_in_none_again(group):
    def ask(requests):
        raise BROKEN

    made = rounds(group, ask)
    with pytest.raises(LocalError, match=r"vLLM failed on rank 0 .*ZeroDivisionError: by zero"):
        made.answers("label", [REQUEST])
    made._gather = None  # nobody is waited for
    made.leave("label")


@pytest.mark.parametrize("error", [TrainingStopped("faulty"), interrupt.Interrupted(15)], ids=type)
def test_what_every_rank_of_an_engine_meets_is_raised_as_it_is(group, error):
    def ask(requests):
        raise error

    made = rounds(group, ask)
    with pytest.raises(type(error)) as raised:
        made.answers("label", [REQUEST])
    assert raised.value is error
    made.leave("label")


def test_ranks_of_an_engine_give_up_before_the_same_step(group):
    """The first of its steps at which all look."""
    interrupt.begin_run(None)
    interrupt.open_window()
    try:
        interrupt.ask(15)
        made, steps = rounds(group, None), 0
        with pytest.raises(interrupt.Interrupted):
            while True:
                made.check_interrupt()
                steps += 1
        assert steps == 15
    finally:
        interrupt.reset()
