"""Bytes on a rank, part by part, and the phases of a step as sums of parts; docs/plan.md derives
them.

L layers, D hidden, H query and K key heads of size d, I intermediate, V vocabulary; w bytes of an
element of the residual stream, n bytes of an element of linear layers' inputs and outputs.
"""

from dataclasses import dataclass, fields

import torch

from scsdpo.loss.kernel import BLOCK_BYTES, chunk_rows
from scsdpo.planning.architecture import Architecture
from scsdpo.planning.setup import FLOAT32, GIB, SecondWeights, Setup
from scsdpo.rollout.hf.kv_cache import blocks

PREFILL_TOKENS = 8192
"""Most tokens of one forward of prompts (`ContinuousBatcher`)."""
BLOCK_TABLES = 5
"""Tables [block, V] float32 beside the logits: probabilities, and intermediates of the credit."""
DRAW_TABLES = 4
"""Tables [rows, V] float32 of a draw: logits, probabilities, their padded copy, a temporary."""
GRAPHS = 2
"""Graphs alive at a time: that of a micro-batch and that of its prompts."""
CPU_TOKENS = 1024
GPU_TOKENS = 2**17
"""Most tokens of `limits.max_tokens: auto` (`CausalLM.token_budget`)."""
VLLM_BYTES = GIB
"""Bytes assumed for the activations and graphs of a colocated vLLM."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Bytes on a rank, part by part."""

    process: int = 0
    """Libraries and the device's context (assumed)."""
    weights: int = 0
    """Weights of the policy."""
    optimizer: int = 0
    """Optimizer states."""
    teacher: int = 0
    """The teacher's own weights."""
    reference: int = 0
    """The reference's own weights."""
    buckets: int = 0
    """DDP's buckets, as large as the gradients. They are never filled, so on a CPU they take no
    resident memory."""
    vllm: int = 0
    """A colocated vLLM that stays awake through the whole step."""
    gradients: int = 0
    gradients_before: int = 0
    """Gradients that exist when the last micro-batch's teacher runs: all if there are several
    micro-batches, else 0."""
    gradients_meanwhile: int = 0
    """Gradients that exist during the micro-batch with the peak: 0 if that is the first."""
    gathered: int = 0
    """If weights are sharded: gathered weights of the running model, two layers and the root."""
    casts: int = 0
    """bf16 copies of float32 weights that the backward reads."""
    activations: int = 0
    """Activations of a micro-batch at its budget, with those of its prompts."""
    dequantized: int = 0
    """One matrix, dequantised from 4 bits for its product."""
    kept: int = 0
    """Activations and casts of prompts that wait for their responses."""
    prompts: int = 0
    """Float32 sums of the gradients of prompts' keys and values."""
    heads: int = 0
    """bf16 copies of heads, and the head's gradient if it is beside the embedding's."""
    chunks: int = 0
    """Chunks of logits."""
    teaching: int = 0
    """A teacher's forward: keys and values of its prompts, and the activations of one layer."""
    sampling_weights: int = 0
    """Copies of weights to sample from: gathered shards, merged LoRA, or vLLM's own."""
    cache: int = 0
    """Keys and values of sampling."""
    drawing: int = 0
    """A forward of prompts, or the logits of a draw."""
    stepping: int = 0
    """Temporaries of the optimizer, or of the end of the backward before it."""

    def total(self, names: tuple[str, ...]) -> int:
        """Sum of the parts `names`."""
        return sum(getattr(self, name) for name in names)

    def nonzero(self) -> dict[str, int]:
        """Name -> bytes of the parts that are not 0."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}


RESIDENT = ("process", "weights", "optimizer", "teacher", "reference", "buckets", "vllm")
"""Parts that exist through the whole step."""
PARTS_OF_PHASE = {
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
"""Phase -> the parts that exist together at its peak."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of a setup on one rank."""

    parts: Parts
    budget: int
    """Tokens of a micro-batch."""
    micro_batches: int
    """Micro-batches of an optimizer step, if all responses have full length and are trained on."""

    @property
    def phases(self) -> dict[str, int]:
        """Peak bytes of each phase."""
        return {name: self.parts.total(names) for name, names in PARTS_OF_PHASE.items()}

    @property
    def peak(self) -> int:
        """Peak bytes of the whole step."""
        return max(self.phases.values())

    @property
    def least(self) -> int:
        """Bytes of weights, gradients and optimizer states, which no other setting reduces."""
        return self.parts.total(("weights", "gradients", "optimizer"))


def memory_of(setup: Setup) -> Memory:
    """Estimate the memory of `setup` on one rank."""
    resident = _resident(setup)
    budget = _budget(setup, resident)
    batch = _micro_batch(setup, budget)
    gradients = FLOAT32 * setup.counted.trained // setup.shards
    a_token, waiting = activation_bytes(setup), batch.kept * stored_bytes(setup)
    # During the first micro-batch there are no gradients yet; the second may be smaller.
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
    """Tokens of the micro-batches of an optimizer step on a rank."""

    kept: int
    """Tokens of prompts that wait for their responses."""
    first: int
    """Tokens of the responses of the first micro-batch."""
    second: int
    """Tokens of the responses of the second micro-batch; 0: there is none."""
    count: int
    """Number of micro-batches."""


