"""How many bytes each backend needs for one stage on one rank, by arithmetic.

What a backend allocates follows from its source (DeepSpeed 0.19.8, torch 2.13); the measurements
that the formulas were checked against are in docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from scpl_ds.ds_checks import lookup
from scpl_ds.ds_config import DeepSpeedSection

FP32 = 4


class Moment(NamedTuple):
    """What is live beside parameters and inputs at one instant of a forward and backward, bytes."""

    activations: int
    """What the forward keeps for the backward, its temporaries, and gradients of activations."""
    gradients: int
    """Of parameters: whole, in their type, kept until the end."""


class StageSize(NamedTuple):
    """What one stage is made of. Sizes are in numbers (elements) unless they say bytes."""

    parameters: int
    trained: int
    """Parameters that get a gradient, the local head's included."""
    head: int
    """Parameters of the local head."""
    largest: int
    """The largest single parameter."""
    block: int
    """The largest layer."""
    outside: int
    """What is in no layer: embeddings, task head, local head."""
    itemsize: int
    """Bytes of one number of a parameter in forward and backward."""
    buffers: int
    """Bytes of what is neither parameter nor computed: rotary tables, queues."""
    moments: tuple[Moment, ...]
    """Of one micro-batch's forward and backward in plain torch."""
    frozen_bytes: int | None = None
    """Of what is not trained, where ``model.lora.base_dtype`` holds it; else None."""

    def held(self, width: int) -> int:
        """Bytes of the parameters, those without a type of their own at ``width`` a number."""
        if self.frozen_bytes is None:
            return width * self.parameters
        return width * self.trained + self.frozen_bytes

    @property
    def activations(self) -> int:
        """The most bytes of activations at any instant."""
        return max(moment.activations for moment in self.moments)

    def most(self, gradients: Callable[[int], int]) -> int:
        """The most bytes at any instant, with what the backend makes of so many gradients."""
        return max(m.activations + gradients(m.gradients) for m in self.moments)


class Setting(NamedTuple):
    """Where and how a stage runs, as far as its memory depends on it."""

    section: DeepSpeedSection
    dp_size: int
    moments: int
    """Numbers that the optimizer keeps for each parameter: 2 for Adam, 0 for plain SGD."""
    scratch: int
    """Temporaries of the optimizer's step, in copies of the largest tensor it steps."""
    accumulates: bool
    """Several micro-batches a step."""
    on_cpu: bool
    """An allocation takes memory when it is written to, and messages go through gloo."""


class Layout(NamedTuple):
    """Bytes of one stage on one rank. The first four live between steps too."""

    parameters: int
    optimizer: int
    """Moments and fp32 copies of the weights, unless they are on the host."""
    buffers: int
    """Gradient and communication buffers that are never freed."""
    host: int
    """What was offloaded to the CPU's memory."""
    gradients: int
    """The most gradients at any time."""
    messages: int
    """The most that collectives need at any time, beside ``buffers``."""
    working: int
    """The most that lives during a step beside the first four, activations included. Less than the
    sum of the maxima: gradients appear while activations go."""


Footprint = Callable[[StageSize, Setting], Layout]
"""What a backend makes of one stage; a user's own has it as a static method ``footprint``."""


def none(size: StageSize, setting: Setting) -> Layout:
    """Everything whole on every rank; gradients are averaged in messages of bounded size."""
    from scpl_ds.distributed.collectives import MESSAGE_ELEMENTS

    message = 0
    if setting.dp_size > 1:
        message = FP32 * min(size.trained, max(MESSAGE_ELEMENTS, size.largest))
    return _whole(size, setting, message=message)


def frozen(size: StageSize) -> Layout:
    """Of a stage that is not trained: whole on every rank, whatever the backend, and in fp32 unless
    ``model.lora.base_dtype`` says otherwise."""
    own = size.held(FP32) + size.buffers
    return Layout(own, 0, 0, host=0, gradients=0, messages=0, working=size.activations)


def ddp(size: StageSize, setting: Setting) -> Layout:
    """Everything whole on every rank; gradients live in the messages, which are never freed."""
    alone = _whole(size, setting, message=0)
    if setting.dp_size == 1:
        return alone
    one = size.itemsize * size.largest  # made, then copied into its message
    return alone._replace(
        buffers=alone.gradients,
        gradients=0,  # views of the messages
        working=size.most(lambda gradients: min(gradients, one)),
    )


