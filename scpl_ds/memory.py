"""What a run will need: bytes of every rank, before anything is loaded or started.

Every kind of stage is run once on tensors without values, forward and backward, while what is alive
is counted (``memory_track``); the sharding backend says by arithmetic what it makes of that.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import nn

from scpl_ds import registry
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.errors import PartitionError, ScplError
from scpl_ds.memory_track import FusedAttention, LiveBytes
from scpl_ds.objectives._base import Objective
from scpl_ds.optim import build_optimizer, moment_names
from scpl_ds.partition.anatomy import Anatomy
from scpl_ds.partition.footprint import (
    MakeStage,
    example_inputs,
    longest_sequence,
    weightless_stages,
)
from scpl_ds.partition.lora import Adapters
from scpl_ds.partition.lora_base import held_bytes, unpacked_bytes
from scpl_ds.partition.matrices import shapes_of
from scpl_ds.partition.plan import PartitionPlan, stages_of_rank
from scpl_ds.recipe import Recipe, ScplSection
from scpl_ds.sharding._base import DTYPES
from scpl_ds.sharding._footprint import (
    FOOTPRINTS,
    Footprint,
    Layout,
    Setting,
    StageSize,
    computes_in,
    frozen,
)
from scpl_ds.stage import LocalStage, as_body
from scpl_ds.stage_build import rests


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, its cut, and how it is trained: what memory depends on, ranks apart."""

    config: Any
    """The model's Hugging Face config."""
    task: str
    anatomy: Anatomy
    plan: PartitionPlan
    scpl: ScplSection
    section: DeepSpeedSection
    sequence_length: int
    """Positions of every sample. A run pads to the longest of a micro-batch: this is the most."""
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    device_type: str = "cpu"
    """``cuda`` has fused attention with dropout, and allocations take memory at once."""
    adapters: Adapters | None = None
    """Trained in the place of the layers' weights."""

    @classmethod
    def of(cls, recipe: Recipe, model: Any, device_type: str) -> Workload:
        """The workload of a recipe; ``model`` is what ``setup.cut_model`` made of it."""
        asked = getattr(recipe.data.options, "max_length", model.anatomy.sequence_length)
        return cls(
            config=model.config,
            task=recipe.model.task,
            anatomy=model.anatomy,
            plan=model.plan,
            scpl=recipe.scpl,
            section=recipe.deepspeed,
            sequence_length=longest_sequence(model.config, asked),
            gradient_checkpointing=recipe.train.gradient_checkpointing,
            attn_implementation=recipe.model.attn_implementation,
            device_type=device_type,
            adapters=model.adapters,
        )


@dataclasses.dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank needs; the data-parallel ranks of a stage are alike.

    Each part is the most it takes at any time, and ``peak`` is less than their sum: gradients
    appear while activations go, and stages of one rank take turns.
    """

    rank: int
    """Pipeline coordinate."""
    stages: tuple[int, ...]
    parameters: int
    """Of the model's layers, embeddings and task head, and buffers such as rotary tables."""
    gradients: int
    optimizer: int
    activations: int
    head: int
    """Local heads: their parameters and optimizer state."""
    boundary: int
    """Hidden states on their way between stages or ranks."""
    buffers: int
    """What the backend uses to send, gather and accumulate."""
    host: int
    """Offloaded to the CPU's memory; on a CPU it is part of the rest below too."""
    resident: int
    """What lives between steps."""
    peak: int
    """The most during a step. On a CPU without what Python and torch's libraries take (about
    0.4 GB)."""

    @property
    def activation_and_gradient(self) -> int:
        """What a step adds to what lives between steps."""
        return self.peak - self.resident


def predict(workload: Workload, *, pipeline_ranks: int, dp_size: int) -> list[RankMemory]:
    """Memory of each pipeline rank; needs no process group, no weights and no device.

    Counts training steps, from the second on. Not counted: evaluation with a larger batch, loading,
    what a kernel allocates inside itself, and fragmentation.

    Raises:
        PartitionError: A stage cannot be run without its weights; the message says why.
        RecipeError: The batch sizes do not fit ``dp_size``.
        ScplError: The sharding backend does not say what it needs.
    """
    return Prediction(workload).ranks(pipeline_ranks=pipeline_ranks, dp_size=dp_size)


