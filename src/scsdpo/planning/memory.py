"""Bytes a rank, part by part, and the phases of a step as sums of them. docs/plan.md derives them.

L layers, D hidden, H query and K key heads of size d, I intermediate, V vocabulary (`Architecture`);
w bytes of the residual stream, n bytes of what linear layers read and give.
"""

from dataclasses import dataclass, fields

from scsdpo.loss.kernel import BLOCK_BYTES, CHUNK_BYTES, FEWEST_ROWS
from scsdpo.planning.setup import FLOAT32, GIB, SecondWeights, Setup
from scsdpo.rollout.kv_cache import blocks

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
    gradients_meanwhile: int = 0
    """Of them, those that lie beside a micro-batch: all, unless there is one micro-batch."""
    gathered: int = 0
    """Under shards, what is whole of a running model: two layers and the root."""
    casts: int = 0
    """bf16 copies of float32 weights that the backward reads."""
    activations: int = 0
    """At the budget of a micro-batch, its prompts' among them."""
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
    """Temporaries of the optimizer, or the embedding's gradient before it is added."""

    def total(self, names: tuple[str, ...]) -> int:
        """Sum over some of them."""
        return sum(getattr(self, name) for name in names)

    def nonzero(self) -> dict[str, int]:
        """By name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}


RESIDENT = ("process", "weights", "optimizer", "teacher", "reference", "buckets", "vllm")
"""There through the whole step."""
PHASES = {
    "sampling": (*RESIDENT, "sampling_weights", "cache", "drawing"),
    "teacher": (*RESIDENT, "gradients_meanwhile", "gathered", "prompts", "heads", "teaching"),
    "update": (
        *RESIDENT,
        "gradients_meanwhile",
        "gathered",
        "casts",
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
    distinct = setup.prompts * setup.lengths.prompt + setup.responses * setup.lengths.response
    # A response that alone exceeds the budget runs alone.
    tokens = min(max(budget, setup.lengths.response), distinct)
    micro_batches = min(-(-distinct // tokens), setup.responses)
    gradients = FLOAT32 * setup.counted.trained // setup.shards
    kept = min(tokens * 3 // 4, setup.prompts * setup.lengths.prompt)
    return Memory(
        parts=Parts(
            **resident,
            gradients=gradients,
            gradients_meanwhile=gradients if micro_batches > 1 else 0,
            gathered=_gathered(setup),
            casts=GRAPHS * _casts(setup),
            activations=int(tokens * activation_bytes(setup)),
            prompts=2 * FLOAT32 * setup.shapes.layers * setup.shapes.keys * kept,
            heads=_heads(setup),
            chunks=_chunks(setup, tokens),
            teaching=_teaching(setup, tokens),
            sampling_weights=_sampling_weights(setup),
            cache=_cache(setup),
            drawing=_drawing(setup),
            stepping=_stepping(setup),
        ),
        budget=budget,
        micro_batches=micro_batches,
    )


def layer_bytes(setup: Setup) -> int:
    """What one decoder layer keeps of a token for the backward.

    Norms, each: float32 input and, where its weight is trained, the normalised one. Inputs of
    linear layers: one copy for all, or under autocast one each of q, k, v, gate and up. Queries and
    keys: the same of their norms, then scaled queries, keys, values, attention's output; gate, its
    activation, up and their product.
    """
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


def activation_bytes(setup: Setup) -> int:
    """What a token leaves behind over all layers, and at the end of the trunk.

    With checkpointing the input of each layer, and one layer as it is recomputed and goes back.
    """
    shapes, n = setup.shapes, setup.narrow
    trunks = sum(second.trunks for second in setup.seconds)
    # Last norm, its output gathered in the order of tokens, its gradient; the kernel's copies.
    end = (5 * setup.wide + FLOAT32 + n + trunks * setup.wide) * shapes.hidden
    if not setup.checkpointing:
        return shapes.layers * layer_bytes(setup) + end
    again = layer_bytes(setup) + 12 * shapes.hidden + 2 * n * shapes.intermediate
    return shapes.layers * setup.wide * shapes.hidden + again + end


def _resident(setup: Setup) -> dict[str, int]:
    counted, devices = setup.counted, setup.devices
    weights = setup.base * counted.frozen + FLOAT32 * counted.trained
    many = devices.ranks > 1 and not devices.sharded and devices.kind == "cuda"
    sampler = setup.sampler
    engine = sampler.weight_bytes * setup.shapes.parameters + sampler.cache_bytes + VLLM_BYTES
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
    """A whole fine-tune copies everything; LoRA shares the base, and copies factors that move."""
    copied = setup.counted.whole or second.kind == "moving"
    return FLOAT32 * setup.counted.trained if copied and second.kind != "none" else 0


def _budget(setup: Setup, resident: dict[str, int]) -> int:
    """As `CausalLM.token_budget`: half of what is free, less gradients and casts."""
    if setup.max_tokens != "auto":
        return setup.max_tokens
    gradients = FLOAT32 * setup.counted.trained // setup.shards
    free = setup.devices.memory - sum(resident.values())
    fixed = GRAPHS * _casts(setup) + gradients
    most = GPU_TOKENS if setup.devices.kind == "cuda" else CPU_TOKENS
    return max(min(int((free // 2 - fixed) / activation_bytes(setup)), most), 1)


def _casts(setup: Setup) -> int:
    """Of one graph: the backward reads every linear layer's weight as the product read it."""
    if not setup.autocast or not setup.counted.whole:
        return 0
    layers = 1 if setup.checkpointing else setup.shapes.layers
    return setup.narrow * layers * setup.shapes.matrices


