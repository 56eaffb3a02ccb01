"""Weights from files into models, with the reason where they do not fit."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from distill.files import what_starts

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMATS = {
    b"PK\x03\x04": "PyTorch's",
    b"\x80": "PyTorch's",  # a bare pickle: PyTorch's before 1.6
    b"\x89HDF": "HDF5, as Keras writes it",
    b"\x93NUMPY": "NumPy's",
}
"""The first bytes of a file of numbers -> its format; that of safetensors begins with a length and `{`."""
BY_NUMBER = "by_number"
"""In the place of a class map's file: the classes of weights are those of the data, whatever their names are."""


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a .safetensors or .pth file, or a folder with `model.safetensors`, into `model`, strictly.

    Files with pickled objects other than tensors and plain containers are refused. A checkpoint that holds an EMA beside the
    weights gives the EMA, as in timm. ValueError, in one line, where file and model do not fit.
    """
    load_state(model, read_weights(path), path)


def load_body(model: nn.Module, path: str | Path) -> None:
    """Loads all but the classifier, which stays as it is: the weights may be of other classes. As `load_weights` else."""
    own = {key: value for key, value in model.state_dict().items() if _of_classifier(model, key)}
    if not own:
        raise ValueError(f"{path}: nothing tells the classifier of a {_name(model)} from its body, so that it cannot be fresh")
    state = {key: value for key, value in read_weights(path).items() if not _of_classifier(model, key)}
    load_state(model, {**state, **own}, path)


def load_state(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Loads tensors by name into `model`, strictly; a model that was made without a classifier leaves that of `state` out.

    ValueError, in one line that begins with `path`, where they do not fit.
    """
    own = model.state_dict()
    if model.num_classes == 0:
        state = {key: value for key, value in state.items() if key in own or not _of_classifier(model, key)}
    _check_classes(model, state, path)
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or extra:
        raise ValueError(
            f"{path}: not the weights of a {_name(model)}; "
            f"{len(missing)} tensors missing {missing[:3]}, {len(extra)} unknown {extra[:3]}"
        )
    odd = [key for key in own if state[key].shape != own[key].shape]
    if odd:
        first = f"{odd[0]} is {tuple(state[odd[0]].shape)}, there {tuple(own[odd[0]].shape)}"
        raise ValueError(f"{path}: {len(odd)} tensors have other shapes than in the {_name(model)}: {first}")
    model.load_state_dict(state)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file or folder, by name, on the CPU. ValueError where it cannot be read."""
    file = Path(path)
    if file.is_dir():
        file = file / WEIGHTS
    if not file.is_file():
        raise ValueError(f"{file}: no such weights; give a .safetensors or .pth file, or a folder with {WEIGHTS}")
    _check_format(file)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'torch.load' received a zip file that looks like a TorchScript")
            state = load_state_dict(str(file), weights_only=True)
    except Exception as error:  # every reader has its own exceptions for a broken file; the cause stays attached
        raise ValueError(f"{file}: cannot be read as weights: {_why(error)}") from error
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file}: holds no plain dictionary of tensors; save model.state_dict()")
    check_finite(state, file)
    return state


def _check_format(file: Path) -> None:
    """ValueError where a file's first bytes say that it holds no weights, or those of another format than its name says."""
    with file.open("rb") as opened:
        start = opened.read(64)
    if not start:
        raise ValueError(f"{file}: is empty (0 bytes); fetch or write it again")
    safetensors = start[8:9] == b"{"
    found = "safetensors" if safetensors else next((name for magic, name in FORMATS.items() if start.startswith(magic)), None)
    if found is None:
        what = what_starts(start)
        raise ValueError(f"{file}: holds no weights: it {what if what.startswith('starts') else f'is {what}'}")
    wanted, other = ("safetensors", ".pth") if file.suffix == ".safetensors" else ("PyTorch's", ".safetensors")
    if found != wanted:
        remedy = f"name it {file.stem}{other}" if found in ("safetensors", "PyTorch's") else "save model.state_dict()"
        raise ValueError(f"{file}: its first bytes are those of another format, {found}; {remedy}")


def _why(error: Exception) -> str:
    """The reason why a file cannot be read, without PyTorch's advice to load it in a way that may run code."""
    text = str(error)
    if "TorchScript" in text:
        return "it is a TorchScript archive; save model.state_dict() instead"
    if "weights_only" in text:
        named = re.search(r"Unsupported globals: (.*?)\. ", text)
        what = f" ({', '.join(sorted(named[1].split(', '))[:3])}, ...)" if named else ""
        return f"it holds Python objects{what} beside tensors, which could run code; save model.state_dict() instead"
    return (
        f"{text.splitlines()[0][:120] if text else type(error).__name__}; it is damaged or cut short, fetch or write it again"
    )


def check_finite(state: Mapping[str, Tensor], where: object) -> None:
    """ValueError where a value of weights is not finite: nothing that is computed with them would be."""
    odd = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if odd:
        raise ValueError(
            f"{where}: {len(odd)} of {len(state)} tensors hold values that are not finite, the first is {odd[0]}; these are the"
            " weights of a training that failed, take earlier ones"
        )


