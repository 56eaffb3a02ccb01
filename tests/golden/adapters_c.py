"""Adapters of the third family of methods: those of RepDistiller's table that neither of the two papers compares with."""

from __future__ import annotations

from torch import Tensor

from distill.losses.ab import AB, SCALE
from distill.losses.cc import CC
from distill.losses.fsp import FSP
from distill.losses.ft import FT
from distill.losses.nst import NST
from distill.losses.srrl import SRRL
from distill.losses.vid import VID
from distill.protocols import Criterion, DataFacts, ModelFacts, ModelOutput, Progress, Target
from tests.golden.adapters_b import UNREAD, Inputs, facts_of, output_of
from tests.golden.case import Adapter, Case


def embedded(rows: Tensor) -> ModelOutput:
    """A model output of an embedding [B, D] alone."""
    return output_of([rows[:, :, None, None]], embedding=rows)


def on_maps(given: Inputs, loss: type[Criterion]) -> dict[str, Tensor]:
    """A criterion over all stages of a case; each stage's part is the reference's before it sums."""
    student, teacher = given.maps("student"), given.maps("teacher")
    criterion = loss(student=facts_of(student), teacher=facts_of(teacher))
    given.load(criterion)
    total, found = criterion(output_of(student), output_of(teacher), Target(UNREAD))
    # pairs are counted from the last map, the reference's from the first
    parts = list(found.values()) if loss is FSP else list(reversed(found.values()))
    return given.results(total, **{f"loss{number}": part for number, part in enumerate(parts)})


def nst(case: Case) -> dict[str, Tensor]:
    """The criterion over all stages."""
    return on_maps(Inputs(case), NST)


def fsp(case: Case) -> dict[str, Tensor]:
    """The criterion over all stages."""
    return on_maps(Inputs(case), FSP)


def ab(case: Case) -> dict[str, Tensor]:
    """The criterion over all stages; its statistics lack the stages' weights."""
    given = Inputs(case)
    student, teacher = given.maps("student"), given.maps("teacher")
    criterion = AB(facts_of(student), facts_of(teacher))
    given.load(criterion)
    total, found = criterion(output_of(student), output_of(teacher), Target(UNREAD))
    weights = [2.0 ** (number + 1 - len(student)) for number in range(len(student))]
    assert SCALE == 3 / 1000
    parts = zip(weights, found.values(), strict=True)
    return given.results(total, **{f"loss{number}": weight * part for number, (weight, part) in enumerate(parts)})


def vid(case: Case) -> dict[str, Tensor]:
    """The criterion over one pair."""
    given = Inputs(case)
    maps = given["student"], given["teacher"]
    criterion = VID(*(facts_of([each]) for each in maps))
    given.load(criterion)
    loss, _ = criterion(*(output_of([each]) for each in maps), Target(UNREAD))
    return given.results(loss)


def cc(case: Case) -> dict[str, Tensor]:
    """The criterion over both embeddings."""
    given = Inputs(case)
    rows = given["student"], given["teacher"]
    data = DataFacts(10, UNREAD, len(rows[0]))
    facts = [ModelFacts(10, (), embedding=each.shape[1]) for each in rows]
    criterion = CC(*facts, data, embedding=given.hyper["feat_dim"])
    given.load(criterion)
    loss, _ = criterion(*(embedded(each) for each in rows), Target(UNREAD))
    return given.results(loss)


def srrl(case: Case) -> dict[str, Tensor]:
    """The criterion over both embeddings; the bias of the teacher's classifier is read, and must not matter."""
    given = Inputs(case)
    rows, weight = (given["student"], given["teacher"]), given["classifier_weight"]
    assert given["classifier_bias"].abs().min() > 0
    facts = [ModelFacts(len(weight), (), embedding=each.shape[1], classifier=weight) for each in rows]
    criterion = SRRL(*facts)
    given.load(criterion, apart=("classifier",))
    loss, parts = criterion(*(embedded(each) for each in rows), Target(UNREAD))
    return given.results(loss, **parts)


def ft(case: Case) -> dict[str, Tensor]:
    """The criterion in the epoch that the case's part belongs to."""
    given = Inputs(case)
    maps = given["student"], given["teacher"]
    criterion = FT(*(facts_of([each]) for each in maps), rate=given.hyper["k"], paraphraser_epochs=1, paraphraser_weight=1.0)
    given.load(criterion)
    epoch = {"paraphraser": 0, "transfer": 1}[given.hyper["part"]]
    loss, _ = criterion(*(output_of([each]) for each in maps), Target(UNREAD, progress=Progress(epoch, 1, 2)))
    return given.results(loss)


ADAPTERS: dict[str, Adapter] = {"ab": ab, "cc": cc, "fsp": fsp, "ft": ft, "nst": nst, "srrl": srrl, "vid": vid}
