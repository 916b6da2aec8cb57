"""Train a small policy with its own tokenizer on (messages, response), and measure what it can do.

`pretrain.py`, `pretrain_store.py` and `warm_start.py` use it.
"""

import json
import math
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from scsdpo.data.rendered import rendered
from scsdpo.policy import CausalLM, Chat
from scsdpo.rollout import HFRollout
from scsdpo.types import Message, Prompt, Responses, Sampling, Verdict
from scsdpo.verifiers import verify_all

RECORD = "record.json"
"""File in a policy's folder that records how it was made."""
EOS, PAD = "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A later turn of an episode."""

    observed: Sequence[Message]
    """The environment's answer to the response before it; read, not trained on."""
    response: str
    is_learned: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One conversation to learn from."""

    messages: Sequence[Message]
    """The chat turns up to the response."""
    response: str
    """The target, end-of-sequence included."""
    prefix: str = ""
    """A start of the response that is read but not trained on."""
    is_learned: bool = True
    """False: the response is only read, for the turns after it."""
    turns: Sequence[Turn] = ()
    """Later turns of an episode."""


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    phrases: Sequence[str] = (),
    roles: Sequence[str] = ROLES,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which a digit is always a token of its own.

    Any text survives encoding and decoding: what the vocabulary lacks is spelled in bytes.

    Args:
        texts: texts from which merges are learned.
        vocab_size: number of tokens; at least 261 for bytes and special tokens, plus phrases.
        phrases: strings that become one token wherever they occur, e.g. of a template.
        roles: headers of turns, as the chat template writes them.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(phrases),
        special_tokens=[PAD, EOS, *roles],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_without(texts, phrases), trainer)
    bpe.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(roles),
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _without(texts: Iterable[str], phrases: Sequence[str]) -> Iterator[str]:
    """The parts of `texts` between `phrases`."""
    for text in texts:
        pieces = [text]
        for phrase in phrases:
            pieces = [part for piece in pieces for part in piece.split(phrase)]
        yield from filter(None, pieces)


def build_policy(config: Qwen3Config, tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """A fresh policy whose vocabulary and end-of-sequence are the tokenizer's.

    Draws from the global generator: seed it before.
    """
    config.vocab_size = len(tokenizer)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.bos_token_id = None
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face folder: safetensors, configuration, tokenizer, chat template."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterator[Example],
    folder: Path,
    *,
    steps: int,
    lr: float = 3e-3,
) -> list[float]:
    """Call `warm_up` with a line every 50 steps, then `save`; returns the losses, one a step."""
    chat = Chat(tokenizer=tokenizer, eos_ids=(tokenizer.eos_token_id,))
    losses: list[float] = []
    for loss in warm_up(model, chat, examples, steps=steps, lr=lr):
        losses.append(loss)
        if len(losses) % 50 == 0:
            print(f"step {len(losses)}/{steps}: loss {sum(losses[-50:]) / 50:.3f}", flush=True)
    save(model, tokenizer, folder)
    return losses


def write_record(
    folder: Path,
    script: str,
    losses: Sequence[float],
    *,
    seed: int,
    seconds: float,
    **found: object,
) -> None:
    """Write `RECORD` into a policy's folder and print it: how it was made, and its scores.

    Args:
        folder: folder of the policy.
        script: path of the script; this process's arguments follow it, without the folder.
        losses: losses, one a step.
        seed: seed of its weights and examples.
        seconds: time of the steps.
        found: further figures.
    """
    words = [*sys.argv[1:]]
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    record = {
        "command": shlex.join(["python", script, *words]),
        "seed": seed,
        "steps": len(losses),
        "wall_seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "last_losses": sum(losses[-50:]) / max(len(losses[-50:]), 1),
        **found,
    }
    text = json.dumps(record, indent=2)
    (folder / RECORD).write_text(text + "\n")
    print(text)


def warm_up(
    model: Qwen3ForCausalLM,
    chat: Chat,
    examples: Iterator[Example],
    *,
    steps: int,
    batch_size: int = 64,
    lr: float = 3e-3,
) -> Iterator[float]:
    """Train on the tokens of responses; yields each step's loss (nats per token).

    Muon moves the matrices between layers and AdamW the rest: copying from the prompt is learned
    in a third of the steps that AdamW alone takes. The learning rate rises over the first
    twentieth and falls to zero on a cosine. Examples are drawn 16 batches ahead and sorted by
    length, so that little is spent on padding.
    """
    optimizers = _optimizers(model, lr)
    schedulers = [LambdaLR(optimizer, lambda i: _rate(i, steps)) for optimizer in optimizers]
    model.train()
    for ids, learned in islice(batches(chat, examples, batch_size), steps):
        loss = response_loss(model, ids, learned)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        yield loss.item()
    model.eval()


def _optimizers(model: Qwen3ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    embedding = model.get_input_embeddings().weight
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim == 2 and p is not embedding]
    rest = [p for p in parameters if p.ndim != 2 or p is embedding]
    return [
        torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw", weight_decay=0.01),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _rate(step: int, steps: int) -> float:
    warm = max(steps // 20, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def response_loss(model: Qwen3ForCausalLM, ids: Tensor, learned: Tensor) -> Tensor:
    """Mean of -log S(y) over learned tokens; logits are computed for these only.

    Shapes:
        ids: [B, L] int64, padded on the right, which causal attention makes harmless.
        learned: [B, L] bool, False at position 0 of each row.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][learned[:, 1:]])
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][learned[:, 1:]])


