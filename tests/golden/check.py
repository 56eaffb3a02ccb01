"""Checks every golden case of folders with an `index.json`: `python -m tests.golden.check DIR... [--device cuda]`.

Every case is computed in float64, and on a CPU again in float32. Prints the number of cases and the worst error of each method,
and every case that it cannot run or that misses; exit code 1 where there is one of either. Every tensor of a case is an input
that the method's adapter reads, an output that it computes, or one that it names as left out, with the reason: nothing stored
is passed over in silence.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.command_line import Parser, command, requests
from distill.errors import RequestError
from tests.golden import adapters_a, adapters_b, adapters_c
from tests.golden.case import ROUNDING, Adapter, Case, Options, Stored, cases, load

ADAPTERS: dict[str, Adapter] = {**adapters_a.ADAPTERS, **adapters_b.ADAPTERS, **adapters_c.ADAPTERS}
"""Method, as the indices call it -> what computes its cases with our code. `names.NAMES` has the parameters' names."""

RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest error, relative to the largest entry of what is expected."""
RELATIVE_GRADIENT = {("pkt", torch.float64): 1e-6, ("wkd_l", torch.float32): 1e-4}
"""Gradients that depend on the order of operations: of PKT's opposite rows the last bit of a cosine of -1 counts, divided by an
eps of 1e-7; WKD-L's in float32 are wrong by as much in the reference itself where logits exceed 30."""
COARSER = torch.finfo(torch.float32).eps / ROUNDING
"""Rounding in float32 over that in float64: what an index calls noise is so much larger there. Where it names none it is four
roundings of a number of size 1: gradients that are 0 in exact arithmetic are sums of some hundred terms that cancel."""
CANCELLED = {
    "fitnet/zero_student": 1e-5,
    "reviewkd_02": 1e-6,
    "semckd_06": 1e-4,
}
"""Absolute errors in float32 where terms of size 1 cancel; all of them hold in float64. BatchNorm of a constant divides
rounding errors by sqrt(1e-5); it makes +-1 of two values and lets 1e-4 of a gradient through; inner products of large maps
are cancelled in the attention."""
ORDINARY = 1e6
"""Larger gradients are the reference's explosion where ours is ordinary, and a slope like any other where ours is not."""
EXPLOSION = 1e7
"""The reference's gradients from here on are 1/eps of a norm that is 0, no slope of anything: ours must stay below, no more."""

UNREAD = {
    "crd": "embedding eps gradient_to_teacher_features negatives num_samples",
    "ctkd": "alpha beta decay_max decay_min lambda_",
    "fitnet": "convolution kernel padding parameters stride",
    "lskd": "alpha beta standardise",
    "mgd": "align",
    "ofd": "reduction stage_factors",
    "reviewkd": "in_channels out_channels student_sizes teacher_sizes",
    "sdd_kd+crd": "warmup",
    "sdd_kd+sp": "warmup",
    "semckd": "factor unused_parameters",
    "wcord_gckt": "critic embedding negatives num_samples spectral_norm",
    "wcord_lckt": "cost marginals order",
}
"""Options that an adapter need not read: sizes that the stored tensors have, constants of the reference, and what only some
cases of the method depend on. Any other that is not read is a problem: it would change nothing without a word."""


