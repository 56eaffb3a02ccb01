"""A model's own head on stored means: the logits of the whole image and of every region, as the whole model gives them."""

import pytest
import torch

import distill.models  # noqa: F401 (registers the small nets)
from distill.models.build import create_teacher
from distill.models.cells import CellHead, CellTrunk, cell_rows, cells_refusal, forget_trunk, headed_logits, means_of, places_of
from distill.protocols import Needs, Regions

PYRAMID = Regions(scales=(1, 2, 4))
WHOLE = Regions(scales=(1,))
KINDS = {"cifar_resnet8": 32, "resnet10t": 96, "efficientvit_b0": 96, "mambaout_femto": 96}
"""Pool, pool, split, and pool over a map with its channels last; with the side of their images."""


def teacher(name: str, needs: Needs, size: int | None = None, classes: int = 7):
    torch.manual_seed(0)
    made = create_teacher(name, weights="random", num_classes=classes, image_size=size or KINDS[name])
    for module in made.model.modules():  # normalisation as a trained net has it
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    return made.backbone(needs)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "regions",
    [PYRAMID, Regions((1, 2), "adaptive"), Regions((1, 2, 4), "cascade"), Regions((1, 3), windows=(2,))],
    ids=["area", "adaptive", "cascade", "windows"],
)
def test_the_head_on_cells_gives_the_logits_of_the_whole_model(name, regions):
    features = () if name.startswith("efficientvit") else (Regions((1, 2), regions.mode),)
    backbone = teacher(name, Needs(region_logits=(regions, WHOLE), region_features=features))
    assert not cells_refusal(backbone)
    cells = cell_rows([regions, Regions((1, 2), regions.mode)], backbone.grid)
    images = torch.rand(3, 3, KINDS[name], KINDS[name])
    with torch.no_grad():
        whole = backbone(images)
        found = CellHead(backbone, cells)(CellTrunk(backbone, cells)(images))
    scale = whole.region_logits[regions].abs().max()
    assert (headed_logits(backbone, whole) - headed_logits(backbone, found)).abs().max() < 1e-5 * scale
    assert (whole.region_logits[regions] - found.region_logits[regions]).abs().max() < 1e-5 * scale
    for asked in features:
        assert torch.allclose(whole.region_features[asked], found.region_features[asked], atol=1e-5)


def test_region_features_of_another_map_than_the_stored_one_are_refused():
    """A split head stores the map that its own layers made: its means are not those of the feature map."""
    backbone = teacher("efficientvit_b0", Needs(region_logits=(WHOLE,), region_features=(PYRAMID,)))
    assert backbone.mechanism == "split"
    with pytest.raises(ValueError, match="takes means of another map"):
        CellHead(backbone, cell_rows([PYRAMID], backbone.grid))


def test_embeddings_and_the_bias_of_the_head_come_from_cells_too():
    backbone = teacher("resnet10t", Needs(embedding=True, head_bias=True, region_logits=(WHOLE,)))
    cells = cell_rows([], backbone.grid)
    images = torch.rand(3, 3, 96, 96)
    with torch.no_grad():
        whole, found = backbone(images), CellHead(backbone, cells)(CellTrunk(backbone, cells)(images))
    assert torch.allclose(whole.embedding, found.embedding, atol=1e-5)
    assert torch.allclose(whole.head_bias, found.head_bias, atol=1e-6)
    assert torch.allclose(whole.logits, found.logits, atol=1e-5)


@pytest.mark.parametrize(
    ("regions", "count"),
    [
        ([], 1),
        ([Regions((1, 2))], 4),
        ([Regions((1, 2, 4)), Regions((1, 2))], 16),
        ([Regions((1, 2), "adaptive")], 5),  # its windows overlap on 7 x 7: the whole image is no mean of them
        ([Regions((1, 2, 3))], 13),  # neither is a mean of the other
        ([Regions((1, 2, 4), "cascade")], 17),
    ],
)
def test_no_more_cells_are_stored_than_give_all_regions(regions, count):
    assert len(cell_rows(regions, (7, 7))) == count


def test_coarse_regions_come_from_finer_cells_and_the_reverse_is_refused():
    coarse, fine = cell_rows([Regions((1, 2))], (7, 7)), cell_rows([PYRAMID], (7, 7))
    shares = means_of(fine, coarse)
    assert torch.allclose(shares.double() @ fine, coarse)
    with pytest.raises(ValueError, match="no mean of the stored cells"):
        means_of(coarse, fine)
    assert places_of(fine, fine[[3, 1]]) == [3, 1]
    with pytest.raises(ValueError, match="none of the stored ones"):
        places_of(fine, coarse)


@pytest.mark.parametrize(("name", "size"), [("vit_tiny_patch16_224", 64), ("vgg11", 224)])
def test_a_head_that_reads_more_than_means_is_refused(name, size):
    backbone = teacher(name, Needs(region_logits=(WHOLE,)), size)
    assert "reads more than means" in cells_refusal(backbone)


@pytest.mark.parametrize("name", ["resnet10t", "efficientvit_b0"])
def test_a_forgotten_trunk_gives_its_memory_back_and_leaves_the_head(name):
    backbone = teacher(name, Needs(region_logits=(PYRAMID,)))
    cells = cell_rows([PYRAMID], backbone.grid)
    images = torch.rand(2, 3, KINDS[name], KINDS[name])
    held = sum(p.nbytes for p in (*backbone.model.parameters(), *backbone.model.buffers()))
    with torch.no_grad():
        values = CellTrunk(backbone, cells)(images)
        before = CellHead(backbone, cells)(values)
        freed = forget_trunk(backbone, keep_head=True)
        after = CellHead(backbone, cells)(values)
        assert torch.equal(before.region_logits[PYRAMID], after.region_logits[PYRAMID])
        with pytest.raises(RuntimeError):
            backbone(images)
    left = sum(p.nbytes for p in (*backbone.model.parameters(), *backbone.model.buffers()))
    assert left == held - freed < held
    if name == "resnet10t":
        assert left == sum(p.nbytes for p in backbone.model.fc.parameters())
