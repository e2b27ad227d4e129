"""What every end-to-end rival gets, and what it must be able to do."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scpl_ds.distributed.mesh import Mesh
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.errors import RecipeError
from scpl_ds.optim import build_optimizer
from scpl_ds.partition.stage_module import StageModule
from scpl_ds.timeline import Kind, Timeline

Spans = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Job:
    """One model and how it is trained: the same for every rival."""

    make_body: Callable[[int, int], StageModule]
    """Layers ``[start, end)`` of the model, with tensors of their own, equal whatever the cut."""
    cut: Callable[[int], Spans]
    """Number of stages -> first layer, and one past the last, of each."""
    hidden_size: int
    num_micro_batches: int
    """Micro-batches (M) of an optimizer step."""
    micro_batch_size: int
    """Samples (B) of a micro-batch; data-parallel ranks of a stage share them."""
    sequence_length: int
    """Positions (T) of the first batch; later ones may have others."""
    lr: float
    device: torch.device
    autocast: torch.dtype | None = None
    """Type that products are computed in, and hidden states are sent in; None is fp32."""
    adam: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """More parameters of AdamW: ``betas``, ``eps``, ``weight_decay``."""
    lr_at: Callable[[int], float] | None = None
    """Learning rate of each optimizer step, 0-based, in the place of ``lr``."""
    keep_spans: bool = False
    """Keep every action in ``Rival.timeline``, for a trace."""

    @property
    def rows(self) -> int:
        """Samples of an optimizer step."""
        return self.num_micro_batches * self.micro_batch_size

    def optimizer(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Torch's fused AdamW over the trainable ones of ``named``."""
        params = {"lr": self.lr, **self.adam}
        return build_optimizer(
            named, DeepSpeedSection({"optimizer": {"type": "AdamW", "params": params}})
        )


class Part(nn.Module):
    """A stage with gradients across its boundaries, as pipeline libraries want it: one tensor in,
    one tensor out."""

    def __init__(self, job: Job, stage: int, spans: Spans) -> None:
        super().__init__()
        self.body = job.make_body(*spans[stage]).to(job.device).train()
        self.stage = stage
        self._autocast = job.autocast

    def forward(self, entering: Tensor, /, **inputs: Tensor) -> Tensor:
        """
        Args:
            entering: Hidden states [B, T, D]; on the first stage anything, for it is not looked at.
            **inputs: ``input_ids`` and perhaps ``attention_mask`` [B, T], ``labels`` [B].

        Returns:
            Hidden states [B, T, D], in ``Job.autocast``'s type if there is one; on the last stage
            HF's loss, a scalar in fp32.
        """
        body, half = self.body, self._autocast
        with torch.autocast(entering.device.type, dtype=half, enabled=half is not None):
            output = body(inputs, None if body.is_first else entering)
        if body.is_last:
            assert output.loss is not None, "labels are among the inputs"
            return output.loss.float()
        hidden = output.hidden_states
        return (hidden if half is None else hidden.to(half)).contiguous()