@dataclass
class Found:
    """What a method's cases came to."""

    cases: int = 0
    worst: dict[torch.dtype, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def compare(name: str, actual: Any, expected: Tensor, noise: float, method: str = "") -> tuple[float, str]:
    """The relative error of one output, and what is wrong with it, if anything.

    Where the reference is not finite or explodes, ours must be finite and ordinary: the vectors of such entries (dimension 1,
    the channels of a map's cell) are left out of the comparison.
    """
    actual = torch.as_tensor(actual, dtype=None if isinstance(actual, Tensor) else torch.float64).detach()
    if actual.shape != expected.shape:
        return 0.0, f"{name}: has shape {list(actual.shape)}, expected {list(expected.shape)}"
    if not actual.isfinite().all():
        return 0.0, f"{name}: is not finite"
    allowed = RELATIVE.get(expected.dtype, 1e-9)
    if "grad" in name:
        allowed = max(allowed, RELATIVE_GRADIENT.get((method, expected.dtype), 0.0))
    actual, expected = actual.double(), expected.double()
    steep = (expected.abs() > EXPLOSION) | ((expected.abs() > ORDINARY) & (actual.abs() < ORDINARY))
    wild = ~expected.isfinite() | (steep & ("grad" in name))
    if wild.any() and wild.dim() > 1:
        wild = wild.any(1, keepdim=True).expand_as(wild)
    if (actual[wild].abs() > EXPLOSION).any():
        return 0.0, f"{name}: explodes as the reference's does, to {actual[wild].abs().max():.1e}"
    actual, expected = actual.masked_fill(wild, 0), expected.masked_fill(wild, 0)
    if not expected.numel():
        return 0.0, ""
    size, error = float(expected.abs().max()), float((actual - expected).abs().max())
    # the noise counts as an error of the size that it is: zeros need no other rule
    scale = size + noise / allowed
    relative = error / scale if scale else float(error > 0)
    if relative > allowed:
        return relative, f"{name}: off by {error:.1e} of {size:.1e} ({relative:.1e}; allowed {allowed:.0e})"
    return relative, ""


def in_float32(case: Case) -> None:
    """Makes a loaded case one of float32: what is given and what is expected, and its noise."""
    stored = case.inputs.tensors
    case.inputs = Stored({name: value.float() if value.is_floating_point() else value for name, value in stored.items()})
    case.noise = CANCELLED.get(case.id, COARSER * max(case.entry.get("absolute_noise", 0.0), 4 * ROUNDING))


def check(case: Case, folder: Path, found: Found, device: str = "cpu", single: bool = False) -> None:
    """Runs one case on a device, in float32 where `single` is set, and adds to what was found; what is wrong is a problem."""
    found.cases += not single
    if case.method not in ADAPTERS:
        found.problems.append(f"{case.id}: cannot be run, no adapter for method {case.method!r}")
        return
    try:
        load(case, folder)
        if single:
            in_float32(case)
        case.inputs = Stored({name: tensor.to(device) for name, tensor in case.inputs.tensors.items()})
        with torch.device(device):  # modules and tensors that the adapters make
            computed = ADAPTERS[case.method](case)
    except Exception as error:  # whatever it is, the other cases are run
        found.problems.append(f"{case.id}: cannot be run, {type(error).__name__}: {error}")
        return
    if isinstance(case.options, Options):
        for name in sorted(set(case.options) - case.options.read - set(UNREAD.get(case.method, "").split())):
            found.problems.append(f"{case.id}: option {name} is given, and the adapter does not read it")
    # a value or a gradient is an output even where an adapter has looked at it
    expected = {name for name in case.inputs if name not in case.inputs.read or re.search(r"\b(loss|grad)", name)}
    for name in sorted(computed.keys() | expected):
        if name not in computed:
            reasons = [reason for pattern, reason in case.left_out.items() if re.fullmatch(pattern, name)]
            if reasons:
                found.left_out[f"{case.id} {name}"] = reasons[0]
            else:
                found.problems.append(f"{case.id}: {name} is stored, and the adapter neither reads nor computes it")
        elif name not in case.inputs:
            found.problems.append(f"{case.id}: {name} is computed, and there is no such tensor")
        else:
            stored = case.inputs.tensors[name].cpu()
            given = computed[name].cpu() if isinstance(computed[name], Tensor) else computed[name]
            relative, problem = compare(name, given, stored, case.noise, case.method)
            dtype = stored.dtype if stored.dtype in RELATIVE else torch.float64
            found.worst[dtype] = max(found.worst.get(dtype, 0.0), relative)
            found.problems += [f"{case.id}: {problem}"] if problem else []


def check_folder(folder: Path, device: str = "cpu") -> dict[str, Found]:
    """What each method of a folder's index came to on a device.

    A GPU's float32 is left out: its convolutions may compute by other algorithms, which round more.
    """
    results: dict[str, Found] = {}
    for single in (False, True) if device == "cpu" else (False,):
        for case in cases(folder):
            check(case, folder, results.setdefault(case.method, Found()), device, single)
    return results


@command
def main(argv: Sequence[str]) -> int:
    """1 where something was missed."""
    parser = Parser(prog="python -m tests.golden.check", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a folder with an index.json")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--left-out", action="store_true", help="list stored tensors that are not compared, with the reason")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    failed = False
    for folder in arguments.folders:
        if not (folder / "index.json").is_file():
            raise RequestError(f"{folder}: has no index.json; give the folder of one")
        with requests():
            results = check_folder(folder, arguments.device)
        print(f"{folder}: {sum(found.cases for found in results.values())} cases")
        for method, found in results.items():
            worst = ", ".join(f"{error:.1e} in {str(dtype)[6:]}" for dtype, error in found.worst.items())
            print(f"  {method:<14} {found.cases:>3} cases, worst relative error {worst or 'unknown'}", end="")
            print(f", {len(found.left_out)} tensors not compared" if found.left_out else "")
            for line in found.problems:
                print(f"    MISS {line}")
            for name, reason in found.left_out.items() if arguments.left_out else ():
                print(f"    not compared: {name}: {reason}")
        failed |= any(found.problems for found in results.values())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
