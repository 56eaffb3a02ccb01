"""CRD's memory: what its banks hold, what is drawn from them, and that they are the same on every rank and after a resume."""

from __future__ import annotations

import copy
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from distill.losses.crd import CRD, crd_row_loss
from distill.losses.memory_bank import MemoryBank, Visit, crd_scores, updated_rows
from distill.protocols import DataFacts, ModelFacts, ModelOutput, Target
from tests.distill.losses.outputs import DATA, FACTS, facts, made, model_output
from tests.distill.losses.refusals import refused_in_one_line
from tests.distill.losses.relations import rows

IDS = torch.tensor([3, 17, 0, 39])
SMALL = {"embedding": 5, "negatives": 7}


def embeddings(*shape: int, seed: int = 0) -> torch.Tensor:
    """Unit rows."""
    return torch.nn.functional.normalize(rows(*shape, seed=seed), dim=1)


def target(step: int = 0) -> Target:
    """The target of a step, whose draws depend on its number only."""
    return Target(DATA.sample_labels[IDS], IDS, generator=torch.Generator().manual_seed(step))


def outputs(seed: int = 0) -> tuple[ModelOutput, ModelOutput]:
    """Both models' outputs."""
    return tuple(model_output(side, CRD.student_needs, seed=seed) for side in ("student", "teacher"))


@pytest.mark.parametrize(
    ("student", "teacher", "count"),
    # resnet32x4-ShuffleNetV1, -resnet8x4 and the others of Table 7 of arXiv 2502.05835v1, with both banks and 5 constants
    [(64, 64, 12_816_645), (256, 256, 12_865_797), (128, 256, 12_849_413), (960, 256, 12_955_909), (1024, 256, 12_964_101)],
)
def test_the_numbers_of_the_memory_are_the_papers(student, teacher, count):
    data = DataFacts(50000, torch.arange(50000) % 100, 64)
    criterion = CRD(ModelFacts(100, (), embedding=student), ModelFacts(100, (), embedding=teacher), data)
    trained = sum(parameter.numel() for parameter in criterion.parameters())
    assert trained == 128 * (student + teacher) + 256
    assert trained + sum(criterion.memory.get_buffer(f"bank_{side}").numel() for side in FACTS) + 5 == count
    assert set(criterion.state_dict()) == {
        *(f"memory.embed_{side}.{name}" for side in FACTS for name in ("weight", "bias")),
        *(f"memory.bank_{side}" for side in FACTS),
        "memory.normalisers",
    }


def test_banks_begin_as_noise_of_length_1():
    bank = made("crd").memory.bank_student
    assert bank.shape == (40, 128)
    assert bank.abs().max() <= (3 / 128) ** 0.5
    assert 0.95 < bank.norm(dim=1).mean() < 1.05


def test_negatives_are_of_other_classes_all_of_them_and_evenly():
    labels = torch.tensor([0] * 5 + [2] * 30 + [1] * 2 + [0] * 3)  # ragged and out of order
    memory = MemoryBank((4, 4), DataFacts(40, labels, 4), 5, 20000, 0.5, "exact")
    ids = torch.tensor([0, 20, 36, 39])
    drawn = memory.draw(ids, torch.Generator().manual_seed(0))
    assert torch.equal(drawn[:, 0], ids)
    for sample, negatives in zip(ids, drawn[:, 1:], strict=True):
        others = (labels != labels[sample]).nonzero().flatten()
        counts = torch.bincount(negatives, minlength=40)
        assert torch.equal(counts.nonzero().flatten(), others)
        expected = 20000 / len(others)
        assert (counts[others] - expected).abs().max() < 5 * expected**0.5
    assert torch.equal(drawn, memory.draw(ids, torch.Generator().manual_seed(0)))


