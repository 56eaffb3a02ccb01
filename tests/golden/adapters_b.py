"""Adapters of the second family of methods: method, as the index calls it -> what computes its cases with our code.

Each makes the criterion as a run does, gives it the case's parameters, and hands over the case's maps as model outputs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

from distill.losses.cat_kd import CATKD
from distill.losses.ctkd import CTKD
from distill.losses.logits import dkd_loss, kd_loss, standardise
from distill.losses.maps import to_grid
from distill.losses.mgd import MGD, cell_mask, channel_mask
from distill.losses.mlkd import MLKD
from distill.losses.ofd import OFD, batchnorm_margin, partial_distance
from distill.losses.reviewkd import POOLED, ReviewKD
from distill.losses.semckd import CrossLayer, semckd_loss
from distill.losses.simkd import SimKD
from distill.models.simkd import SimKDStudent
from distill.optim import weight_schedule
from distill.protocols import Affine, DataFacts, MapShape, ModelFacts, ModelOutput, Progress, Target
from distill.regions import pool, region_matrix
from tests.golden.case import Adapter, Case
from tests.golden.names import our_name

UNREAD = torch.zeros(1, dtype=torch.int64)
"""Labels of a loss that reads none."""


class Inputs:
    """A case's inputs, as leaves that take a gradient where one is stored, and the modules with its parameters."""

    def __init__(self, case: Case) -> None:
        self.case, self.hyper = case, case.options
        self.leaves: dict[str, Tensor] = {}
        self.modules: list[nn.Module] = []
        self.dtype = next(value.dtype for name, value in case.inputs.tensors.items() if value.is_floating_point())

    def __getitem__(self, name: str) -> Tensor:
        if name in self.leaves:
            return self.leaves[name]
        value = self.case.inputs[f"in/{name}"]
        if f"grad/{name}" in self.case.inputs:
            value = self.leaves[name] = value.clone().requires_grad_()
        return value

    def maps(self, side: str) -> list[Tensor]:
        """The maps `side0`, `side1`, ..., first to last."""
        names = [name for name in self.case.inputs if re.fullmatch(rf"in/{side}\d+", name)]
        return [self[name.removeprefix("in/")] for name in sorted(names)]

    def load(self, module: nn.Module, apart: tuple[str, ...] = ()) -> None:
        """Gives the module all of the case's parameters and buffers, the inputs' type and the case's mode."""
        module.double() if self.dtype == torch.float64 else module.float()
        module.train(self.case.entry["module_mode"] == "train")
        given = {**self.case.named("param/"), **self.case.named("buffer/")}
        ours = {our_name(self.case.method, name): value for name, value in given.items()}
        untrained = {*apart, *(name for name, _ in module.named_buffers())}
        missing, unexpected = module.load_state_dict(ours, strict=False)
        assert not unexpected, f"we have no {unexpected}"
        assert set(missing) <= untrained, f"the case has no {missing}"
        self.modules.append(module)

    def results(self, loss: Tensor, **outputs: Tensor) -> dict[str, Tensor]:
        """The loss and other outputs, and every gradient that the case stores, under the names of the case."""
        parameters = {name: value for module in self.modules for name, value in module.named_parameters()}
        wanted = {f"grad/{name}": leaf for name, leaf in self.leaves.items()}
        for name in self.case.inputs:
            if name.startswith("grad/param/"):
                wanted[name] = parameters[our_name(self.case.method, name.removeprefix("grad/param/"))]
        slopes = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True, allow_unused=True)
        values = {"out/loss": loss, **{f"out/{name}": value for name, value in outputs.items()}}
        return {name: value.detach() for name, value in {**values, **dict(zip(wanted, slopes, strict=True))}.items()}


def facts_of(maps: Sequence[Tensor], num_classes: int = 10, **more: Any) -> ModelFacts:
    """Facts of a model with these stages."""
    return ModelFacts(num_classes, tuple(MapShape(*each.shape[1:]) for each in maps), **more)


def output_of(maps: Sequence[Tensor], **more: Any) -> ModelOutput:
    """A model output with these stages; its logits are not to be read unless they are given."""
    fields = {"logits": maps[-1].new_zeros(len(maps[-1]), 1), "region_logits": {}, "region_features": {}, **more}
    stages = {number - len(maps): each for number, each in enumerate(maps)}
    return ModelOutput(feature_map=maps[-1], stages=stages, preactivations=stages, **fields)


