"""The report of `pipelines/benchmark.py`: one dataclass, written as JSON and read back strictly."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from distill.config import RecipeError
from distill.files import write_atomically
from distill.protocols import Gathered
from pipelines.measure.timeline import BACKWARD, FORWARD, OPTIMISER, TEACHER

FORMAT = 3
MODELS = (TEACHER, FORWARD, BACKWARD, OPTIMISER)
"""The parts that the ceiling has too."""
_STRICT = ConfigDict(extra="forbid", strict=True)


@with_config(_STRICT)
@dataclass(frozen=True)
class Setting:
    """The setting of a measurement: the machine, the pair and the options."""

    device: str
    on_gpu: bool
    cores: int
    threads: int
    torch: str
    processes: int
    precision: str
    compiled: str
    channels_last: bool
    teacher_precision: str
    teacher: str
    student: str
    losses: list[str]
    advice: dict[str, str]
    """The option that makes a loss cheaper, by its name; empty where it knows none."""
    image_size: list[int]
    micro_batch: int
    accumulate: int
    data: str
    """`shards`: the real loader; `memory`: batches that lie on the device."""
    clock: str
    """`wall`, or `cpu`: seconds of all threads of the process."""
    recipe: dict[str, Any]


@with_config(_STRICT)
@dataclass(frozen=True)
class WarmUp:
    """Steps before the measurement, reported apart."""

    steps: int
    seconds: float
    first_step_ms: float
    compile_ms: float | None
    """Time of the first step beyond that of a later one; None where nothing is compiled."""
    compiled: str
    """Graphs and graph breaks in words; empty where nothing is compiled."""


@with_config(_STRICT)
@dataclass(frozen=True)
class StepPart:
    """One part of the step: the mean over the middle half of the measured steps, so that parts sum to the step."""

    name: str
    ms: float
    share: float
    alone_ms: float | None
    """The same work alone; None where there is no such thing."""


@with_config(_STRICT)
@dataclass(frozen=True)
class Step:
    """The measured step."""

    ms: float
    images_per_second: float
    """The images of all processes."""
    steps: int
    all_ms: list[float]
    """Every measured step, in order."""
    unmarked_ms: float
    """The median step without any marks, taken in turn with the marked ones."""
    local_ms: float | None
    """The median step without all-reduce, taken in turn; None for one process."""


@with_config(_STRICT)
@dataclass(frozen=True)
class Ceiling:
    """The pieces alone, measured in turn with the steps."""

    models_ms: float
    """Teacher forward + student forward, backward and optimiser, on plain models."""
    ratio: float
    """Step without data wait / models_ms: the median over the rounds, each round against its own."""
    ratios: list[float]
    loader_images_per_second: float
    """Rate of one process while nothing else runs."""
    copy_gigabytes_per_second: float
    host_to_device_gigabytes_per_second: float | None
    teraflops: float
    teraflops_float32: float
    gigaflops_per_image: dict[str, float]
    network_bytes_per_second: float | None
    network_latency_ms: float | None


@with_config(_STRICT)
@dataclass(frozen=True)
class MemoryUse:
    """Memory of one process during a step, in bytes."""

    peak: int
    """The highest mark: the allocator's on a GPU; on a CPU the resident set's, with all that the process holds, PyTorch's own
    code too."""
    peak_part: str
    """The part of the step in which the peak came."""
    owners: dict[str, int]
    """Exact sizes by name: weights, what is saved at the end of the forward pass, gradients, states."""

    @property
    def owner(self) -> str:
        """The name of the largest."""
        return max(self.owners, key=lambda name: self.owners[name])


@with_config(_STRICT)
@dataclass(frozen=True)
class Traffic:
    """The bytes of a step that come from the disk or go over the network."""

    gradient_bytes: int
    """Size of the trained parameters' gradients."""
    buckets: list[int]
    """Bytes of each of DDP's all-reduces; empty for one process."""
    arrivals: list[tuple[float, int]]
    """(share of the backward pass that was over, bytes) of each gradient as it came."""
    gathers: dict[str, list[Gathered]]
    """Rows that a loss gathers from all processes in a micro-batch, or would if it were set to, by the loss's name."""
    bytes_per_image: float
    """Mean size of an encoded training image, with its row of a teacher cache."""
    training_images: int


@with_config(_STRICT)
@dataclass(frozen=True)
class CacheUse:
    """A step whose teacher is read from a cache, beside the step with the live one."""

    row_bytes: int
    """Bytes of an image's row."""
    live_teacher_ms: float
    """The live teacher alone, measured in turn with the steps."""
    live_ms: float
    """The step with that teacher in the place of the part that is left of it."""


@with_config(_STRICT)
@dataclass(frozen=True)
class Report:
    """The whole report, as the JSON file holds it."""

    format: int
    setting: Setting
    warm_up: WarmUp
    step: Step
    parts: list[StepPart]
    ceiling: Ceiling
    memory: MemoryUse
    traffic: Traffic
    bottleneck: str
    cache: CacheUse | None = None
    """None where the teacher is live."""

    def part_ms(self, name: str) -> float:
        """Milliseconds of a part; 0 where the step has none."""
        return sum(part.ms for part in self.parts if part.name == name)

    def write(self, path: Path) -> None:
        """Writes the report as JSON, whole or not at all."""
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> Report:
        """The report in a file of `write`. Raises RecipeError with one line for anything else."""
        try:
            return TypeAdapter(Report).validate_json(path.read_bytes())
        except OSError as error:
            raise RecipeError(f"{path}: {error.strerror}; write one with pipelines/benchmark.py --json FILE") from None
        except ValidationError as error:
            first = error.errors()[0]
            where, what = ".".join(str(key) for key in first["loc"]), first["msg"].lower()
            raise RecipeError(f"{path}: not a file of pipelines/benchmark.py --json: {f'{where} {what}'.strip()}") from None