class Prediction:
    """The stages of a workload, measured once; memory under any backend by arithmetic."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._measured: dict[Any, tuple[list[StageSize], int]] = {}

    def ranks(self, *, pipeline_ranks: int, dp_size: int) -> list[RankMemory]:
        """As ``predict``."""
        w = self.workload
        sizes, hidden = self.sizes()
        layouts = []
        for k, size in enumerate(sizes):
            section = w.section
            if w.scpl.zero_stages is not None:
                section = section.with_zero_stage(w.scpl.zero_stages[k])
            layouts.append(footprint(w.scpl.sharding, size, self._setting(section, dp_size)))
        groups = stages_of_rank(w.plan.num_stages, pipeline_ranks)
        return [
            self._rank(
                p, list(stages), sizes, layouts, hidden, dp_size, last=p == pipeline_ranks - 1
            )
            for p, stages in enumerate(groups)
        ]

    def with_section(self, scpl: ScplSection, section: DeepSpeedSection) -> Prediction:
        """The same stages under another backend or ZeRO stage; measured again only if they compute
        in other types."""
        other = Prediction(dataclasses.replace(self.workload, scpl=scpl, section=section))
        other._measured = self._measured
        return other

    def sizes(self) -> tuple[list[StageSize], int]:
        """What each stage is made of, from one fake forward and backward of each kind of stage, and
        the bytes of the hidden states of one micro-batch."""
        w = self.workload
        precision, half = computes_in(w.scpl.sharding, w.section)
        dtype, autocast = DTYPES[precision], None if half is None else DTYPES[half]
        key = (dtype, autocast)
        if key not in self._measured:
            with weightless_stages(
                w.config,
                w.task,
                w.anatomy,
                dtype=dtype,
                attn_implementation=w.attn_implementation,
                gradient_checkpointing=w.gradient_checkpointing,
                adapters=w.adapters,
            ) as make_stage:
                self._measured[key] = self._measure(make_stage, dtype, autocast)
        return self._measured[key]

    def _measure(
        self, make_stage: MakeStage, dtype: torch.dtype, autocast: torch.dtype | None
    ) -> tuple[list[StageSize], int]:
        w, seen, sizes = self.workload, {}, []
        inputs = example_inputs(
            w.config,
            w.task,
            micro_batch=w.section.micro_batch_size,
            sequence_length=w.sequence_length,
        )
        hidden, extras = None, {}
        for k in range(w.plan.num_stages):
            start, end = w.plan.span(k)
            layers = slice(start, end)
            kind = (
                start == 0,
                end == w.anatomy.num_layers,
                w.anatomy.layer_parameters[layers],
                w.anatomy.layer_flops[layers],
                w.scpl.has_objective(k),
                k < w.scpl.freeze_stages,
                w.scpl.reach(k, end, w.anatomy.num_layers) - end,
                w.adapters and w.adapters.in_layers(w.anatomy, start, end),
            )
            if kind not in seen:
                try:
                    stage = self._stage(k, make_stage, start, end, dtype)
                    given = (inputs, hidden, extras)
                    seen[kind] = _watch(stage, given, autocast, w.device_type)
                except ScplError:
                    raise
                except Exception as error:
                    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                    raise PartitionError(
                        f"the memory of stage {k} cannot be predicted: it does not run without its "
                        f"weights ({reason}). Training may still work."
                    ) from error
            size, hidden, extras = seen[kind]
            sizes.append(size)
        return sizes, 0 if hidden is None else hidden.nbytes

    def _stage(
        self, k: int, make_stage: MakeStage, start: int, end: int, dtype: torch.dtype
    ) -> LocalStage:
        w, objective = self.workload, None
        body: Any = make_stage(start, end)
        reach = w.scpl.reach(k, end, w.anatomy.num_layers)
        ahead: Any = make_stage(end, reach) if reach > end else None
        frozen = k < w.scpl.freeze_stages
        if w.scpl.has_objective(k):
            objective = w.scpl.objective.build(
                hidden_size=body.hidden_size,
                num_labels=w.config.num_labels,
                matrices=lambda names: {
                    name: torch.empty_like(shape, device="cpu")  # as all that is measured
                    for name, shape in shapes_of(w.config, names).items()
                },
            )
        stage = LocalStage(
            as_body(body), objective, detach_features=w.scpl.detach_features, ahead=ahead
        )
        if objective is not None:
            for parameter in objective.parameters():  # buffers keep their type: queues are fp32
                parameter.data = parameter.data.to(dtype)
        if rests(stage):
            frozen, stage.objective = True, None  # as build_stage does
        if frozen:
            stage.requires_grad_(False)
        return stage.train(not frozen)

    def _setting(self, section: DeepSpeedSection, dp_size: int) -> Setting:
        one = build_optimizer([("one", nn.Parameter(torch.zeros(1, 1)))], section)
        return Setting(
            section=section,
            dp_size=dp_size,
            moments=len(moment_names(one) or ()),
            scratch=0 if one.defaults.get("fused") else 2,
            accumulates=section.batch(dp_size).accumulation > 1,
            on_cpu=self.workload.device_type == "cpu",
        )

    def _rank(
        self,
        rank: int,
        stages: list[int],
        sizes: list[StageSize],
        layouts: list[Layout],
        hidden: int,
        dp_size: int,
        *,
        last: bool,
    ) -> RankMemory:
        w, own = self.workload, [layouts[k] for k in stages]
        on_cpu = w.device_type == "cpu"
        host = sum(layout.host for layout in own)
        resident = sum(x.parameters + x.optimizer + x.buffers for x in own)
        resident += host if on_cpu else 0
        boundary = hidden * self._waiting(len(stages), dp_size, first=rank == 0, last=last)
        working = max(layout.working for layout in own)
        if self._together and len(own) > 1:
            others = sum(layout.gradients for layout in own) - max(x.gradients for x in own)
            working += others
        heads = [sizes[k].head / max(1, sizes[k].trained) for k in stages]
        head_parameters = sum(sizes[k].head * sizes[k].itemsize for k in stages)
        head_states = sum(int(x.optimizer * h) for x, h in zip(own, heads, strict=True))
        return RankMemory(
            rank=rank,
            stages=tuple(stages),
            parameters=sum(x.parameters for x in own) - head_parameters,
            gradients=sum(x.gradients for x in own)
            if self._together
            else max(x.gradients for x in own),
            optimizer=sum(x.optimizer for x in own) - head_states,
            activations=max(sizes[k].activations for k in stages),
            head=head_parameters + head_states,
            boundary=boundary,
            buffers=sum(x.buffers for x in own) + max(x.messages for x in own),
            host=host,
            resident=resident,
            peak=resident + boundary + working,
        )

    @property
    def _together(self) -> bool:
        """Whether the stages of a rank hold gradients at the same time."""
        scpl = self.workload.scpl
        return scpl.clip_scope == "global" or not scpl.step_in_backward

    def _waiting(self, local_stages: int, dp_size: int, *, first: bool, last: bool) -> int:
        """Micro-batches whose hidden states wait: a stage's input, the next one taken ahead,
        messages not taken yet, what one stage of this rank made for the next."""
        w = self.workload
        waiting = 0 if first and local_stages == 1 else 1
        if local_stages > 1 and w.scpl.step_in_backward:
            waiting = max(waiting, w.section.batch(dp_size).accumulation)
        sent = 0 if last else w.scpl.max_in_flight
        return waiting + sent + (0 if first else 1)


def footprint(sharding: str, size: StageSize, setting: Setting) -> Layout:
    """What the backend needs for one stage.

    Raises:
        ScplError: It does not say.
    """
    backend = registry.resolve("sharding", sharding, where="scpl.sharding")
    formula: Footprint | None = FOOTPRINTS.get(sharding) or getattr(backend, "footprint", None)
    if formula is None:
        raise ScplError(
            f"scpl.sharding '{sharding}' does not say how much memory it needs. Give the class a "
            "static method footprint(size, setting), as in scpl_ds/sharding/_footprint.py."
        )
    return formula(size, setting) if size.trained else frozen(size)


def _watch(
    stage: LocalStage,
    given: tuple[dict[str, torch.Tensor], torch.Tensor | None, dict[str, torch.Tensor]],
    autocast: torch.dtype | None,
    device_type: str,
) -> tuple[StageSize, torch.Tensor, dict[str, torch.Tensor]]:
    """What a stage needs for one micro-batch (inputs, hidden states, extras), and what it gives."""
    inputs, hidden, extras = given
    parameters = list(stage.parameters())
    buffers = list(stage.buffers())
    known = [*parameters, *buffers, *inputs.values(), *extras.values()]
    known += [] if hidden is None else [hidden]
    fused = FusedAttention() if device_type != "cpu" else contextlib.nullcontext()
    half = torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext()
    tracker = LiveBytes(known)
    hooks = tracker.watch(stage)
    with tracker, fused:
        with half:
            output = stage(inputs, hidden, extras)
        if (loss := output["loss"]) is not None:
            loss.backward()
        sent, more = output["hidden_states"], output["extras"]
        del output
    for hook in hooks:
        hook.remove()
    for parameter in parameters:
        parameter.grad = None
    body: Any = stage.body
    blocks = [_numbers(block) for block in body.blocks]
    objective: Objective | None = stage.objective
    total, whole = _numbers(stage), unpacked_bytes(body)
    size = StageSize(
        parameters=total,
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        head=0 if objective is None else _numbers(objective),
        largest=max(p.numel() for p in parameters),
        block=max(blocks),
        outside=total - sum(blocks),
        itemsize=max(p.element_size() for p in parameters),
        buffers=sum(b.nbytes for b in buffers),
        moments=tuple(m._replace(activations=m.activations + whole) for m in tracker.moments),
        frozen_bytes=held_bytes(body, stage.ahead),
    )
    return size, sent, more


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