def batches(
    chat: Chat, examples: Iterator[Example], batch_size: int, ahead: int = 16
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and learned places [B, L] of `examples`, in batches of similar length.

    `ahead` batches are sorted at a time; their order is drawn from the global generator.
    """
    while pool := [_tokenize(chat, example) for example in islice(examples, batch_size * ahead)]:
        pool.sort(key=lambda pair: len(pair[0]))
        starts = range(0, len(pool), batch_size)
        for i in torch.randperm(len(starts)).tolist():
            yield _pad(pool[starts[i] : starts[i] + batch_size], chat.pad_id)


def _tokenize(chat: Chat, example: Example) -> tuple[list[int], list[bool]]:
    """Ids of the whole conversation, as in a rollout, and which of them are trained on."""
    ids = [*chat.render(example.messages), *chat.encode(example.prefix)]
    learned = [False] * len(ids)

    def say(response: str, *, is_learned: bool) -> None:
        said = [*chat.encode(response), chat.eos_ids[0]]
        ids.extend(said)
        learned.extend([is_learned] * len(said))

    say(example.response, is_learned=example.is_learned)
    for turn in example.turns:
        between = chat.continuation(turn.observed)[1:]  # after the end-of-sequence above
        ids.extend(between)
        learned.extend([False] * len(between))
        say(turn.response, is_learned=turn.is_learned)
    return ids, learned


def _pad(rows: Sequence[tuple[list[int], list[bool]]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad_id)
    learned = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, targets) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        learned[i, : len(row)] = torch.tensor(targets)
    return ids, learned


def respond(
    policy: CausalLM, prompts: Sequence[Prompt], sampling: Sampling
) -> tuple[Responses, tuple[tuple[Verdict, ...], ...]]:
    """Responses and verdicts [Q][n]; prompts are rendered where they were not yet."""
    asked = [p if p.ids else rendered(p, policy.chat) for p in prompts]
    responses = HFRollout().sample(policy, asked, sampling)
    return responses, verify_all(asked, responses.texts)


def level_and_shape(prompt: Prompt) -> tuple[str, ...]:
    """Groups of a question of `LabTasks`, for `accuracy`."""
    return prompt.category, prompt.key.split("/")[2]


def accuracy(
    prompts: Sequence[Prompt],
    verdicts: Sequence[Sequence[Verdict]],
    *,
    strata: Callable[[Prompt], Sequence[str]] = level_and_shape,
) -> dict[str, float]:
    """Mean reward over `all`, and over each group of questions."""
    found: dict[str, list[float]] = {"all": []}
    for prompt, group in zip(prompts, verdicts, strict=True):
        for name in ("all", *strata(prompt)):
            found.setdefault(name, []).extend(verdict.reward for verdict in group)
    return {name: _mean(rewards) for name, rewards in sorted(found.items())}


def well_formed(responses: Responses, verdicts: Sequence[Sequence[Verdict]]) -> float:
    """Share of responses that ended by themselves and hold an answer, right or wrong."""
    ended = responses.ended.flatten().tolist()
    held = [verdict.answer is not None for group in verdicts for verdict in group]
    return _mean([float(a and b) for a, b in zip(ended, held, strict=True)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
