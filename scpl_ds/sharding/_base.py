"""What a sharding backend does for one stage: run it, train it, and give its state back by name."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scpl_ds.distributed.mesh import Mesh
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.errors import CheckpointError
from scpl_ds.optim import LR_FACTOR, OptimizerState, moment_names

MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""``DeepSpeedSection.precision`` -> torch's name."""


class StageBackend(abc.ABC):
    """One stage's module over the data-parallel ranks that share it.

    A new backend is one file with a subclass and one line in ``registry.py``. Nothing in it may
    wait for another stage: every collective runs in ``mesh.dp_group``.

    The module comes on the CPU, its tensors perhaps still in a file (mapped, read when touched): a
    backend puts it on ``device``, and one that shards takes its share without holding the rest.
    """

    optimizer: Any
    """Torch's optimizer, or what the backend made of it."""

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: MakeOptimizer,
        section: DeepSpeedSection,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        """
        Args:
            module: The stage; its forward returns a dict with a scalar ``loss``.
            make_optimizer: Called once, with the named trainable parameters, when they are what
                is going to be trained.
            section: The recipe's ``deepspeed`` section, with nothing left to fill in.
        """
        del make_optimizer
        self.module, self.section = module, section
        self.mesh, self.device = mesh, device
        self.shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        """Whole shapes of parameters and persistent buffers, before anything was sharded."""

    @classmethod
    def start(cls, mesh: Mesh) -> None:
        """Load what the backend needs in this process, before any stage is made."""
        del mesh  # most need nothing

    @staticmethod
    def weights_dtype(section: DeepSpeedSection) -> torch.dtype | None:
        """What a checkpoint should be read as: the type that this backend keeps weights in. None:
        as it is, because the backend makes it that type itself, piece by piece."""
        del section
        return torch.float32

    @abc.abstractmethod
    def forward(self, **inputs: Any) -> dict[str, Any]:
        """The module's forward, through whatever the backend puts around it."""

    @abc.abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradients, scaled by 1 / gradient_accumulation_steps.

        ``last``: it is the step's last micro-batch; a backend may begin to average gradients.
        """

    @abc.abstractmethod
    def norm(self) -> Tensor:
        """After the last backward of a step: the norm of this stage's gradients, averaged over the
        data-parallel ranks, not scaled, not clipped; not finite if the step will be skipped.

        0-dim, equal on all ranks of the stage. At most once a step, and only before ``step``.
        """

    @abc.abstractmethod
    def step(self, lr: float, *, clip_to: float | None = None) -> dict[str, Tensor]:
        """After the last backward of a step: average the gradients over the data-parallel ranks,
        clip, update, forget them.

        A step whose gradients overflowed (fp16) is skipped; other stages know nothing of it.

        Args:
            lr: Learning rate of this step.
            clip_to: Largest norm of this stage's gradients, in the place of the section's;
                ``norm`` was called before. 0 is off.

        Returns:
            0-dim metrics: ``grad_norm`` (before clipping), in fp16 ``loss_scale`` and
            ``skipped_steps`` (so far).
        """

    @abc.abstractmethod
    def discard(self) -> None:
        """Forget the gradients of a step that will not be finished."""

    @abc.abstractmethod
    def parameters_by_name(
        self, names: Collection[str], *, keep: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Whole fp32 parameters and persistent buffers of those names, on the CPU (a collective of
        the stage). With ``keep``, this rank gets those only, and never has room for the rest."""

    @abc.abstractmethod
    def optimizer_state(self, *, keep: Collection[str] | None = None) -> OptimizerState:
        """Whole optimizer state on the CPU (a collective of the stage); with ``keep``, this rank
        gets the moments of those parameters only."""

    @abc.abstractmethod
    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Put back what ``optimizer_state`` gave; parameters without an entry start from zero."""

    def close(self) -> None:  # noqa: B027 - most have nothing else that holds on to it
        """Let go of the module and its memory; nothing is asked of this backend afterwards."""

    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Set parameters and buffers by name; names that are absent keep their value."""
        with torch.no_grad():
            for name, target in self.module.state_dict(keep_vars=True).items():
                if name in tensors:
                    self.put(target, tensors[name])

    def put(self, target: Tensor, whole: Tensor) -> None:
        """Set what this rank has of a parameter or buffer; called without autograd."""
        target.copy_(whole)


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The named parameters that a stage trains."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def set_lr(optimizer: Any, lr: float) -> None:
    """Give every parameter group its learning rate for the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_FACTOR, 1.0)


def copy_on_cpu(tensor: Tensor) -> Tensor:
    """A copy of its own on the CPU, without autograd."""
    return tensor.detach().to("cpu", copy=True)


def copy_beside(parameter: Tensor, whole: Tensor) -> Tensor:
    """A copy of a moment where its parameter is."""
    return whole.to(parameter.device, parameter.dtype, copy=True)


def plain_optimizer_state(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    keep: Collection[str] | None = None,
) -> OptimizerState:
    """The state of a torch optimizer, by parameter name, copied; ``whole`` puts one tensor of it
    together, and is called for those too that are not in ``keep``."""
    step, moments = 0, {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key == "step":
                step = max(step, int(value))
            elif torch.is_tensor(value):
                tensor = whole(value)
                if keep is None or name in keep:
                    moments.setdefault(key, {})[name] = copy_on_cpu(tensor)
    return OptimizerState(step, moments)


def check_moments(optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
    """Refuse the memory of another optimizer; an empty one (no step taken yet) fits all.

    Raises:
        CheckpointError: ``optimizer`` keeps something else than ``state`` holds.
    """
    found, kept = frozenset(state.moments), moment_names(optimizer)
    if not found or kept is None or found == kept:
        return
    raise CheckpointError(
        f"the checkpoint's optimizer state has {_listed(found)}, but {type(optimizer).__name__} "
        f"keeps {_listed(kept)} as set up here: it is of another optimizer. Use the optimizer of "
        "the run that saved it, or load_checkpoint(..., load_optimizer_states=False)."
    )


def _listed(names: Iterable[str]) -> str:
    *most, last = sorted(names) or ["nothing"]
    return f"{', '.join(most)} and {last}" if most else last


def load_plain_optimizer_state(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: OptimizerState,
    *,
    beside: Callable[[Tensor, Tensor], Tensor] = copy_beside,
) -> None:
    """Inverse of ``plain_optimizer_state``; ``beside(parameter, whole)`` makes one moment."""
    check_moments(optimizer, state)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    optimizer.state.clear()
    for name, parameter in module.named_parameters():
        if id(parameter) not in trained:
            continue
        if not any(name in by_name for by_name in state.moments.values()):
            continue  # a head that starts afresh: with an old step count it would leap
        # Fused optimizers want the count where the parameter is, the others on the CPU.
        fused = any(group.get("fused") for group in optimizer.param_groups)
        count = torch.tensor(float(state.step), device=parameter.device if fused else "cpu")
        entry: dict[str, Any] = {"step": count}
        for key, by_name in state.moments.items():
            whole = by_name.get(name)
            entry[key] = torch.zeros_like(parameter) if whole is None else beside(parameter, whole)
        optimizer.state[parameter] = entry