def _gathered(setup: Setup) -> int:
    """This layer and the next, whole, with the gradient of one; and the root with its gradient."""
    if not setup.devices.sharded:
        return 0
    bytes_each = FLOAT32 if setup.counted.whole else setup.base
    whole = bytes_each * (2 * setup.shapes.layer + setup.shapes.root)
    gradients = FLOAT32 * (setup.shapes.layer + setup.shapes.root) if setup.counted.whole else 0
    return whole + gradients


def _heads(setup: Setup) -> int:
    """One copy a model if autocast narrows it; gradients of a tied head and of the embedding."""
    if not setup.counted.whole:
        return 0
    models = 1 + sum(second.trunks for second in setup.seconds)
    copies = models * setup.narrow if setup.autocast else 0
    beside = FLOAT32 if setup.shapes.tied else 0
    product = setup.narrow if setup.autocast else 0
    return (copies + beside + product) * setup.shapes.table


def _chunks(setup: Setup, tokens: int) -> int:
    """A table of products a model, and of a block what lies between them."""
    kind, row = setup.devices.kind, FLOAT32 * setup.shapes.vocabulary
    rows = min(max(CHUNK_BYTES[kind] // row, FEWEST_ROWS), tokens)
    block = min(max(BLOCK_BYTES[kind] // row, 1), rows)
    tables = 1 + sum(second.trunks for second in setup.seconds)
    narrow = rows * setup.narrow * setup.shapes.vocabulary if setup.autocast else 0
    return tables * rows * row + BLOCK_TABLES * block * row + narrow


def _working(setup: Setup) -> int:
    """Bytes a token of a layer that keeps nothing: residual stream, and its widest place."""
    shapes, n = setup.shapes, setup.narrow
    queries = (2 * n + FLOAT32) * (shapes.queries + shapes.keys)
    return 3 * FLOAT32 * shapes.hidden + max(queries, 3 * n * shapes.intermediate)


def _teaching(setup: Setup, tokens: int) -> int:
    prompts = {"teacher": setup.lengths.teacher_prompt, "reference": setup.lengths.prompt}
    slots = {second.slot: second.trunks for second in setup.seconds if second.trunks}
    if not slots:
        return 0
    kept = sum(
        trunks * setup.narrow * setup.shapes.cached(min(tokens, setup.responses * prompts[slot]))
        for slot, trunks in slots.items()
    )
    return kept + tokens * _working(setup) + _one_cast(setup)


def _one_cast(setup: Setup) -> int:
    """Of the widest product, made and let go."""
    shapes = setup.shapes
    widest = max(shapes.table, shapes.hidden * max(shapes.intermediate, shapes.queries))
    return setup.narrow * widest if setup.autocast and setup.counted.whole else 0


def _sampling_weights(setup: Setup) -> int:
    shapes, counted, sampler = setup.shapes, setup.counted, setup.sampler
    if sampler.kind == "colocated":
        engine = sampler.weight_bytes * shapes.parameters + sampler.cache_bytes + VLLM_BYTES
        return engine if sampler.sleeps else 0
    if sampler.kind == "remote":
        return FLOAT32 * max(shapes.table, shapes.layer)  # one tensor at a time
    whole = 0
    if setup.devices.sharded:
        linear = setup.narrow if setup.autocast else setup.wide
        whole = linear * (shapes.multiplied + (0 if shapes.tied else shapes.table))
        whole += setup.wide * (shapes.parameters - shapes.multiplied)
        whole -= 0 if shapes.tied else setup.wide * shapes.table
    merged = setup.base * counted.adapted
    free = setup.devices.memory - sum(_resident(setup).values())
    return whole + (merged if 2 * merged <= free else 0)


def _cache(setup: Setup) -> int:
    """Prompts, and responses in rectangles that grow by half; at most the sampler's room."""
    if setup.sampler.kind != "hf":
        return 0
    prompt, response = setup.lengths.prompt, setup.lengths.response
    rows = min(setup.sampler.max_rows, setup.in_flight)
    groups = -(-rows // setup.group)
    tokens = groups * prompt + rows * blocks(response)
    share = min(setup.sampler.max_tokens / tokens, 1.0)
    held = groups * setup.shapes.cached(prompt) + rows * setup.shapes.cached(blocks(response))
    return int(share * held * setup.narrow)


def _drawing(setup: Setup) -> int:
    if setup.sampler.kind != "hf":
        return 0
    rows = min(setup.sampler.max_rows, setup.in_flight)
    prefill = min(PREFILL_TOKENS, -(-rows // setup.group) * setup.lengths.prompt) * _working(setup)
    logits = DRAW_TABLES * FLOAT32 * rows * setup.shapes.vocabulary
    return max(prefill, logits) + _one_cast(setup)


def _stepping(setup: Setup) -> int:
    """A list as long as the gradients, or one tensor at a time; the embedding's gradient."""
    trained = setup.counted.trained // setup.shards
    lists = int(setup.optimizer.temporary * trained)
    whole = setup.counted.whole
    embedding = FLOAT32 * setup.shapes.table if whole else 0
    return max(lists, embedding)