def test_a_relaxed_positive_is_any_sample_of_the_class():
    labels = torch.tensor([0] * 5 + [1] * 30 + [0] * 5)
    memory = MemoryBank((4, 4), DataFacts(40, labels, 4), 5, 1, 0.5, "relax")
    generator = torch.Generator().manual_seed(0)
    positives = torch.cat([memory.draw(torch.tensor([2, 7]), generator)[:, 0] for _ in range(300)]).view(300, 2)
    assert set(positives[:, 0].tolist()) == {0, 1, 2, 3, 4, 35, 36, 37, 38, 39}
    assert set(positives[:, 1].tolist()) == set(range(5, 35))


def test_scores_are_those_of_the_rows_that_the_ids_name(monkeypatch):
    own, bank, ids = embeddings(6, 5), embeddings(40, 5, seed=1), torch.randint(40, (6, 8))
    expected = (torch.einsum("bd,bkd->bk", own, bank[ids]) / 0.07).exp()
    torch.testing.assert_close(crd_scores(own, bank, ids), expected)
    monkeypatch.setitem(crd_scores.__globals__["CHUNK_SCORES"], "cpu", 100)  # two rows at a time
    torch.testing.assert_close(crd_scores(own, bank, ids), expected)


def test_the_loss_falls_with_the_positives_score_and_grows_with_each_negatives():
    scores = rows(3, 6).exp().requires_grad_()
    crd_row_loss(scores, 2.0, 40).sum().backward()
    assert (scores.grad[:, 0] < 0).all()
    assert (scores.grad[:, 1:] > 0).all()
    order = torch.tensor([0, 3, 1, 5, 2, 4])
    torch.testing.assert_close(crd_row_loss(scores[:, order], 2.0, 40), crd_row_loss(scores, 2.0, 40))


def test_without_negatives_only_the_eps_is_left():
    scores = rows(3, 1).exp()
    torch.testing.assert_close(crd_row_loss(scores, 1.0, 40), torch.log1p(1e-7 / scores[:, 0]))


def test_the_first_step_sets_the_normalisers_for_good_and_reads_the_banks_before_it_writes():
    criterion = made("crd", **SMALL)
    bank = criterion.memory.bank_teacher.clone()
    student, teacher = outputs()
    memory = criterion.memory
    contrasts = memory.draw(IDS, target().generator)
    with torch.no_grad():
        own = torch.nn.functional.normalize(memory.embed_student(student.embedding), dim=1)
        scores = crd_scores(own, bank, contrasts)
        expected = crd_row_loss(scores, scores.mean() * 40, 40).mean()
    _, found = criterion(student, teacher, target())
    torch.testing.assert_close(found["student"], expected)
    torch.testing.assert_close(memory.normalisers[0], scores.mean() * 40)
    first = memory.normalisers.clone()
    criterion(*outputs(seed=3), target(1))
    assert torch.equal(memory.normalisers, first)


def test_a_step_moves_the_visited_rows_only_and_keeps_their_length():
    criterion = made("crd", **SMALL)
    before = {side: getattr(criterion.memory, f"bank_{side}").clone() for side in FACTS}
    criterion(*outputs(), target())
    for side, old in before.items():
        new = getattr(criterion.memory, f"bank_{side}")
        others = torch.ones(40, dtype=torch.bool).index_fill(0, IDS, False)
        assert torch.equal(new[others], old[others])
        assert (new[IDS] != old[IDS]).any(1).all()
        torch.testing.assert_close(new[IDS].norm(dim=1), torch.ones(4))


def test_momentum_0_stores_the_embedding_and_1_keeps_the_direction():
    old, new = 3 * embeddings(4, 5), embeddings(4, 5, seed=1)
    torch.testing.assert_close(updated_rows(old, new, 0.0), new)
    torch.testing.assert_close(updated_rows(old, new, 1.0), old / 3)


