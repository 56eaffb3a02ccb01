"""The frozen teacher as a training step calls it: in its own memory format and precision, perhaps on a stream of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from distill.models.backbone import Backbone
from distill.models.quantize import EIGHT_BITS, Quantized, bfloat16_usable, bfloat16_weights, quantize
from distill.protocols import ModelOutput


class ServedTeacher(nn.Module):
    """Images -> what the backbone gives.

    stream: where its kernels go; the stream that called it may read the outputs after `join`. None: that stream itself.
    """

    def __init__(self, backbone: Backbone, memory_format: torch.memory_format, stream: torch.cuda.Stream | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.memory_format = memory_format
        self.dtype: torch.dtype | None = None
        """Of its autocast; None: the caller's."""
        self._stream = stream

    def forward(self, images: Tensor) -> ModelOutput:
        """As `Backbone.forward`; the caller keeps the images until `join`."""
        if self._stream is None:
            return self._outputs(images)
        # This also lets the outputs' memory be used again: whoever read those of the call before was launched before this.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            return self._outputs(images)

    def join(self) -> None:
        """What the calling stream does from now on sees the outputs; the host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def precision(self, device: torch.device) -> AbstractContextManager[object]:
        """Entered around its forward pass."""
        return nullcontext() if self.dtype is None else torch.autocast(device.type, self.dtype)

    def lower(self, precision: str, device: torch.device) -> Quantized | None:
        """Turns the weights to `precision`, in place; what was quantised, where that is asked. A second call is not allowed.

        The backbone serves no other needs afterwards: `Backbone.serving` probes a model in float32.
        """
        if precision == "auto":
            return None
        if bfloat16_usable(device):
            bfloat16_weights(self.backbone.model)
            self.dtype = torch.bfloat16
        return quantize(self.backbone.model, precision) if precision in EIGHT_BITS else None

    def _outputs(self, images: Tensor) -> ModelOutput:
        # converted here and not before: a copy that the other stream made would be given away while this one still reads it
        with self.precision(images.device):
            return self.backbone(images.contiguous(memory_format=self.memory_format))
