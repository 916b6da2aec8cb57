"""`checkpoint.monitor` against the metrics that a run will have."""

import re
from collections.abc import Sequence

from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from scsdpo.callbacks import RolloutCallback
from scsdpo.errors import ConfigurationError

_ACCURACY = re.compile(r"(val/(?:.+/)?(?:mean|maj))@(\d+)")


def check_monitor(
    checkpoint: ModelCheckpoint, responses: int, callbacks: Sequence[Callback]
) -> None:
    """Refuse a metric that no validation will log.

    Args:
        checkpoint: monitors it.
        responses: k of mean@k and maj@k.
        callbacks: of the run; one of the user's own may log anything.

    Raises:
        ConfigurationError: naming one that will be there.
    """
    name = checkpoint.monitor
    if name is None or name.startswith("train/"):
        return
    accuracy = _ACCURACY.fullmatch(name)
    if accuracy and int(accuracy[2]) == responses:
        return
    if not accuracy and any(isinstance(each, RolloutCallback) for each in callbacks):
        return
    stem = accuracy[1] if accuracy else "val/mean"
    raise ConfigurationError(
        f"checkpoint.monitor: nothing logs {name}, for model.val_sampling.n is {responses}; did "
        f"you mean {stem}@{responses}?"
    )
