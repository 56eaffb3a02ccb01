"""Students and teachers by timm name."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.models import get_pretrained_cfg, is_model, list_models, list_pretrained
from torch import nn

from distill.models.anatomy import Anatomy, examine
from distill.models.backbone import Backbone
from distill.models.input_spec import input_spec_of
from distill.models.region_logits.layout import TimmModel
from distill.models.weights import (
    BY_NUMBER,
    CONFIG,
    check_finite,
    classes_in,
    lacks_classifier_alone,
    load_body,
    load_state,
    load_weights,
    match_classes,
    read_class_map,
    read_config,
    read_weights,
)
from distill.protocols import InputSpec, ModelFacts, Needs

LOCAL = "local-dir:"
REMOTE = ("hf-hub:", "hf_hub:", LOCAL)
WITHOUT = "take it without its classifier by `num_classes: 0` in model_kwargs"


@dataclass(frozen=True)
class ProbedModel:
    """A timm model that was made and probed once: losses are made from its facts, then a backbone for each who reads it."""

    model: TimmModel
    anatomy: Anatomy
    class_tokens: str = "attend"
    class_map: tuple[int, ...] | None = None
    frozen: bool = False
    remark: str = ""
    """A remark, for people, of what was done so that its classes are those of the data."""

    @property
    def facts(self) -> ModelFacts:
        """What losses are told of it; its classes are those of the data."""
        facts = self.anatomy.facts
        if self.class_map is None:
            return facts
        weight = None if facts.classifier is None else facts.classifier[list(self.class_map)]
        return replace(facts, num_classes=len(self.class_map), classifier=weight)

    @property
    def input_spec(self) -> InputSpec:
        """What it wants to be fed."""
        return self.anatomy.input_spec

    def backbone(self, needs: Needs) -> Backbone:
        """The model as the one module that gives what `needs` asks for. ValueError where it cannot give that."""
        return Backbone(
            self.model,
            self.anatomy,
            needs,
            frozen=self.frozen,
            class_tokens=self.class_tokens,
            class_map=self.class_map,
        )


def probe(
    model: TimmModel,
    *,
    name: str = "",
    input_spec: InputSpec | None = None,
    class_tokens: str = "attend",
    class_map: Sequence[int] | None = None,
    frozen: bool = False,
) -> ProbedModel:
    """A timm model that you have made, probed.

    name: what errors call it. input_spec: what it is fed; None: what its `pretrained_cfg` says. The others as in `Backbone`.
    ValueError for a model whose features have no grid.
    """
    anatomy = examine(model, input_spec or input_spec_of(model), name)
    return ProbedModel(model, anatomy, class_tokens, None if class_map is None else tuple(class_map), frozen)


def create_student(
    name: str,
    *,
    num_classes: int,
    weights: str | Path | None = None,
    image_size: int | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    class_tokens: str = "attend",
    class_names: Sequence[str] | None = None,
    fresh_head: bool = False,
) -> ProbedModel:
    """A student, in training mode, with fresh weights or those of a file or folder `weights`.

    image_size: its input, in pixels, where it is not the architecture's own; models of a fixed input size are made for it.
    `drop_rate` and `drop_path_rate` are timm's; None leaves the architecture's default. model_kwargs: anything else that
    `timm.create_model` takes for it. class_tokens: see `Backbone`. class_names: those of the data; a folder of weights whose
    `label_names` are the same in another order is put into theirs. fresh_head: the classifier of `weights` is left out,
    whatever its classes are. ValueError where the name is unknown (with the nearest ones), where an argument is not one of the
    architecture's, or where the weights are not finite, not its own or of other classes.
    """
    if "num_classes" in (model_kwargs or {}):
        raise ValueError("model_kwargs: num_classes of a model that is trained comes from the data; leave it out")
    kwargs = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate, **(model_kwargs or {})}
    if image_size is not None and _is_fixed(name):
        kwargs.setdefault("img_size", image_size)
    model = create_model(name, num_classes=num_classes, **kwargs)
    remark = ""
    if weights is not None and fresh_head:
        load_body(model, weights)
    elif weights is not None:
        load_weights(model, weights)
        if (Path(weights) / CONFIG).is_file():
            remark = match_classes(model, read_config(weights).get("label_names"), class_names, weights)
    spec = _spec_at(model, image_size or kwargs.get("img_size"))
    return replace(probe(model.train(), name=name, input_spec=spec, class_tokens=class_tokens), remark=remark)


def create_teacher(
    name: str,
    *,
    weights: str,
    num_classes: int,
    image_size: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    class_tokens: str = "attend",
    class_map: str | None = None,
    class_names: Sequence[str] | None = None,
) -> ProbedModel:
    """A teacher at its own input size (or `image_size`) and normalisation, whose backbones are frozen.

    weights: "pretrained" (timm's published ones), a .safetensors or .pth file, a folder in timm's layout, or "random" (for
    tests and measurements). ValueError as in `create_student`, and where the weights are for another number of classes: timm
    itself would put a fresh random head there without a word. class_map: a file with one line per class of the data, the number
    of that class among the weights' own; it lets a teacher of other classes (ImageNet-21k) serve data that are some of them.
    class_names: those of the data, which the weights' `label_names` are compared with, as in `create_student`, unless a class
    map is given; the class map `by_number` only leaves that out.

    Weights without a classifier (DINOv2, MAE) make a teacher without one; `num_classes` 0 among `model_kwargs` takes it off
    any other. Such a teacher has no logits: see `Backbone`.
    """
    kwargs = dict(model_kwargs or {})
    own_classes = kwargs.pop("num_classes", num_classes)
    if own_classes not in (0, num_classes):
        raise ValueError(f"model_kwargs: num_classes {own_classes}, the data have {num_classes}; leave it out, or say 0")
    if image_size is not None and _is_fixed(name):
        kwargs.setdefault("img_size", image_size)
    mapped = None
    if class_map not in (None, BY_NUMBER):
        own_classes = own_classes and _classes_of_weights(name, weights)
        mapped = read_class_map(class_map, num_classes, own_classes)
    if weights == "random":
        model = create_model(name, num_classes=own_classes, **kwargs)
    elif weights == "pretrained":
        model = _published(name, own_classes, kwargs)
    elif Path(weights).is_dir():
        model = _from_folder(name, Path(weights), own_classes, kwargs)
    else:
        state = read_weights(weights)
        model = create_model(name, num_classes=own_classes, **kwargs)
        if lacks_classifier_alone(model, state):
            model = create_model(name, num_classes=0, **kwargs)
        load_state(model, state, weights)
    remark = ""
    if class_map is None and (weights == "pretrained" or Path(weights).is_dir()):
        names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
        remark = match_classes(model, names, class_names, name if weights == "pretrained" else weights)
    spec = _spec_at(model, image_size or kwargs.get("img_size"))
    probed = probe(model, name=name, input_spec=spec, class_tokens=class_tokens, class_map=mapped, frozen=True)
    return replace(probed, remark=remark)


def _spec_at(model: nn.Module, size: int | tuple[int, int] | None) -> InputSpec:
    """The model's own input, at another size where one was asked for: timm's cfg keeps the size of the published weights."""
    spec = input_spec_of(model)
    if size is None:
        return spec
    height, width = (size, size) if isinstance(size, int) else size
    return replace(spec, height=height, width=width)


def create_model(name: str, **kwargs: Any) -> TimmModel:
    """`timm.create_model`, with one clear line (ValueError) for an unknown name, files or a connection that fail, or arguments
    that it does not take.
    """
    check_name(name)
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    while True:
        try:
            model: TimmModel = timm.create_model(name, **kwargs)
            break
        except TypeError as error:
            refused = next((key for key in kwargs if f"'{key}'" in str(error)), None)
            if refused is None:
                raise
            if kwargs[refused] != 0:
                raise ValueError(f"{refused} {kwargs[refused]}: {name} does not take it; leave it out") from error
            del kwargs[refused]  # 0 is what an architecture without such a rate does anyway
        except (OSError, RuntimeError, AssertionError, SafetensorError) as error:
            fetched = name.startswith(REMOTE) or kwargs.get("pretrained")
            remedy = "check name, files and connection" if fetched else f"check its arguments {kwargs}"
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{name}: timm cannot make it ({first}); {remedy}") from error
    if kwargs.get("pretrained"):
        check_finite(model.state_dict(), name)
    return model


def import_models(path: str | Path) -> None:
    """Runs a user's Python file, once: it registers architectures in timm's registry, or losses in ours.

    ValueError where there is none, or with what it raises.
    """
    file = Path(path).resolve()
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no such file"
        raise ValueError(f"--import {path}: {what}; give a Python file that registers models with timm, or losses")
    name = f"user_models_{file.stem}"
    if getattr(sys.modules.get(name), "__file__", None) == str(file):
        return
    found = importlib.util.spec_from_file_location(name, file)
    if found is None or found.loader is None:
        raise ValueError(f"--import {path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # timm's register_model looks its module up there
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"--import {path}: {type(error).__name__}: {error}") from error


def check_name(name: str) -> None:
    """ValueError with the nearest names where timm knows no such architecture or no such tag of it, or has no such folder."""
    if name.startswith(LOCAL):
        name = str(read_config(name.removeprefix(LOCAL))["architecture"])
    elif name.startswith(REMOTE):
        return
    architecture, _, tag = name.partition(".")
    if not is_model(architecture):
        near = difflib.get_close_matches(architecture, list_models(), n=3, cutoff=0.6)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has them all, --import adds your own"
        raise ValueError(f"{name}: no architecture of timm; {hint}")
    if tag and name not in _tagged(architecture):
        tags = ", ".join(_tagged(architecture)) or "none"
        raise ValueError(f"{name}: {architecture} has no weights tagged {tag!r}; its weights are {tags}")


def _tagged(architecture: str) -> list[str]:
    """All published weights of an architecture, as `architecture.tag`."""
    return [name for name in list_pretrained(f"{architecture}.*") if name.partition(".")[0] == architecture]


def _is_fixed(name: str) -> bool:
    """Whether timm builds this architecture for one input size, and so takes `img_size`."""
    if name.startswith(LOCAL):
        config = read_config(name.removeprefix(LOCAL))
        return bool(config.get("pretrained_cfg", config).get("fixed_input_size"))
    check_name(name)
    if name.startswith(REMOTE):
        return False
    cfg = get_pretrained_cfg(name)
    return bool(cfg and cfg.fixed_input_size)


def _published(name: str, num_classes: int, kwargs: dict[str, Any]) -> TimmModel:
    """A model with timm's published weights and the head they come with."""
    check_name(name)
    if not name.startswith(REMOTE):
        cfg = get_pretrained_cfg(name)
        if cfg is None or not cfg.has_weights:
            raise ValueError(f"{name}: timm publishes no weights for it; give a path, or train it on these data first")
        _check_classes(name, cfg.num_classes, num_classes)
    model = create_model(name, pretrained=True, num_classes=None if num_classes else 0, **kwargs)
    _check_classes(name, int(model.num_classes), num_classes)
    return model


def _check_classes(name: str, have: int, want: int) -> None:
    """ValueError where published weights have a classifier, one is wanted, and it has other classes."""
    if 0 in (have, want) or have == want:
        return
    architecture = name.partition(".")[0]
    others = [] if name.startswith(REMOTE) else [n for n in _tagged(architecture) if _classes_of(n) == want]
    remedy = f"take {', '.join(others)}" if others else "take other weights, or train it on these data first"
    raise ValueError(f"{name}: weights for {have} classes, the data have {want}; {remedy}, or {WITHOUT}")


def published_without_classifier(name: str) -> bool:
    """Whether the weights that timm takes for this name have no classifier, as far as can be told before they are fetched."""
    cfg = None if name.startswith(REMOTE) else get_pretrained_cfg(name)
    return cfg is not None and cfg.has_weights and cfg.num_classes == 0


def _classes_of(name: str) -> int:
    cfg = get_pretrained_cfg(name)
    return cfg.num_classes if cfg else 0


def _classes_of_weights(name: str, weights: str) -> int:
    """The number of classes that a teacher's weights are for, whatever the data have."""
    check_name(name)
    if Path(weights).is_dir():
        return int(read_config(weights).get("num_classes", 0))
    if name.startswith(REMOTE):
        raise ValueError(f"{name}: its classes are known only once it is fetched; give a folder or a file beside class_map")
    cfg = get_pretrained_cfg(name)
    if weights in ("pretrained", "random"):
        return cfg.num_classes if cfg else 0
    return classes_in(read_weights(weights), cfg.classifier if cfg else None) or 0


def _from_folder(name: str, folder: Path, num_classes: int, kwargs: dict[str, Any]) -> TimmModel:
    """A model from a folder that `export_student` or timm's `save_for_hf` wrote, with the input it was trained for."""
    check_name(name)
    config = read_config(folder)
    architecture = name.partition(".")[0]
    if not name.startswith(REMOTE) and config["architecture"] != architecture:
        raise ValueError(
            f"{folder}: holds a {config['architecture']}, not a {architecture};"
            f" name that model, or give weights of a {architecture}"
        )
    have = int(config.get("num_classes", 0))
    if have != num_classes and 0 not in (have, num_classes):
        what = f"weights for {have} classes, the data have {num_classes}"
        raise ValueError(f"{folder}: {what}; give a teacher of these data, or {WITHOUT}")
    return create_model(f"local-dir:{folder}", pretrained=True, num_classes=None if num_classes else 0, **kwargs)
