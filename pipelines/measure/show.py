"""The benchmark's report for people: a table, a picture, and the bottleneck in a sentence."""

from __future__ import annotations

from pathlib import Path

from distill.text_table import table
from pipelines.measure.report import MODELS, Ceiling, Report, Setting, StepPart, WarmUp
from pipelines.measure.timeline import ALL_REDUCE, AVERAGE, DATA, REST, TEACHER, TRANSFORM


def bottleneck(report_parts: list[StepPart], setting: Setting, ceiling: Ceiling) -> str:
    """The sentence on what costs most beside the models' own work, with the option that would help."""
    total = sum(part.ms for part in report_parts)
    shares = {part.name: part.ms / total for part in report_parts}
    excess = {part.name: part.ms - (part.alone_ms or 0.0) for part in report_parts}
    losses: dict[str, float] = {}
    for part in report_parts:
        if part.name.startswith("loss "):
            name = part.name.split()[1]
            losses[name] = losses.get(name, 0.0) + part.ms
    costs = {
        **{f"loss {name}": ms for name, ms in losses.items()},
        **{name: excess.get(name, 0.0) for name in (DATA, ALL_REDUCE, TRANSFORM, AVERAGE, REST)},
    }
    worst = max(costs, key=lambda name: costs[name])
    if costs[worst] >= 0.05 * total:
        return _advice(worst, costs[worst], total, setting, ceiling)
    largest = max((name for name in MODELS if name in shares), key=lambda name: shares[name])
    return (
        f"{largest} is the largest part ({shares[largest]:.0%}) and nothing beside the models takes 5 % of the step;"
        f" {_models_advice(setting, largest)}"
    )


def _advice(name: str, ms: float, total: float, setting: Setting, ceiling: Ceiling) -> str:
    share = f"{ms:.1f} ms, {ms / total:.0%} of the step"
    if name == DATA:
        needed = 1000 * setting.micro_batch * setting.accumulate / (total - ms)
        have = ceiling.loader_images_per_second
        if have < needed:
            reason = f"alone it gives {have:.0f} images/s and the models take {needed:.0f}: it is {needed / have:.2f}x short"
        else:
            reason = f"alone it gives {have:.0f} images/s, enough for the {needed:.0f} of the models, but not beside them"
        return f"The loader holds the step up ({share}); {reason}; more cores for --data.num_threads help"
    if name == ALL_REDUCE:
        return f"The all-reduce holds the step up ({share}); --train.accumulate {2 * setting.accumulate} halves it per image"
    if name.startswith("loss "):
        loss = name.removeprefix("loss ")
        return f"{name.capitalize()} costs {share}; {setting.advice[loss] or f'--loss.{loss} null drops it'}"
    if name == AVERAGE:
        return f"The weight average costs {share}; --ema.enabled false leaves it out"
    if name == TRANSFORM:
        return (
            f"Turning bytes into pixels, mixing and erasing cost {share}; --augment.erasing and mixup are what can be left out"
        )
    larger = "a larger batch per process makes it count less"
    return f"What lies between the parts (launches, checks, norms) costs {share}; {larger}"


def _models_advice(setting: Setting, largest: str) -> str:
    """The first option that makes the models themselves faster and is not in use."""
    train = setting.recipe["train"]
    if setting.precision == "no":
        return "--train.mixed_precision bf16 is the first thing to try"
    if setting.compiled == "none":
        return "--train.compile both is the next thing to try"
    if largest == TEACHER and setting.teacher_precision == "auto":
        return "--teacher.precision bf16 casts its weights once"
    if setting.on_gpu and setting.teacher != "none" and not train["overlap_teacher"]:
        return "--train.overlap_teacher true runs the teacher beside the student where the GPU has room for both"
    other = str(not setting.channels_last).lower()
    return f"--train.channels_last {other} may be faster for these models; else only smaller ones or more devices help"


def as_text(report: Report) -> str:
    """The ledger for people."""
    setting, step, ceiling, memory = report.setting, report.step, report.ceiling, report.memory
    size = "x".join(str(side) for side in setting.image_size)
    compiled = "" if setting.compiled == "none" else f", compiled: {setting.compiled}"
    lowered = "" if setting.teacher_precision == "auto" else f" (teacher {setting.teacher_precision})"
    low, high = min(step.all_ms), max(step.all_ms)
    lines = [
        f"{setting.teacher} -> {setting.student}, {' + '.join(setting.losses)}",
        f"{setting.device}, {setting.cores} cores, {setting.threads} threads, torch {setting.torch};"
        f" {setting.processes} process{'es' if setting.processes > 1 else ''} x {setting.micro_batch} images"
        f" x {setting.accumulate}, {size} px, precision {setting.precision}{lowered}{compiled},"
        f" {'channels_last' if setting.channels_last else 'contiguous'}; data from {setting.data}"
        + ("" if setting.clock == "wall" else "; milliseconds are CPU time of all threads"),
        _warm_up_line(report.warm_up),
        "",
        _parts(report),
        "",
        f"{step.images_per_second:.1f} images per {'second' if setting.clock == 'wall' else 'CPU second'};"
        f" {step.steps} steps from {low:.1f} to {high:.1f} ms, {step.unmarked_ms:.1f} ms at the median without marks"
        + ("" if step.local_ms is None else f", {step.local_ms:.1f} ms without all-reduce"),
        f"step without data wait / models alone: {ceiling.ratio:.3f} ({min(ceiling.ratios):.3f} to {max(ceiling.ratios):.3f})",
        *_cache_lines(report),
        *_machine_lines(report),
        f"memory: peak {memory.peak / 2**20:,.0f} MiB during {memory.peak_part}; most of it: {memory.owner},"
        f" {memory.owners[memory.owner] / 2**20:,.0f} MiB",
        "  " + ", ".join(f"{name} {held / 2**20:,.1f}" for name, held in memory.owners.items()) + " MiB",
        f"bottleneck: {report.bottleneck}",
    ]
    return "\n".join(lines)