def logits_output(logits: Tensor) -> ModelOutput:
    """A model output of logits alone."""
    return ModelOutput(logits, logits[:, :, None, None], {}, {}, {})


def cat_kd(case: Case) -> dict[str, Tensor]:
    """Both models as feature map and classifier, with a bias that must not matter."""
    given, classes = Inputs(case), case.options["classes"]
    names = ("student", "teacher")
    cams = {name: torch.einsum("bchw,kc->bkhw", given[name], given[f"{name}_weight"]) for name in names}
    facts = {name: facts_of([given[name]], classes) for name in names}
    if given.hyper["normalise"] and facts["student"].stages[-1].height == 1:
        # our class refuses a pair whose gradient is exactly 0; the case shows that it is
        facts["student"] = ModelFacts(classes, (MapShape(1, 2, 2),))
    criterion = CATKD(**facts, resolution=given.hyper["resolution"], normalise=given.hyper["normalise"])
    logits = {name: each.mean((2, 3)) for name, each in cams.items()}
    maps = dict(cams)
    if given.hyper["binarize"]:
        maps["teacher"] = _binarised(cams["teacher"])
    if given.hyper["partial"]:
        maps = _partial(cams, logits["teacher"], given.hyper["partial"])
    outputs = {name: _with_bias(each, criterion) for name, each in maps.items()}
    loss = given.hyper["beta"] * criterion(outputs["student"], outputs["teacher"], Target(UNREAD))[0]
    cross_entropy = torch.nn.functional.cross_entropy(logits["student"], given["labels"])
    shown = {"student_cam": cams["student"], "teacher_cam": cams["teacher"], "student_logits": logits["student"]}
    return given.results(loss, loss_ce=cross_entropy, **shown)


def _with_bias(cams: Tensor, criterion: CATKD) -> ModelOutput:
    """What a backbone whose head has a bias gives for these maps."""
    bias = torch.linspace(-1, 1, cams.shape[1], dtype=cams.dtype)
    regions = pool(cams, region_matrix(*cams.shape[-2:], criterion.regions)) + bias
    return output_of([cams], region_logits={criterion.regions: regions}, head_bias=bias)


def _binarised(cams: Tensor) -> Tensor:
    """The released ablation: 1 where a cell is above the mean magnitude of its map."""
    return (cams > cams.abs().mean((2, 3), keepdim=True)).to(cams.dtype)


def _partial(cams: dict[str, Tensor], logits: Tensor, count: int) -> dict[str, Tensor]:
    """The released ablation: only classes that are strictly above the teacher's `count`-th, alike many in every image."""
    kept = logits > logits.sort(descending=True).values[:, count - 1 : count]
    return {name: each[kept].unflatten(0, (len(each), -1)) for name, each in cams.items()}


def ctkd(case: Case) -> dict[str, Tensor]:
    """The loss in one epoch, or a whole run of the optimiser on the temperature."""
    if case.entry["variant"] == "run":
        return _ctkd_run(case)
    given, hyper, base = Inputs(case), case.options, case.entry["variant"]
    options = {"start": hyper["t_start"], "span": hyper["t_range"], "epochs": hyper["decay_loops"], "shape": hyper["decay"]}
    weights = {} if base == "kd" else {"alpha": hyper["alpha"], "beta": hyper["beta"]}
    criterion = CTKD(base=base, **options, **weights)
    given.load(criterion)
    labels = given["labels"]
    student, teacher = (logits_output(given[f"{side}_logits"]) for side in ("student", "teacher"))
    loss, found = criterion(student, teacher, Target(labels, progress=Progress(hyper["epoch"] - 1, 1, 1000)))
    # once more at a temperature of its own, whose gradient is not reversed
    temperature = (hyper["t_start"] + hyper["t_range"] * criterion.g.sigmoid()).detach().requires_grad_()
    if base == "kd":
        rows = kd_loss(student.logits, teacher.logits, temperature)
    else:
        rows = dkd_loss(student.logits, teacher.logits, labels, hyper["alpha"], hyper["beta"], temperature)
    (slope,) = torch.autograd.grad(rows.mean(), temperature)
    shown = {"temperature": temperature, "gradient_of_temperature": slope, "lambda": -found["curriculum"]}
    return given.results(loss, **shown)


