"""The abstract class of layouts: how the layers of a decoder mix the tokens of one forward."""

from abc import ABC, abstractmethod

from torch import Tensor

from scsdpo.policy.segment_states import DeltaInputs


class AttentionLayout(ABC):
    """Which tokens attend to which in one forward of the decoder, and which state each goes on."""

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
        """Softmax attention of one layer.

        Args:
            layer: index of the layer.
            query: [B, H, s, d], scaled.
            key: [B, K, s, d], K a divisor of H.
            value: [B, K, s, e].
            window: number of positions that a token attends to, itself included; None: all before.
            sinks: [H] scores of one more key, to which every token attends and whose value is
                zero; None: the layer has no sinks.

        Returns:
            [B, s, H, e].
        """

    @abstractmethod
    def convolve(self, layer: int, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Causal convolution of one layer: y_t = bias + sum_j weight_j x_(t - k + 1 + j).

        Args:
            layer: index of the layer.
            inputs: [B, s, C].
            weight: [C, k].
            bias: [C].

        Returns:
            [B, s, C].
        """

    @abstractmethod
    def delta_rule(self, layer: int, inputs: DeltaInputs) -> Tensor:
        """Gated delta rule of one layer (`SegmentStates.delta_rule`); call `convolve` first.

        Args:
            layer: index of the layer.
            inputs: [B, s, ...].

        Returns:
            [B, s, H, e].
        """
