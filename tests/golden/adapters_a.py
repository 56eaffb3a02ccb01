"""Adapters of the first family of methods and of the ceiling: what computes a golden case with our code.

An adapter reads a case's inputs and gives what we compute under the names of the stored outputs (`case.Adapter`).
"""

from __future__ import annotations

import re
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.losses.at import at_loss
from distill.losses.crd import CRD
from distill.losses.dist_kd import dist_loss
from distill.losses.fitnet import FitNetRegressor, fitnet_loss
from distill.losses.logits import nkd_loss
from distill.losses.pkt import pkt_loss
from distill.losses.rkd import rkd_angle_loss, rkd_distance_loss
from distill.losses.sdd import complementary, region_reliability, sdd_loss
from distill.losses.sp import sdsp_loss, sp_loss
from distill.losses.wcord import WCoRD, sinkhorn_plan, wcord_local_loss
from distill.losses.wkd_feature import BottleneckProjector, build_map_projector, moments, wkd_feature_loss
from distill.losses.wkd_logit import FLOOR, cka_distances, classifier_distances, sinkhorn, transport_cost, wkd_logit_loss
from distill.optim import weight_schedule
from distill.protocols import DataFacts, MapShape, ModelFacts, Progress, Regions
from distill.regions import pool, region_matrix
from tests.golden.case import Adapter, Case
from tests.golden.names import gradients, load_parameters, our_name

ENOUGH = 20000
"""Rounds of Sinkhorn's algorithm after which nothing moves any more."""


def leaf(tensor: Tensor) -> Tensor:
    """A copy that takes a gradient."""
    return tensor.clone().requires_grad_()


def slope(loss: Tensor, tensor: Tensor) -> Tensor:
    """The gradient of one loss of several that share a graph; 0 where the tensor plays no part."""
    (found,) = torch.autograd.grad(loss, tensor, retain_graph=True, allow_unused=True)
    return torch.zeros_like(tensor) if found is None else found


def at(case: Case) -> dict[str, Any]:
    """AT over the first `stages` maps of both: the reference pairs from the front."""
    pairs = range(case.options["stages"])
    student = [leaf(case.inputs[f"student.{number}"]) for number in pairs]
    teacher = [tensor for _, tensor in sorted(case.named("teacher.").items())][: len(pairs)]
    rows = torch.stack([at_loss(mine, theirs, case.options["power"]) for mine, theirs in zip(student, teacher, strict=True)])
    loss = rows.mean(1).sum()
    found = {"loss": loss, **{f"grad.student.{number}": slope(loss, student[number]) for number in pairs}}
    if "loss_rows" in case.inputs:
        found |= {"loss_rows": rows, "loss_stage": rows.mean(1)}
    return found


def fitnet(case: Case) -> dict[str, Any]:
    """FitNet through its regressor, in training or evaluation mode."""
    student, teacher = leaf(case.inputs["student"]), case.inputs["teacher"]
    grids = (tuple(student.shape[-2:]), tuple(teacher.shape[-2:]))
    regressor = FitNetRegressor(student.shape[1], teacher.shape[1], *grids, relu=case.options["use_relu"]).to(student)
    stored = {name: case.inputs[name] for name in case.inputs if name.startswith("regressor.")}
    load_parameters(regressor, "fitnet", stored)
    predicted = regressor.train(case.options["training"])(student)
    rows = fitnet_loss(predicted, teacher)
    rows.mean().backward()
    found = {"loss": rows.mean(), "loss_rows": rows, "predicted": predicted, "grad.student": student.grad}
    found |= {f"grad.{name}": value for name, value in gradients(regressor, "fitnet", stored).items()}
    if case.options["training"]:
        found |= {f"after.bn.{name}": getattr(regressor.bn, name) for name in ("running_mean", "running_var")}
    return found


def rows_of(loss: Any, *options: str) -> Adapter:
    """An adapter for a loss of each row of `student` and `teacher`, with those of its options that the loss takes."""

    def adapter(case: Case) -> dict[str, Any]:
        student = leaf(case.inputs["student"])
        rows = loss(student, case.inputs["teacher"], **{name: case.options[name] for name in options})
        return {"loss": rows.mean(), "loss_rows": rows, "grad.student": slope(rows.mean(), student)}

    return adapter


def rkd(case: Case) -> dict[str, Any]:
    """Both parts of RKD, apart and weighted."""
    student, teacher, options = leaf(case.inputs["student"]), case.inputs["teacher"], case.options
    distance = rkd_distance_loss(student, teacher, options["eps"], options["squared"])
    angle = rkd_angle_loss(student, teacher)
    total = options["distance_weight"] * distance.mean() + options["angle_weight"] * angle.mean()
    found = {"loss": total, "grad.student": slope(total, student)}
    for name, rows in (("distance", distance), ("angle", angle)):
        found |= {f"loss_{name}": rows.mean(), f"loss_{name}_rows": rows}
        found[f"grad_{name}.student"] = slope(rows.mean(), student)
    return found


