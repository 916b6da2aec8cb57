"""What the host asks a GPU during an update: nothing between micro-batches, little in a step."""

import pytest
import torch

from batches import ALL, METHODS, parts
from runs import data, module, trainer
from scsdpo.advantage import (
    Divergence,
    Failed,
    Full,
    GroupRelative,
    Route,
    Routed,
    SelfDistillation,
    SignAgreement,
    TeacherRatio,
    TopK,
    Trusted,
)
from scsdpo.loss import SamplerImportance
from scsdpo.policy import CausalLM, Lora
from scsdpo.teacher import EMA, Frozen, Live, TrustRegion
from scsdpo.training.step import OptimizerSteps
from waits import Waits

HOST = torch.device("cpu")


def ask(table):
    """Each kind of wait, by name."""
    small = torch.arange(2, device=HOST)
    return {
        "item": lambda: table.sum().item(),
        "bool": lambda: bool(table.any()),
        "if": lambda: 1 if table.any() else 0,
        "float": lambda: float(table.sum()),
        "int": lambda: int(table.sum()),
        "tolist": lambda: table.tolist(),
        "cpu": lambda: table.cpu(),
        "numpy": lambda: table.numpy(),
        "nonzero": lambda: table.nonzero(),
        "mask": lambda: table[table > 0],
        "set by mask": lambda: table.__setitem__(table > 0, 1.0),
        "list": lambda: table[[0, 1]],
        "index of the host": lambda: table[torch.tensor([0, 1])],
        "masked_select": lambda: table.masked_select(table > 0),
        "unique": lambda: table.unique(),
        "equal": lambda: torch.equal(table, table),
        "tensor": lambda: torch.tensor([1.0], device=HOST),
        "new_tensor": lambda: table.new_tensor(1.0),
        "to": lambda: torch.tensor([1]).to(HOST),
        "repeat_interleave": lambda: table.repeat_interleave(small),
    }


@pytest.mark.parametrize("kind", ask(torch.ones(2)))
def test_each_kind_of_wait_is_found_by_the_line_that_asks(kind):
    table = torch.ones(2, device=HOST)
    work = ask(table)[kind]
    with Waits() as waits:
        work()
    assert sum(waits.found.values()) >= 1
    assert all("test_waits.py" in line for line in waits.found)


def test_what_the_host_knows_costs_no_wait():
    table = torch.ones(3, device=HOST)
    with Waits() as waits:
        known = torch.tensor([2, 0])
        assert known.sum().item() == 2 and (known > 0).nonzero().tolist() == [[0]]
        sent = known.to(HOST, non_blocking=True)
        made = table.index_select(0, sent) + table[sent] + table[:2] * 3
        torch.where(made > 0, made, 0.0).sum()
    assert not waits.found


MORE = {
    "trust region": lambda: (SelfDistillation(support=TopK(k=5)), {"teacher": TrustRegion()}),
    "routed": lambda: (
        Routed(
            routes=(
                Route(where=Failed(), advantage=SelfDistillation(support=Full())),
                Route(advantage=GroupRelative()),
            )
        ),
        {"teacher": EMA()},
    ),
    "modulated": lambda: (GroupRelative(modulator=TeacherRatio()), {"teacher": Live()}),
    "signs": lambda: (GroupRelative(modulator=SignAgreement()), {"teacher": EMA()}),
    "trusted": lambda: (Trusted(advantage=SelfDistillation()), {"teacher": EMA()}),
    "clipped": lambda: (
        SelfDistillation(divergence=Divergence(alpha=0.0, summand_clip=0.1)),
        {"teacher": Frozen()},
    ),
}


def waits_of(policy, method, budget):
    """What `losses` waits for, and its micro-batches."""
    advantage, rest = (METHODS | MORE)[method]()
    batch, update = parts(policy, advantage, **rest)
    micro_batches = 0
    with Waits() as waits:
        for output, _ in update.losses(policy, batch, ALL, budget):
            output.loss.backward()
            micro_batches += 1
    return waits.found, micro_batches


@pytest.mark.parametrize("method", [*METHODS, *MORE])
def test_nothing_waits_between_micro_batches(policy, method):
    """The host asks for all rows and places, whether token weights are sound, and whether any of
    them is not 0; some strategies ask more, once a step.
    """
    found, micro_batches = waits_of(policy, method, 1)
    assert micro_batches > 2
    once, _ = waits_of(policy, method, 10**6)
    assert found == once
    most = 7 if method == "hybrid+anchor+entropy" else 3
    assert sum(once.values()) <= most, once


def test_nothing_waits_between_micro_batches_of_adapters(qwen3):
    policy = CausalLM(str(qwen3), adapter=Lora(r=2), gradient_checkpointing=True)
    policy.configure_model()
    found, micro_batches = waits_of(policy, "sc-sdpo", 1)
    assert micro_batches > 2 and sum(found.values()) <= 3, found


@pytest.mark.parametrize("updates", [1, 2])
def test_a_step_waits_at_most_10_times(qwen3, tmp_path, monkeypatch, updates):
    learn, found = OptimizerSteps.learn, []

    def watched(self, *args):
        with Waits() as waits:
            learn(self, *args)
        found.append(waits.found)

    monkeypatch.setattr(OptimizerSteps, "learn", watched)
    model = module(
        qwen3,
        updates_per_rollout=updates,
        importance=SamplerImportance(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    )
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, data())
    assert run.global_step >= 2 and len(found) >= 2
    for each in found[1:]:  # the first measures the weights' norm once more
        said = "\n".join(f"{count} {asked}" for asked, count in each.items())
        assert sum(each.values()) <= 10 * updates, said
