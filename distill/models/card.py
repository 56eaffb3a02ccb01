"""The model card of an exported student: what it is, how timm loads it from where it lies, how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from timm.models import model_entrypoint

from distill.protocols import InputSpec

CARD = "README.md"
HERE = "local-dir:FOLDER"
"""How timm names a model that lies in a folder."""
TRAINED = "## How it was trained\n"
TAGS = ("image-classification", "timm")


def model_card(
    architecture: str, num_classes: int, spec: InputSpec, metadata: Mapping[str, Any], fields: Mapping[str, Any]
) -> ModelCard:
    """The card of a student in a folder. metadata: JSON values that it ends with; fields: more of `ModelCardData`."""
    data = ModelCardData(library_name="timm", **{"tags": list(TAGS), "model_name": architecture, **fields})
    usage = [
        "import timm",
        *registration(architecture),
        "",
        f'model = timm.create_model("{HERE}", pretrained=True).eval()  # FOLDER: where this file is',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        "logits = model(transform(image)[None])",
    ]
    facts = [
        f"- {num_classes} classes; their names are `label_names` of `config.json` where they are known",
        f"- input {spec.height} x {spec.width}, {spec.interpolation}, crop {spec.crop_fraction}",
        f"- mean {spec.mean}, std {spec.std}",
    ]
    trained = ["", TRAINED, "```json", json.dumps(dict(metadata), indent=2), "```"] if metadata else []
    lines = [f"# {architecture}", "", *facts, "", "```python", *usage, "```", *trained]
    return ModelCard(f"---\n{data}\n---\n" + "\n".join(lines) + "\n")


def registration(architecture: str) -> list[str]:
    """What a script has to import before timm knows this architecture; nothing for timm's own."""
    home = model_entrypoint(architecture).__module__.partition(".")[0]
    known = {"timm": [], "distill": ["import distill.models  # registers the architecture"]}
    return known.get(home, [f"# import first the file that registers {architecture} with timm's register_model"])


def with_section(card: ModelCard, title: str, lines: Sequence[str]) -> ModelCard:
    """The card with one more section, before what it was trained with."""
    before, trained, after = card.text.partition(TRAINED)
    card.text = f"{before.rstrip()}\n\n## {title}\n\n" + "\n".join(lines) + f"\n\n{trained}{after}"
    return card


def hub_card(folder: Path, repository: str, fields: Mapping[str, Any]) -> ModelCard:
    """The card of a folder as it stands in a repository of the hub: its usage names the repository.

    fields: more of `ModelCardData`, as `license`.
    """
    card = ModelCard.load(folder / CARD)
    here = f'"{HERE}", pretrained=True).eval()  # FOLDER: where this file is'
    card.text = card.text.replace(here, f'"hf-hub:{repository}", pretrained=True).eval()')
    for name, value in fields.items():
        setattr(card.data, name, value)
    return card
