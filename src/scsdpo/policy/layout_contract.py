"""The contract of a layout: how the layers of a decoder mix the tokens of one forward."""

from abc import ABC, abstractmethod

from torch import Tensor

from scsdpo.policy.segment_states import DeltaInputs


class AttentionLayout(ABC):
    """Who attends to whom in one forward of the decoder, and who goes on from whose state."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of one layer; `query` comes scaled.

        Args:
            layer: its index.
            query: [B, H, s, d].
            key: [B, K, s, d], K a divisor of H.
            value: [B, K, s, e].
            window: a token sees so many positions, itself included; None: all before it.
            sinks: [H] scores of a key that every token sees beside the others, and whose value is
                zero; None: there is none.

        Returns:
            [B, s, H, e].
        """

    @abstractmethod
    def convolve(self, layer: int, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Causal convolution of one layer: y_t = bias + sum_j weight_j x_(t - k + 1 + j).

        Args:
            layer: its index.
            inputs: [B, s, C].
            weight: [C, k].
            bias: [C].

        Returns:
            [B, s, C].
        """

    @abstractmethod
    def delta_rule(self, layer: int, inputs: DeltaInputs) -> Tensor:
        """Gated delta rule of one layer (`SegmentStates.delta_rule`), after its `convolve`.

        Args:
            layer: its index.
            inputs: [B, s, ...].

        Returns:
            [B, s, H, e].
        """
