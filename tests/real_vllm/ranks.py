"""One of two ranks with vLLM in each: `ranks.py FOLDER NAME...` goes through cases, one by one.

FOLDER has the policies, and gets for each case and rank what was seen, as JSON. Only what is of one
rank is asserted here.
"""

import faulthandler
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from policies import excess, prompt
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from runs import Toys, data, module, trainer
from scsdpo.callbacks import PredictionWriter
from scsdpo.policy import CausalLM, Lora
from scsdpo.rollout import Colocated, VLLMRollout
from scsdpo.types import Sampling

SECONDS = 900.0
SAMPLING = Sampling(n=2, max_new_tokens=12, seed=3)


@dataclass(frozen=True)
class Case:
    """A row of the pairwise cover."""

    model: str
    tensor_parallel: int
    sharded: bool
    lora: bool
    empty: bool
    """Rank 1 has no prompts; otherwise it has fewer."""
    refuses: bool
    """Rank 1 asks for what cannot be; otherwise the engine is closed and starts again."""
    seen: dict = field(default_factory=lambda: {"excess": [], "errors": [], "versions": []})


#                   tied     TP  shards lora   empty  refuses
CASES = {
    "one": Case("tied", 1, False, False, False, False),
    "two": Case("tied", 2, True, True, True, True),
    "three": Case("untied", 1, False, True, True, False),
    "four": Case("untied", 2, True, False, False, True),
    "five": Case("sliding", 1, True, False, True, False),
    "six": Case("sliding", 2, False, True, False, True),
    "seven": Case("tied", 1, False, False, False, True),
    "eight": Case("tied", 2, True, True, True, False),
}
"""Every two of the six factors meet in each combination of their values (`test_ranks`)."""


class Run:
    """A case on this rank."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.rank = case, dist.get_rank()
        self.policy = _policy(case, folder / case.model)
        self.engine = Colocated(
            max_model_len=128,
            kv_cache_gib=0.1,
            enforce_eager=True,
            tensor_parallel=case.tensor_parallel,
            adapter="alone" if case.lora and case.refuses else "merged",
        )
        self.rollout = VLLMRollout(self.engine)
        texts = ["Why?", "Is water wet?", "And fire?"][: 3 if self.rank == 0 else 1]
        self.prompts = [prompt(self.policy, f"{self.rank}: {text}") for text in texts]
        if case.empty and self.rank == 1:
            self.prompts = []

    def sample(self, sampling: Sampling = SAMPLING) -> None:
        """And note how far the trainer's log-probs are, over what rounding allows."""
        rollouts = self.rollout.sample(self.policy, self.prompts, sampling)
        assert rollouts.ids.shape[:2] == (len(self.prompts), sampling.n)
        assert [p.key for p in rollouts.prompts] == [p.key for p in self.prompts]
        with self.policy.held_whole():
            self.case.seen["excess"].append(excess(self.policy, rollouts))
        self.case.seen["versions"].append(rollouts.version)

    def fails(self, work) -> None:
        """And note how."""
        try:
            work()
        except Exception as error:
            self.case.seen["errors"].append([type(error).__name__, str(error)])

    def move(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                if parameter.requires_grad:
                    noise = 0.02 * torch.randn(parameter.shape, generator=generator)
                    if isinstance(parameter, DTensor):
                        place = parameter.device_mesh, parameter.placements
                        noise = distribute_tensor(noise, *place)
                    parameter.add_(noise)

    def refuse(self) -> None:
        """Rank 1 has a prompt without room for its response, and then an engine that breaks."""
        before = self.prompts
        self.prompts = [prompt(self.policy, "A" * 120)] if self.rank == 1 else before
        self.fails(self.sample)
        self.fails(self.sample_held)
        self.prompts = before
        if self.case.tensor_parallel == 1:
            own = self.engine._ask
            if self.rank == 1:
                self.engine._ask = lambda requests: 1 // 0
            self.fails(self.sample)
            self.engine._ask = own

    def sample_held(self) -> None:
        """As in training, where the engine starts before requests are known to it."""
        with self.rollout.hold_weights(self.policy):
            self.rollout.sample(self.policy, self.prompts, SAMPLING)

    def restart(self) -> None:
        """The trainer's group outlives the engine."""
        self.rollout.close()
        ones = torch.ones(1)
        dist.all_reduce(ones)
        assert ones == 2

    def apart(self) -> None:
        """As in an evaluation: rank 0 has one batch more."""
        with self.policy.held_whole(), self.rollout.hold_weights(self.policy, barrier=False):
            self.sample(replace(SAMPLING, temperature=0.7))
            if self.rank == 0:
                self.sample(SAMPLING.at(1))

    def disagree(self) -> None:
        """Ranks of one engine that believe in different weights."""

        def ask() -> None:
            with self.rollout.hold_weights(self.policy):
                right = self.engine._version
                self.engine._version = f"of rank {self.rank}"
                try:
                    self.sample()
                finally:
                    self.engine._version = right

        self.fails(ask)

    def run(self) -> dict:
        self.sample()
        self.move(1)
        self.sample()
        self.refuse() if self.case.refuses else self.restart()
        if self.case.tensor_parallel > 1:
            self.disagree()
        self.move(2)
        self.sample()
        self.apart()
        self.rollout.close()
        return self.case.seen


def _policy(case: Case, folder: Path) -> CausalLM:
    adapter = {"adapter": Lora(r=4, lora_dropout=0.5)} if case.lora else {}
    policy = CausalLM(str(folder), **adapter)
    torch.manual_seed(0)  # peft draws the factors A
    policy.configure_model(to_shard=case.sharded)
    if case.sharded:
        policy.fill_shards(init_device_mesh("cpu", (dist.get_world_size(),)), [])
    return policy


def evaluate(folder: Path) -> None:
    """Test and predict with one engine for both ranks, which have unequal numbers of questions.

    Rank 0 has one batch of predictions more; of the last batch of a test rank 1 has nothing.
    """
    engine = Colocated(max_model_len=128, kv_cache_gib=0.1, enforce_eager=True, tensor_parallel=2)
    sampling = Sampling(n=2, max_new_tokens=6, seed=1)
    model = module(folder / "tied", rollout=VLLMRollout(engine), val_sampling=sampling)
    questions = data(Toys(8), Toys(5), val_questions_per_batch=2, max_prompt_tokens=64)
    writer = PredictionWriter(str(folder / "predictions.jsonl"))
    run = trainer(folder, devices=2, strategy="ddp", callbacks=[writer])
    run.test(model, questions, verbose=False)
    run.predict(model, questions, return_predictions=False)
    asked = model.evaluation.result.questions
    assert len(asked) == 5 and engine._llm is None


def main(folder: str, *names: str) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # a rank that waits for ever says where
    evaluate(Path(folder))  # in the group of Lightning, which stays
    for name in names:
        seen = Run(CASES[name], Path(folder)).run()
        Path(folder, f"{name}-{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