def test_evaluation_leaves_the_memory_alone():
    criterion = made("crd", **SMALL)
    criterion(*outputs(), target())
    before = copy.deepcopy(criterion.state_dict())
    with torch.no_grad():
        criterion(*outputs(seed=1), target(1))
    criterion.eval()(*outputs(seed=2), target(2))
    assert all(torch.equal(before[name], value) for name, value in criterion.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_never_gets_into_a_bank_or_a_normaliser(value):
    criterion = made("crd", **SMALL)
    student, teacher = outputs()
    spoiled = student.embedding.detach().clone()
    spoiled[1, 2] = value
    before = criterion.memory.bank_teacher[IDS].clone()
    loss, _ = criterion(student._replace(embedding=spoiled), teacher, target())
    assert not loss.isfinite()
    state = criterion.state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert (state["memory.normalisers"] > 0).all()
    moved = (criterion.memory.bank_teacher[IDS] != before).any(1)
    assert moved.tolist() == [True, False, True, True]  # in both banks or in none


def test_an_embedding_of_length_0_gets_no_gradient_and_stays_finite():
    criterion = made("crd", **SMALL)
    torch.nn.init.zeros_(criterion.memory.embed_student.bias)
    student, teacher = outputs()
    feature = student.embedding.detach().clone()
    feature[2] = 0
    feature.requires_grad_()
    loss, _ = criterion(student._replace(embedding=feature), teacher, target())
    loss.backward()
    assert loss.isfinite()
    assert feature.grad[2].abs().max() == 0
    assert 0 < feature.grad.abs().max() < 1e3
    assert criterion.memory.bank_student.isfinite().all()


def test_of_a_sample_that_comes_twice_the_last_visit_counts_and_the_last_finite_one():
    memory = MemoryBank((4, 4), DATA, 5, 3, 0.5, "exact").double()
    old, new = memory.bank_student.clone(), embeddings(4, 5)
    new[3] = torch.nan
    ids = torch.tensor([7, 7, 2, 7])
    memory.update(Visit(ids, new, embeddings(4, 5, seed=1), torch.ones(4, 2)))
    torch.testing.assert_close(memory.bank_student[7:8], updated_rows(old[7:8], new[1:2], 0.5))
    torch.testing.assert_close(memory.bank_student[2:3], updated_rows(old[2:3], new[2:3], 0.5))


def test_each_sides_loss_trains_its_own_layer_and_the_students_features_alone():
    criterion = made("crd", **SMALL)
    student, teacher = outputs()
    loss, found = criterion(student, teacher, target())
    torch.testing.assert_close(loss.detach(), found["student"] + found["teacher"])
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in criterion.parameters())
    assert student.feature_map.grad.abs().max() > 0
    assert teacher.feature_map.grad is None


def test_a_saved_memory_goes_on_as_if_it_had_not_stopped():
    going, saved = made("crd", **SMALL), made("crd", **SMALL)
    for step in range(2):
        going(*outputs(seed=step), target(step))
    saved.load_state_dict(copy.deepcopy(going.state_dict()))
    for step in range(2, 4):
        values = [each(*outputs(seed=step), target(step))[0] for each in (going, saved)]
        assert torch.equal(*values)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in going.state_dict().items())


def test_nothing_of_a_step_waits_for_a_gpu():
    """Tensors without values: whatever asks for a value raises, where a GPU would be waited for. Gradients are made on the way
    forward, which a device of that name cannot feign."""
    criterion = made("crd", **SMALL, mode="relax")
    student, teacher = outputs()
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {**dict(criterion.named_parameters()), **dict(criterion.named_buffers())}
        state = {name: torch.empty_like(value) for name, value in state.items()}
        moved = [each._replace(embedding=torch.empty_like(each.embedding)) for each in (student, teacher)]
        ids = torch.zeros(4, dtype=torch.int64)
        for parameter in state.values():
            parameter.requires_grad_(parameter.is_floating_point() and parameter.dim() == 2 and len(parameter) == 5)
        loss, _ = torch.func.functional_call(criterion, state, (*moved, Target(ids, ids)))
        assert loss.requires_grad
        with pytest.raises(DataDependentOutputException):
            loss.item()


STEPS = 3


