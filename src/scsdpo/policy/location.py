"""Where a policy is loaded from, and checks of its folder."""

import json
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

TINY, TINY_TOOLS = "tiny", "tiny-tools"
"""Names of the policies that ship with the package: for single-turn questions, and for tools."""
TINY_FOLDER = Path(__file__).parent / TINY
"""Folder of `tiny`: weights, tokenizer, and the record of how `benchmarks/pretrain.py` made it."""
TINY_TOOLS_FOLDER = Path(__file__).parent / TINY_TOOLS
"""Folder of `tiny-tools`, which `benchmarks/pretrain_store.py` made."""
SHIPPED = {TINY: TINY_FOLDER, TINY_TOOLS: TINY_TOOLS_FOLDER}
SECONDS = 5.0
"""Seconds to wait for the hub before the cache is used."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_POINTER = b"version https://git-lfs"


def located(name_or_path: str) -> str:
    """The checked folder of a model, or its hub name.

    If the hub cannot be reached, or HF_HUB_OFFLINE is set, it is the folder of the copy in the
    cache.

    Args:
        name_or_path: local folder, hub name, or a name in `SHIPPED`.

    Raises:
        ValueError: if there is no usable model; one line says what is missing or what to do.
    """
    if name_or_path in SHIPPED:
        return str(SHIPPED[name_or_path])
    path = Path(name_or_path)
    if path.exists():
        check_folder(path)
        return name_or_path
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise ValueError("there is no such folder")
    why = _unreachable(name_or_path)
    if not why:
        return name_or_path
    try:
        folder = snapshot_download(name_or_path, local_files_only=True)
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"there is no such folder, {why}, and {constants.HF_HUB_CACHE} has no copy of it: "
            "name a folder, or download it once while there is a network"
        ) from error
    check_folder(Path(folder))
    return folder


def _unreachable(name: str) -> str:
    """Ask the hub once for config.json. Return '' if it has the file, else why it did not answer.

    Raises:
        ValueError: if the hub answers that it has no such model for this user.
    """
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=SECONDS)
    except HFValidationError as error:
        raise ValueError("is neither a folder nor a valid name of a hub repository") from error
    except GatedRepoError as error:
        raise ValueError(
            f"is gated: accept its terms on {constants.ENDPOINT}/{name}, and log in with "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no such folder, and {constants.ENDPOINT} has no such public model: check "
            "the name, or log in (`hf auth login`) if it is private"
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(
            "has no config.json on the hub: adapters and GGUF files cannot be trained; name the "
            "model that they were made from"
        ) from error
    except HfHubHTTPError as error:
        return f"the hub answers with an error ({str(error).splitlines()[0]})"
    except Exception as error:  # a failed connection may raise any error
        return f"the hub cannot be reached ({type(error).__name__})"
    return ""


def check_folder(folder: Path) -> None:
    """Check that a folder holds a model with its tokenizer and weights.

    Raises:
        ValueError: if not; one line says what the folder is or lacks.
    """
    if folder.is_file():
        raise ValueError(_of_file(folder))
    names = {path.name for path in folder.iterdir()}
    config = folder / "config.json"
    if not config.exists():
        raise ValueError(_without_config(folder, names))
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError("its config.json is not JSON") from error
    if "model_type" not in settings:
        raise ValueError("its config.json has no model_type: it is not the config of a model")
    missing = []
    if not names.intersection(_TOKENIZERS):
        missing.append(f"a tokenizer ({_TOKENIZERS[0]})")
    found = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    weights = [path for path in found if not path.name.startswith("adapter_")]
    listed = sorted(_listed(folder) - names)
    if not weights and not listed:
        missing.append("weights (*.safetensors)")
    missing += listed[:1]
    if missing:
        more = f" and {len(listed) - 1} more files" if len(listed) > 1 else ""
        raise ValueError(f"the folder lacks {' and '.join(missing)}{more}")
    for path in weights:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ValueError(f"{path.name} is a Git LFS pointer: run `git lfs pull` there")


def _listed(folder: Path) -> set[str]:
    """Names of the weight files that the folder's indices list."""
    files: set[str] = set()
    for index in folder.glob("*.index.json"):
        files.update(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
    return files


def _of_file(path: Path) -> str:
    if path.suffix == ".ckpt":
        return _OWN.format(path)
    if path.suffix == ".gguf":
        return _GGUF
    return "is a file; name the folder that holds config.json, tokenizer and weights"


def _without_config(folder: Path, names: Iterable[str]) -> str:
    """Message for a folder without config.json: what the folder holds instead."""
    found = sorted(names)
    own = [*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt"), *folder.glob("*/*/*.ckpt")]
    if "adapter_config.json" in found:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        model = base.get("base_model_name_or_path")
        return (
            f"is an adapter without the weights of {model}: merge both (peft's merge_and_unload) "
            "and name the result, or name that model"
        )
    if folder.suffix == ".ckpt" or ".metadata" in found:
        return _OWN.format(folder)
    if own:
        return _OWN.format(max(own, key=lambda path: path.stat().st_mtime))
    if any(name.endswith(".gguf") for name in found):
        return _GGUF
    shown = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
    return f"the folder lacks config.json (it holds {shown or 'nothing'})"


_GGUF = "GGUF files cannot be trained: name the folder of the model that they were made from"
_OWN = (
    "is a training checkpoint: write its policy with `scsdpo export --ckpt {} --out DIR`, and name "
    "DIR"
)
