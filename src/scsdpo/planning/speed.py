"""Seconds of a step by phase, from floating-point operations and bytes at given rates."""

from dataclasses import dataclass

from scsdpo.planning.architecture import Architecture
from scsdpo.planning.memory import Memory
from scsdpo.planning.setup import BFLOAT16, FLOAT32, SecondWeights, Setup


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates that the devices reach in practice. The defaults are assumptions.

    Args:
        flops: floating-point operations per second in matrix products.
        bandwidth: bytes per second between a device and its memory.
        link: bytes per second that a rank sends or receives in a collective.
        host: seconds that Python takes to launch one decoder layer, which bounds `HFRollout`.
    """

    flops: float = 4e14
    bandwidth: float = 2.5e12
    link: float = 2e11
    host: float = 1.25e-3


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations and bytes of one phase of a batch on a rank."""

    flops: float
    """Floating-point operations."""
    memory: float
    """Bytes between device and memory."""
    link: float
    """Bytes between ranks."""
    launches: float = 0.0
    """Number of decoder layers that Python launches."""

    def seconds(self, rates: Rates) -> float:
        """Seconds of the slowest of computation, memory and launches, plus those of traffic
        between ranks, which is assumed not to overlap.
        """
        here = max(self.flops / rates.flops, self.memory / rates.bandwidth)
        return max(here, self.launches * rates.host) + self.link / rates.link


def work_of(setup: Setup, memory: Memory) -> dict[str, Work]:
    """Work of each phase of one batch, if every response is trained on."""
    tokens = setup.responses * setup.updates * setup.lengths.response
    prompts = setup.prompts * setup.updates * setup.lengths.prompt
    teacher_prompts = setup.responses * setup.updates * setup.lengths.teacher_prompt
    read = {"teacher": tokens + teacher_prompts, "reference": tokens + prompts}
    batches = memory.micro_batches * setup.updates
    # A forward and two products in the backward; a frozen matrix needs no gradient.
    passes = (3 if setup.counted.whole else 2) + setup.checkpointing
    heads = (3 if setup.counted.whole else 2) * setup.shapes.table
    heads += sum(second.forwards * second.shapes.table for second in setup.seconds)
    teachers = [
        Work(
            flops=second.forwards
            * _decoder_flops(setup, second.shapes, read[second.slot], setup.lengths.teacher_prompt),
            memory=batches * second.forwards * _teacher_weight_bytes(setup, second),
            link=batches * second.forwards * _teacher_gather(setup, second),
        )
        for second in setup.seconds
    ]
    return {
        "sampling": _sampling(setup, memory, tokens, prompts),
        "teacher": Work(
            flops=sum(each.flops for each in teachers),
            memory=sum(each.memory for each in teachers),
            link=sum(each.link for each in teachers),
        ),
        "update": Work(
            flops=passes
            * _decoder_flops(setup, setup.shapes, tokens + prompts, setup.lengths.prompt)
            + 2.0 * heads * tokens,
            memory=batches * passes * _weight_bytes(setup),
            link=batches * 2 * _gather(setup) + _reduce(setup, batches),
        ),
        "optimizer step": Work(
            flops=0.0,
            memory=setup.updates * 2 * (memory.parts.total(("gradients", "optimizer", "weights"))),
            link=0.0,
        ),
    }


def _decoder_flops(setup: Setup, shapes: Architecture, tokens: float, before: int) -> float:
    """Operations of a forward of the decoder over `tokens` tokens of responses.

    Each token attends to `before` tokens of its prompt and on average to half of its response.
    """
    seen = before + setup.lengths.response / 2
    attention = 4.0 * shapes.queries * seen * len(shapes.windows)
    return tokens * (2.0 * shapes.active + attention)


def _weight_bytes(setup: Setup) -> float:
    """Bytes of the policy's weights between device and memory in one forward.

    Autocast reads float32, writes bf16 and reads that. A matrix in 4 bits is read, written
    dequantised, and read again.
    """
    if setup.autocast and setup.counted.whole:
        return float((FLOAT32 + 2 * setup.narrow) * setup.shapes.parameters)
    counted = setup.counted
    in_4_bits = (counted.packed + 2 * setup.base) * counted.quantized
    return in_4_bits + setup.base * (setup.shapes.parameters - counted.quantized)


def _teacher_weight_bytes(setup: Setup, second: SecondWeights) -> float:
    """Bytes of a teacher's weights between device and memory in one forward."""
    if not second.another:
        return _weight_bytes(setup)
    cast = 2 * BFLOAT16 * (setup.autocast and second.width > BFLOAT16)
    return float((second.width + cast) * second.shapes.parameters)


def _gather(setup: Setup) -> float:
    """Bytes that a rank receives to gather the policy's weights once; 0 if not sharded."""
    if not setup.devices.sharded:
        return 0.0
    others = 1 - 1 / setup.devices.ranks
    each = FLOAT32 if setup.counted.whole else setup.base
    return others * each * setup.shapes.parameters


def _teacher_gather(setup: Setup, second: SecondWeights) -> float:
    """Bytes that a rank receives to gather a teacher's weights once."""
    if not second.another or not setup.devices.sharded:
        return _gather(setup)
    return (1 - 1 / setup.devices.ranks) * second.width * second.shapes.parameters


def _reduce(setup: Setup, batches: int) -> float:
    """Bytes of gradients between ranks: in each backward if sharded, else once in each step."""
    others = 1 - 1 / setup.devices.ranks
    times = batches if setup.devices.sharded else 2 * setup.updates
    return others * times * FLOAT32 * setup.counted.trained


def _sampling(setup: Setup, memory: Memory, tokens: float, prompts: float) -> Work:
    """Work of sampling. A decoding step reads all weights and keys once; the number of steps
    follows from the responses in flight.
    """
    shapes, sampler = setup.shapes, setup.sampler
    held = setup.lengths.prompt / setup.group + setup.lengths.response
    room = sampler.max_tokens / held if sampler.kind == "hf" else tokens
    rows = max(min(sampler.max_rows or tokens, room, setup.responses * setup.updates), 1)
    steps = max(tokens / rows, setup.lengths.response)
    width = setup.narrow if sampler.kind == "hf" else sampler.weight_bytes
    per_step = width * shapes.parameters / sampler.sharing
    if sampler.kind == "hf":
        merged = setup.counted.quantized and memory.parts.sampling_weights
        per_step = setup.base * shapes.parameters if merged else _weight_bytes(setup)
    cache = width * tokens * shapes.cached(setup.lengths.prompt + setup.lengths.response // 2)
    flops = (
        _decoder_flops(setup, shapes, tokens + prompts, setup.lengths.prompt)
        + 2.0 * shapes.table * tokens
    )
    return Work(
        flops=flops,
        memory=steps * per_step + cache,
        link=_gather(setup),
        launches=steps * shapes.layers if sampler.kind == "hf" else 0.0,
    )
