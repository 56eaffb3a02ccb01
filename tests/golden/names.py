"""The reference's names of parameters and ours: the one table, method by method."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

MEMORY = {r"(embed_\w+\.\w+)": r"memory.\1", r"(bank_\w+|normalisers)(\.before)?": r"memory.\1"}
NAMES: dict[str, dict[str, str]] = {
    "fitnet": {r"regressor\.(.*)": r"\1"},
    **dict.fromkeys(("crd", "sdd_kd+crd", "wcord_gckt"), MEMORY),
    "wkd_f": {r"projector\.(.*)": r"\1"},  # of bottleneck and of conv1x1 alike
    "ctkd": {r"global_T": r"g"},
    "ofd": {r"(\d+)\.(.*)": r"connectors.\1.\2"},
    "reviewkd": {
        r"(\d+)\.conv1\.(.*)": r"blocks.\1.reduce.\2",
        r"(\d+)\.conv2\.(.*)": r"blocks.\1.expand.\2",
        r"(\d+)\.att_conv\.0\.(.*)": r"blocks.\1.gate.\2",
    },
    "semckd": {
        r"query_(?:weight)?(\d)\.linear1\.(.*)": r"queries.\1.0.\2",
        r"query_(?:weight)?(\d)\.linear2\.(.*)": r"queries.\1.2.\2",
        r"key_(?:weight)?(\d)\.linear1\.(.*)": r"keys.\1.0.\2",
        r"key_(?:weight)?(\d)\.linear2\.(.*)": r"keys.\1.2.\2",
        r"regressor(\d)(\d)\.regressor\.(.*)": r"regressors.\1-\2.\3",
    },
    "simkd": {r"transfer\.(.*)": r"projector.\1"},
    "ab": {r"ab\.(.*)": r"\1"},
    "cc": {r"embed_s\.linear\.(.*)": r"student.\1", r"embed_t\.linear\.(.*)": r"teacher.\1"},
    "ft": {
        # the reference has an empty place for BatchNorm behind each of the paraphraser's convolutions
        **{rf"paraphraser\.(en|de)coder\.{3 * number}\.(.*)": rf"paraphraser.\1code.{2 * number}.\2" for number in range(3)},
        r"translator\.encoder\.(.*)": r"translate.\1",
    },
    "srrl": {r"srrl\.transfer\.(.*)": r"project.\1"},
    "vid": {r"vid\.regressor\.(.*)": r"predict.0.\1", r"vid\.log_scale": r"spreads.0"},
    "mgd": {r"generation\.(.*)": r"generator.\1"},
}
"""Method -> regular expression of the reference's name -> ours, a substitution; the first that fits counts."""


def our_name(method: str, name: str) -> str:
    """Our name of a parameter or buffer that the reference calls `name`; the same where the table says nothing."""
    for pattern, replacement in NAMES.get(method, {}).items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def load_parameters(module: nn.Module, method: str, tensors: Mapping[str, Tensor]) -> None:
    """Loads parameters and buffers that are named as in the reference; raises where one is missing on either side."""
    module.load_state_dict({our_name(method, name): tensor for name, tensor in tensors.items()})


def gradients(module: nn.Module, method: str, names: Iterable[str]) -> dict[str, Tensor]:
    """The gradients of those names that are parameters of the module, under the reference's names; 0 where none has come."""
    ours = dict(module.named_parameters())
    found = {name: ours[our_name(method, name)] for name in names if our_name(method, name) in ours}
    return {name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in found.items()}
