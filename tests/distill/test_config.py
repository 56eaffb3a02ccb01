"""The recipe is strict: what is wrong with it is said all at once, before anything is built."""

import json
from pathlib import Path

import pytest

from distill.config import RecipeError, as_dict, load_recipe
from distill.data.augment.parameters import TrainTransform
from distill.errors import RequestError
from distill.loss_options import loss_options, option_descriptions, summary
from distill.losses import LOSSES
from distill.recipe import Augment
from distill.yaml12 import parse_yaml
from pipelines.setup.arguments import DEFAULT_RECIPE, parse

RECIPES = sorted((Path(__file__).parents[2] / "pipelines" / "recipes").rglob("*.yaml"))


def problems(overrides: dict) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(DEFAULT_RECIPE, overrides, LOSSES)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_and_its_header_names_a_command(path: Path):
    recipe = load_recipe(path, {}, LOSSES)
    assert recipe.loss
    assert "# Command:" in path.read_text()
    # those of a published cell write into the folder of its first run, where its table looks
    assert Path(recipe.out).name in (path.stem, "seed0")


def test_all_problems_are_reported_together_with_the_nearest_name():
    said = problems({"loss.sdd.temprature": 4, "train.epcohs": 3, "optim.learning_rate": "fast", "data.prepare": "cifar"})
    assert "4 problems" in said
    assert "loss.sdd.temprature: unknown key, did you mean 'temperature'?" in said
    assert "train.epcohs: unknown key, did you mean 'epochs'?" in said
    assert 'optim.learning_rate: "fast": input should be a valid number' in said
    assert "'none' or 'digits'" in said


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"loss.kdd.weight": 1.0}, "loss.kdd: unknown key, did you mean 'kd'?"),
        ({"train.epochs": 1.5}, "train.epochs: 1.5"),
        ({"train.epochs": True}, "train.epochs: true"),
        ({"train.epochs": 0}, "greater than or equal to 1"),
        ({"augment.scale": [0.5]}, "augment.scale"),
        ({"augment.scale": [0.9, 0.1]}, "augment.scale (0.9, 0.1): must be two shares of the area, 0 < least <= most <= 1"),
        ({"augment.color_jitter": 0.4, "augment.rand_augment": "rand-m9"}, "augment.color_jitter 0.4 with rand_augment"),
        ({"augment.rand_augment": "rand-m9-x3"}, "augment.rand_augment 'rand-m9-x3': must be like"),
        ({"augment.plain_repeats": 1}, "augment.plain_repeats: 1 of augment.repeats 1 views; it must be less, for others are"),
        ({"augment.repeats": 2, "augment.plain_repeats": 2}, "say --augment.repeats 3, or 0"),
        (
            {"augment.repeats": 2, "augment.plain_repeats": 1, "augment.cutmix": 1.0},
            "augment.plain_repeats: 1, but mixup and cutmix would mix plain views with altered ones; say 0 for either",
        ),
        (
            {"loss.mlkd": {}},
            "loss.mlkd: tells plain views of an image from altered ones, and augment.plain_repeats is 0; say"
            " --augment.repeats 2 --augment.plain_repeats 1",
        ),
        ({"teacher.name": "none"}, "loss.sdd: needs a teacher"),
        ({"schedule.name": "step"}, "schedule.decay_epochs: empty"),
        ({"schedule.decay_epochs": [3]}, "belongs to 'step'"),
        ({"train.accumulate": 7}, "global batch size 64 is not divisible by 1 processes x accumulate 7 = 7"),
        ({"loss": {}}, "loss: no loss is left"),
        (
            {"loss.sdd": None, "loss.msdcrd": None},
            "but no loss reads a teacher (cross_entropy); add one with --loss.NAME.weight 1",
        ),
        ({"student.model_kwargs": {"num_classes": 5}}, "student.model_kwargs: num_classes: it is that of the data"),
        ({"student.model_kwargs": {"in_chans": 1}}, "student.model_kwargs: in_chans: images are RGB, grey ones too"),
        ({"student.model_kwargs": {"drop_rate": 0.1}}, "student.model_kwargs: drop_rate: use student.drop_rate"),
        ({"teacher.model_kwargs": {"features_only": True}}, "teacher.model_kwargs: features_only: stages are found without it"),
        ({"teacher.model_kwargs": {"global_pool": ""}}, "teacher.model_kwargs: global_pool: the head is read as"),
        ({"teacher.model_kwargs": {"checkpoint_path": "x"}}, "use student.initial_weights or teacher.weights"),
        ({"teacher.model_kwargs": {"num_classes": 5}}, "or say 0 for a teacher without its classifier"),
        (
            {"optim.name": "dot", "loss.cross_entropy": None},
            "and here is only one kind (sdd, msdcrd); give both, or say optim.",
        ),
        ({"optim.name": "dot", "teacher.name": "none"}, "loss.sdd: needs a teacher"),
        ({"optim.name": "dot", "train.clip_gradient_norm": 5}, "train.clip_gradient_norm: 5, but optim.name is 'dot'"),
        ({"optim.name": "dot", "train.compile": "both"}, "train.compile: both, but optim.name 'dot' asks which weights"),
        ({"loss": [1]}, "loss: [1]"),
        ({"student": "resnet18"}, "student"),
        (
            {"loss.msdcrd.stages": "foo"},
            """loss.msdcrd.stages: "foo": input should be 'last' or 'all', or input should be a valid array""",
        ),
    ],
)
def test_a_wrong_value_or_combination_is_named_with_its_rule(overrides: dict, expected: str):
    assert expected in problems(overrides)


