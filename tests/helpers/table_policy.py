"""An enumerable policy: its logits are a table, looked up by prompt and previous token."""

import zlib
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoTokenizer

from kernel_inputs import identity_head
from scsdpo.policy import TINY_FOLDER
from scsdpo.policy.weights import Weights
from scsdpo.types import Episode, Judged, Part, Prompt, Responses, Verdict
from scsdpo.verifiers import ExactMatch

V, STATES = 6, 11
OTHER = 7
"""Seed of another model."""
Q, G = 4, 4
SUCCESSES = (2, 0, 4, 1)
"""Of each question's four rollouts; the first ones are right."""


class TableChat:
    """Two ids a prompt: enough to tell prompts apart."""

    pad_id, rows = 0, 0

    @property
    def tokenizer(self):
        """What another model's is compared with: `tiny`'s."""
        return AutoTokenizer.from_pretrained(TINY_FOLDER)

    def render(self, messages, tools=()):
        text = "|".join(message["content"] for message in messages)
        return (zlib.crc32(text.encode()) % 97, len(text))

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def state(prompt, previous):
    """The row of the table that predicts the token after `previous` (the first: -1)."""
    return (sum(prompt) + 3 * (previous + 1)) % STATES


class Table(nn.Module):
    """A second set of weights."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table.detach().clone(), requires_grad=False)

    def pairs(self, model):
        yield self.table, model.table

    def same(self, other):
        return self is other

    follow = Weights.follow


class Current:
    """The student's own weights: they have no table."""

    def same(self, other):
        return isinstance(other, Current)


@dataclass(frozen=True)
class TableAdapter:
    def current(self):
        return Current()

    def initial(self, model, stored=None):
        return Table(model.table)

    def moving(self, model, name, stored=None):
        return Table(model.table)

    def other(self, model, source):
        return Table(TablePolicy(seed=OTHER).table)


class TablePolicy(nn.Module):
    """What `PolicyOptimizer` asks of a `CausalLM`, on a table [STATES, V] of float64 logits."""

    vocabulary, adapter, chat, name_or_path = V, TableAdapter(), TableChat(), "table"
    expert_balance = 0.0

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(STATES, V, generator=generator).double())
        self.head = identity_head(V).requires_grad_(False)

    @property
    def wrapped(self):
        return self

    def configure_model(self, *, to_shard=False):
        pass

    def token_budget(self):
        return 10**6

    def sampling_mode(self):
        return nullcontext(self)

    def in_force(self, weights):
        return nullcontext(self)

    def _hidden(self, table, rows):
        places = [
            state(prompt, previous)
            for prompt, ids, present, sampled in zip(
                rows.prompts, rows.ids, rows.present, rows.sampled, strict=True
            )
            for previous, drawn in zip(
                [-1, *ids[present].tolist()], sampled[present].tolist(), strict=False
            )
            if drawn
        ]
        return table[places]

    def runner(self, rows, chosen, max_tokens, weights=None, watches=False):
        return TableRunner(self, rows, chosen, weights)


class TableRunner:
    """All in one micro-batch."""

    def __init__(self, policy, rows, chosen, weights):
        self.policy, self.rows, self.chosen, self.weights = policy, rows, chosen, weights

    def micro_batches(self):
        return [self.chosen] if self.chosen else []

    def run(self, micro, loss):
        own = self.weights is None or isinstance(self.weights, Current)
        table = (self.policy if own else self.weights).table
        return loss(self.policy._hidden(table, self.rows.at(micro)), self.policy.head)

    def done(self, micro):
        pass


def judged(seed=0, temperature=0.8):
    """Four questions of four rollouts, of lengths 1 to 5; the sampler's log-probs are off."""
    generator = torch.Generator().manual_seed(seed)
    policy = TablePolicy()
    prompts = []
    for q in range(Q):
        messages = ({"role": "user", "content": f"question {q}?"},)
        prompts.append(
            Prompt(
                key=f"toy/{q}",
                messages=messages,
                verifier=ExactMatch(),
                answer=f"gold {q}",
                ids=policy.chat.render(messages),
            )
        )
    lengths = torch.randint(1, 6, (Q, G), generator=generator)
    mask = torch.arange(5) < lengths[..., None]
    ids = torch.randint(V, mask.shape, generator=generator) * mask
    noise = -torch.rand(mask.shape, generator=generator).double() * 3
    rewards = (torch.arange(G) < torch.tensor(SUCCESSES)[:, None]).float()
    responses = Responses.of_one_turn(
        prompts=tuple(prompts),
        ids=ids,
        sampled=mask,
        sampling_logprobs=noise,
        policy_logprobs=noise,
        ended=torch.ones(Q, G, dtype=torch.bool),
        texts=tuple(tuple(f"response {q} {g}" for g in range(G)) for q in range(Q)),
        temperature=temperature,
    )
    said = [[f"wrong {q} {g}" if g >= k else "" for g in range(G)] for q, k in enumerate(SUCCESSES)]
    verdicts = tuple(
        tuple(Verdict(reward=r, feedback=words) for r, words in zip(*row, strict=True))
        for row in zip(rewards.tolist(), said, strict=True)
    )
    return Judged(responses=responses, verdicts=verdicts, rewards=rewards, successes=rewards > 0.5)


TOOL = (2, 4)
"""Places of the tokens that the tool wrote, of the responses that are long enough."""


def _said(text, call, reward):
    return (
        Part(role="assistant", text=call),
        Part(role="tool", text="an answer", name="f", reward=reward),
        Part(role="assistant", text=text),
    )


def with_a_tool(batch, places=TOOL):
    """The same responses, of which some tokens were written by a tool between two turns.

    The first turn of response g to question q earns (q + 2 g) / 16; of odd questions that is a part
    of the verdict's reward, of even ones it stands beside it.
    """
    responses, (start, end) = batch.responses, places
    column = torch.arange(responses.ids.shape[-1])
    long = responses.extents > end
    by_tool = (column >= start) & (column < end) & long[..., None]
    sampled = responses.present & ~by_tool
    unknown = torch.full_like(responses.policy_logprobs, torch.nan)
    episodes, verdicts = [], []
    for q, group in enumerate(long.tolist()):
        earned = [(q + 2 * g) / 16 * played for g, played in enumerate(group)]
        episodes.append(
            tuple(
                Episode(parts=_said(text, f"call {q} {g}", reward) if long[q, g] else ())
                for g, (text, reward) in enumerate(zip(responses.texts[q], earned, strict=True))
            )
        )
        verdicts.append(
            tuple(
                replace(verdict, earned=reward * (q % 2))
                for verdict, reward in zip(batch.verdicts[q], earned, strict=True)
            )
        )
    return replace(
        batch,
        verdicts=tuple(verdicts),
        responses=replace(
            responses,
            sampled=sampled,
            turns=((column >= end) & long[..., None]).int(),
            episodes=tuple(episodes),
            # Nobody drew them: what stands there must not be read.
            policy_logprobs=torch.where(sampled, responses.policy_logprobs, unknown),
            sampling_logprobs=torch.where(sampled, responses.sampling_logprobs, unknown),
        ),
    )
