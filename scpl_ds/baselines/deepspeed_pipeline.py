"""DeepSpeed's own pipeline: ``PipelineModule`` and its engine, one stage a rank, 1F1B."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from scpl_ds.baselines._base import Job, Part, Rival, lane, lane_size, ring_bytes
from scpl_ds.baselines._deepspeed import WholeWorld, config
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.timeline import Kind

_KINDS: dict[str, Kind] = {
    "LoadMicroBatch": "data",
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "OptimizerStep": "step",
    "ReduceGrads": "step",
    "RecvActivation": "receive",
    "RecvGrad": "receive",
    "SendActivation": "send",
    "SendGrad": "send",
}
"""DeepSpeed's instructions, by class name."""


class _Layer(Part):
    """A stage as one layer of a ``PipelineModule``, which hands it hidden states and no more."""

    def expect(self, batches: Iterable[dict[str, Tensor]]) -> None:
        """The inputs of the coming step's micro-batches, in order."""
        self._batches = iter(batches)

    def forward(self, entering: Tensor, /, **inputs: Tensor) -> Tensor:
        return super().forward(entering, **inputs, **next(self._batches))


class DeepSpeedPipeline(Rival):
    """DeepSpeed's 1F1B over its own messages, with ZeRO-0 or 1.

    Every rank has the tokens and the mask, so only hidden states and their gradients travel.
    ``bytes_sent`` counts them by shape, once for each instruction to send. DeepSpeed averages the
    loss over all data-parallel ranks and tells every rank.
    """

    def __init__(self, name: str, job: Job, mesh: Mesh, zero_stage: int) -> None:
        super().__init__(name, job, mesh)
        self._rows = lane_size(name, job, mesh)
        spans = job.cut(mesh.pp_size)
        self._world = WholeWorld()
        with self._world.building(job) as deepspeed:
            from deepspeed.pipe import LayerSpec, PipelineModule

            layers = [LayerSpec(_Layer, job, stage, spans) for stage in range(mesh.pp_size)]
            net = PipelineModule(layers, num_stages=mesh.pp_size, partition_method="uniform")
            self._layer: _Layer = net.forward_funcs[0]
            self.engine: Any = deepspeed.initialize(
                model=net,
                optimizer=job.optimizer(net.named_parameters()),
                config=config(
                    job,
                    micro_batch_size=self._rows,
                    accumulation=job.num_micro_batches,
                    zero_stage=zero_stage,
                ),
                dist_init_required=False,
            )[0]
        if mesh.dp_size == 1 and zero_stage == 0:
            # It would flatten, send to itself and copy back all gradients of every step.
            self.engine.pipeline_enable_backward_allreduce = False
        self.engine._INSTRUCTION_MAP = {
            instruction: self._watched(instruction.__name__, work)
            for instruction, work in self.engine._INSTRUCTION_MAP.items()
        }
        self._length = job.sequence_length
        self._done: dict[str, int] = {}

    def _watched(self, instruction: str, work: Callable[..., None]) -> Callable[..., None]:
        """How the engine carries out an instruction, with a clock and a count around it."""
        kind = _KINDS.get(instruction)
        if kind is None:
            return work

        def call(engine: Any, **options: Any) -> None:
            number = self._done[instruction] = self._done.get(instruction, -1) + 1
            with self.doing(kind, self.mesh.pp_rank, -1 if kind == "step" else number):
                work(engine, **options)
            if kind == "send":
                self.bytes_sent += self._payload

        return call

    @property
    def _payload(self) -> int:
        size = 4 if self.job.autocast is None else self.job.autocast.itemsize
        return self._rows * self._length * self.job.hidden_size * size

    def _train_batch(self, inputs: dict[str, Tensor]) -> Tensor | None:
        own = lane(inputs, self.job, self.mesh)
        batches = [
            {key: tensor[at : at + self._rows] for key, tensor in own.items()}
            for at in range(0, len(own["labels"]), self._rows)
        ]
        pairs = iter([(batch["input_ids"], batch["labels"]) for batch in batches])
        length = own["input_ids"].shape[1]
        if length != self._length:
            self._length = length
            self.engine.reset_activation_shape()
        self._layer.expect(batches)
        self._done.clear()
        self.set_lr(self.engine.optimizer)
        with self._world.training():
            loss = self.engine.train_batch(pairs)
        if self.mesh.dp_size > 1:
            self.bytes_sent += ring_bytes(self._layer.parameters(), self.mesh.dp_size)
        return loss

    def parameters(self) -> dict[str, Tensor]:
        return self._layer.body.hf_state_dict()
