"""Measuring layer times for ``scpl.partition: time`` in the setting of a run: rank 0 does, and all
ranks cut by its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scpl_ds.distributed.collectives import broadcast_object
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.patience import wait_for_all
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.errors import OtherRankFailed, PartitionError, ScplError
from scpl_ds.objectives._base import StageView
from scpl_ds.partition.anatomy import Anatomy
from scpl_ds.partition.footprint import example_inputs
from scpl_ds.partition.layer_list import Layer, count_parameters
from scpl_ds.partition.matrices import shapes_of
from scpl_ds.partition.plan import LayerTimes, PartitionPlan, time_cut
from scpl_ds.partition.stage_module import PreTrainedModel, StageModule, StageOutput
from scpl_ds.partition.timing import (
    LocalHead,
    Setting,
    copied_stages,
    random_stages,
    time_list,
    time_model,
)
from scpl_ds.recipe import ScplSection
from scpl_ds.sharding._base import DTYPES
from scpl_ds.sharding._footprint import computes_in


def from_rank_0(mesh: Mesh, work: Callable[[], Any]) -> Any:
    """What ``work`` gives on rank 0, on every rank; it may take longer than the timeout. If it
    fails, all stop, and rank 0 says why."""
    found: Any = None
    error: ScplError | None = None
    if mesh.rank == 0:
        try:
            found = work()
        except ScplError as problem:
            error = problem
    wait_for_all(mesh)
    found, failed = broadcast_object(mesh, (found, error is not None))
    if error is not None:
        raise error
    if failed:
        raise OtherRankFailed("rank 0 found the problem.")
    return found


@dataclasses.dataclass(frozen=True)
class Stopwatch:
    """How a run computes, for measuring its layers."""

    scpl: ScplSection
    section: DeepSpeedSection
    device: torch.device
    seed: int = 42
    mesh: Mesh | None = None
    """Given, rank 0 measures and tells the others; None is this process alone."""
    rows: int | None = None
    """Samples of a micro-batch; None is the section's."""

    @property
    def micro_batch(self) -> int:
        return self.rows or self.section.micro_batch_size

    def config(
        self,
        config: Any,
        task: str,
        anatomy: Anatomy,
        *,
        sequence_length: int,
        attn_implementation: str | None = None,
        prepare: Callable[[StageModule], StageModule] | None = None,
    ) -> LayerTimes:
        """Times of the model that a config describes, with random weights, one layer at a time.

        Raises:
            PartitionError: A layer does not run on its own, or the task has no local objective.
        """

        def measure() -> LayerTimes:
            stages = random_stages(
                config, task, anatomy, self.setting,
                attn_implementation=attn_implementation, prepare=prepare,
            )  # fmt: skip
            return self._model(stages, config, task, anatomy, sequence_length)

        return self._agreed(measure)

    def model(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        *,
        example: Tensor | None = None,
        prepare: Callable[[StageModule], StageModule] | None = None,
    ) -> LayerTimes:
        """Times of a model in memory, for samples as long as ``example`` [B, T] (128 without)."""
        length = anatomy.sequence_length if example is None else example.shape[-1]
        return self._agreed(
            lambda: self._model(
                copied_stages(model, anatomy, prepare=prepare),
                model.config,
                "sequence-classification",
                anatomy,
                length,
            )
        )

    def layers(self, layers: Sequence[Layer], example: Tensor | None) -> PartitionPlan:
        """The cut of a list of layers.

        Raises:
            PartitionError: There is no example to run, or fewer layers with something to train than
                stages.
        """
        if example is None:
            raise PartitionError(
                "scpl.partition: time runs the layers of a list, and does not know on what. Give "
                "PipelineModule(..., input_example=<one batch of inputs>), or use parameters."
            )
        learns = [bool(count) for count in count_parameters(layers)]
        if self.scpl.stages > sum(learns):
            raise PartitionError(
                f"{sum(learns)} of {len(layers)} layers have something to train, so they cannot be "
                f"cut into {self.scpl.stages} stages that learn on their own. Use fewer stages."
            )
        times = self._agreed(
            lambda: time_list(
                layers, self._head_of, self.setting, example,
                micro_batch=self.micro_batch, seed=self.seed,
            )
        )  # fmt: skip
        on_last = self.scpl.detach_features is not False
        bounds = time_cut(times, self.scpl.stages, head_on_last=on_last, learns=learns)
        return PartitionPlan(bounds, "time", head_on_last=on_last, times=times)

    @property
    def setting(self) -> Setting:
        precision, half = computes_in(self.scpl.sharding, self.section)
        return Setting(self.device, DTYPES[precision], None if half is None else DTYPES[half])

    def _agreed(self, measure: Callable[[], LayerTimes]) -> LayerTimes:
        return measure() if self.mesh is None else from_rank_0(self.mesh, measure)

    def _model(
        self, stages: Any, config: Any, task: str, anatomy: Anatomy, length: int
    ) -> LayerTimes:
        inputs = example_inputs(config, task, micro_batch=self.micro_batch, sequence_length=length)
        head = self._head(anatomy.hidden_size, config, inputs)
        make_stage, kinds = stages
        return time_model(make_stage, kinds, head, self.setting, inputs, anatomy.hidden_size)

    def _head_of(self, width: int) -> LocalHead:
        return self._head(width, None, {})

    def _head(self, width: int, config: Any, inputs: Mapping[str, Tensor]) -> LocalHead:
        """The run's local objective on ``width`` features, its rows of this rank only."""
        num_labels = getattr(config, "num_labels", None)

        def random(names: Collection[str]) -> dict[str, Tensor]:
            shapes = {} if config is None else shapes_of(config, names)
            return {name: torch.randn(shape.shape) for name, shape in shapes.items()}

        with torch.random.fork_rng(devices=[]):
            objective = self.scpl.objective.build(
                hidden_size=width, num_labels=num_labels, matrices=random
            )
            objective.attach(_NoLayers())
        self.setting.place(objective)
        known = {name: inputs[name].to(self.device) for name in _SEEN if name in inputs}
        classes = max(2, num_labels or 2)

        def loss(features: Tensor) -> Tensor:
            labels = known.get("labels")
            if labels is None or labels.ndim == 1:
                labels = torch.arange(len(features), device=features.device) % classes
            view = StageView(features, features.detach(), {**known, "labels": labels}, {})
            return objective.learn(view).loss

        return loss


_SEEN = ("attention_mask", "labels")
"""What an objective looks at of a micro-batch."""


class _NoLayers(nn.Module):
    """Stands for the layers of an objective that wants to know them, and costs nothing."""

    start, end, is_first, is_last = 0, 1, True, False

    def forward(self, inputs: dict[str, Tensor], hidden_states: Tensor | None) -> StageOutput:
        assert hidden_states is not None
        return StageOutput(hidden_states, None, None)
