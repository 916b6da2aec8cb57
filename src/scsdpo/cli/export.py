"""`scsdpo export`: a checkpoint's policy as a Hugging Face folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from scsdpo.checkpoints import Saved
from scsdpo.cli.model_card import model_card
from scsdpo.cli.options import OptionParser, check_new_folder
from scsdpo.errors import ConfigurationError, blamed_on
from scsdpo.policy import CausalLM, Lora, Unquantized
from scsdpo.policy.adapter import (
    STUDENT,
    adapted_ends,
    adapted_layers,
    is_tied,
    merged_layer,
    untie,
)
from scsdpo.policy.quantization import make_plain


def options() -> argparse.ArgumentParser:
    """The command's options."""
    parser = OptionParser(
        prog="scsdpo export", description="Write a policy as a Hugging Face folder."
    )
    add = parser.add_argument
    add(
        "--ckpt",
        type=Path,
        required=True,
        metavar="FILE",
        help="checkpoint, such as RUN/checkpoints/last.ckpt",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; new or empty")
    add(
        "--adapter",
        action="store_true",
        help="write the LoRA adapter alone, as a PEFT folder; without it, it is merged",
    )
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the written weights; auto: that of the model that training started from",
    )
    return parser


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: what follows `scsdpo export` on the command line.
    """
    given = options().parse_args(args)
    export(given.ckpt, given.out, adapter=given.adapter, dtype=given.dtype)
    print(given.out)


def export(ckpt: Path, out: Path, *, adapter: bool = False, dtype: str = "auto") -> None:
    """Write the policy of a checkpoint with tokenizer, generation config and model card.

    Args:
        ckpt: a checkpoint of `scsdpo fit`, a file or a folder of shards; its data is not needed,
            and its optimizer's states are not read.
        out: folder that does not exist or is empty.
        adapter: write LoRA factors only, for `PeftModel.from_pretrained`; without it they are
            merged into the base in float32, and then rounded to `dtype`. A base in 4 bits is
            written dequantised. If embedding and head are tied and one of them is adapted, the
            folder holds both.
        dtype: of the written weights; `auto` is that of the checkpoint that training started
            from. Factors stay float32.

    Raises:
        ConfigurationError: if `ckpt` or `out` cannot be used, or the weights do not fit the model.
    """
    check_new_folder(out)
    with blamed_on("--ckpt"):
        saved = Saved.read(ckpt)
    policy = make_policy(saved)
    if not isinstance(policy.quantization, Unquantized):
        rank_zero_info(
            "export: the adapter was trained on a base in 4 bits. Load it on a base in 4 bits, as "
            "README.md in the written folder shows"
            if adapter
            else "export: the policy was trained on a base in 4 bits. The written weights are that "
            "base dequantised, with the adapter merged, and not those of the original model"
        )
    if adapter and not isinstance(policy.adapter, Lora):
        raise ConfigurationError(
            "--adapter: this policy has no adapter, because all its weights were trained: leave "
            "--adapter out"
        )
    load_weights(policy, saved)
    write_policy(policy, out, adapter=adapter, dtype=dtype)
    (out / "README.md").write_text(model_card(saved, adapter=adapter), encoding="utf-8")


def write_policy(policy: CausalLM, out: Path, *, adapter: bool, dtype: str) -> None:
    """Write weights, tokenizer and generation config; the policy must not be used afterwards.

    Args:
        policy: in float32.
        out: as in `export`.
        adapter: as in `export`.
        dtype: as in `export`.
    """
    generation = policy.language_model.generation_config
    if adapter:
        _save_adapter(policy.wrapped, out)
    else:
        _merged(policy).to(_dtype(policy, dtype)).save_pretrained(out)
    policy.chat.tokenizer.save_pretrained(out)
    generation.eos_token_id = list(policy.chat.eos_ids)
    generation.save_pretrained(out)


def make_policy(saved: Saved) -> CausalLM:
    """The policy that a checkpoint describes, in float32; its weights are not loaded yet.

    Raises:
        ConfigurationError: if what training started from is not there.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=CausalLM)
    config = parser.parse_object({"policy": saved.model["policy"]})
    config.policy.init_args.dtype = "float32"
    with blamed_on("model.policy of the checkpoint"):
        return parser.instantiate(config).policy


def load_weights(policy: CausalLM, saved: Saved) -> None:
    """Load the base's weights, and over them the checkpoint's.

    Raises:
        ConfigurationError: if tensors are missing, left over or of another shape.
    """
    with blamed_on("model.policy of the checkpoint"):
        policy.configure_model()
    prefix = "policy."
    weights = {k.removeprefix(prefix): v for k, v in saved.weights.items() if k.startswith(prefix)}
    own = policy.state_dict()  # its tensors are the parameters
    if isinstance(policy.wrapped, PeftModel):  # leave out the factors of a LoRA teacher
        weights = {k: v for k, v in weights.items() if STUDENT in k.split(".")}
    odd = sorted(own.keys() ^ weights.keys())
    odd += [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    if odd:
        raise ConfigurationError(
            f"--ckpt: {len(odd)} tensors of {saved.path} do not fit {policy.name_or_path}, "
            f"e.g. {odd[0]!r}; it must be the model that training started from"
        )
    with blamed_on("--ckpt"):
        saved.fill({f"{prefix}{key}": tensor for key, tensor in own.items()})


def _dtype(policy: CausalLM, dtype: str) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    return AutoConfig.from_pretrained(policy.chat.tokenizer.name_or_path).dtype or torch.float32


def _merged(policy: CausalLM) -> PreTrainedModel:
    """The policy's model with adapters merged and weights dequantised; changes the policy."""
    model = policy.language_model
    if is_tied(model) and adapted_ends(model):
        untie(model)
    for name, adapted in adapted_layers(model).items():
        model.set_submodule(name, merged_layer(adapted))
    make_plain(model)
    return model


def _save_adapter(model: nn.Module, out: Path) -> None:
    """Write the factors; a base folder is named by its absolute path, to be found from anywhere."""
    assert isinstance(model, PeftModel)
    config = model.peft_config[STUDENT]
    base = Path(config.base_model_name_or_path)
    if base.is_dir():
        config.base_model_name_or_path = str(base.resolve())
    model.save_pretrained(out, selected_adapters=[STUDENT], save_embedding_layers=False)
