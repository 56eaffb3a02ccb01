"""One network class for all CIFAR architectures: stem, stages, tail and timm's classifier head, with timm's interface."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

CIFAR_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR_STD = (0.2675, 0.2565, 0.2761)


class StagedNet(nn.Module):
    """A classifier made of `stem`, `stages` and `tail`, with the interface of a timm model.

    `tail` is what runs between the last stage's map and the head (a last norm and activation, a 1x1 convolution), else None.
    widths: channels of each stage's map. reductions: image pixels per cell of it and side, which a `large_stem` doubles.
    head_width: channels of the map that the head averages. `feature_info` lists the stages, never the stem.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        tail: nn.Module | None,
        *,
        widths: Sequence[int],
        reductions: Sequence[int],
        head_width: int,
        large_stem: bool = False,
        num_classes: int = 100,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = head_width
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": width, "reduction": reduction * (2 if large_stem else 1), "module": f"stages.{i}"}
            for i, (width, reduction) in enumerate(zip(widths, reductions, strict=True))
        ]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.tail = nn.Identity() if tail is None else tail
        self.head = ClassifierHead(head_width, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.apply(_initialise)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each stage in the backward pass. BatchNorm statistics then move twice per step, as in any timm model."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the last linear layer by a fresh one; 0 classes removes it."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def _run_stages(self, x: Tensor, upto: int) -> list[Tensor]:
        """The maps of the first `upto` stages, in order."""
        maps = []
        x = self.stem(x)
        for stage in self.stages[:upto]:
            x = checkpoint(stage, x) if self.grad_checkpointing and self.training else stage(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """images [B, in_chans, H, W] -> the map that the head reads, [B, num_features, h, w]."""
        return self.tail(self._run_stages(x, len(self.stages))[-1])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The stages' maps asked for by `indices`, behind the map of `forward_features` unless `intermediates_only`.

        With `stop_early` the stages after the last one asked for do not run. `norm` exists for timm's interface and does
        nothing. ValueError for an `output_fmt` other than NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r}: these maps are NCHW; ask for 'NCHW'")
        wanted, last = feature_take_indices(len(self.stages), indices)
        maps = self._run_stages(x, last + 1 if stop_early else len(self.stages))
        intermediates = [maps[i] for i in wanted]
        if intermediates_only:
            return intermediates
        return (maps[-1] if stop_early and last + 1 < len(self.stages) else self.tail(maps[-1])), intermediates

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of `forward_features` -> logits [B, num_classes], or the pooled features [B, num_features]."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """images [B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def _initialise(module: nn.Module) -> None:
    """He initialisation of convolutions, as the papers' code; linear layers keep PyTorch's own."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def conv_norm(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False
) -> list[nn.Module]:
    """A padded convolution and its BatchNorm."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=bias)
    return [convolution, nn.BatchNorm2d(out_channels)]


def stem_convolution(in_chans: int, width: int, large: bool, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """The first convolution at 32 px; for 224 px images (`large`) it is 7x7 and halves the grid once more."""
    kernel, stride = (7, 2 * stride) if large else (kernel, stride)
    return nn.Conv2d(in_chans, width, kernel, stride, kernel // 2, bias=False)


def register(module: str, name: str, make: Callable[..., StagedNet], stages: int) -> None:
    """Registers `name` for 32 px and `name_224` for 224 px images in timm's registry, as functions of `module`.

    make: (large_stem, num_classes, in_chans, drop_rate, global_pool, ...) -> net of so many `stages`.
    """
    cfgs = generate_default_cfgs({name: default_cfg(), f"{name}_224": default_cfg(large=True)})
    # timm reads a new name's cfgs off its module
    vars(sys.modules[module]).setdefault("default_cfgs", {}).update(cfgs)
    for variant, large in ((name, False), (f"{name}_224", True)):
        entry = _entry(variant, partial(make, large_stem=large), 200 if large else 100, stages)
        entry.__name__, entry.__module__ = variant, module
        register_model(entry)


def _entry(variant: str, make: Callable[..., StagedNet], classes: int, stages: int) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        kwargs = {"num_classes": classes, **kwargs}
        feature_cfg = {"out_indices": tuple(range(stages)), "feature_cls": "getter"}
        return build_model_with_cfg(make, variant, pretrained, feature_cfg=feature_cfg, **kwargs)

    return entry


def default_cfg(large: bool = False) -> dict[str, Any]:
    """timm's default cfg of these nets, without weights: CIFAR-100 at 32 px, or CUB-200 at 224 px (`large`)."""
    own = {
        "num_classes": 200 if large else 100,
        "input_size": (3, 224, 224) if large else (3, 32, 32),
        "crop_pct": 0.875 if large else 1.0,
        "mean": IMAGENET_DEFAULT_MEAN if large else CIFAR_MEAN,
        "std": IMAGENET_DEFAULT_STD if large else CIFAR_STD,
    }
    return {**own, "pool_size": None, "interpolation": "bicubic", "first_conv": "stem.0", "classifier": "head.fc"}


def drop_path_rates(total: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth per block, rising linearly from 0 to `total` over all blocks, stage by stage."""
    rates = torch.linspace(0, total, sum(depths)).tolist()
    ends = [sum(depths[: i + 1]) for i in range(len(depths))]
    return [rates[end - depth : end] for depth, end in zip(depths, ends, strict=True)]
