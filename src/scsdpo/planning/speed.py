"""Seconds of a step by phase, from floating-point operations and bytes at given rates."""

from dataclasses import dataclass

from scsdpo.planning.architecture import Architecture
from scsdpo.planning.memory import Memory
from scsdpo.planning.setup import BFLOAT16, FLOAT32, SecondWeights, Setup


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the devices reach, not what their makers print. The defaults are assumptions.

    Args:
        flops: floating-point operations a second of matrix products.
        bandwidth: bytes a second between a device and its memory.
        link: bytes a second that a rank sends or receives in a collective.
        host: seconds that Python takes to launch one decoder layer, which bounds `HFRollout`.
    """

    flops: float = 4e14
    bandwidth: float = 2.5e12
    link: float = 2e11
    host: float = 1.25e-3


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations and bytes of a phase of one batch, a rank."""

    flops: float
    memory: float
    """Bytes between device and memory."""
    link: float
    """Bytes between ranks."""
    launches: float = 0.0
    """Decoder layers launched one by one."""

    def seconds(self, rates: Rates) -> float:
        """What takes longest; traffic between ranks is counted as if it hid behind nothing."""
        here = max(self.flops / rates.flops, self.memory / rates.bandwidth)
        return max(here, self.launches * rates.host) + self.link / rates.link


def work_of(setup: Setup, memory: Memory) -> dict[str, Work]:
    """Of each phase of one batch; every response is trained on."""
    tokens = setup.responses * setup.updates * setup.lengths.response
    prompts = setup.prompts * setup.updates * setup.lengths.prompt
    told = setup.responses * setup.updates * setup.lengths.teacher_prompt
    read = {"teacher": tokens + told, "reference": tokens + prompts}
    batches = memory.micro_batches * setup.updates
    # Forward, and two products in the backward; a frozen matrix has no gradient of its own.
    passes = (3 if setup.counted.whole else 2) + setup.checkpointing
    heads = (3 if setup.counted.whole else 2) * setup.shapes.table
    heads += sum(second.trunks * second.shapes.table for second in setup.seconds)
    teachers = [
        Work(
            flops=second.trunks
            * _trunk(setup, second.shapes, read[second.slot], setup.lengths.teacher_prompt),
            memory=batches * second.trunks * _bytes_read(setup, second),
            link=batches * second.trunks * _gather_of(setup, second),
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
            flops=passes * _trunk(setup, setup.shapes, tokens + prompts, setup.lengths.prompt)
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


def _trunk(setup: Setup, shapes: Architecture, tokens: float, before: int) -> float:
    """Products with every matrix, and scores and sums over half the own and all earlier tokens."""
    seen = before + setup.lengths.response / 2
    attention = 4.0 * shapes.queries * seen * len(shapes.windows)
    return tokens * (2.0 * shapes.active + attention)


def _weight_bytes(setup: Setup) -> float:
    """Read for one forward; autocast reads float32, writes bf16 and reads that.

    A matrix in 4 bits is read, written plain, and read again.
    """
    if setup.autocast and setup.counted.whole:
        return float((FLOAT32 + 2 * setup.narrow) * setup.shapes.parameters)
    counted = setup.counted
    in_4_bits = (counted.packed + 2 * setup.base) * counted.quantized
    return in_4_bits + setup.base * (setup.shapes.parameters - counted.quantized)


def _bytes_read(setup: Setup, second: SecondWeights) -> float:
    """The same of a teacher."""
    if not second.another:
        return _weight_bytes(setup)
    cast = 2 * BFLOAT16 * (setup.autocast and second.width > BFLOAT16)
    return float((second.width + cast) * second.shapes.parameters)


def _gather(setup: Setup) -> float:
    """Bytes that come from other ranks to make a model whole once."""
    if not setup.devices.sharded:
        return 0.0
    others = 1 - 1 / setup.devices.ranks
    each = FLOAT32 if setup.counted.whole else setup.base
    return others * each * setup.shapes.parameters


def _gather_of(setup: Setup, second: SecondWeights) -> float:
    """The same of a teacher."""
    if not second.another or not setup.devices.sharded:
        return _gather(setup)
    return (1 - 1 / setup.devices.ranks) * second.width * second.shapes.parameters


def _reduce(setup: Setup, batches: int) -> float:
    """Gradients over ranks: in each backward under shards, else once a step, there and back."""
    others = 1 - 1 / setup.devices.ranks
    times = batches if setup.devices.sharded else 2 * setup.updates
    return others * times * FLOAT32 * setup.counted.trained


def _sampling(setup: Setup, memory: Memory, tokens: float, prompts: float) -> Work:
    """Decoding reads weights and keys once a step; steps follow from the responses in flight."""
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
        _trunk(setup, shapes, tokens + prompts, setup.lengths.prompt) + 2.0 * shapes.table * tokens
    )
    return Work(
        flops=flops,
        memory=steps * per_step + cache,
        link=_gather(setup),
        launches=steps * shapes.layers if sampler.kind == "hf" else 0.0,
    )