class Rival(abc.ABC):
    """Trains a whole model by backpropagation, on all ranks together.

    A new rival is a subclass and an entry in ``RIVALS``. Whoever makes one also makes its process
    groups, so all ranks make the same rivals in the same order.
    """

    bytes_sent: int
    """Payload that this rank has sent so far, in bytes: hidden states and gradients over
    boundaries, and for averaging gradients what a ring has every rank send."""

    def __init__(self, name: str, job: Job, mesh: Mesh) -> None:
        """
        Raises:
            RecipeError: This rival cannot run these numbers of ranks and micro-batches.
        """
        self.name, self.job, self.mesh = name, job, mesh
        self.timeline = Timeline(keep=job.keep_spans, device=job.device)
        """``forward`` and ``backward`` (a collective inside them included), ``step``; inside
        ``train_batch`` everything else counts as ``receive``: waiting for other ranks, and the
        library's own bookkeeping."""
        self.bytes_sent = 0
        self.steps = 0
        """Optimizer steps taken."""
        self._gap: float | None = None

    def train_batch(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """One optimizer step.

        Args:
            inputs: ``input_ids``, ``attention_mask`` [M * B, T] and ``labels`` [M * B], the same on
                every rank, on its device.

        Returns:
            Mean loss, on the ranks that have it; of data-parallel ranks, each the mean of its own
            samples.
        """
        rows = len(inputs["input_ids"])
        if rows != self.job.rows:
            raise RecipeError(
                f"{self.name}: a step has {self.job.num_micro_batches} micro-batches x "
                f"{self.job.micro_batch_size} = {self.job.rows} samples, but {rows} were given."
            )
        self._gap = self.timeline.begin("receive")
        loss = self._train_batch(_without_idle_mask(inputs))
        self._close_gap("receive")
        self._gap = None
        self.steps += 1
        return None if loss is None else loss.detach()

    @abc.abstractmethod
    def _train_batch(self, inputs: dict[str, Tensor]) -> Tensor | None: ...

    @abc.abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """What this rank owns (persistent buffers too), by full Hugging Face name; detached, and
        shared with the model."""

    def finish(self) -> None:
        """Return when all that this rank was told to do is done."""
        if self.job.device.type == "cuda":
            torch.cuda.synchronize(self.job.device)

    # -- for subclasses --------------------------------------------------------------------

    @contextlib.contextmanager
    def doing(self, kind: Kind, stage: int = 0, micro_batch: int = -1) -> Iterator[None]:
        """Around one action of a step; what passed since the last one was waiting."""
        self._close_gap("receive")
        start = self.timeline.begin(kind)
        yield
        self.timeline.end(kind, start, stage=stage, step=self.steps, micro_batch=micro_batch)
        self._gap = self.timeline.begin("receive")

    def _close_gap(self, kind: Kind) -> None:
        if self._gap is not None:
            self.timeline.end(kind, self._gap, stage=-1, step=self.steps, micro_batch=-1)

    def set_lr(self, optimizer: Any) -> None:
        """Give every parameter group the learning rate of the coming step."""
        if self.job.lr_at is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.job.lr_at(self.steps)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the step, and forget the gradients."""
        with self.doing("step"):
            self.set_lr(optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def lane_size(name: str, job: Job, mesh: Mesh) -> int:
    """Rows of each micro-batch that one of a stage's data-parallel ranks takes.

    Raises:
        RecipeError: They cannot all take as many.
    """
    rows, rest = divmod(job.micro_batch_size, mesh.dp_size)
    if rest or not rows:
        raise RecipeError(
            f"{name}: {mesh.dp_size} data-parallel ranks cannot share a micro-batch of "
            f"{job.micro_batch_size} evenly. Use a multiple of {mesh.dp_size}."
        )
    return rows


def lane(inputs: dict[str, Tensor], job: Job, mesh: Mesh) -> dict[str, Tensor]:
    """This data-parallel rank's rows of every micro-batch, [M * B / data-parallel ranks, ...]."""
    if mesh.dp_size == 1:
        return inputs
    size = job.micro_batch_size // mesh.dp_size
    first = mesh.dp_rank * size
    batches = (job.num_micro_batches, job.micro_batch_size)
    return {
        key: tensor.unflatten(0, batches)[:, first : first + size].flatten(0, 1)
        for key, tensor in inputs.items()
    }


def ring_bytes(parameters: Iterable[nn.Parameter], ranks: int) -> int:
    """What every rank sends when a ring of them averages these parameters' gradients."""
    size = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    return round(2 * (ranks - 1) / ranks * size)


def _without_idle_mask(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without a mask that hides nothing: attention is faster then."""
    mask = inputs.get("attention_mask")
    if mask is None or not bool(mask.all()):
        return inputs
    return {key: tensor for key, tensor in inputs.items() if key != "attention_mask"}