def _whole(size: StageSize, setting: Setting, *, message: int) -> Layout:
    gradients = size.itemsize * size.trained
    step = gradients + max(message, setting.scratch * FP32 * size.largest)
    return Layout(
        parameters=size.held(size.itemsize) + size.buffers,
        optimizer=setting.moments * FP32 * size.trained,
        buffers=0,
        host=0,
        gradients=gradients,
        messages=message,
        working=max(_with_whole_gradients(size, setting), step),
    )


def _with_whole_gradients(size: StageSize, setting: Setting) -> int:
    """Forward and backward where gradients stay whole, those of earlier micro-batches included."""
    if setting.accumulates:
        return size.activations + size.itemsize * size.trained
    return size.most(lambda gradients: gradients)


def deepspeed(size: StageSize, setting: Setting) -> Layout:
    """DeepSpeed's ZeRO-0 to 3, by its own defaults as ``DeepSpeedSection.engine_config`` has
    them."""
    stage = setting.section.zero_stage
    if stage == 0:  # one flat copy of all gradients is averaged
        message = FP32 * min(size.trained, 500_000_000) if setting.dp_size > 1 else 0
        return _whole(size, setting, message=message)
    if stage == 3:
        return _zero_3(size, setting)
    if stage == 1 and setting.section.precision == "bf16" and not _offloads(setting, "optimizer"):
        return _bf16_zero_1(size, setting)
    return _zero_1_and_2(size, setting)


