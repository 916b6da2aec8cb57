"""A plan as text and tables."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from scsdpo.planning.advice import FEW_TOKENS, ROOM, advice, fits
from scsdpo.planning.memory import PARTS_OF_PHASE, Memory, memory_of
from scsdpo.planning.setup import BFLOAT16, GIB, Setup
from scsdpo.planning.speed import Rates, work_of
from scsdpo.planning.splitting import DeviceSplit

_WORDS = {
    "process": "libraries, device context (assumed)",
    "weights": "weights of the policy",
    "optimizer": "optimizer states",
    "buckets": "DDP's buckets",
    "vllm": "vLLM, awake",
    "gradients": "gradients",
    "gathered": "gathered layers (sharding)",
    "casts": "bf16 copies for the backward",
    "dequantized": "a matrix dequantised from 4 bits",
    "activations": "activations at the budget",
    "kept": "prompts that wait for responses",
    "prompts": "gradients of prompts' keys and values",
    "heads": "copies of heads, the head's gradient",
    "chunks": "chunks of logits",
    "teaching": "a teacher's forward",
    "sampling_weights": "copies of weights to sample from",
    "cache": "keys and values of sampling",
    "drawing": "forward of prompts, or draw",
    "stepping": "temporaries of the step",
}


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f}"


def setup_line(setup: Setup) -> str:
    """Model, precision and devices of a setup, in one line."""
    shapes, devices = setup.shapes, setup.devices
    trained = (
        "all trained" if setup.counted.whole else f"{setup.counted.trained / 1e6:.1f}M trained"
    )
    if setup.counted.quantized:
        trained += f" beside {setup.counted.quantized / 1e9:.2f}B in 4 bits"
    how = (
        "one device"
        if devices.ranks == 1
        else f"{devices.ranks} devices, "
        + ("sharded (FullySharded)" if devices.sharded else "replicated (DDP)")
    )
    active = shapes.parameters - shapes.multiplied + shapes.active
    experts = f" ({active / 1e9:.2f}B active)" if shapes.has_experts else ""
    return (
        f"{shapes.name}, {_count(shapes.parameters)} parameters{experts}, {trained}, "
        f"{'bf16-mixed' if setup.autocast else 'float32'}; {how} of {gib(devices.memory)} GiB"
    )


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e8 else f"{parameters / 1e6:.1f}M"


def print_plan(setup: Setup, memory: Memory, rates: Rates, console: Console) -> None:
    """Print the whole plan."""
    console.print(setup_line(setup), highlight=False, soft_wrap=True)
    console.print(_parts(setup, memory))
    console.print(_phases(setup, memory, rates))
    for line in (fit_line(setup, memory), *assumptions(setup, memory, rates)):
        console.print(line, highlight=False, soft_wrap=True)


def fit_line(setup: Setup, memory: Memory) -> str:
    """One line that says if the setup fits, with how much room, and which changes would help."""
    phase = max(memory.phases, key=memory.phases.__getitem__)
    room = setup.devices.memory - memory.peak
    if fits(setup, memory):
        said = f"Fits: the peak, {gib(memory.peak)} GiB in {phase}, leaves {gib(room)} GiB."
        return said + _small(setup, memory)
    lacking = f"lacks {gib(-room)} GiB" if room < 0 else f"leaves {gib(room)} GiB, less than 5 %"
    found = advice(setup)
    if found is None:
        remedy = "No change that plan knows makes it fit: use a smaller model or larger devices."
    else:
        remedy = (
            f"Smallest change that fits: {found.words} ({gib(found.memory.peak)} GiB, "
            f"{gib(setup.devices.memory - found.memory.peak)} GiB to spare)."
        )
    return f"Does not fit: the peak, {gib(memory.peak)} GiB in {phase}, {lacking}. {remedy}"


def _small(setup: Setup, memory: Memory) -> str:
    """A hint if memory leaves few tokens for a micro-batch; each micro-batch reads all weights."""
    if setup.checkpointing or setup.max_tokens != "auto" or memory.budget >= FEW_TOKENS:
        return ""
    more = memory_of(replace(setup, checkpointing=True)).budget
    return (
        f" Micro-batches of {memory.budget} tokens are small; with "
        f"model.policy.gradient_checkpointing=true they hold {more}."
    )


def assumptions(setup: Setup, memory: Memory, rates: Rates) -> list[str]:
    """The assumptions of the estimate, a line each."""
    auto = " (auto)" if setup.max_tokens == "auto" else ""
    if auto and memory.budget <= 1:
        auto = " (auto: no memory is left)"
    lengths = setup.lengths
    return [
        f"Counted with {setup.questions} questions x {setup.group} responses, {lengths.prompt} "
        f"tokens in a prompt, {lengths.teacher_prompt} in a teacher's prompt, {lengths.response} "
        "in a response (each that long, and trained on); "
        f"{memory.budget} tokens{auto} in a micro-batch, {memory.micro_batches} micro-batches in "
        "an optimizer step.",
        f"Seconds assume {rates.flops / 1e12:.0f} TFLOP/s in products, "
        f"{rates.bandwidth / 1e12:.1f} TB/s of memory, {rates.link / 1e9:.0f} GB/s between ranks, "
        f"{rates.host * 1e3:.2f} ms of Python for each layer and decoding step of HFRollout; they "
        "leave out verifiers, elementwise kernels and waiting for other ranks.",
        f"A plan that fills more than {ROOM:.0%} of a device counts as not fitting.",
    ]


def _parts(setup: Setup, memory: Memory) -> Table:
    table = Table("part", "GiB a rank", "at the peak of", title="memory", title_justify="left")
    table.columns[1].justify = "right"
    for name, size in memory.parts.nonzero().items():
        if name.startswith("gradients_"):  # these are listed as `gradients`
            continue
        phases = [phase for phase, names in PARTS_OF_PHASE.items() if _lies(name, names, memory)]
        where = "all" if len(phases) == len(PARTS_OF_PHASE) else ", ".join(phases)
        table.add_row(_named(setup, name), gib(size), where)
    return table


def _lies(name: str, names: tuple[str, ...], memory: Memory) -> bool:
    if name != "gradients":
        return name in names
    return any(n.startswith(name) and getattr(memory.parts, n) > 0 for n in names)


def _named(setup: Setup, name: str) -> str:
    for second in setup.seconds:
        if second.slot == name:
            where = ", on the host" if second.stored.on_host else ""
            dtype = second.stored.dtype
            if second.kind == "external":
                dtype = "bfloat16" if second.width == BFLOAT16 else "float32"
            return f"weights of the {name} ({second.kind}, {dtype}{where})"
    return _WORDS[name]


def _phases(setup: Setup, memory: Memory, rates: Rates) -> Table:
    table = Table("phase", "peak GiB", "room", "seconds", title="step", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    seconds = {name: work.seconds(rates) for name, work in work_of(setup, memory).items()}
    for name, peak in memory.phases.items():
        table.add_row(name, gib(peak), gib(setup.devices.memory - peak), f"{seconds[name]:.1f}")
    table.add_section()
    room = gib(setup.devices.memory - memory.peak)
    table.add_row("step", gib(memory.peak), room, f"{sum(seconds.values()):.1f}")
    return table


def print_splits(
    setup: Setup, found: Sequence[DeviceSplit], rates: Rates, console: Console
) -> None:
    """Print the ways to split devices between trainers and servers."""
    console.print(setup_line(setup), highlight=False, soft_wrap=True)
    table = Table(title="trainers and vLLM servers", title_justify="left")
    for column in ("trainers", "servers", "devices a server", "trainer's peak GiB", "room"):
        table.add_column(column, justify="right")
    for column in ("sampling s", "training s", "batch s"):
        table.add_column(column, justify="right")
    for split in found:
        room = gib(split.setup.devices.memory - split.memory.peak)
        how = " (sharded)" if split.setup.devices.sharded else ""
        cells = [f"{split.trainers}{how}", str(split.servers), str(split.width)]
        cells += [gib(split.memory.peak), room if split.fits else f"{room}: does not fit"]
        cells += [f"{n:.1f}" for n in (split.sampling, split.training, split.seconds)]
        table.add_row(*cells)
    console.print(table)
    for line in (_fastest(found), *assumptions(setup, memory_of(setup), rates)):
        console.print(line, highlight=False, soft_wrap=True)


def _fastest(found: Sequence[DeviceSplit]) -> str:
    best = next((split for split in found if split.fits), None)
    if best is None:
        return "No split fits: use LoRA, checkpointing, a smaller model or larger devices."
    shards = " with FullySharded (configs/scale)" if best.setup.devices.sharded else ""
    wide = f" of {best.width} devices each (tensor_parallel_size)" if best.width > 1 else ""
    return (
        f"Fastest that fits: trainer.devices={best.trainers}{shards} and {best.servers} "
        f"server{'s' if best.servers > 1 else ''}{wide} (configs/rollouts/vllm-server.yaml), "
        f"{best.seconds:.1f} s for each batch; trainers and servers work in turns, and sending the "
        "weights to the servers is not counted."
    )


def compact(setup: Setup, memory: Memory) -> list[str]:
    """The plan in two lines for the start of a run: the setup, then its parts and phases."""
    parts: Mapping[str, int] = memory.parts.nonzero()
    shown = [f"{name} {gib(size)}" for name, size in parts.items() if name in _SHOWN]
    phases = [f"{name} {gib(size)}" for name, size in memory.phases.items()]
    return [
        f"plan: {setup_line(setup)}",
        f"plan: GiB on each rank: {', '.join(shown)}; peak of {', '.join(phases)}",
    ]


_SHOWN = (
    "weights",
    "gradients",
    "optimizer",
    "teacher",
    "reference",
    "casts",
    "activations",
    "chunks",
    "cache",
)
