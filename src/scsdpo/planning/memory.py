"""Bytes a rank, part by part, and the phases of a step as sums of them. docs/plan.md derives them.

L layers, D hidden, H query and K key heads of size d, I intermediate, V vocabulary; w bytes of the
residual stream, n bytes of what linear layers read and give.
"""

from dataclasses import dataclass, fields

import torch

from scsdpo.loss.kernel import BLOCK_BYTES, chunk_rows
from scsdpo.planning.activations import activation_bytes, stored_bytes
from scsdpo.planning.architecture import Architecture
from scsdpo.planning.setup import FLOAT32, GIB, SecondWeights, Setup
from scsdpo.rollout.hf.kv_cache import blocks

PREFILL_TOKENS = 8192
"""Most tokens of one prompt pass (`ContinuousBatcher`)."""
BLOCK_TABLES = 5
"""Tables [block, V] float32 beside the products: probabilities and what credit makes of them."""
DRAW_TABLES = 4
"""Tables [rows, V] float32 of a draw: logits, probabilities, their padded copy, a temporary."""
GRAPHS = 2
"""Graphs alive at a time: that of a micro-batch and that of the prompts above it."""
CPU_TOKENS = 1024
GPU_TOKENS = 2**17
"""Most tokens of `limits.max_tokens: auto` (`CausalLM.token_budget`)."""
VLLM_BYTES = GIB
"""Assumed for the activations and graphs of a colocated vLLM."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Bytes a rank."""

    process: int = 0
    """Libraries, the device's context: assumed."""
    weights: int = 0
    """Of the policy."""
    optimizer: int = 0
    """States."""
    teacher: int = 0
    """Weights of its own."""
    reference: int = 0
    """Weights of its own."""
    buckets: int = 0
    """DDP's, as large as the gradients and never filled: no resident memory on a CPU."""
    vllm: int = 0
    """Colocated, awake through the whole step."""
    gradients: int = 0
    gradients_before: int = 0
    """Of them, those there when a teacher runs: all, if there is a later micro-batch."""
    gradients_meanwhile: int = 0
    """Of them, those that lie beside the largest micro-batch: none if that is the first."""
    gathered: int = 0
    """Under shards, what is whole of a running model: two layers and the root."""
    casts: int = 0
    """bf16 copies of float32 weights that the backward reads."""
    activations: int = 0
    """At the budget of a micro-batch, its prompts' among them."""
    dequantized: int = 0
    """The matrix at work, made plain from 4 bits."""
    kept: int = 0
    """Activations and casts of the prompts alone, which wait for their responses."""
    prompts: int = 0
    """Float32 sums of the gradients sent back to keys and values of prompts."""
    heads: int = 0
    """bf16 copies of heads, the head's gradient where it lies beside the embedding's."""
    chunks: int = 0
    """Logits."""
    teaching: int = 0
    """Of a teacher's forward: keys and values of its prompts, and a layer at work."""
    sampling_weights: int = 0
    """Copies to sample from: whole under shards, merged under LoRA, vLLM's own."""
    cache: int = 0
    """Keys and values of sampling."""
    drawing: int = 0
    """A prompt pass, or the logits of a draw."""
    stepping: int = 0
    """Temporaries of the optimizer, or what the end of the backward has before it."""

    def total(self, names: tuple[str, ...]) -> int:
        """Sum over some of them."""
        return sum(getattr(self, name) for name in names)

    def nonzero(self) -> dict[str, int]:
        """By name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}


RESIDENT = ("process", "weights", "optimizer", "teacher", "reference", "buckets", "vllm")
"""There through the whole step."""
PHASES = {
    "sampling": (*RESIDENT, "sampling_weights", "dequantized", "cache", "drawing"),
    "teacher": (
        *RESIDENT,
        "gradients_meanwhile",
        "gathered",
        "dequantized",
        "kept",
        "prompts",
        "heads",
        "teaching",
    ),
    "update": (
        *RESIDENT,
        "gradients_meanwhile",
        "gathered",
        "casts",
        "dequantized",
        "activations",
        "prompts",
        "heads",
        "chunks",
    ),
    "optimizer step": (*RESIDENT, "gradients", "stepping"),
}
"""Which parts lie beside each other at the peak of each phase."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of a setup, a rank."""

    parts: Parts
    budget: int
    """Tokens of a micro-batch."""
    micro_batches: int
    """An optimizer step, if all responses are trained on and of the given length."""

    @property
    def phases(self) -> dict[str, int]:
        """Peak bytes of each phase."""
        return {name: self.parts.total(names) for name, names in PHASES.items()}

    @property
    def peak(self) -> int:
        """Of the whole step."""
        return max(self.phases.values())

    @property
    def least(self) -> int:
        """Weights, gradients and optimizer states: less than this no setting makes it."""
        return self.parts.total(("weights", "gradients", "optimizer"))