def _micro_batch(setup: Setup, budget: int) -> _Tokens:
    """Split the budget: prompts get at most half of it, and responses share the rest.

    A response that does not fit runs alone.
    """
    response = setup.lengths.response
    kept = min(setup.prompts * setup.lengths.prompt, budget // 2)
    rows = min(max((budget - kept) // response, 1), setup.responses)
    second = min(rows, setup.responses - rows)
    count = -(-setup.responses // rows)
    return _Tokens(kept=kept, first=rows * response, second=second * response, count=count)


def _engine(setup: Setup) -> int:
    """Bytes of a colocated vLLM that is awake."""
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
    """Bytes of a teacher's own weights on the device.

    A full fine-tune copies the model. LoRA shares the base and copies only factors that move.
    Another model has all of its weights.
    """
    copied = setup.counted.whole or second.kind in ("moving", "external")
    on_host = second.stored.on_host and setup.devices.kind == "cuda"  # a CPU is its own host
    if not copied or second.kind == "none" or on_host:
        return 0
    if second.kind == "external":
        return second.width * second.shapes.parameters - second.saved
    return getattr(torch, second.stored.dtype).itemsize * setup.counted.trained


def _budget(setup: Setup, resident: dict[str, int]) -> int:
    """`CausalLM.token_budget`: tokens that fit in half of the free memory beside gradients and
    casts.
    """
    if setup.max_tokens != "auto":
        return setup.max_tokens
    gradients = FLOAT32 * setup.counted.trained // setup.shards
    free = setup.devices.memory - sum(resident.values())
    fixed = GRAPHS * casts_bytes(setup) + gradients
    most = GPU_TOKENS if setup.devices.kind == "cuda" else CPU_TOKENS
    return max(min(int((free // 2 - fixed) / activation_bytes(setup)), most), 1)


def casts_bytes(setup: Setup) -> int:
    """Bytes of the bf16 copies of weights in one graph, which its backward reads."""
    if not setup.autocast or not setup.counted.whole:
        return 0
    shapes = setup.shapes
    return setup.narrow * (shapes.matrices if setup.checkpointing else shapes.multiplied)


def gathered_bytes(setup: Setup) -> int:
    """Bytes of gathered weights if they are sharded: this layer, the next one and the root, and the
    gradient of a layer.

    Another model has as many, without a gradient.
    """
    if not setup.devices.sharded:
        return 0
    bytes_each = FLOAT32 if setup.counted.whole else setup.base
    whole = bytes_each * (2 * setup.shapes.layer + setup.shapes.root)
    whole += sum(each.width * (2 * each.shapes.layer + each.shapes.root) for each in setup.others)
    return whole + (FLOAT32 * setup.shapes.layer if setup.counted.whole else 0)


def ending_bytes(setup: Setup) -> int:
    """Bytes at the end of a backward, when no activation is left.

    They are a gradient of the embedding; if weights are sharded, the root and a layer, each with
    its gradient.
    """
    if not setup.counted.whole:
        return 0
    if setup.devices.sharded:
        return 2 * FLOAT32 * (setup.shapes.root + setup.shapes.layer)
    return FLOAT32 * setup.shapes.table


def _heads(setup: Setup) -> int:
    """Bytes of a bf16 head for each model under autocast, and gradients of head and embedding."""
    others = sum(
        setup.narrow_of(each) * each.shapes.table
        for each in setup.others
        if each.width > setup.narrow_of(each)
    )
    if not setup.counted.whole:
        return others
    models = 1 + sum(each.forwards for each in setup.seconds if not each.another)
    copies = models * setup.narrow if setup.autocast else 0
    beside = FLOAT32 if setup.shapes.tied else 0
    product = setup.narrow if setup.autocast else 0
    return (copies + beside + product) * setup.shapes.table + others


def _chunks(setup: Setup, tokens: int) -> int:
    """Bytes of a chunk's logits for each model, and of a block's intermediates."""
    kind, row = setup.devices.kind, FLOAT32 * setup.shapes.vocabulary
    rows = min(chunk_rows(setup.shapes.vocabulary, kind, setup.devices.memory), tokens)
    block = min(max(BLOCK_BYTES[kind] // row, 1), rows)
    tables = 1 + sum(second.forwards for second in setup.seconds)
    narrow = rows * setup.narrow * setup.shapes.vocabulary if setup.autocast else 0
    return tables * rows * row + BLOCK_TABLES * block * row + narrow


def _working(shapes: Architecture, n: int) -> int:
    """Bytes of a token in a layer without a graph: residual stream, and its widest intermediate."""
    queries = (2 * n + FLOAT32) * (shapes.queries + shapes.keys)
    return 3 * FLOAT32 * shapes.hidden + max(queries, 3 * n * shapes.intermediate)


def _teaching(setup: Setup, tokens: int) -> int:
    prompts = {"teacher": setup.lengths.teacher_prompt, "reference": setup.lengths.prompt}
    if not setup.seconds:
        return 0
    kept = sum(
        second.forwards
        * setup.narrow_of(second)
        * second.shapes.cached(min(tokens, setup.responses * prompts[second.slot]))
        for second in setup.seconds
    )
    return kept + max(_forward(setup, second, tokens) for second in setup.seconds)


def _forward(setup: Setup, second: SecondWeights, tokens: int) -> int:
    """Bytes of a teacher's forward: a layer's activations, a cast, and copies of `OffloadHooks`."""
    shapes, n = second.shapes, setup.narrow_of(second)
    loaded = second.width * (shapes.layer + shapes.root) * (not second.stored.is_plain)
    cast = _one_cast(setup)
    if second.another:
        cast = n * _widest(shapes) if n < second.width else 0
    return tokens * _working(shapes, n) + cast + loaded


def _widest(shapes: Architecture) -> int:
    """Elements of the largest matrix."""
    return max(shapes.table, shapes.hidden * max(shapes.intermediate, shapes.queries))


def _one_cast(setup: Setup) -> int:
    """Bytes of the bf16 copy of the largest matrix, which is freed after its product."""
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
    """Bytes of keys and values of prompts and responses, at most the sampler's room.

    States of layers without attention are added, one for each prompt and each response.
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
    """Bytes of the optimizer's temporaries, or of the end of the backward if that is more."""
    trained = setup.counted.trained // setup.shards
    lists = int(setup.optimizer.temporary * trained)
    table = setup.shapes.table if setup.counted.whole else 0
    one = int(setup.optimizer.of_largest * table) // setup.shards
    return max(lists, one, ending_bytes(setup))


# ------------------------------------------------------------------ activations


def layer_bytes(setup: Setup) -> int:
    """Bytes that one decoder layer keeps of a token for the backward; of the largest type of layer.

    Layers of linear attention, convolutions and experts are measured (`measured_layers`). Other
    layers keep:

    * for each norm its float32 input, and the normalised one if its weight is trained;
    * inputs of linear layers: one copy for all, or with autocast one each for q, k, v, gate and up;
    * queries and keys: inputs of their norms as above, then scaled queries, keys, values, and
      attention's output;
    * gate, its activation, up, and their product.
    """
    if setup.measured.layers:
        return int(max(setup.measured.layers))
    shapes, counted, n = setup.shapes, setup.counted, setup.narrow
    scale = counted.whole * 1
    inputs = 5 * n if setup.autocast else 2 * n
    of_hidden = 2 * FLOAT32 * (1 + scale) + inputs
    normed = FLOAT32 + scale * n if shapes.head_norms else 0
    copied = n if setup.autocast and not counted.whole else 0
    scalars = 2 * FLOAT32 + FLOAT32 * shapes.heads
    scalars += FLOAT32 * (shapes.heads + shapes.key_heads) if shapes.head_norms else 0
    return (
        of_hidden * shapes.hidden
        + (normed + 2 * n + copied) * shapes.queries
        + (normed + 2 * n) * shapes.keys
        + 4 * n * shapes.intermediate
        + n * counted.rank_tables
        + scalars
    )


def stored_bytes(setup: Setup) -> int:
    """Bytes that all layers keep of a token; with checkpointing, the input of each layer."""
    if setup.checkpointing:
        return setup.shapes.layers * setup.wide * setup.shapes.hidden
    return int(sum(setup.measured.layers)) or setup.shapes.layers * layer_bytes(setup)


def activation_bytes(setup: Setup) -> int:
    """Bytes of a token in a micro-batch: `stored_bytes`, and the peak beyond the layers.

    That peak is at the end of the decoder: the last norm, its output gathered in the order of
    tokens, its gradient, and the kernel's copies. With checkpointing it may be one layer that is
    recomputed and goes back, with its gradients and, with LoRA, casts.
    """
    shapes, n = setup.shapes, setup.narrow
    end = (5 * setup.wide + FLOAT32 + n) * shapes.hidden
    for second in setup.seconds:
        wide = second.width if second.another else setup.wide
        end += second.forwards * wide * second.shapes.hidden
    end = max(end, int(setup.measured.end))
    if setup.checkpointing:
        gradients = 4 * shapes.hidden + 2 * n * shapes.intermediate
        if not setup.counted.whole:
            gradients += 8 * shapes.hidden + n * shapes.intermediate
        end = max(layer_bytes(setup) + gradients, end)
    return stored_bytes(setup) + end
