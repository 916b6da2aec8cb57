"""What a token leaves behind for the backward. docs/plan.md derives it."""

from scsdpo.planning.setup import FLOAT32, Setup


def layer_bytes(setup: Setup) -> int:
    """What one decoder layer keeps of a token for the backward; of several kinds, the largest.

    Layers of linear attention, convolutions and experts are measured (`measured_layers`).
    Of others: norms, each: float32 input and, where its weight is trained, the normalised one.
    Inputs of linear layers: one copy for all, or under autocast one each of q, k, v, gate and up.
    Queries and keys: the same of their norms, then scaled queries, keys, values, attention's
    output; gate, its activation, up and their product.
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
    """What a token leaves in all layers: with checkpointing, the input of each."""
    if setup.checkpointing:
        return setup.shapes.layers * setup.wide * setup.shapes.hidden
    return int(sum(setup.measured.layers)) or setup.shapes.layers * layer_bytes(setup)


def end_bytes(setup: Setup) -> int:
    """What comes on top for a token of the micro-batch at work.

    The last norm, its output gathered in the order of tokens, its gradient, the kernel's copies.
    With checkpointing that, or one layer as it is recomputed and goes back, whose gradients and,
    under LoRA, casts come with it.
    """
    shapes, n = setup.shapes, setup.narrow
    end = (5 * setup.wide + FLOAT32 + n) * shapes.hidden
    for second in setup.seconds:
        wide = second.width if second.another else setup.wide
        end += second.trunks * wide * second.shapes.hidden
    end = max(end, int(setup.measured.end))
    if not setup.checkpointing:
        return end
    gradients = 4 * shapes.hidden + 2 * n * shapes.intermediate
    if not setup.counted.whole:
        gradients += 8 * shapes.hidden + n * shapes.intermediate
    return max(layer_bytes(setup) + gradients, end)


def activation_bytes(setup: Setup) -> int:
    """Both: bytes a token of a micro-batch."""
    return stored_bytes(setup) + end_bytes(setup)
