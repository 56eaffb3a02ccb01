"""The trained student as a plain timm model in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import nn

from distill.files import write_atomically, written_aside
from distill.models.card import CARD, model_card
from distill.models.weights import CONFIG, WEIGHTS
from distill.protocols import InputSpec

# What timm's cfg says about the weights it publishes is not true of ours.
FOREIGN = (
    "tag", "license", "origin_url", "paper_name", "paper_ids", "notes", "description", "url", "file", "hf_hub_id",
    "hf_hub_filename", "source", "state_dict", "label_offset", "test_input_size", "test_crop_pct", "test_pool_size",
)  # fmt: skip


def export_student(
    model: nn.Module,
    folder: str | Path,
    *,
    input_spec: InputSpec,
    class_names: Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Writes `model.safetensors` and `config.json` as timm's `save_for_hf` does, and a model card; timm loads them by itself.

    `timm.create_model(NAME, checkpoint_path=FOLDER/model.safetensors, num_classes=K)` and
    `timm.create_model("local-dir:FOLDER", pretrained=True)` give the same logits. metadata: JSON values
    (recipe, teacher, metrics), under `distillation` and in the card. card: fields of `huggingface_hub.ModelCardData`
    (`eval_results`, `base_model`, ...). ValueError where `class_names` are not as many as the classes.
    """
    if class_names is not None and len(class_names) != model.num_classes:
        raise ValueError(f"class_names: {len(class_names)} names for {model.num_classes} classes")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # contiguous, because safetensors refuses channels_last; cloned, because it refuses tensors that share memory
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    with written_aside(folder / WEIGHTS) as file:
        save_file(state, file, metadata={"format": "pt"})
    with written_aside(folder / CONFIG) as file:
        _write_config(model, file, input_spec, class_names, metadata)
    architecture = json.loads((folder / CONFIG).read_text())["architecture"]
    classes = int(model.num_classes)  # type: ignore[arg-type]
    write_atomically(folder / CARD, str(model_card(architecture, classes, input_spec, metadata or {}, card or {})))


def _write_config(
    model: nn.Module, file: Path, spec: InputSpec, class_names: Sequence[str] | None, metadata: Mapping[str, Any] | None
) -> None:
    data_config = {
        "input_size": (3, spec.height, spec.width),
        "mean": spec.mean,
        "std": spec.std,
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_fraction,
    }
    save_config_for_hf(model, str(file), data_config=data_config)
    config = json.loads(file.read_text())
    for key in FOREIGN:
        config["pretrained_cfg"].pop(key, None)
    for key in ("label_names", "label_descriptions"):
        config["pretrained_cfg"].pop(key, None)
    if class_names is not None:
        config["label_names"] = list(class_names)
    if metadata:
        config["distillation"] = dict(metadata)
    file.write_text(json.dumps(config, indent=2) + "\n")