def _zero_1_and_2(size: StageSize, setting: Setting) -> Layout:
    section, share = setting.section, _share(size.trained, setting)
    width = size.itemsize
    kept = share * _accumulated_in(size, section)  # this rank's part, averaged
    # One flat fp32 tensor, there from the first bucket on; else pieces, made into one in the step.
    flat = width < FP32 and _accumulated_in(size, section) == FP32
    reduced = FP32 if flat and section.zero_stage == 1 else width
    gradients = reduced * size.trained
    bucket = reduced * _option(section, "reduce_bucket_size", size.trained)
    masters = (1 + setting.moments) * FP32 * share
    early = kept if flat or setting.accumulates or bucket < gradients else 0
    if section.zero_stage == 1:
        reducing = max(gradients + bucket + early, gradients + kept)
        backward = gradients + size.activations
        if not setting.accumulates:
            backward = size.most(lambda made: made * reduced // width)
    else:  # a full bucket is copied, averaged, and this rank's part taken out of it
        reducing = 2 * bucket + early
        backward = size.most(
            lambda made: (kept if setting.accumulates else 0) + made if made < bucket else reducing
        )
    if not setting.on_cpu:  # the bucket is there as soon as the first gradient is
        doubled = 2 if lookup(section.filled, "zero_optimization.overlap_comm") else 1
        backward = max(backward, size.most(lambda made: (made > 0) * doubled * bucket))
        backward += bucket if section.zero_stage == 1 else 0
    step = kept + FP32 * share * (setting.scratch + (not flat))
    gather = _gathering(width * size.trained, setting)
    host = 0
    if _offloads(setting, "optimizer"):
        # masters, their gradients, a copy in the weights' type, the largest parameter's gradient
        host = masters + FP32 * share + width * share + width * size.largest
        masters, step = 0, 0
    return Layout(
        parameters=width * size.parameters + size.buffers,
        optimizer=masters,
        buffers=width * size.largest if host else 0,
        host=host,
        gradients=max(kept, gradients if section.zero_stage == 1 else min(gradients, bucket)),
        messages=max(bucket, gather),
        working=max(backward, reducing, step, gather),
    )


def _bf16_zero_1(size: StageSize, setting: Setting) -> Layout:
    """Whole gradients in fp32 live always; those of a backward are added to them one by one."""
    share = _share(size.trained, setting)
    gradients = FP32 * size.trained
    message = FP32 * min(size.trained, 500_000_000) if setting.dp_size > 1 else 0
    gather = _gathering(size.itemsize * size.trained, setting)
    backward = size.most(lambda made: min(made, size.itemsize * size.largest))
    return Layout(
        parameters=size.itemsize * size.parameters + size.buffers,
        optimizer=(1 + setting.moments) * FP32 * share,
        buffers=gradients,
        host=0,
        gradients=gradients,
        messages=max(message, gather),
        working=max(backward, message, gather, FP32 * share * setting.scratch),
    )


def _zero_3(size: StageSize, setting: Setting) -> Layout:
    section, share = setting.section, _share(size.trained, setting)
    width = size.itemsize
    whole, bucket = (
        width * size.parameters,
        width * _option(section, "reduce_bucket_size", size.trained),
    )
    # A parameter that is used again within this distance is kept: there and back from the turn.
    reuse = _option(section, "stage3_max_reuse_distance", 1_000_000_000) // 2
    ahead = _option(section, "stage3_prefetch_bucket_size", min(50_000_000, size.parameters))
    gathered = min(whole, width * max(reuse, size.block + ahead))
    fetched = min(whole, width * ahead)  # what is being gathered is there twice
    kept = share * _accumulated_in(size, section)
    one = width * size.largest  # a gradient, made and then copied into the bucket
    backward = gathered + fetched + size.most(lambda made: min(made, one))
    # The bucket is copied, and gloo copies it again.
    reducing = gathered + (2 if setting.on_cpu else 1) * min(bucket, width * size.trained)
    step = FP32 * share * (1 + setting.scratch)
    masters = (1 + setting.moments) * FP32 * share
    own = width * _share(size.parameters, setting)
    host = 0
    if _offloads(setting, "optimizer"):
        host, masters, step = masters + kept + FP32 * share, 0, 0
        kept = 0
    if _offloads(setting, "param"):
        host, own = host + own, 0
    return Layout(
        parameters=own + size.buffers,
        optimizer=masters,
        buffers=kept + (min(bucket, width * size.trained) if setting.on_cpu else bucket),
        host=host,
        gradients=kept + one,
        messages=gathered + fetched,
        working=max(backward, reducing, step),
    )


def fsdp(size: StageSize, setting: Setting) -> Layout:
    """FSDP2: shards in fp32; a layer is whole, in the type it computes in, while it runs and the
    next one is being fetched."""
    share, width = _share(size.trained, setting), size.itemsize
    whole = size.held(width)
    block, outside = (whole * part // size.parameters for part in (size.block, size.outside))
    resharded = setting.section.zero_stage != 2
    gathered = min(whole, outside + 2 * block) if resharded else whole
    # A layer's gradients, whole, and the fp32 message made of them.
    sent = (width + FP32) * max(size.block, size.outside)
    own, masters = _share(size.held(FP32), setting), setting.moments * FP32 * share
    kept = FP32 * share
    host = 0
    if _offloads(setting, "param"):
        host, own, masters = own + masters + kept, 0, 0
    backward = gathered + size.most(lambda made: min(made, sent)) + (0 if host else kept)
    step = kept + FP32 * share * setting.scratch
    return Layout(
        parameters=own + size.buffers,
        optimizer=masters,
        buffers=0,
        host=host,
        gradients=kept + sent,
        messages=gathered + sent,
        working=max(backward, 0 if host else step),
    )


def _share(numbers: int, setting: Setting) -> int:
    return -(-numbers // setting.dp_size)


def _gathering(numbers: int, setting: Setting) -> int:
    """What gloo copies of a message while it gathers; NCCL writes into its place."""
    return numbers if setting.on_cpu and setting.dp_size > 1 else 0


def _offloads(setting: Setting, what: str) -> bool:
    device = lookup(setting.section.filled, f"zero_optimization.offload_{what}.device")
    return device not in (None, "none")


def _option(section: DeepSpeedSection, name: str, default: int) -> int:
    """A size in numbers, never more than there is to put into it by default."""
    written = lookup(section.filled, f"zero_optimization.{name}")
    return default if written in (None, "auto") else int(written)


def _accumulated_in(size: StageSize, section: DeepSpeedSection) -> int:
    """Bytes of a number of this rank's averaged gradients."""
    names = {"fp32": FP32, "bf16": 2, "fp16": 2}
    written = lookup(section.filled, "data_types.grad_accum_dtype")
    return size.itemsize if section.precision == "fp32" else names[str(written or "fp32")]


def computes_in(sharding: str, section: DeepSpeedSection) -> tuple[str, str | None]:
    """The precision of the weights in forward and backward, and that of ``torch.autocast`` around
    them (None: there is none)."""
    if section.precision != "fp32" and sharding in ("deepspeed", "fsdp"):
        return section.precision, None
    half = section.autocast or section.precision
    return "fp32", None if half == "fp32" else half


FOOTPRINTS: dict[str, Footprint] = {"none": none, "ddp": ddp, "fsdp": fsdp, "deepspeed": deepspeed}
"""By name in the registry."""