def read_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of a folder in timm's layout. ValueError where it is absent or not one."""
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise ValueError(f"{file}: no such file; a model's folder has {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(config, dict) or "architecture" not in config:
        raise ValueError(f"{file}: names no architecture; it is not a timm config")
    return config


def checksum_bytes(model: nn.Module) -> Iterator[bytes | memoryview]:
    """What a checksum of a model is made of: of each weight and buffer its name, then its content.

    The checksums are in the manifests of runs and of teacher caches: another order here would make all of those other ones.
    """
    for name, tensor in model.state_dict().items():
        yield name.encode()
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def lacks_classifier_alone(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether a state dict has all of the model but its classifier, by the names that timm's cfg gives it."""
    missing = set(model.state_dict()) - set(state)
    return bool(missing) and all(_of_classifier(model, key) for key in missing)


def _of_classifier(model: nn.Module, key: str) -> bool:
    """Whether a tensor lies in the outermost module of a classifier: LeViT's has a BatchNorm beside its linear layer."""
    cfg: Any = getattr(model, "pretrained_cfg", {})
    names = cfg.get("classifier") or ()
    return key.partition(".")[0] in {each.partition(".")[0] for each in ((names,) if isinstance(names, str) else names)}


def _check_classes(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """The most common misfit has its own words: another number of classes."""
    cfg: Any = getattr(model, "pretrained_cfg", {})
    classes = classes_in(state, cfg.get("classifier"))
    if classes is not None and classes != model.num_classes:
        raise ValueError(
            f"{path}: weights for {classes} classes, the data have {model.num_classes}; a student takes them with a fresh"
            " classifier by student.fresh_head true"
        )


def classes_in(state: dict[str, Tensor], classifier: str | tuple[str, ...] | None) -> int | None:
    """Rows of the classifier's weight in a state dict, by the classifier's names in timm's cfg; None where it is not there."""
    for name in (classifier,) if isinstance(classifier, str) else classifier or ():
        for suffix in ("", ".l", ".linear"):
            weight = state.get(f"{name}{suffix}.weight")
            if weight is not None:
                return len(weight)
    return None


def read_class_map(path: str | Path, num_classes: int, own_classes: int) -> tuple[int, ...]:
    """The class of the weights for each class of the data, from a file of one number per line; `#` starts a comment.

    ValueError where the lines are not as many as the data's classes, or name a class that the weights have not.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file}: no such class map; give a file with one class number of the teacher per line")
    if own_classes < 1:
        raise ValueError(f"class_map {file}: the teacher has no classifier, so there are no classes to map; leave it out")
    lines = [text for text in (line.partition("#")[0].strip() for line in file.read_text().splitlines()) if text]
    wrong = next((text for text in lines if not text.isdecimal() or int(text) >= own_classes), None)
    if wrong is not None:
        raise ValueError(f"{file}: {wrong!r} is no class of the teacher; its classes are 0 to {own_classes - 1}")
    if len(lines) != num_classes:
        raise ValueError(f"{file}: {len(lines)} lines, the data have {num_classes} classes; give one line per class")
    return tuple(int(text) for text in lines)


def match_classes(model: Any, names: Sequence[str] | None, class_names: Sequence[str] | None, where: object) -> str:
    """Orders the classifier's rows as the classes of the data, by their names; what was done for people, empty where nothing.

    names: those of the classes that the weights were trained for, as `config.json` has them in `label_names`; nothing is
    compared where they or `class_names` are not known. ValueError where the names are not the same.
    """
    if not names or not class_names or model.num_classes < 1 or list(names) == list(class_names):
        return ""
    pairs = enumerate(zip(names, class_names, strict=False))
    different = [f"{number} is {mine!r} there, {other!r} in the data" for number, (mine, other) in pairs if mine != other]
    told = f"class {'; class '.join(different[:3])}" if different else f"{len(names)} there, {len(class_names)} in the data"
    if sorted(names) != sorted(class_names) or len(set(names)) != len(names):
        raise ValueError(
            f"{where}: its classes have other names than those of the data: {told}; give weights of these data, or, if only"
            f" names differ, take the classes by number: class_map {BY_NUMBER} of a teacher, or the file {WEIGHTS} of a student"
        )
    place = {name: number for number, name in enumerate(names)}
    _reorder(model, torch.tensor([place[name] for name in class_names]), where)
    return f"{where}: its classes are those of the data in another order ({told}); they were matched by their names"


def _reorder(model: Any, order: Tensor, where: object) -> None:
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        parameters = [parameter for parameter in head.parameters() if len(parameter) == len(order)]
        if len(parameters) != len(list(head.parameters())) or not parameters:
            raise ValueError(f"{where}: its classes have another order than those of the data, and its classifier is not plain")
        for parameter in parameters:
            parameter.data = parameter.data[order]


def _name(model: nn.Module) -> str:
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)
