"""SimKD's student: any timm model without its head, a projector to a teacher's channels, and that teacher's classifier.

Source: Chen et al., CVPR 2022; DefangChen/SimKD 2b389c3, `models/util.py`, where the projector is kept beside the student.
Here all of it is one model in timm's registry, `simkd_student`, so that evaluation, averaging and export need nothing special.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from distill.models.anatomy import evaluating
from distill.models.region_logits.layout import Layout, TimmModel, find_layout
from distill.regions import adaptive_side

OF_THE_INPUT = ("input_size", "mean", "std", "interpolation", "crop_pct", "fixed_input_size")
"""What the student's cfg takes over from its body's."""
OF_THE_HEAD = ("num_classes", "global_pool", "drop_rate", "in_chans", "pretrained")
"""Arguments that the body does not take over from a model with a head."""
LARGEST_DIFFERENCE = 1e-4
"""The largest relative difference, taken for rounding, of a teacher's logits from its classifier on the mean of its map. A
larger one means that the head does something else."""


class SimKDStudent(nn.Module):
    """Body, projector and classifier, with the interface of a timm model.

    The feature map is the projected one, [B, teacher_channels, h, w]; intermediates are the body's. The classifier is frozen,
    for it is a teacher's: `reset_classifier` puts a fresh one in its place that trains. What is left of the body's head is
    frozen too, for nothing reads it.

    body: timm name of the model whose map is projected; further arguments are its own (drop_path_rate, img_size, ...).
    factor: teacher's channels over the projector's inner ones. rectified: end in a ReLU, for a teacher's map without negative
    values. pool_to: grid (h, w) that the body's map is averaged to first, where the teacher's is smaller.
    """

    def __init__(
        self,
        body: str,
        teacher_channels: int,
        factor: int = 2,
        rectified: bool = True,
        pool_to: tuple[int, int] | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        **body_args: Any,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = teacher_channels
        self.body: TimmModel = timm.create_model(body, num_classes=0, global_pool="", in_chans=in_chans, **body_args)
        self.feature_info = self.body.feature_info
        _, height, width = self.body.pretrained_cfg["input_size"]
        size = body_args.get("img_size") or (height, width)
        blank = torch.zeros(2, in_chans, *((size, size) if isinstance(size, int) else size))
        self.layout = _layout(self.body, blank, body)
        _freeze_unread(self.body, self.layout, blank)
        self.pool_to = None if pool_to is None else (pool_to[0], pool_to[1])
        self.projector = projector(self.layout.channels, teacher_channels, factor, rectified)
        self.head = ClassifierHead(teacher_channels, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head.requires_grad_(False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the body's blocks in the backward pass."""
        self.body.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the body's parameters that it keeps from weight decay."""
        return {f"body.{name}" for name in getattr(self.body, "no_weight_decay", set)()}

    def get_classifier(self) -> nn.Module:
        """The last linear layer, the teacher's."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a fresh one, which trains; 0 classes removes it."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def project(self, feature_map: Tensor) -> Tensor:
        """The body's map [B, C, H, W] -> [B, teacher_channels, h, w]."""
        return self.projector(feature_map if self.pool_to is None else _averaged(feature_map, self.pool_to))

    def forward_features(self, x: Tensor) -> Tensor:
        """images [B, in_chans, H, W] -> the projected map, which the head reads."""
        return self.project(self.layout.map_of(self.body.forward_features(x)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The body's maps asked for by `indices`, behind the projected map unless `intermediates_only`."""
        options = {"norm": norm, "output_fmt": output_fmt}
        if intermediates_only:
            return self.body.forward_intermediates(
                x, indices=indices, stop_early=stop_early, intermediates_only=True, **options
            )
        features, maps = self.body.forward_intermediates(x, indices=indices, stop_early=False, **options)
        return self.project(self.layout.map_of(features)), maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The projected map -> logits [B, num_classes], or its mean [B, teacher_channels]."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """images [B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def projector(student_channels: int, teacher_channels: int, factor: int, rectified: bool) -> nn.Sequential:
    """conv1x1(s -> t // factor) - conv3x3 - conv1x1(-> t), each with BN and ReLU and without bias; the last ReLU is an option.

    It stays where the channels are equal: without it the published results are bad.
    """
    if not 1 <= factor <= teacher_channels:
        raise ValueError(f"factor {factor} must lie in 1..{teacher_channels}: the projector has t // factor channels inside")
    inner = teacher_channels // factor
    widths, layers = [student_channels, inner, inner, teacher_channels], []
    for channels, wanted, size in zip(widths, widths[1:], (1, 3, 1), strict=False):
        convolution = nn.Conv2d(channels, wanted, size, padding=size // 2, bias=False)
        layers += [convolution, nn.BatchNorm2d(wanted), nn.ReLU(inplace=True)]
    return nn.Sequential(*(layers if rectified else layers[:-1]))


def build_simkd_student(
    student: TimmModel, teacher: TimmModel, *, student_images: Tensor, teacher_images: Tensor, factor: int = 2
) -> SimKDStudent:
    """The student whose body has the architecture, arguments and weights of `student`, with the teacher's classifier.

    student_images, teacher_images: some at each model's own size, [N, C, H, W], noise will do: they show both grids, and
    whether the teacher's map has negative values, which a projector that ends in a ReLU cannot reach.
    ValueError for a teacher whose logits are not its last linear layer on the mean of its map: such a head does not fit a map
    of another grid, or reads what is not in the map (a class token). ValueError for another number of classes.
    """
    feature_map, classifier = _classified_map(teacher, teacher_images)
    if student.num_classes != classifier.out_features:
        raise ValueError(
            f"simkd's student takes the teacher's classifier of {classifier.out_features} classes; "
            f"{student.num_classes} were asked for"
        )
    grid = _seen(student, _layout(student, student_images, "the student"), student_images).shape[-2:]
    wanted = [min(sides) for sides in zip(grid, feature_map.shape[-2:], strict=True)]
    # what timm keeps of how a model was made
    args = {key: value for key, value in getattr(student, "_model_args", {}).items() if key not in OF_THE_HEAD}
    cfg: Any = student.pretrained_cfg
    try:
        built = timm.create_model(
            "simkd_student",
            body=cfg["architecture"],
            teacher_channels=feature_map.shape[1],
            factor=factor,
            rectified=bool(feature_map.min() >= 0),
            pool_to=wanted if wanted != list(grid) else None,
            num_classes=classifier.out_features,
            in_chans=student_images.shape[1],
            drop_rate=getattr(student, "drop_rate", 0.0),
            **args,
        )
    except (AssertionError, TypeError) as error:  # as timm refuses arguments that an architecture cannot have
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{cfg['architecture']} cannot be made without its head ({why}); take another student") from error
    missing, _ = built.body.load_state_dict(student.state_dict(), strict=False)
    if missing:
        raise ValueError(f"{type(student).__name__} without its head has other weights ({missing[0]}); take another student")
    with torch.no_grad():
        built.head.fc.weight.copy_(classifier.weight)
        built.head.fc.bias.zero_() if classifier.bias is None else built.head.fc.bias.copy_(classifier.bias)
    return built.train(student.training)


def _classified_map(teacher: TimmModel, images: Tensor) -> tuple[Tensor, nn.Linear]:
    """The map of these images, and the classifier; ValueError where the logits are not the latter on the mean of the former."""
    get_classifier: Any = teacher.get_classifier
    name, classifier = type(teacher).__name__, get_classifier()
    remedy = "simkd needs a teacher of global average pooling and one linear layer, such as a ResNet"
    if not isinstance(classifier, nn.Linear):
        raise ValueError(f"{name}'s classifier is {type(classifier).__name__}; {remedy}")
    feature_map = _seen(teacher, _layout(teacher, images, name), images)
    if feature_map.shape[1] != classifier.in_features:
        raise ValueError(
            f"{name}'s classifier reads {classifier.in_features} numbers, its map has {feature_map.shape[1]}; {remedy}"
        )
    with evaluating(teacher):
        logits = teacher(images)
        difference = (classifier(feature_map.mean((2, 3))) - logits).abs().max() / logits.abs().max()
    if not difference <= LARGEST_DIFFERENCE:
        raise ValueError(
            f"{name}'s logits are not those of its classifier on the mean of its map (off by {difference:.0e}); {remedy}"
        )
    return feature_map, classifier


def _seen(model: TimmModel, layout: Layout, images: Tensor) -> Tensor:
    """The model's map of these images, in evaluation mode."""
    with evaluating(model):
        return layout.map_of(model.forward_features(images))


def _layout(model: TimmModel, images: Tensor, name: str) -> Layout:
    """The layout of the model's features, found by one pass. ValueError where they hold no map."""
    with evaluating(model):
        layout = find_layout(model, *model.forward_intermediates(images, output_fmt="NCHW"))
    if layout.primary is None:
        raise ValueError(f"{name} has no map in what its head reads; simkd projects that map, so take another student")
    return layout


def _freeze_unread(body: TimmModel, layout: Layout, images: Tensor) -> None:
    """Freezes the parameters that the body's map does not depend on (MobileNetV3's last convolution).

    They would never have a gradient, and DDP waits for one from each parameter that trains.
    """
    with evaluating(body), torch.enable_grad():
        waiting, seen = [layout.map_of(body.forward_features(images)).grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    read = {id(node.variable) for node in seen if hasattr(node, "variable")}
    for parameter in body.parameters():
        parameter.requires_grad_(id(parameter) in read)


def _averaged(feature_map: Tensor, grid: tuple[int, int]) -> Tensor:
    """Adaptive average pooling as two products: PyTorch's own is not deterministic on a GPU in the backward pass."""
    rows, columns = (
        adaptive_side(length, cells).to(feature_map) for length, cells in zip(feature_map.shape[-2:], grid, strict=True)
    )
    return rows @ feature_map @ columns.T


default_cfgs = generate_default_cfgs(
    {"simkd_student": {"num_classes": 1000, "input_size": (3, 224, 224), "first_conv": None, "classifier": "head.fc"}}
)


@register_model
def simkd_student(pretrained: bool = False, **kwargs: Any) -> SimKDStudent:
    """`SimKDStudent` by its name; without weights of its own its cfg has the input of its body."""
    model = build_model_with_cfg(SimKDStudent, "simkd_student", pretrained, **kwargs)
    if not pretrained:
        own = {key: model.body.pretrained_cfg.get(key) for key in OF_THE_INPUT}
        model.pretrained_cfg.update({key: value for key, value in own.items() if value is not None})
        model.default_cfg = model.pretrained_cfg
    return model