@pytest.mark.parametrize("pairs", [[0, 1], [[0, "x"]], [[0, 1, 2]]])
def test_an_error_inside_of_one_of_several_types_is_one_line_with_the_options_description(pairs: list):
    """Each type that was tried used to have a line, and none said what a pair is."""
    said = problems({"loss.at.pairs": pairs})
    assert f"loss.at.pairs: {json.dumps(pairs)}: must be all that both have, from the end; last; or (student, teacher)" in said
    assert said.endswith("such as [[-1, -1], [0, 0]].")
    assert "\n" not in said


def test_what_is_done_to_an_image_has_one_home_of_its_defaults():
    assert Augment().of_each_image() == TrainTransform()


def test_two_losses_that_build_their_own_student_are_refused():
    losses = {**LOSSES, "other": LOSSES["simkd"]}
    with pytest.raises(RecipeError, match=r"loss\.other: trains a student of its own, and so does loss\.simkd; drop either"):
        load_recipe(DEFAULT_RECIPE, {"loss.simkd": {}, "loss.other": {}}, losses)


def test_impossible_combinations_are_reported_together():
    said = problems({"augment.scale": [0.9, 0.1], "augment.ratio": [0.0, 1.0], "train.accumulate": 7, "loss": {}})
    assert "4 problems" in said
    assert all(name in said for name in ("augment.scale (", "augment.ratio (", "train.accumulate: ", "loss: no loss"))


def test_numbers_in_scientific_notation_are_numbers():
    assert parse_yaml("1e-4") == 1e-4
    assert parse_yaml("{a: 2E+3, b: 1.5e-2, c: e5}") == {"a": 2000.0, "b": 0.015, "c": "e5"}


def test_no_is_a_precision_and_not_false():
    assert parse_yaml("{a: no, b: on, c: true, d: False}") == {"a": "no", "b": "on", "c": True, "d": False}
    assert parse(["--train.mixed_precision", "no"], LOSSES).recipe.train.mixed_precision == "no"


def test_times_dates_and_numbers_with_zeros_before_them_stay_text():
    assert parse_yaml("{a: 1:30, b: 2026-11-28, c: 017, d: 1_000}") == {
        "a": "1:30",
        "b": "2026-11-28",
        "c": "017",
        "d": "1_000",
    }


def test_numbers_and_nothing_are_what_they_look_like():
    assert parse_yaml("[0, -1, +5, .5, 5., -.inf]") == [0, -1, 5, 0.5, 5.0, float("-inf")]
    assert parse_yaml("{a: , b: ~, c: null}") == {"a": None, "b": None, "c": None}


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['true']", "!!binary aGk=", "!!set {x}", "!!timestamp 2026-11-28"]
)
def test_yaml_cannot_construct_objects(text: str):
    with pytest.raises(Exception, match="could not determine a constructor"):
        parse_yaml(text)


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path):
    path = tmp_path / "twice.yaml"
    path.write_text("train:\n  epochs: 3\n  epochs: 5\n")
    with pytest.raises(RecipeError, match=r"twice.yaml: .*'epochs' is given twice; drop one .*line 3"):
        load_recipe(path, {}, LOSSES)


