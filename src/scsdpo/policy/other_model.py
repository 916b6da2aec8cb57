"""Another model beside the policy, with the same tokens."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from scsdpo.policy.chat import Chat
from scsdpo.policy.loading import load_model
from scsdpo.policy.location import located
from scsdpo.policy.quantization import Quantization, Unquantized, quantization_of
from scsdpo.policy.row_path import KnownPath, known_path
from scsdpo.policy.shard_loading import load_shards
from scsdpo.policy.stored import Stored
from scsdpo.policy.weights import Weights, Whole


@dataclass(frozen=True, kw_only=True)
class OtherModel:
    """Where another model is loaded from, and how it is kept and run.

    Args:
        name_or_path: hub name or local folder.
        dtype: dtype in which its weights are kept and run. `auto`: bfloat16 on GPU, float32 on CPU.
        on_host: keep its weights in memory of the host between forwards, pinned if there is a GPU.
            They are copied to the device layer by layer (if sharded, FSDP unit by unit).
        attn_implementation: as in transformers; prefixes are shared with `sdpa`.

    Raises:
        ValueError: if there is no such model, or it is incomplete.
    """

    name_or_path: str = field(compare=False)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    on_host: bool = False
    attn_implementation: str = "sdpa"
    path: str = field(init=False)
    """The folder with symbolic links resolved, or the hub name."""

    def __post_init__(self) -> None:
        path = located(self.name_or_path)
        folder = Path(path)
        object.__setattr__(self, "path", str(folder.resolve()) if folder.exists() else path)

    def loaded_dtype(self, device_is_gpu: bool) -> torch.dtype:
        """Dtype in which its weights are loaded."""
        if self.dtype == "auto":
            return torch.bfloat16 if device_is_gpu else torch.float32
        return getattr(torch, self.dtype)

    def known(self) -> KnownPath:
        """How its rows run.

        Raises:
            ValueError: if the model is not causal.
        """
        return known_path(AutoConfig.from_pretrained(self.path), self.attn_implementation)

    def quantization(self) -> Quantization:
        """Format of its matrices.

        Raises:
            ValueError: if the format is not supported; if it is 4 bits and `on_host` is true,
                because a copy to the device would cast them.
        """
        found = quantization_of(AutoConfig.from_pretrained(self.path), Unquantized())
        if self.on_host and not isinstance(found, Unquantized):
            raise ValueError(
                f"{self.path} is in 4 bits, which on_host does not support: set on_host to false"
            )
        return found

    def check_vocabulary(self, chat: Chat) -> None:
        """Compare its tokens with the policy's, id by id, without loading weights.

        Its embedding may have more rows than the policy's (padding); they are not used.

        Raises:
            ValueError: if an id stands for another token, or the embedding has fewer rows.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path)
            rows = AutoConfig.from_pretrained(self.path).get_text_config().vocab_size
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"its tokenizer cannot be loaded: {(str(error).splitlines() or [''])[0]}"
            ) from error
        theirs, ours = _tokens(tokenizer), _tokens(chat.tokenizer)
        differ = sorted(i for i in theirs.keys() | ours.keys() if theirs.get(i) != ours.get(i))
        if differ:
            first = differ[0]
            raise ValueError(
                f"its vocabulary is not model.policy's: id {first} is {_shown(theirs, first)} in "
                f"it and {_shown(ours, first)} in the policy's ({len(differ)} of {len(ours)} ids "
                "differ); name a model with the policy's own tokenizer"
            )
        if rows < chat.rows:
            raise ValueError(
                f"its embedding has {rows} rows, fewer than the {chat.rows} of model.policy, whose "
                f"ids it must read: enlarge it (`resize_token_embeddings({chat.rows})`) and save it"
            )


class OtherWeights(Whole):
    """The frozen weights of another model.

    Args:
        source: the model.
        on_meta: build it on `meta`, without values; `begin` loads its shards.

    Raises:
        ValueError: if they cannot be loaded.
    """

    def __init__(self, source: OtherModel, *, on_meta: bool) -> None:
        dtype, known = source.loaded_dtype(torch.cuda.is_available()), source.known()
        with torch.device("cpu"):  # `on_host` stays there
            model = load_model(
                source.path,
                dtype=dtype,
                known=known,
                quantization=source.quantization(),
                on_meta=on_meta,
            )
        # In train mode, because Lightning warns of modules in eval mode. Each forward sets eval.
        super().__init__(model.train(), Stored(on_host=source.on_host), saved=False)
        self.source, self._dtype, self._known = source, dtype, known
        if source.on_host and torch.cuda.is_available() and not on_meta:
            for parameter in model.parameters():
                parameter.data = parameter.data.pin_memory()

    def begin(self, model: nn.Module) -> None:
        load_shards(self.copy, self.source.path)

    def runs_in(self, student: torch.dtype) -> torch.dtype:
        return self._dtype

    def known(self, policy: KnownPath) -> KnownPath:
        return self._known

    def same(self, other: Weights) -> bool:
        return isinstance(other, OtherWeights) and other.source == self.source

    def pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(())


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, frozenset[str]]:
    """Id -> its tokens, added tokens included."""
    found: dict[int, frozenset[str]] = {}
    added = ((token.content, i) for i, token in tokenizer.added_tokens_decoder.items())
    for token, i in (*tokenizer.get_vocab().items(), *added):
        found[i] = found.get(i, frozenset()) | {token}
    return found


def _shown(tokens: Mapping[int, frozenset[str]], token_id: int) -> str:
    return " and ".join(map(repr, sorted(tokens[token_id]))) if token_id in tokens else "nothing"
