"""Private names of other libraries: each does what its line says, and none stands elsewhere."""

import ast
import importlib
import inspect
import os
import pickle
import pkgutil
import signal
import sys
import textwrap
import threading
from functools import cache
from importlib.metadata import version
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from packaging.specifiers import SpecifierSet
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM, RwkvForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

import scsdpo.private.torch as own_torch
from scsdpo.private import jsonargparse as own_jsonargparse
from scsdpo.private import lightning as own_lightning
from scsdpo.private import peft as own_peft
from scsdpo.private import tensorboard as own_tensorboard
from scsdpo.private import transformers as own_transformers
from scsdpo.private.lightning_cli import OpenCLI

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "scsdpo"
HOME = PACKAGE / "private"
LIBRARIES = ("torch", "lightning", "peft", "transformers", "jsonargparse", "tensorboard", "vllm")
DOCUMENTED = {"_exit", "_replace", "_asdict", "_fields"}
"""Of the standard library, public in spite of the underscore."""

# ------------------------------------------------------------------ versions


@pytest.mark.parametrize("path", sorted(HOME.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_the_names_were_checked_for_the_version_that_is_installed(path):
    library = path.stem.removesuffix("_cli")
    assert library in LIBRARIES
    module = importlib.import_module(f"scsdpo.private.{path.stem}")
    if library == "vllm" and not importlib.util.find_spec("vllm"):
        pytest.skip("vllm is not installed; tests/real_vllm/test_private_names.py has its names")
    installed = version(library).split("+")[0]
    assert installed in SpecifierSet(module.CHECKED), (
        f"{library} {installed}: check each name of {path.name}, then write its CHECKED anew"
    )


# ------------------------------------------------------------------ structure


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def parsed(source):
    return list(ast.walk(ast.parse(source)))


@cache
def known():
    """Private names that the modules in private/ read, define or spell; other libraries' all."""
    found = set()
    for path in HOME.glob("*.py"):
        for node in parsed(path.read_text()):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.ImportFrom):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return {name for name in found if is_private(name) and name.isidentifier()}


def defined(nodes):
    """Private names that a file itself defines."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__":
            yield from ast.literal_eval(node.value)


def foreign(source):
    """(line, private name of another library) for each place in a file that has one.

    A private attribute is the file's own if the file defines it; a name that private/ has never
    is. So are methods by such names, and strings for `getattr` or for a library's own keys.
    """
    nodes = parsed(source)
    own = {*defined(nodes), *DOCUMENTED} - known()
    methods = [n for kind in nodes if isinstance(kind, ast.ClassDef) for n in kind.body]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "scsdpo":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, name) for name in names if is_private(name))
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
            yield from ((node.lineno, name) for name in names if is_private(name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and node.value in known():
            yield node.lineno, node.value
        elif isinstance(node, ast.FunctionDef) and node in methods and node.name in known():
            yield node.lineno, node.name


def test_no_private_name_of_another_library_stands_outside_private():
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent != HOME
        for line, name in foreign(path.read_text())
    ]
    assert not found, f"give these a plain name in scsdpo/private: {found}"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from torch.utils._pytree import tree_map", "_pytree"),
        ("from lightning.pytorch.loops.progress import _Progress", "_Progress"),
        ("import torch._inductor", "_inductor"),
        ("def f(trainer):\n return trainer._results", "_results"),
        ("def f(trainer):\n trainer._results = 1", "_results"),
        ("def f(model):\n return getattr(model, '_weight_conversions')", "_weight_conversions"),
        ("class A(B):\n def _apply(self, fn): ...", "_apply"),
        ("class A(B):\n def f(self):\n  self._every_n_train_steps = 1", "_every_n_train_steps"),
        ("class A(B):\n def f(self):\n  return self._of_the_base", "_of_the_base"),
        ("class A:\n def f(self):\n  self._trainer = self", "_trainer"),
    ],
)
def test_a_private_name_that_comes_back_is_found(source, name):
    assert name in {found for _, found in foreign(source)}


@pytest.mark.parametrize(
    "source",
    [
        "from scsdpo.data._base import Source",
        "class A:\n _x = 1\n def f(self, other):\n  return other._x",
        "class A:\n __slots__ = ('_x',)\n def f(self):\n  return self._x",
        "import os\nos._exit(0)",
        "from __future__ import annotations",
    ],
)
def test_names_of_our_own_are_left_alone(source):
    assert not list(foreign(source))


def test_no_class_uses_a_private_name_that_its_library_class_has_too():
    """Also names that private/ does not have: a field of ours could take the place of theirs."""
    found = []
    for kind in classes():
        theirs = [base for base in kind.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
        if theirs and ".private." not in kind.__module__:
            names = set().union(*map(names_of, theirs))
            found += [(kind.__name__, name) for name in names_of(kind) & names]
    assert not found


def classes():
    import scsdpo

    for place in pkgutil.walk_packages(scsdpo.__path__, "scsdpo."):
        if place.name.endswith("__main__"):
            continue
        for kind in vars(importlib.import_module(place.name)).values():
            if inspect.isclass(kind) and kind.__module__ == place.name:
                yield kind


@cache
def names_of(kind):
    """Private names of a class: what it holds, what its methods set or read on `self`."""
    try:
        nodes = parsed(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):
        nodes = []  # in C
    read = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")
    }
    made = {"_backward_cls", "_abc_impl"}  # by metaclasses
    return {name for name in {*vars(kind), *read} - made if is_private(name)}


@pytest.mark.parametrize(
    ("name", "late"),
    [
        ("vllm", {"vllm"}),
        ("tensorboard", {"tensorboard"}),
        ("lightning", {"lightning.pytorch.cli", "jsonargparse"}),
        ("torch", {"torch._dynamo", "torch._inductor"}),
    ],
)
def test_a_private_module_is_as_light_as_what_uses_it(name, late):
    """What takes long to import comes with its first use."""
    top = ast.parse((HOME / f"{name}.py").read_text()).body
    given = {node.module for node in top if isinstance(node, ast.ImportFrom)}
    given |= {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    assert not given & late
    assert not any(each.startswith(f"{other}.") for each in given for other in late)


# ---------------------------------------------------------------------- torch


def test_dispatch_mode_sees_operations_and_storages_have_keys():
    seen = []

    class Mode(own_torch.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        x = torch.ones(2)
        made = x + 1
    assert torch.ops.aten.add.Tensor in seen
    key = own_torch.storage_key
    assert key(x.untyped_storage()) == key(x[:1].untyped_storage())
    assert key(x.untyped_storage()) != key(made.untyped_storage())
    empty = torch.empty(0), torch.empty(0)
    assert key(empty[0].untyped_storage()) != key(empty[1].untyped_storage())
    assert own_torch.tree_leaves(([1], {"a": (2, 3)})) == [1, 2, 3]


def test_flash_attention_on_cpu_returns_its_log_normaliser_and_has_a_backward():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64)
    scores = query @ key.mT
    out, lse = own_torch.cpu_flash_forward(query, key, value, 0.0, False, scale=1.0)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ value)
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    ((inputs[0] @ inputs[1].mT).softmax(-1) @ inputs[2]).sum().backward()
    gradients = own_torch.cpu_flash_backward(
        torch.ones_like(out), query, key, value, out, lse, 0.0, False, scale=1.0
    )
    for found, wanted in zip(gradients, inputs, strict=True):
        torch.testing.assert_close(found, wanted.grad)


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        (
            own_torch.flash_forward,
            "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask "
            "scale window_size_left",
        ),
        (
            own_torch.flash_backward,
            "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p "
            "is_causal rng_state unused scale window_size_left",
        ),
    ],
)
def test_flash_attention_on_cuda_takes_the_arguments_that_it_is_given(operation, arguments):
    """What it computes, a machine with a GPU checks (tests of partial attention)."""
    names = [argument.name for argument in operation.default._schema.arguments]
    assert names[: len(arguments.split())] == arguments.split()


def test_the_default_store_is_that_of_the_process_group():
    own = dist.HashStore()
    dist.init_process_group("gloo", store=own, rank=0, world_size=1)
    try:
        keys = own.num_keys()
        own_torch.default_store().set("scsdpo", "here")
        assert own.num_keys() == keys + 1
    finally:
        dist.destroy_process_group()


def test_ddp_ignores_the_parameters_that_it_is_told():
    module = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    own_torch.ignore_in_ddp(module, iter(["b.weight"]))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ignored = DistributedDataParallel(module).parameters_to_ignore
        assert set(ignored) == {"b.weight"}
    finally:
        dist.destroy_process_group()


def test_load_hooks_are_listed():
    module, hook = nn.Linear(1, 1), lambda *_: None
    assert not own_torch.load_hooks(module)
    module.register_load_state_dict_post_hook(hook)
    assert hook in own_torch.load_hooks(module).values()


def test_a_moved_module_decides_what_a_parent_s_cast_does():
    class Stays(own_torch.Moved):
        def __init__(self, stays):
            super().__init__()
            self.stays, self.weight = stays, nn.Parameter(torch.ones(1))

        def moves_alone(self, fn):
            return self.stays

    both = nn.ModuleList([Stays(True), Stays(False)]).double()
    assert [part.weight.dtype for part in both] == [torch.float32, torch.float64]


def test_compiled_graphs_count_up():
    before = own_torch.compiled_graphs()
    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    disabled = os.environ.get("TORCHDYNAMO_DISABLE") == "1"
    assert own_torch.compiled_graphs() == before + (not disabled)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_names_in_tables_are_what_a_pickle_of_one_names(tmp_path):
    from torch.distributed import checkpoint as dcp

    dcp.save({"x": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    table = (tmp_path / ".metadata").read_bytes()
    for module, names in own_torch.NAMES_IN_TABLES.items():
        for name in names:
            assert hasattr(importlib.import_module(module), name)
            assert name.encode() in table
    assert pickle.loads(table)


# ------------------------------------------------------------------ lightning


class Probe(L.Callback):
    """What the names say in the middle of a fit."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loop = trainer.fit_loop.epoch_loop
        assert isinstance(loop.batch_progress.total, own_lightning.ProcessedTracker)
        content = own_lightning.checkpoint_content(trainer, False)
        states = content["loops"]["fit_loop"]
        self.seen.append(
            (
                own_lightning.validation_is_due(trainer),
                own_lightning.loader_positions(trainer),
                states["epoch_loop.state_dict"][own_lightning.STEPPED],
            )
        )
        assert own_lightning.trainer_of(pl_module) is trainer
        assert content["global_step"] == trainer.global_step
        assert "optimizer_states" not in own_lightning.checkpoint_content(trainer, True)


class States(own_lightning.BestStates):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.done = []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % self.batches_between == 0 and self.may_save(trainer):
            self.save_if_best(trainer)
            assert not self.may_save(trainer)

    def write_best(self, trainer, filepath):
        self.done.append("write")
        super().write_best(trainer, filepath)
        self.note_saved(trainer, filepath)

    def write_last(self, trainer):
        self.done.append("last")
        super().write_last(trainer)

    def remove_worse(self, trainer, filepath):
        self.done.append("remove")
        super().remove_worse(trainer, filepath)


def trainer(tmp_path, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, **{**quiet, **settings}
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*sanity")
def test_lightning_names_in_a_fit(tmp_path):
    class Placed(DataLoader):
        def state_dict(self):
            return {"at": 3}

        def load_state_dict(self, state): ...

    module, probe = BoringModel(), Probe()
    module.train_dataloader = lambda: Placed(RandomDataset(32, 64))
    states = States(dirpath=tmp_path, every_n_train_steps=2, save_top_k=1, save_last=True)
    assert own_lightning.trainer_of(module) is None
    assert (states.batches_between, states.seconds_between) == (2, None)
    run = trainer(
        tmp_path,
        max_steps=4,
        limit_train_batches=4,
        limit_val_batches=1,
        val_check_interval=2,
        num_sanity_val_steps=0,
        callbacks=[probe, states],
    )
    own_lightning.silence_signal_handlers(run)
    within = []
    module.on_train_start = lambda: within.append(signal.getsignal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    run.fit(module)
    assert within == [before]
    assert [due for due, _, _ in probe.seen] == [False, True, False, True]
    assert all(positions == [{"at": 3}] for _, positions, _ in probe.seen)
    assert states.done == ["write", "write", "remove"]
    states._save_last_checkpoint(run, {})  # Lightning's call, where it saves one
    assert states.done[-2:] == ["last", "write"] and (tmp_path / "last.ckpt").exists()
    assert states.newest_best == str(tmp_path / "last.ckpt")
    assert len(list(tmp_path.glob("epoch*.ckpt"))) == 1
    own_lightning.count_stepped(run, 7)
    stepped = run.fit_loop.epoch_loop.on_save_checkpoint()
    assert stepped[own_lightning.STEPPED] == 7


def test_lightning_names_of_a_requeued_job(tmp_path):
    run = trainer(tmp_path)
    assert type(own_lightning.cluster_environment(run)).__name__ == "LightningEnvironment"
    assert own_lightning.requeued_from(run) is None
    path = own_lightning.requeue_path(run, tmp_path)
    assert path == str(tmp_path / "hpc_ckpt_1.ckpt")
    Path(path).touch()
    assert own_lightning.requeued_from(run) == path
    assert own_lightning.requeue_path(run, tmp_path).endswith("hpc_ckpt_2.ckpt")


def test_lightning_names_of_launchers(tmp_path):
    launchers = {
        "ddp": own_lightning.ScriptLauncher,
        "ddp_spawn": own_lightning.ForkLauncher,
    }
    for strategy, kind in launchers.items():
        run = trainer(tmp_path, strategy=strategy)
        run.strategy._configure_launcher()
        assert isinstance(run.strategy.launcher, kind)
    assert hasattr(own_lightning.ScriptLauncher(run.strategy.cluster_environment, 1, 1), "procs")


def test_a_child_observer_that_is_disarmed_kills_nobody():
    class Gone:
        def poll(self):
            return 1

    from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

    observer = _ChildProcessObserver(123, [Gone()], sleep_period=1)
    observer._run = lambda: False
    stop = threading.Event()
    observer.run = stop.wait
    observer.start()
    try:
        own_lightning.disarm_child_observers()
        assert observer._child_processes == []
    finally:
        stop.set()
        observer.join()


def test_a_logger_whose_writer_is_forgotten_opens_another(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    first = logger.experiment
    assert logger.experiment is first
    writers = [thread for thread in threading.enumerate() if own_tensorboard.is_writer(thread)]
    assert len(writers) >= 1 and not own_tensorboard.is_writer(threading.current_thread())
    own_lightning.forget_writer(logger)
    assert logger.experiment is not first
    first.close()
    logger.experiment.close()


def test_a_strategy_shards_over_the_ranks_that_it_is_told():
    strategy = ModelParallelStrategy("auto", 1)
    own_lightning.shard_over(strategy, 3)
    assert strategy._data_parallel_size == 3
    source = inspect.getsource(ModelParallelStrategy.setup_environment)
    assert "self._data_parallel_size" in source


def test_the_command_line_has_its_parser_and_reads_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scsdpo"])
    ran = []

    class CLI(OpenCLI):
        def run_subcommand(self, subcommand):
            ran.append((subcommand, self.subcommand_parser() is self.subcommand_parsers()["fit"]))

    class Module(BoringModel):
        def __init__(self, width: int = 1):
            super().__init__()
            self.width = width

    saved = tmp_path / "x.ckpt"
    torch.save({"hyper_parameters": {"width": 5, own_lightning.INSTANTIATOR: "x"}}, saved)
    words = ["fit", f"--ckpt_path={saved}", "--trainer.logger=false", "--model.width=2"]
    words += ["--trainer.accelerator=cpu", "--trainer.barebones=true"]
    cli = CLI(Module, args=words, save_config_callback=None, seed_everything_default=False)
    assert ran == [("fit", True)]
    assert cli.model.width == 2


# ------------------------------------------------- peft, transformers, parser


def test_adapters_of_a_layer_are_switched_without_touching_gradients(qwen3):
    model = AutoModelForCausalLM.from_pretrained(qwen3)
    assert own_transformers.attention_of(model) == "sdpa"
    plain = model(torch.tensor([[3, 4, 5]])).logits
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    layers = [part for part in tuned.modules() if isinstance(part, LoraLayer)]
    trained = [p.requires_grad for p in tuned.parameters()]

    def logits():
        return tuned(torch.tensor([[3, 4, 5]])).logits

    adapted = logits()
    assert not torch.equal(adapted, plain)
    for layer in layers:
        own_peft.use_adapters(layer, ["default"], disabled=True)
    assert torch.equal(logits(), plain)
    for layer in layers:
        own_peft.use_adapters(layer, ["default"])
    assert torch.equal(logits(), adapted)
    for layer in layers:
        own_peft.use_adapters(layer, [])
    assert torch.equal(logits(), plain)
    assert trained == [p.requires_grad for p in tuned.parameters()]


def test_transformers_says_how_a_class_attends(qwen3):
    assert own_transformers.has_sdpa(Qwen3ForCausalLM)
    assert own_transformers.has_attention_interface(Qwen3ForCausalLM)
    assert not own_transformers.is_stateful(Qwen3ForCausalLM)
    assert not own_transformers.has_sdpa(RwkvForCausalLM)
    assert not own_transformers.has_attention_interface(RwkvForCausalLM)
    assert own_transformers.is_stateful(importlib.import_module("transformers").MambaForCausalLM)


def test_the_forward_of_a_layer_is_found_within_its_checkpoint():
    class Layer(GradientCheckpointingLayer):
        def forward(self, x):
            return 2 * x

    class Other(Layer): ...

    forwards = [own_transformers.forward_in_checkpoint(kind) for kind in (Layer, Other)]
    assert forwards[0] is forwards[1] and forwards[0].__code__.co_name == "forward"
    layer = Other()
    layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, lambda f, x: -f(x)
    assert layer(3) == -6 and forwards[0](layer, 3) == 6


def test_transformers_fills_the_tables_of_one_part(qwen3):
    model = AutoModelForCausalLM.from_pretrained(qwen3)
    rotary = model.get_decoder().rotary_emb
    wanted, weight = rotary.inv_freq.clone(), model.lm_head.weight.clone()
    rotary.inv_freq.fill_(torch.nan)
    own_transformers.fill_anew(model, rotary)
    assert torch.equal(rotary.inv_freq, wanted)
    assert torch.equal(model.lm_head.weight, weight)


def test_transformers_names_routers_and_conversions(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    config = Qwen3MoeConfig(
        vocab_size=11, num_key_value_heads=1, intermediate_size=8, **sizes, **experts
    )
    made = Qwen3MoeForCausalLM(config)
    found = own_transformers.recorders(made.get_decoder())
    assert isinstance(made.get_decoder().layers[0].mlp.gate, found["router_logits"].target_class)
    assert own_transformers.recorders(nn.Linear(1, 1)) == {}
    assert not own_transformers.conversions_at_load(made)
    made.save_pretrained(tmp_path)
    loaded = Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    assert own_transformers.conversions_at_load(loaded)


def test_how_packed_weights_were_put_together_is_forgotten(qwen3, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes: pip install -e '.[dev]'")
    from scsdpo.policy import NF4

    settings = NF4().loading(torch.float32)
    AutoModelForCausalLM.from_pretrained(qwen3, **settings).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert own_transformers.conversions_at_load(model)
    own_transformers.drop_conversions_of_quantizer(model)
    assert own_transformers.conversions_at_load(model) == []


def test_configurations_name_a_class_by_the_path_that_is_given():
    from jsonargparse._util import get_import_path

    kind = type("Kind", (), {})
    own_jsonargparse.spell_as(kind, "home.of.Kind")
    assert get_import_path(kind) == "home.of.Kind"


def test_a_short_name_is_torchs_where_bitsandbytes_has_it_too():
    import bitsandbytes
    from jsonargparse._typehints import resolve_class_path_by_name

    import scsdpo.cli.parser  # noqa: F401 - which says so

    assert issubclass(bitsandbytes.optim.AdamW, torch.optim.Optimizer)
    for name in ("AdamW", "SGD"):
        path = resolve_class_path_by_name(torch.optim.Optimizer, name)
        assert path == f"torch.optim.{name}"
    own = resolve_class_path_by_name(torch.optim.Optimizer, "AdamW8bit")
    assert own == "bitsandbytes.optim.AdamW8bit"


def test_the_options_of_a_parser_are_listed_in_order():
    parser = LightningArgumentParser()
    parser.add_argument("--thing", type=int)
    parser.add_argument("--other", type=int)
    names = [action.dest for action in own_jsonargparse.options_of(parser)]
    assert names[0] == "help" and names[-2:] == ["thing", "other"]