def _ctkd_run(case: Case) -> dict[str, Tensor]:
    given, hyper = Inputs(case), case.options
    criterion = CTKD()
    given.load(criterion)
    optimizer = torch.optim.SGD(criterion.parameters(), **{key: hyper[key] for key in ("lr", "momentum", "weight_decay")})
    rows: list[tuple[Tensor, ...]] = []
    for step in range(hyper["steps"]):
        student, teacher = (logits_output(given[f"{side}_logits"][step]) for side in ("student", "teacher"))
        target = Target(UNREAD, progress=Progress(step, hyper["steps_per_epoch"], hyper["steps"]))
        loss, found = criterion(student, teacher, target)
        optimizer.zero_grad()
        (hyper["kd_weight"] * loss).backward()
        rows.append(
            (found["temperature"], criterion.g.grad[0].clone(), -found["curriculum"], hyper["kd_weight"] * loss.detach())
        )
        optimizer.step()
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    names = ("temperature", "gradients", "lambda", "losses")
    series = {f"out/{name}": column for name, column in zip(names, columns, strict=True)}
    return {**series, "out/loss": columns[-1][-1], "out/final_global_T": criterion.g.detach()}


def lskd(case: Case) -> dict[str, Tensor]:
    """KD or DKD with the option `standardise`.

    With two classes the gradient is what cancelling leaves: 2e-9 of terms of 0.1. The stored one is itself 1.3e-17 from the
    exact value (forty digits), ours as far to the other side.
    """
    case.noise = max(case.noise, 1e-16)
    given, hyper = Inputs(case), case.options
    student, teacher, labels = given["student_logits"], given["teacher_logits"], given["labels"]
    if case.entry["variant"] == "dkd":
        rows = dkd_loss(student, teacher, labels, hyper["alpha"], hyper["beta"], hyper["temperature"], standardise=True)
    else:
        rows = kd_loss(student, teacher, hyper["temperature"], standardise=True)
    shown = {"student_standardised": standardise(student), "teacher_standardised": standardise(teacher)}
    return given.results(rows.mean(), **shown)


def mlkd(case: Case) -> dict[str, Tensor]:
    """The criterion; which rows are the weak views is one of its inputs."""
    given, hyper = Inputs(case), case.options
    student, teacher = given["student_logits"], given["teacher_logits"]
    facts = ModelFacts(student.shape[1], ())
    criterion = MLKD(facts, facts, temperature=hyper["temperature"], standardise=hyper["standardise"])
    loss, parts = criterion(logits_output(student), logits_output(teacher), Target(UNREAD, plain=given["plain"]))
    return given.results(loss, **parts)


def mgd(case: Case) -> dict[str, Tensor]:
    """The criterion with the case's uniform numbers in the place of its own."""
    given, hyper = Inputs(case), case.options
    student, teacher, uniform, mask = (given[name] for name in ("student", "teacher", "uniform", "mask"))
    kind = {"channel": "channel", "spatial": "cell"}[hyper["mask"]]
    criterion = MGD(facts_of([student]), facts_of([teacher]), mask=kind, mask_ratio=hyper["lambda"])
    given.load(criterion)
    assert torch.equal((channel_mask if kind == "channel" else cell_mask)(uniform, hyper["lambda"]), mask.bool())
    criterion._uniform = lambda aligned, generator: uniform  # type: ignore[method-assign]
    seen: dict[str, Tensor] = {}
    criterion.generator.register_forward_hook(lambda module, taken, made: seen.update(masked=taken[0], generated=made))
    loss, _ = criterion(output_of([student]), output_of([teacher]), Target(UNREAD))
    return given.results(hyper["alpha"] * loss, **seen)


def reviewkd(case: Case) -> dict[str, Tensor]:
    """The criterion; the student's maps are before their ReLU or after it, which is one to it."""
    given, hyper = Inputs(case), case.options
    sides = {side: (given.maps(side), given[f"{side}_pooled"]) for side in ("student", "teacher")}
    facts = [facts_of(maps) for maps, _ in sides.values()]
    data = DataFacts(10, torch.zeros(10, dtype=torch.int64), len(sides["student"][0][0]))
    options = {"student_preactivations": hyper["student_preact"], "middle_channels": hyper["mid_channels"]}
    criterion = ReviewKD(*facts, data, **options)
    given.load(criterion)
    outputs = [output_of(maps, region_features={POOLED: pooled[:, None]}) for maps, pooled in sides.values()]
    fused: dict[str, Tensor] = {}
    for number, block in enumerate(reversed(criterion.blocks)):
        block.expand.register_forward_hook(lambda m, taken, made, name=f"fused{number}": fused.update({name: made}))
    loss, found = criterion(*outputs, Target(UNREAD))
    levels = {f"level_loss{number}": value for number, value in enumerate(reversed(found.values()))}
    weight = weight_schedule(hyper["weight"], warmup_epochs=hyper["warmup_epochs"])
    return given.results(weight(Progress(hyper["epoch"] - 1, 1, 1000)) * loss, **fused, **levels)