def _cache_lines(report: Report) -> list[str]:
    """What a teacher cache saves of the step, and what it reads."""
    cache, step = report.cache, report.step
    if cache is None:
        return []
    hours = 1e6 / step.images_per_second / 3600
    gain = cache.live_ms / step.ms
    return [
        f"teacher cache: {cache.row_bytes:,} bytes an image, {cache.row_bytes * step.images_per_second / 1e6:.1f} MB/s read;"
        f" {report.part_ms(TEACHER):.2f} ms are left of the teacher, which takes {cache.live_teacher_ms:.2f} ms live:"
        f" the step is {gain:.2f}x faster, a million images take {hours:.2f} h instead of {gain * hours:.2f} h"
    ]


def _parts(report: Report) -> str:
    rows = [["part of the step", "ms", "share", "alone ms", "ratio"]]
    for part in report.parts:
        alone = ["", ""] if part.alone_ms is None else [f"{part.alone_ms:.2f}", f"{part.ms / part.alone_ms:.2f}"]
        rows.append([part.name, f"{part.ms:.2f}", f"{part.share:.1%}", *alone])
    rows.append(["step", f"{report.step.ms:.2f}", f"{1:.1%}", f"{report.ceiling.models_ms:.2f}", f"{report.ceiling.ratio:.2f}"])
    return table(rows, "lrrrr")


def _warm_up_line(warm_up: WarmUp) -> str:
    compiled = (
        "" if warm_up.compile_ms is None else f", {warm_up.compile_ms / 1000:.1f} s of it to compile ({warm_up.compiled})"
    )
    return (
        f"warm-up, not measured: {warm_up.steps} steps in {warm_up.seconds:.1f} s,"
        f" the first {warm_up.first_step_ms / 1000:.1f} s{compiled}"
    )


def _machine_lines(report: Report) -> list[str]:
    ceiling, setting = report.ceiling, report.setting
    flops = ceiling.gigaflops_per_image
    images = setting.micro_batch * setting.accumulate
    reached = sum(flops.values()) * images / ceiling.models_ms  # GFLOP/ms are TFLOP/s
    sent = ceiling.host_to_device_gigabytes_per_second
    copied = f"device copy {ceiling.copy_gigabytes_per_second:.1f} GB/s"
    decode = 1000 * images / ceiling.loader_images_per_second
    pixels = 3 * images * setting.image_size[0] * setting.image_size[1]  # a byte each
    there = "none, one memory" if sent is None else f"{pixels / sent / 1e6:.2f} ms at {sent:.1f} GB/s"
    lines = [
        f"beside the step, alone: decode {decode:.1f} ms ({ceiling.loader_images_per_second:.0f} images/s per process),"
        f" host-to-device copy {there}; {copied}",
        f"matrix product {ceiling.teraflops:.3f} TFLOP/s in this precision; models alone {reached:.3f}"
        f" ({reached / ceiling.teraflops:.0%}), {sum(flops.values()):.2f} GFLOP an image",
    ]
    if ceiling.network_bytes_per_second is not None:
        traffic = report.traffic
        lines.append(
            f"all-reduce alone: {ceiling.network_bytes_per_second / 1e6:.0f} MB/s sent, {ceiling.network_latency_ms:.2f} ms for"
            f" one number; a step reduces {sum(traffic.buckets):,} bytes in {len(traffic.buckets)} buckets"
        )
    return lines


def plot(report: Report, path: Path) -> None:
    """The step as one stacked bar, the models alone as another beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 3.2), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    for row, values in ((1, [p.ms for p in report.parts]), (0, [p.alone_ms or 0.0 for p in report.parts])):
        left = 0.0
        for number, (part, ms) in enumerate(zip(report.parts, values, strict=True)):
            label = f"{part.name} {part.share:.1%}" if row else None
            axes.barh(row, ms, left=left, color=colours[number % len(colours)], label=label)
            left += ms
    axes.set_yticks([1, 0], ["step", "alone"])
    axes.set_xlabel("ms")
    setting = report.setting
    axes.set_title(
        f"{setting.teacher} -> {setting.student}, {' + '.join(setting.losses)}: {report.step.images_per_second:.1f} images/s",
        fontsize=10,
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
