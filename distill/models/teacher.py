"""The frozen teacher as a training step calls it: in its own memory format and precision, perhaps on a stream of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from distill.models.backbone import Backbone
from distill.protocols import ModelOutput

_CAST = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


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

    def lower(self, precision: str) -> None:
        """Turns the weights to `precision` (`auto`: as they are, `bf16`), in place.

        The backbone serves no other needs afterwards: `Backbone.serving` probes a model in float32.
        """
        if precision == "bf16":
            bfloat16_weights(self.backbone.model)
            self.dtype = torch.bfloat16

    def _outputs(self, images: Tensor) -> ModelOutput:
        # converted here and not before: a copy that the other stream made would be given away while this one still reads it
        with self.precision(images.device):
            return self.backbone(images.contiguous(memory_format=self.memory_format))


def bfloat16_weights(model: nn.Module) -> None:
    """Keeps the weights of Linear and convolutional layers in bfloat16, in place; to be run under bfloat16 autocast.

    The outputs are those of autocast over float32 weights, bit for bit, which would cast them anew in every call: it remembers
    only weights that take a gradient. Normalisation stays float32, and so do layers that compute their weights (weight
    standardisation).
    """
    for module in model.modules():
        if type(module).forward in _CAST:
            module.to(torch.bfloat16)


def bfloat16_usable(device: torch.device) -> bool:
    """Whether the device has bfloat16 of its own; old GPUs emulate it."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
