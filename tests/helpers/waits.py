"""Where a host would wait for a GPU, found on CPU by the line that asks.

Inside `Waits` a tensor counts as the device's unless it is known to be the host's: what a download
gave, what is made without naming a device, and what is made of these alone. Asking a device tensor
for a value is a wait, and so is a copy to the device that the host must wait for.
"""

import traceback
from collections import Counter

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

ASKS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__contains__",
    "nonzero",
    "argwhere",
    "is_nonzero",
    "equal",
    "allclose",
    "masked_select",
    "unique",
    "unique_consecutive",
    "bincount",
    "histc",
}
"""Functions whose result, or its shape, the host must know."""
FACTORIES = {"tensor", "as_tensor", "arange", "zeros", "ones", "full", "empty", "rand", "randint"}
LOGGING = "logger_connector/result.py"
MINE = ("/src/scsdpo/", "/benchmarks/", "/tests/")


def line():
    """The innermost line of the project."""
    for frame in reversed(traceback.extract_stack()):
        if any(part in frame.filename for part in MINE) and frame.filename != __file__:
            return f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.line}"
    return "elsewhere"


class Waits(TorchFunctionMode):
    """`found`: how often each line waited."""

    def __init__(self):
        super().__init__()
        self.found = Counter()
        self._of_host = WeakIdKeyDictionary()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = [x for x in given if x not in self._of_host]
        if name in ASKS and devices:
            self._say(name)
        if name in ("__getitem__", "__setitem__", "index_put", "index_put_") and given:
            self._index(args, is_host=args[0] in self._of_host)
        to_device = name == "to" and self._names_device(args, kwargs)
        if to_device and args[0] in self._of_host and not kwargs.get("non_blocking"):
            self._say("copy to the device")
        if name in ("new_tensor", "repeat_interleave") and devices:
            self._say(name)
        if name in ("tensor", "as_tensor") and kwargs.get("device") is not None:
            self._say(f"{name} on the device")
        made = func(*args, **kwargs)
        if to_device and made is args[0]:  # on CPU it is the same tensor
            made = made.detach()
        is_factory = not given and kwargs.get("device") is None and name in FACTORIES
        of_host = is_factory or name == "cpu" or (given and not devices and not to_device)
        if of_host:
            for tensor in tree_leaves(made):
                if isinstance(tensor, Tensor):
                    self._of_host[tensor] = True
        return made

    def _index(self, args, *, is_host):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        for each in index:
            if is_host:
                continue
            if isinstance(each, list):
                self._say("index by a list")
            elif isinstance(each, Tensor) and each in self._of_host and each.dim():
                self._say("index by a tensor of the host")
            elif isinstance(each, Tensor) and each.dtype == torch.bool:
                self._say("index by a mask")

    def _names_device(self, args, kwargs):
        named = [*args[1:], kwargs.get("device")]
        return any(isinstance(x, torch.device | str) for x in named) or (
            len(args) > 1 and isinstance(args[1], Tensor)
        )

    def _say(self, what):
        # Lightning moves a table of its own to where the logged value is: on the host already.
        if any(LOGGING in frame.filename for frame in traceback.extract_stack()):
            return
        self.found[f"{what}: {line()}"] += 1