def test_overrides_add_change_and_drop():
    request = parse(
        ["--loss.msdcrd", "null", "--loss.kd.weight", "0.5", "--train.epochs", "3", "--student", "resnet18"], LOSSES
    )
    assert set(request.recipe.loss) == {"cross_entropy", "sdd", "kd"}
    assert request.recipe.loss["kd"]["weight"] == 0.5
    assert request.recipe.train.epochs == 3
    assert request.recipe.student.name == "resnet18"


def test_a_name_that_looks_like_a_number_stays_a_name():
    assert parse(["--out", "20261121"], LOSSES).recipe.out == "20261121"


@pytest.mark.parametrize("argument", ["--train.epoch", "--studnet", "--loss.sdd.temprature"])
def test_an_unknown_option_is_refused_with_the_nearest(argument: str):
    with pytest.raises(RequestError, match=r"unknown option, did you mean --"):
        parse([argument, "3"], LOSSES)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--loss.sp.scale", ", did you mean --loss.sp.scales[?]$"),
        ("--loss.spp.weight", ", did you mean --loss.sp.weight[?]$"),
        ("--loss.nonsense.weight", "; --loss has cross_entropy, kd, .*"),
        ("--loss.pkt.zzz", "; --loss.pkt has .*weight"),
        ("--optim.epochs", ", did you mean --train.epochs[?]$"),
    ],
)
def test_an_unknown_option_of_a_loss_is_answered_with_that_loss_or_the_names_of_losses(given: str, told: str):
    """`--loss.sp.scale` used to be taken for `--augment.scale`, `--loss.nonsense.weight` for `--loss.sp.weight`."""
    with pytest.raises(RequestError, match=f"^{given}: unknown option{told}"):
        parse([given, "3"], LOSSES)


def test_unknown_options_unreadable_values_and_wrong_ones_are_reported_together():
    with pytest.raises(RecipeError) as caught:
        parse(["--train.epoch", "3", "--optim.momentum", "[1", "--train.epochs", "0", "--loss.sdd.scales", "x"], LOSSES)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"4 problems in {DEFAULT_RECIPE} and the command line"
    expected = ("--train.epoch: unknown option", "--optim.momentum: '[1' is not", "train.epochs: 0: ", 'loss.sdd.scales: "x": ')
    assert all(line.strip().startswith(words) for line, words in zip(lines[1:], expected, strict=True))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--optim.lr", "--optim.learning_rate"),
        ("--wd", "--optim.weight_decay"),
        ("--epochs", "--train.epochs"),
        ("--batch-size", "--train.global_batch_size"),
    ],
)
def test_an_option_is_found_by_the_initials_or_the_last_part_of_its_name(given: str, meant: str):
    """`--optim.lr` used to be taken for `--optim.name`, `--lr` for `--val`."""
    with pytest.raises(RequestError, match=f"{given}: unknown option, did you mean {meant}[?]$"):
        parse([f"{given}=3"], LOSSES)
    assert "did you mean 'learning_rate'?" in problems({"optim.lr": 0.1})


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path):
    import yaml

    recipe = load_recipe(DEFAULT_RECIPE, {}, LOSSES)
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(as_dict(recipe)))
    assert as_dict(load_recipe(copy, {}, LOSSES)) == as_dict(recipe)


def test_help_shows_every_section_and_a_command(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], LOSSES)
    said = capsys.readouterr().out
    assert caught.value.code == 0
    assert "accelerate launch pipelines/imagenet.py" in said
    for text in ("--teacher ", "--train.epochs", "--loss.sdd.scales", "--loss.NAME.weight"):
        assert text in said


def test_help_describes_every_loss_and_every_option_of_it(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        parse(["--help"], LOSSES)
    said = "".join(capsys.readouterr().out.split())  # without the line breaks, which also come behind hyphens
    expected = [
        "--loss.NAME.start_epoch VALUE weight is 0 before this epoch [",
        "loss.rkd: Relational knowledge distillation (Park et al., CVPR 2019) on what",
        "--loss.rkd.angle_weight VALUE of the angles between three images. [float, default ",
    ]
    for name, loss in LOSSES.items():
        texts = option_descriptions(loss)
        expected.append(f"loss.{name}: {summary(loss)}")
        expected += [f"--loss.{name}.{option} VALUE {texts[option]} [" for option in loss_options(loss)]
    assert [text for text in expected if "".join(text.split()) not in said] == []


def test_print_config_prints_what_would_run(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as caught:
        parse(["--print_config", "--seed", "7"], LOSSES)
    assert caught.value.code == 0
    assert parse_yaml(capsys.readouterr().out)["seed"] == 7
