"""The frozen teacher as a training step calls it: in its own memory format and precision, perhaps on a stream of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from distill.models.backbone import Backbone
from distill.protocols import Batch, ModelOutput, Needs

_CAST = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class FrozenTeacher(nn.Module):
    """Images -> what the backbone gives.

    precision: `auto`, which is the caller's autocast; or `bf16`, which turns the backbone's weights to bfloat16, in place, and
    runs under an autocast of its own. stream: where its kernels go; the stream that called it may read the outputs after
    `join`. None: that stream itself.
    """

    def __init__(
        self,
        backbone: Backbone,
        memory_format: torch.memory_format,
        precision: str = "auto",
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.memory_format, self.precision = backbone, memory_format, precision
        self._stream = stream
        if precision == "bf16":
            bfloat16_weights(backbone.model)

    def serving(self, needs: Needs) -> FrozenTeacher:
        """A teacher over the same weights that gives what `needs` asks: not compiled, on the caller's stream."""
        return FrozenTeacher(self.backbone.serving(needs), self.memory_format, self.precision)

    def forward(self, images: Tensor, batch: Batch | None = None) -> ModelOutput:
        """What `Backbone.forward` gives; the caller keeps the images until `join`. A live teacher reads the images alone."""
        if self._stream is None:
            return self._outputs(images)
        # This also lets the outputs' memory be used again: whoever read those of the call before was launched before this.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            return self._outputs(images)

    def join(self) -> None:
        """Makes what the calling stream does from now on see the outputs; the host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of its forward pass on this device."""
        return torch.autocast(device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def _outputs(self, images: Tensor) -> ModelOutput:
        # converted here and not before: a copy that the other stream made would be given away while this one still reads it
        with self.autocast(images.device):
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