def sdsp(case: Case) -> dict[str, Any]:
    """The three readings of SD-SP, from the maps."""
    student, teacher = leaf(case.inputs["student"]), case.inputs["teacher"]
    regions = Regions(tuple(case.options["scales"]), case.options["pooling"].split()[0])
    mine, theirs = (pool(each, region_matrix(*each.shape[-2:], regions)) for each in (student, teacher))
    found = {"region_features.student": mine, "region_features.teacher": theirs}
    for name, reading in (("mean", "mean"), ("joined_vector", "vector"), ("joined_rows", "rows")):
        losses = sdsp_loss(mine, theirs, reading)
        found |= {f"loss_{name}": losses.mean(), f"grad_{name}.student": slope(losses.mean(), student)}
        if reading == "mean":
            found["loss_regions"] = losses.mean(0)
    return found


def dist(case: Case) -> dict[str, Any]:
    """DIST and its two parts."""
    student, options = leaf(case.inputs["in/student_logits"]), case.options
    total, inter, intra = dist_loss(
        student, case.inputs["in/teacher_logits"], options["beta"], options["gamma"], options["tau"]
    )
    return {"out/loss": total, "out/inter": inter, "out/intra": intra, "grad/student_logits": slope(total, student)}


def remembering(case: Case, cls: Any, **options: Any) -> Any:
    """CRD or WCoRD as a case has it: its trained layers, its banks, its normalisers."""
    stored = {
        name: case.inputs[name]
        for name in case.inputs
        if re.fullmatch(r"embed_\w+\.(weight|bias)|bank_\w+\.before|normalisers(\.before)?", name)
    }
    samples, embedding = stored["bank_student.before"].shape
    facts = [ModelFacts(2, (), embedding=stored[f"embed_{side}.weight"].shape[1]) for side in ("student", "teacher")]
    data = DataFacts(samples, torch.arange(samples) % 2, 1)
    criterion = cls(*facts, data, embedding=embedding, negatives=1, **options)
    criterion = criterion.to(stored["bank_student.before"].dtype)
    load_parameters(criterion, case.method, stored)
    return criterion


def crd(case: Case) -> dict[str, Any]:
    """CRD's steps one after the other, with the case's contrasts; the optimiser between them is the reference's."""
    criterion, found = remembering(case, CRD, temperature=case.options["temperature"], momentum=case.options["momentum"]), {}
    names = [name for name in case.inputs if name.startswith("embed_")]
    sgd = case.options["sgd"] and torch.optim.SGD(criterion.parameters(), **case.options["sgd"])
    for step in (f"step{number}" for number in range(case.options["steps"])):
        student, teacher = leaf(case.inputs[f"{step}.student"]), leaf(case.inputs[f"{step}.teacher"])
        criterion.zero_grad()
        losses = criterion.step(student, teacher, case.inputs[f"{step}.sample_ids"], case.inputs[f"{step}.contrast_ids"])
        losses.sum().backward()
        found[f"{step}.loss"] = losses.sum()
        found |= {f"grad.{step}.student": student.grad, f"grad.{step}.teacher": teacher.grad}
        found |= {f"grad.{step}.{name}": value.clone() for name, value in gradients(criterion, case.method, names).items()}
        for name in ("bank_student", "bank_teacher", "normalisers"):
            found[f"{step}.{name}.after"] = getattr(criterion.memory, name).clone()
        if sgd:
            sgd.step()
            ours = criterion.state_dict()
            found |= {f"{step}.after.{name}": ours[our_name("crd", name)].clone() for name in names}
    return found