def ofd(case: Case) -> dict[str, Tensor]:
    """The criterion, or the distance alone."""
    given, hyper = Inputs(case), case.options
    if case.entry["variant"].endswith("distance"):
        return given.results(partial_distance(given["student"], given["teacher"], given["margin"]).sum())
    student, teacher = given.maps("student"), given.maps("teacher")
    norms = tuple(Affine(given[f"bn_weight{number}"], given[f"bn_bias{number}"]) for number in range(len(teacher)))
    criterion = OFD(facts_of(student), facts_of(teacher, preactivation_norms=norms), kernel_size=hyper["kernel_size"])
    given.load(criterion)
    shown: dict[str, Tensor] = {}
    for number, connector in enumerate(criterion.connectors):
        shown[f"margin{number}"] = batchnorm_margin(*norms[number])
        connector.register_forward_hook(lambda m, taken, made, name=f"projected{number}": shown.update({name: made}))
    loss, _ = criterion(output_of(student), output_of(teacher), Target(UNREAD))
    return given.results(hyper["weight"] * loss, **shown)


class GoldenBody(nn.Module):
    """A timm-style model that is the identity: its images are the case's maps."""

    def __init__(self, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (channels, *grid)}
        self.feature_info = [{"num_chs": channels, "reduction": 1, "module": ""}]
        self.num_features = channels
        self.unused = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward_features(self, x: Tensor) -> Tensor:
        """The images."""
        return x

    def forward_intermediates(self, x: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
        """The images, and again."""
        return x, [x]


@register_model
def golden_body(pretrained: bool = False, in_chans: int = 3, grid: tuple[int, int] = (4, 4), **kwargs: Any) -> GoldenBody:
    """Maps in the place of a network, for `SimKDStudent`."""
    return GoldenBody(in_chans, grid)


def simkd(case: Case) -> dict[str, Tensor]:
    """The registered student over the case's maps, and the criterion on its feature map."""
    given, hyper = Inputs(case), case.options
    student, teacher = given["student"], given["teacher"]
    smaller = student.shape[-1] > teacher.shape[-1]
    model = SimKDStudent(
        "golden_body",
        teacher.shape[1],
        factor=hyper["factor"],
        pool_to=tuple(teacher.shape[-2:]) if smaller else None,
        num_classes=hyper["classes"],
        in_chans=student.shape[1],
        grid=tuple(student.shape[-2:]),
    )
    given.load(model, apart=("head.fc.weight", "head.fc.bias", "body.unused"))
    classifier = {"weight": given["classifier_weight"], "bias": given["classifier_bias"]}
    model.get_classifier().load_state_dict(classifier)
    projected = model.forward_features(student)
    output = output_of([projected])
    loss, _ = SimKD(facts_of([projected]), facts_of([teacher]))(output, output_of([teacher]), Target(UNREAD))
    target = to_grid(teacher, *projected.shape[-2:])
    return given.results(loss, projected=projected, logits=model.forward_head(projected), target=target)


def semckd(case: Case) -> dict[str, Tensor]:
    """The module inside the criterion, which refuses the batches of four that some cases have."""
    given, hyper = Inputs(case), case.options
    student, teacher = given.maps("student"), given.maps("teacher")
    pairs = CrossLayer(facts_of(student).stages, facts_of(teacher).stages, hyper["batch"])
    given.load(pairs)
    attention, distances = pairs(student, teacher, hyper["soft"] or 1.0)
    return given.results(semckd_loss(attention, distances).mean(), attention=attention)


ADAPTERS: dict[str, Adapter] = {
    "catkd": cat_kd,
    "ctkd": ctkd,
    "lskd": lskd,
    "mgd": mgd,
    "mlkd": mlkd,
    "ofd": ofd,
    "reviewkd": reviewkd,
    "semckd": semckd,
    "simkd": simkd,
}
