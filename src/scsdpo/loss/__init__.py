"""Loss: one kernel that turns credit into gradients, whatever the objective."""

from scsdpo.loss.credit import Chunk, Credit, DenseCredit, SparseCredit, SumCredit
from scsdpo.loss.importance import Importance, NoImportance, TokenImportance
from scsdpo.loss.kernel import LossOutput, Objective, Tokens, Voice, chunks, credit_loss
from scsdpo.loss.logits import TokenLogits

__all__ = [
    "Chunk",
    "Credit",
    "DenseCredit",
    "Importance",
    "LossOutput",
    "NoImportance",
    "Objective",
    "SparseCredit",
    "SumCredit",
    "TokenImportance",
    "TokenLogits",
    "Tokens",
    "Voice",
    "chunks",
    "credit_loss",
]
