"""What a strategy of the user's own declares, and what it hands over, checked where it comes in."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from scsdpo.errors import ConfigurationError

Shape = tuple[int, ...]

if TYPE_CHECKING:
    _T = TypeVar("_T")

    def declared(get: Callable[[Any], _T]) -> _T | Any:
        """A property that a subclass may declare as a plain attribute, a field or a property.

        Python allows all three, and pyright none but the third over a `property`; over a value that
        may be `Any` it allows them all.
        """
else:
    declared = property


def mask(value: object, *, of: str, axes: str, shape: Shape) -> Tensor:
    """`value`, which must be a bool tensor of `shape`.

    Args:
        value: what came.
        of: who gave it, e.g. "Mine.plan, active".
        axes: the shape in words, e.g. "[Q, G]".
        shape: the shape in numbers.

    Raises:
        ConfigurationError: in one line that says what came and what was expected.
    """
    if isinstance(value, Tensor) and value.dtype == torch.bool and value.shape == shape:
        return value
    raise _mismatch(value, of, "a bool tensor", axes, shape)


def weights(value: object, *, of: str, axes: str, shape: Shape) -> Tensor:
    """`value` as float64, which must be a tensor of `shape` with finite entries >= 0; as `mask`."""
    if not isinstance(value, Tensor) or value.shape != shape or value.is_complex():
        raise _mismatch(value, of, "finite weights >= 0", axes, shape)
    wide = value.double()
    if bool(((wide >= 0) & wide.isfinite()).all()):
        return wide
    bad = wide[~((wide >= 0) & wide.isfinite())]
    raise ConfigurationError(
        f"`{of}` must give finite weights >= 0 {axes} = {list(shape)}, got {float(bad[0]):g} among "
        f"them ({len(bad)} of {wide.numel()})"
    )


def numbers(value: object, *, of: str, axes: str, shape: Shape) -> Tensor:
    """`value`, which must be a real tensor of `shape`; as `mask`."""
    if isinstance(value, Tensor) and value.shape == shape and not value.is_complex():
        return value
    raise _mismatch(value, of, "numbers", axes, shape)


def indices(value: object, *, of: str, axes: str, shape: Shape) -> Tensor:
    """`value`, which must be an int64 tensor of `shape`; as `mask`."""
    if isinstance(value, Tensor) and value.dtype == torch.int64 and value.shape == shape:
        return value
    raise _mismatch(value, of, "int64 indices", axes, shape)


def _mismatch(value: object, of: str, what: str, axes: str, shape: Shape) -> ConfigurationError:
    came = type(value).__name__
    if isinstance(value, Tensor):
        came = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return ConfigurationError(f"`{of}` must give {what} {axes} = {list(shape)}, got {came}")