def sdd_kd_and(case: Case) -> dict[str, Any]:
    """SDD over KD with SP or CRD: each term and its gradient, and the weighted total."""
    maps = {side: case.inputs[f"{side}.map"] for side in ("student", "teacher")}
    head = {side: [case.inputs[f"{side}.head.{name}"] for name in ("weight", "bias")] for side in maps}
    student, weight, bias = leaves = [leaf(tensor) for tensor in (maps["student"], *head["student"])]
    labels, options = case.inputs["labels"], case.options
    regions = Regions(tuple(options["scales"]), options["pooling"])
    pooled = {
        side: pool(each, region_matrix(*each.shape[-2:], regions)) for side, each in (maps | {"student": student}).items()
    }
    logits = student.mean((2, 3)) @ weight.T + bias
    mine, theirs = pooled["student"] @ weight.T + bias, pooled["teacher"] @ head["teacher"][0].T + head["teacher"][1]
    terms = {
        "cross_entropy": F.cross_entropy(logits, labels),
        "sdd_kd": sdd_loss(
            mine, theirs, labels, "kd", options["complementary_weight"], base_options={"temperature": options["temperature"]}
        ),
    }
    if "sp" in options["weights"]:
        terms["sp"] = sp_loss(student, maps["teacher"]).mean()
    else:
        vectors = [each.mean((2, 3)) for each in (student, maps["teacher"])]
        terms["crd"] = remembering(case, CRD).step(*vectors, case.inputs["sample_ids"], case.inputs["contrast_ids"]).sum()
    total = sum(options["weights"][name] * term for name, term in terms.items())
    found = {"student.logits": logits, "student.region_logits": mine, "teacher.region_logits": theirs, "loss.total": total}
    found |= {f"loss.{name}": term for name, term in terms.items()}
    found |= {f"grad_{name}.student.map": slope(term, student) for name, term in terms.items()}
    for name, each in zip(("map", "head.weight", "head.bias"), leaves, strict=True):
        found[f"grad_total.student.{name}"] = slope(total, each)
    return found


def wcord_global(case: Case) -> dict[str, Any]:
    """WCoRD's global part: our reading on both sides."""
    criterion = remembering(case, WCoRD, temperature=case.options["temperature"], momentum=case.options["momentum"])
    student = leaf(case.inputs["student"])
    loss, _ = criterion.step(student, case.inputs["teacher"], case.inputs["sample_ids"], case.inputs["contrast_ids"])
    loss.backward()
    names = ["embed_student.weight", "embed_teacher.weight"]
    found = {"loss": loss, "grad.student": student.grad}
    found |= {f"grad.{name}": value for name, value in gradients(criterion, case.method, names).items()}
    return found | {f"{name}.after": getattr(criterion.memory, name) for name in ("bank_student", "bank_teacher")}


def wcord_local(case: Case) -> dict[str, Any]:
    """WCoRD's local part: its plan after the case's rounds and after very many, and both gradients."""
    student, teacher, options = leaf(case.inputs["student"]), case.inputs["teacher"], case.options
    unit = [F.normalize(each, dim=1) for each in (student, teacher)]
    cost = 1 - unit[0] @ unit[1].T
    exact = min(sum(cost[row, column] for row, column in enumerate(order)) for order in permutations(range(len(cost))))
    found = {"cost": cost, "loss.exact_transport": exact / len(cost)}
    loss = wcord_local_loss(student, teacher, options["entropy"], options["iterations"])
    found |= {"loss.fixed_iterations": loss, "grad_fixed_plan_detached.student": slope(loss, student)}
    found["plan.fixed_iterations"] = sinkhorn_plan(cost.detach(), options["entropy"], options["iterations"])
    plan = sinkhorn_plan(cost.detach(), options["entropy"], ENOUGH)
    loss = (plan * cost).sum()
    found |= {"plan.converged": plan, "loss.converged": loss, "grad_converged_plan_detached.student": slope(loss, student)}
    through = wcord_local_loss(student, teacher, options["entropy"], options["iterations"], through_iterations=True)
    return found | {"grad_fixed_through_iterations.student": slope(through, student)}


def wkd_l(case: Case) -> dict[str, Any]:
    """WKD-L: the distances, the transport, the target part (our nkd with gamma 0), in float64 and in float32."""
    options, labels = case.options, case.inputs["labels"]
    if "class_features" in case.inputs:
        distances = cka_distances(case.inputs["class_features"])
    else:
        distances = classifier_distances(case.inputs["classifier_weight"])
    cost = transport_cost(distances, options["sharpening"])
    settings = [options[name] for name in ("temperature", "entropy", "iterations")]
    found: dict[str, Any] = {"distance": distances, "cost": cost}
    for dtype, loss, gradient in (
        (torch.float64, "loss", "grad_student_logits"),
        (torch.float32, "loss_float32", "grad_float32"),
    ):
        student, teacher = leaf(case.inputs["student_logits"].to(dtype)), case.inputs["teacher_logits"].to(dtype)
        rows = wkd_logit_loss(student, teacher, labels.to(dtype) if labels.is_floating_point() else labels, cost, *settings)
        target = nkd_loss(student, teacher, labels, gamma=0.0).mean()
        total = target + options["weight"] * rows.mean()
        if loss in case.inputs:
            found |= {loss: total, gradient: slope(total, student)}
        if dtype == torch.float64:
            found |= {"target_part": target, "transport_rows": rows, "grad_transport_only": slope(rows.mean(), student)}
            if "plan_without_label" in case.inputs:
                found["plan_without_label"] = plan_without_label(student, teacher, labels, cost, *settings)
    return found