def share_of_steps(rank: int, world: int) -> dict:
    """This rank's losses of a few steps, its gradients, and the memory afterwards, in float64."""
    torch.manual_seed(0)
    criterion, count = made("crd", **SMALL).double(), 8 // world
    part, found = slice(rank * count, (rank + 1) * count), []
    for step in range(STEPS):
        ids = torch.randperm(40, generator=torch.Generator().manual_seed(step))[:8]
        ids[5] = ids[1]  # a sample that two ranks show in one step
        contrasts = criterion.memory.draw(ids, torch.Generator().manual_seed(step))
        criterion.zero_grad()
        student, teacher = (rows(8, FACTS[side].embedding, seed=step) for side in FACTS)
        losses = criterion.step(student[part], teacher[part], ids[part], contrasts[part])
        losses.sum().backward()
        found.append((losses.detach(), [parameter.grad.clone() for parameter in criterion.parameters()]))
    return {"world": world, "steps": found, "state": criterion.state_dict()}


def one_rank(rank: int, world: int, folder: str) -> None:
    """What each process does; its results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.save(share_of_steps(dist.get_rank(), dist.get_world_size()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_same_banks_and_the_joined_batchs_loss(tmp_path: Path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "distill.losses"])
    processes = [context.Process(target=one_rank, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = share_of_steps(0, 1)
    assert [found["world"] for found in ranks] == [2, 2]
    for name, value in alone["state"].items():
        assert torch.equal(ranks[0]["state"][name], ranks[1]["state"][name])
        torch.testing.assert_close(ranks[0]["state"][name], value, rtol=1e-12, atol=1e-15)
    for step in range(STEPS):
        shares = [found["steps"][step] for found in ranks]
        joined, gradients = alone["steps"][step]
        torch.testing.assert_close((shares[0][0] + shares[1][0]) / 2, joined, rtol=1e-12, atol=0)
        for mine, theirs, gradient in zip(shares[0][1], shares[1][1], gradients, strict=True):
            torch.testing.assert_close((mine + theirs) / 2, gradient, rtol=1e-11, atol=1e-15)


REFUSED = {
    "no embedding": (lambda: CRD(facts(4), facts(4), DATA), "crd reads what the last linear layer reads, and the student has"),
    "one class": (lambda: CRD(**FACTS, data=DataFacts(9, torch.zeros(9).long(), 3)), "the training data has one class only"),
    "no negatives": (lambda: made("crd", negatives=0), "negatives 0 must be at least 1"),
    "momentum": (lambda: made("crd", momentum=1.5), r"momentum 1\.5 must lie in 0\.\.1"),
    "mode": (lambda: made("crd", mode="loose"), "mode 'loose' is unknown; choose one of exact, relax"),
    "temperature": (lambda: made("crd", temperature=0.0), r"temperature 0\.0 must be positive"),
    "no ids": (lambda: made("crd")(*outputs(), Target(IDS)), "crd remembers every training sample and got none by name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_requests_are_refused_in_one_line(case):
    refused_in_one_line(*REFUSED[case])
    assert not CRD.accepts_soft_labels


def test_in_float32_the_loss_is_the_references_and_its_gradient_exact():
    """The released code's order of operations at CIFAR-100's numbers; the value's rounding is 8e-5, the gradient's is none."""
    samples, count = 50000, 16384
    scores = (rows(2, 1 + count).float() / 0.07 * 0.1).exp()
    normaliser = scores.mean() * samples
    likelihood, share = scores / normaliser, count / samples
    positive = likelihood[:, 0].div(likelihood[:, 0].add(share + 1e-7)).log()
    others = torch.div(torch.full_like(likelihood[:, 1:], share), likelihood[:, 1:].add(share + 1e-7)).log().sum(1)
    torch.testing.assert_close(crd_row_loss(scores, normaliser, samples), -(positive + others), rtol=1e-6, atol=0)
    slopes = []
    for dtype in (torch.float32, torch.float64):
        leaf = scores.to(dtype).requires_grad_()
        slopes.append(torch.autograd.grad(crd_row_loss(leaf, normaliser.to(dtype), samples).sum(), leaf)[0].double())
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-5, atol=0)