def memory_of(setup: Setup) -> Memory:
    """The arithmetic."""
    resident = _resident(setup)
    budget = _budget(setup, resident)
    batch = _micro_batch(setup, budget)
    gradients = FLOAT32 * setup.counted.trained // setup.shards
    a_token, waiting = activation_bytes(setup), batch.kept * stored_bytes(setup)
    # The first finds no gradients yet; the second may be smaller.
    first, second = batch.first * a_token, batch.second * a_token
    is_later = batch.second > 0 and gradients + second >= first
    return Memory(
        parts=Parts(
            **resident,
            gradients=gradients,
            gradients_before=gradients if batch.count > 1 else 0,
            gradients_meanwhile=gradients if is_later else 0,
            gathered=gathered_bytes(setup),
            casts=GRAPHS * casts_bytes(setup),
            dequantized=setup.base * setup.counted.widest,
            activations=waiting + (second if is_later else first),
            kept=waiting + casts_bytes(setup) if batch.count > 1 else 0,
            prompts=2 * FLOAT32 * len(setup.shapes.windows) * setup.shapes.keys * batch.kept,
            heads=_heads(setup),
            chunks=_chunks(setup, batch.first),
            teaching=_teaching(setup, batch.kept + batch.first),
            sampling_weights=_sampling_weights(setup),
            cache=_cache(setup),
            drawing=_drawing(setup),
            stepping=_stepping(setup),
        ),
        budget=budget,
        micro_batches=batch.count,
    )


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """Of the micro-batches of an optimizer step, on a rank."""

    kept: int
    """Of prompts that wait for their responses."""
    first: int
    """Of the responses of the first micro-batch."""
    second: int
    """Of the second; 0: there is none."""
    count: int


