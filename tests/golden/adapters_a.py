"""Adapters of the first family of methods and of the ceiling: what computes a golden case with our code.

An adapter reads a case's inputs and gives what we compute under the names of the stored outputs (`case.Adapter`).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from distill.losses.at import at_loss
from distill.losses.crd import CRD
from distill.losses.dist_kd import dist_loss
from distill.losses.fitnet import FitNetRegressor, fitnet_loss
from distill.losses.pkt import pkt_loss
from distill.losses.rkd import rkd_angle_loss, rkd_distance_loss
from distill.losses.sp import sdsp_loss, sp_loss
from distill.protocols import DataFacts, ModelFacts, Regions
from distill.regions import pool, region_matrix
from tests.golden.case import Adapter, Case
from tests.golden.names import gradients, load_parameters, our_name


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


def crd_of(case: Case) -> CRD:
    """CRD as a case has it: its trained layers, its banks, its normalisers."""
    stored = {
        name: case.inputs[name] for name in case.inputs if re.fullmatch(r"(embed|bank|normalisers)[a-z_]*\.?[a-z]*", name)
    }
    samples, embedding = stored["bank_student.before"].shape
    facts = [ModelFacts(2, (), embedding=stored[f"embed_{side}.weight"].shape[1]) for side in ("student", "teacher")]
    data = DataFacts(samples, torch.arange(samples) % 2, 1)
    temperature, momentum = case.options.get("temperature", 0.07), case.options.get("momentum", 0.5)
    criterion = CRD(*facts, data, embedding=embedding, negatives=1, temperature=temperature, momentum=momentum)
    criterion = criterion.to(stored["bank_student.before"].dtype)
    load_parameters(criterion, "crd", {name: stored[name] for name in stored if not name.startswith("embed_") or "." in name})
    return criterion


def crd(case: Case) -> dict[str, Any]:
    """CRD's steps one after the other, with the case's contrasts; the optimiser between them is the reference's."""
    criterion, found = crd_of(case), {}
    names = [name for name in case.inputs if name.startswith("embed_")]
    sgd = case.options["sgd"] and torch.optim.SGD(criterion.parameters(), **case.options["sgd"])
    for step in (f"step{number}" for number in range(case.options["steps"])):
        student, teacher = leaf(case.inputs[f"{step}.student"]), leaf(case.inputs[f"{step}.teacher"])
        criterion.zero_grad()
        losses = criterion.step(student, teacher, case.inputs[f"{step}.sample_ids"], case.inputs[f"{step}.contrast_ids"])
        losses.sum().backward()
        found[f"{step}.loss"] = losses.sum()
        found |= {f"grad.{step}.student": student.grad, f"grad.{step}.teacher": teacher.grad}
        found |= {f"grad.{step}.{name}": value.clone() for name, value in gradients(criterion, "crd", names).items()}
        for name in ("bank_student", "bank_teacher", "normalisers"):
            found[f"{step}.{name}.after"] = getattr(criterion.memory, name).clone()
        if sgd:
            sgd.step()
            ours = criterion.state_dict()
            found |= {f"{step}.after.{name}": ours[our_name("crd", name)].clone() for name in names}
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
}
"""Method, as the index calls it -> adapter."""