def plan_without_label(
    student: Tensor, teacher: Tensor, labels: Tensor, cost: Tensor, temperature, entropy, iterations
) -> Tensor:
    """The plans of our one kernel, each without its label's row and column: [B, K - 1, K - 1]."""
    labels = labels.argmax(1) if labels.is_floating_point() else labels
    mine, theirs = (
        (logits / temperature).scatter(1, labels[:, None], -torch.inf).softmax(1) for logits in (student.detach(), teacher)
    )
    rows, columns, kernel = sinkhorn(mine, theirs, cost + FLOOR, labels, entropy, iterations)
    plans = rows[:, :, None] * kernel * columns[:, None, :]
    kept = [torch.arange(len(cost)) != label for label in labels]
    return torch.stack([plan[keep][:, keep] for plan, keep in zip(plans, kept, strict=True)])


def wkd_f(case: Case) -> dict[str, Any]:
    """WKD-F through its projector in training mode."""
    student, teacher, options = leaf(case.inputs["student_map"]), case.inputs["teacher_map"], case.options
    shapes = [MapShape(*each.shape[1:]) for each in (student, teacher)]
    if options["projector"] == "bottleneck":
        projector: nn.Module = BottleneckProjector(student.shape[1], teacher.shape[1], options["hidden"])
    else:
        projector = build_map_projector("convolution" if options["projector"] else "none", *shapes)
    projector = projector.to(student.dtype)
    stored = {name: case.inputs[name] for name in case.inputs if name.startswith("projector.")}
    load_parameters(projector, "wkd_f", stored)
    projected = projector(student)
    means, deviations = (rows.mean() for rows in wkd_feature_loss(projected, teacher, options["grid"], options["eps"]))
    total = options["weight"] * (options["mean_to_deviation"] * means + deviations)
    total.backward()
    found = {"loss": total, "mean_part": means, "deviation_part": deviations, "grad_student_map": student.grad}
    for name, moment in zip(("mean", "deviation"), moments(projected, options["grid"], options["eps"]), strict=True):
        found[f"student_{name}"] = moment.reshape(case.inputs.tensors[f"student_{name}"].shape)
    found |= {f"grad.{name}": value for name, value in gradients(projector, "wkd_f", stored).items()}
    if stored:
        found["projected"] = projected
        found |= {f"after.projector.bn.{name}": getattr(projector.bn, name) for name in ("running_mean", "running_var")}
    return found


def rsm(case: Case) -> dict[str, Any]:
    """SDD with regions weighted by the teacher's confidence."""
    student, teacher, labels = leaf(case.inputs["student_regions"]), case.inputs["teacher_regions"], case.inputs["labels"]
    options = case.options
    base_options = {name: options[name] for name in ("temperature", "alpha", "beta", "gamma") if name in options}
    weight = options["complementary_weight"] if options["sdd_weights"] else 1.0
    settings = (student, teacher, labels, options["base"], weight)
    loss = sdd_loss(
        *settings,
        base_options=base_options,
        reliability="confidence",
        reliability_floor=options["floor"],
        reliability_power=options["power"],
    )
    outside = complementary(teacher, labels, "label")
    return {
        "loss": loss,
        "loss_without_reliability": sdd_loss(*settings, base_options=base_options),
        "grad_student_regions": slope(loss, student),
        "reliability": region_reliability(teacher, options["temperature"], options["floor"], options["power"]),
        "sdd_weight": torch.ones(outside.shape, dtype=torch.float64).masked_fill(outside, weight),
    }


def schedule(case: Case) -> dict[str, Any]:
    """Weights that stay and then fall by a cosine; ours at the end of an epoch is the reference's in it, counted from 1."""
    found = {}
    for name, part in case.entry.items():
        if isinstance(part, dict):
            ours = weight_schedule(part["weight"], final_weight=0.0, decay="cosine", decay_start_epoch=part["decay_start"])
            for epoch in part["at"]:
                found[f"{name}.{epoch}"] = ours(Progress(7 * int(epoch), 7, 7 * part["epochs"]))
    return found


ADAPTERS: dict[str, Adapter] = {
    "at": at,
    "fitnet": fitnet,
    "sp": rows_of(sp_loss),
    "sdsp": sdsp,
    "pkt": rows_of(pkt_loss, "eps"),
    "rkd": rkd,
    "dist": dist,
    "crd": crd,
    "sdd_kd+sp": sdd_kd_and,
    "sdd_kd+crd": sdd_kd_and,
    "wcord_gckt": wcord_global,
    "wcord_lckt": wcord_local,
    "wkd_l": wkd_l,
    "wkd_f": wkd_f,
    "rsm": rsm,
    "schedule": schedule,
}
"""Method, as the index calls it -> adapter."""