def _micro_batch(setup: Setup, budget: int) -> _Tokens:
    """Prompts wait together up to half of the budget; responses share the rest.

    A response that does not fit runs alone.
    """
    response = setup.lengths.response
    kept = min(setup.prompts * setup.lengths.prompt, budget // 2)
    rows = min(max((budget - kept) // response, 1), setup.responses)
    second = min(rows, setup.responses - rows)
    count = -(-setup.responses // rows)
    return _Tokens(kept=kept, first=rows * response, second=second * response, count=count)


def _engine(setup: Setup) -> int:
    """Of a colocated vLLM that is awake."""
    sampler = setup.sampler
    weights = sampler.weight_bytes * setup.shapes.parameters // sampler.sharing
    return weights + sampler.cache_bytes + VLLM_BYTES


def _resident(setup: Setup) -> dict[str, int]:
    counted, devices = setup.counted, setup.devices
    weights = setup.frozen_bytes + FLOAT32 * counted.trained
    many = devices.ranks > 1 and not devices.sharded and devices.kind == "cuda"
    sampler = setup.sampler
    engine = _engine(setup)
    awake = sampler.kind == "colocated" and not sampler.sleeps
    of = {second.slot: _second_bytes(setup, second) for second in setup.seconds}
    return {
        "process": devices.process,
        "weights": weights // setup.shards,
        "optimizer": int(setup.optimizer.state * counted.trained) // setup.shards,
        "teacher": of.get("teacher", 0) // setup.shards,
        "reference": of.get("reference", 0) // setup.shards,
        "buckets": FLOAT32 * counted.trained if many else 0,
        "vllm": engine if awake else 0,
    }


def _second_bytes(setup: Setup, second: SecondWeights) -> int:
    """A whole fine-tune copies everything; LoRA shares the base, and copies factors that move.

    Another model has all of its weights.
    """
    copied = setup.counted.whole or second.kind in ("moving", "external")
    if not copied or second.kind == "none" or (second.stored.on_host and _has_host(setup)):
        return 0
    if second.kind == "external":
        return second.width * second.shapes.parameters - second.saved
    return getattr(torch, second.stored.dtype).itemsize * setup.counted.trained


def _has_host(setup: Setup) -> bool:
    """Whether the host's memory is another than the device's."""
    return setup.devices.kind == "cuda"


def _budget(setup: Setup, resident: dict[str, int]) -> int:
    """As `CausalLM.token_budget`: half of what is free, less gradients and casts."""
    if setup.max_tokens != "auto":
        return setup.max_tokens
    gradients = FLOAT32 * setup.counted.trained // setup.shards
    free = setup.devices.memory - sum(resident.values())
    fixed = GRAPHS * casts_bytes(setup) + gradients
    most = GPU_TOKENS if setup.devices.kind == "cuda" else CPU_TOKENS
    return max(min(int((free // 2 - fixed) / activation_bytes(setup)), most), 1)


def casts_bytes(setup: Setup) -> int:
    """Of one graph: the backward reads every linear layer's weight as the product read it."""
    if not setup.autocast or not setup.counted.whole:
        return 0
    shapes = setup.shapes
    return setup.narrow * (shapes.matrices if setup.checkpointing else shapes.multiplied)


def gathered_bytes(setup: Setup) -> int:
    """Two layers whole, this and the next, the root, and the gradient of a layer.

    Of another model as much, without a gradient; its root stays.
    """
    if not setup.devices.sharded:
        return 0
    bytes_each = FLOAT32 if setup.counted.whole else setup.base
    whole = bytes_each * (2 * setup.shapes.layer + setup.shapes.root)
    whole += sum(each.width * (2 * each.shapes.layer + each.shapes.root) for each in setup.others)
    return whole + (FLOAT32 * setup.shapes.layer if setup.counted.whole else 0)


def ending_bytes(setup: Setup) -> int:
    """At the end of a backward, when no activation is left: the gradient of what is on its way.

    That of the embedding; under shards the root with its gradient, and two layers.
    """
    if not setup.counted.whole:
        return 0
    if setup.devices.sharded:
        return 2 * FLOAT32 * (setup.shapes.root + setup.shapes.layer)
    return FLOAT32 * setup.shapes.table


def _heads(setup: Setup) -> int:
    """One copy a model if autocast narrows it; gradients of a tied head and of the embedding."""
    others = sum(
        setup.narrow_of(each) * each.shapes.table
        for each in setup.others
        if each.width > setup.narrow_of(each)
    )
    if not setup.counted.whole:
        return others
    models = 1 + sum(each.trunks for each in setup.seconds if not each.another)
    copies = models * setup.narrow if setup.autocast else 0
    beside = FLOAT32 if setup.shapes.tied else 0
    product = setup.narrow if setup.autocast else 0
    return (copies + beside + product) * setup.shapes.table + others


def _chunks(setup: Setup, tokens: int) -> int:
    """A table of products a model, and of a block what lies between them."""
    kind, row = setup.devices.kind, FLOAT32 * setup.shapes.vocabulary
    rows = min(chunk_rows(setup.shapes.vocabulary, kind, setup.devices.memory), tokens)
    block = min(max(BLOCK_BYTES[kind] // row, 1), rows)
    tables = 1 + sum(second.trunks for second in setup.seconds)
    narrow = rows * setup.narrow * setup.shapes.vocabulary if setup.autocast else 0
    return tables * rows * row + BLOCK_TABLES * block * row + narrow


def _working(shapes: Architecture, n: int) -> int:
    """Bytes a token of a layer that keeps nothing: residual stream, and its widest place."""
    queries = (2 * n + FLOAT32) * (shapes.queries + shapes.keys)
    return 3 * FLOAT32 * shapes.hidden + max(queries, 3 * n * shapes.intermediate)


def _teaching(setup: Setup, tokens: int) -> int:
    prompts = {"teacher": setup.lengths.teacher_prompt, "reference": setup.lengths.prompt}
    if not setup.seconds:
        return 0
    kept = sum(
        second.trunks
        * setup.narrow_of(second)
        * second.shapes.cached(min(tokens, setup.responses * prompts[second.slot]))
        for second in setup.seconds
    )
    return kept + max(_forward(setup, second, tokens) for second in setup.seconds)


def _forward(setup: Setup, second: SecondWeights, tokens: int) -> int:
    """A layer at work, its cast, and what is lent for the forward, layer by layer."""
    shapes, n = second.shapes, setup.narrow_of(second)
    lent = second.width * (shapes.layer + shapes.root) * (not second.stored.is_plain)
    cast = _one_cast(setup)
    if second.another:
        cast = n * _widest(shapes) if n < second.width else 0
    return tokens * _working(shapes, n) + cast + lent


def _widest(shapes: Architecture) -> int:
    """Elements of the largest matrix."""
    return max(shapes.table, shapes.hidden * max(shapes.intermediate, shapes.queries))


def _one_cast(setup: Setup) -> int:
    """Of the widest product, made and let go."""
    is_cast = setup.autocast and setup.counted.whole
    return setup.narrow * _widest(setup.shapes) if is_cast else 0


def _sampling_weights(setup: Setup) -> int:
    shapes, counted, sampler = setup.shapes, setup.counted, setup.sampler
    if sampler.kind == "colocated":
        return _engine(setup) if sampler.sleeps else 0
    if sampler.kind == "remote":
        return FLOAT32 * max(shapes.table, shapes.layer)  # one tensor at a time
    whole = 0
    if setup.devices.sharded:
        linear = setup.narrow if setup.autocast else setup.wide
        whole = linear * (shapes.multiplied + (0 if shapes.tied else shapes.table))
        whole += setup.wide * (shapes.parameters - shapes.multiplied)
        whole -= 0 if shapes.tied else setup.wide * shapes.table
    elif sampler.kind == "hf" and setup.autocast and counted.whole:
        whole = setup.narrow * (shapes.multiplied + shapes.table)  # linear layers, cast once
        fits = 2 * whole <= setup.devices.memory - sum(_resident(setup).values())
        whole = whole if fits else 0
    merged = setup.base * counted.adapted if sampler.merges else 0
    free = setup.devices.memory - sum(_resident(setup).values())
    return whole + (merged if 2 * merged <= free else 0)


def _cache(setup: Setup) -> int:
    """Prompts, and responses in rectangles that grow by half; at most the sampler's room.

    States of layers without attention come on top, of each prompt and each response.
    """
    if setup.sampler.kind != "hf":
        return 0
    prompt, response = setup.lengths.prompt, setup.lengths.response
    rows = min(setup.sampler.max_rows, setup.in_flight)
    groups = -(-rows // setup.group)
    tokens = groups * prompt + rows * blocks(response)
    share = min(setup.sampler.max_tokens / tokens, 1.0)
    held = groups * setup.shapes.cached(prompt) + rows * setup.shapes.cached(blocks(response))
    states = (groups + rows) * setup.shapes.state * FLOAT32
    return int(share * held * setup.narrow) + states


def _drawing(setup: Setup) -> int:
    if setup.sampler.kind != "hf":
        return 0
    rows = min(setup.sampler.max_rows, setup.in_flight)
    prefill = min(PREFILL_TOKENS, -(-rows // setup.group) * setup.lengths.prompt) * _working(
        setup.shapes, setup.narrow
    )
    logits = DRAW_TABLES * FLOAT32 * rows * setup.shapes.vocabulary
    return max(prefill, logits) + _one_cast(setup)


def _stepping(setup: Setup) -> int:
    """A list as long as the gradients, or one tensor at a time; or the backward's end."""
    trained = setup.counted.trained // setup.shards
    lists = int(setup.optimizer.temporary * trained)
    table = setup.shapes.table if setup.counted.whole else 0
    one = int(setup.optimizer.of_largest * table) // setup.shards
    return max(lists, one, ending_bytes(setup))
