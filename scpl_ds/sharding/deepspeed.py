"""``sharding: deepspeed``: one DeepSpeed engine per stage, the stage being DeepSpeed's whole world
(``_deepspeed_world``)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.world import environment
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.errors import RecipeError
from scpl_ds.optim import OptimizerState
from scpl_ds.sharding._base import (
    DTYPES,
    MakeOptimizer,
    StageBackend,
    check_moments,
    load_plain_optimizer_state,
    plain_optimizer_state,
    set_lr,
    trainable,
)
from scpl_ds.sharding._deepspeed_files import write_deepspeed_files
from scpl_ds.sharding._deepspeed_world import stage_world, tell_device


class DeepSpeedBackend(StageBackend):
    """A stage inside a DeepSpeed engine: ZeRO-0, 1, 2 or 3, offloading, fp32, bf16 or fp16.

    The learning rate is set from our own step count before every step, so that stages cannot
    drift apart when one of them skips a step (fp16), and ``gradient_clipping`` is always written
    out (DeepSpeed's own default is 1.0).
    """

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: MakeOptimizer,
        section: DeepSpeedSection,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        super().__init__(module, make_optimizer, section, mesh, device)
        self.start(mesh)
        tell_device(device)
        import deepspeed

        self._zero_stage = section.zero_stage
        self._dtype = DTYPES[section.precision]
        # Before ZeRO-3 leaves of every parameter an empty vector: a group is chosen by its shape.
        optimizer = make_optimizer(trainable(module))
        config = section.engine_config(
            mesh.dp_size, parameters=sum(p.numel() for p in module.parameters())
        )
        # DeepSpeed takes LOCAL_RANK for the number of the GPU: not so where ranks share one, or see
        # only their own. And it compares groups with the launcher's WORLD_SIZE.
        ranks = environment(
            WORLD_SIZE=str(mesh.dp_size),
            RANK=str(mesh.dp_rank),
            LOCAL_RANK=str(device.index or 0),
        )
        # It prints its memory use, and stdout is the user's.
        with ranks, contextlib.redirect_stdout(io.StringIO()):
            try:
                if self._zero_stage == 3:
                    self._take_share(config)
                else:
                    module.to(device)
                self.engine: Any = deepspeed.initialize(
                    model=module,
                    optimizer=optimizer,
                    config=config,
                    dist_init_required=False,
                )[0]
            except (ValueError, NotImplementedError, AssertionError, RuntimeError) as error:
                raise _refused(error) from error
        self.optimizer = self.engine.optimizer
        self._skipped = 0

    @classmethod
    def start(cls, mesh: Mesh) -> None:
        """Import DeepSpeed (seconds) and give it this rank's stage as its world."""
        stage_world(mesh)

    @staticmethod
    def weights_dtype(section: DeepSpeedSection) -> torch.dtype | None:
        """DeepSpeed keeps bf16 or fp16 weights and makes its fp32 copies of them; with ZeRO-3 they
        become that type a parameter at a time."""
        return None if section.zero_stage == 3 else DTYPES[section.precision]

    def _take_share(self, config: dict[str, Any]) -> None:
        """ZeRO-3's shards, made one parameter at a time: no more than one is ever whole here."""
        import deepspeed

        deepspeed.zero.Init(
            module=_OneByOne(self.module, self._dtype),
            data_parallel_group=self.mesh.dp_group,
            config_dict_or_path=config,
            dtype=self._dtype,
        )
        for module in self.module.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)

    # -- training --------------------------------------------------------------------------

    def forward(self, **inputs: Any) -> dict[str, Any]:
        return self.engine(**(inputs if self._dtype == torch.float32 else self._cast(inputs)))

    def _cast(self, value: Any) -> Any:
        """Floating-point inputs in the weights' type; DeepSpeed casts none of them."""
        if isinstance(value, Mapping):
            return {key: self._cast(entry) for key, entry in value.items()}
        if torch.is_tensor(value) and value.is_floating_point():
            return value.to(self._dtype)
        return value

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # Said every time: DeepSpeed's own count would stay off for ever after a discarded step.
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def norm(self) -> Tensor:
        zero = self.optimizer
        if self._zero_stage == 0:  # DeepSpeed keeps no norm in fp32 without ZeRO
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            return torch.nn.utils.get_total_norm(grads)
        from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors

        if hasattr(zero, "scaled_global_norm"):  # ZeRO-1 and 2
            norm = zero.scaled_global_norm() / zero.loss_scale
        elif hasattr(zero, "_get_norm_groups"):  # ZeRO-3
            norm = combine_grad_norm_groups(zero._get_norm_groups()) / zero.loss_scale
        else:  # bf16 with ZeRO-1
            norm = get_global_norm_of_tensors(zero.get_grads_for_norm()[0])
        norm = torch.as_tensor(norm)
        return torch.where(norm >= 0, norm, torch.inf)  # DeepSpeed's word for inf and NaN is -1

    def step(self, lr: float, *, clip_to: float | None = None) -> dict[str, Tensor]:
        set_lr(self.optimizer, lr)
        limit = self.section.gradient_clipping if clip_to is None else clip_to
        norm: Any = None
        if self._zero_stage == 0:
            norm = self.norm()
            if limit > 0:
                torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), limit, norm)
        else:
            self.optimizer.clip_grad = limit
        self.engine.step()
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        metrics = {"grad_norm": torch.as_tensor(norm, dtype=torch.float32)}
        if getattr(self.optimizer, "overflow", False):  # ZeRO skips such steps in fp32 too
            self._skipped += 1
            self.discard()  # with offloading DeepSpeed 0.19.8 keeps the infinite sums
        if self.section.precision == "fp16":
            metrics["loss_scale"] = torch.tensor(float(self.optimizer.loss_scale))
        if self._skipped or self.section.precision == "fp16":
            metrics["skipped_steps"] = torch.tensor(float(self._skipped))
        return metrics

    def discard(self) -> None:
        self.engine.zero_grad()
        if self._zero_stage:
            zero = self.optimizer
            zero.zero_grad()
            for name in ("averaged_gradients", "all_grad_tensors"):
                kept = getattr(zero, name, {})
                for group in kept:  # in place: parameters hold on to this dict
                    kept[group] = None
            if self._zero_stage < 3 and hasattr(zero, "micro_step_id"):
                zero.micro_step_id = -1  # what it is before the first backward of a step

    def close(self) -> None:
        zero = self.optimizer
        self.engine.destroy()  # its hooks keep it, and all it holds, alive for ever
        if self._zero_stage == 3:  # and module globals keep the rest
            zero.optimizer.state.clear()
            parameters: list[Any] = list(self.module.parameters())
            shares = [parameter.ds_tensor for parameter in parameters]
            for tensor in (*_flat_masters(zero), *shares):
                tensor.data = tensor.data.new_empty(0)

    # -- state -----------------------------------------------------------------------------

    def write_own_files(self, folder: Path, tag: str, names: Mapping[str, str]) -> list[Path]:
        return write_deepspeed_files(self.engine, folder, tag, names)

    def parameters_by_name(
        self, names: Collection[str], *, keep: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        tensors, result = self.module.state_dict(keep_vars=True), {}
        for name in names:
            tensor, whole = tensors[name], None
            if self._zero_stage and isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                whole = safe_get_full_fp32_param(tensor)
            if whole is None:
                with self._whole(tensor):
                    whole = tensor.detach().to("cpu", copy=True)
            if keep is None or name in keep:
                whole = whole.detach().to("cpu", copy=True).view(self.shapes[name])
                result[name] = whole.float() if whole.is_floating_point() else whole
        return result

    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, target in self.module.state_dict(keep_vars=True).items():
                if name not in tensors:
                    continue
                with self._whole(target, change=True):
                    target.copy_(tensors[name])
                if self._zero_stage and isinstance(target, nn.Parameter) and target.requires_grad:
                    self._put(target, tensors[name], None)

    def _whole(self, tensor: Tensor, *, change: bool = False) -> Any:
        """A parameter that ZeRO-3 has in pieces, whole for the length of a block."""
        import deepspeed

        rank = 0 if change else None
        pieces = self._zero_stage == 3 and isinstance(tensor, nn.Parameter)
        return deepspeed.zero.GatheredParameters([tensor], modifier_rank=rank, enabled=pieces)

    def _put(self, parameter: nn.Parameter, whole: Tensor, moment: str | None) -> None:
        """Set this rank's share of a parameter's fp32 copy, or of one of its moments."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = whole.to(self.device).float()
        if self._zero_stage < 3:
            if moment is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)
            return
        # DeepSpeed 0.19.8's own setter fails for sizes that do not divide by the ranks.
        zero = self.optimizer
        share, group = zero._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=moment
        )
        size = share.numel()
        flat = F.pad(value.flatten(), (0, size * self.mesh.dp_size - value.numel()))
        share.data.copy_(flat.narrow(0, size * self.mesh.dp_rank, size))
        if zero._swappable_optimizer_subgroup(group):
            zero._optimizer_states_and_gradient_swap_out(group)

    def optimizer_state(self, *, keep: Collection[str] | None = None) -> OptimizerState:
        if not self._zero_stage:
            return plain_optimizer_state(self.module, self.optimizer, keep=keep)
        from deepspeed.utils import safe_get_full_optimizer_state

        scale = float(self.optimizer.loss_scale) if self.section.precision == "fp16" else None
        shards = self.optimizer.optimizer.state
        entries = [entry for entry in shards.values() if entry]
        if not entries:
            return OptimizerState(0, {}, scale)
        _link_states(self.optimizer)
        step = max(int(entry.get("step", 0)) for entry in entries)
        keys = [k for k, v in entries[0].items() if torch.is_tensor(v) and v.dim() > 0]
        moments: dict[str, dict[str, Tensor]] = {key: {} for key in keys}
        for name, parameter in trainable(self.module):
            for key in keys:
                whole = safe_get_full_optimizer_state(parameter, key)
                assert whole is not None, f"DeepSpeed has no {key} for {name}"
                if keep is not None and name not in keep:
                    continue
                moments[key][name] = whole.detach().to("cpu", copy=True).view(self.shapes[name])
        return OptimizerState(step, moments, scale)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        zero = self.optimizer
        if not self._zero_stage:
            load_plain_optimizer_state(self.module, zero, state)
            return
        check_moments(zero.optimizer, state)
        if self.section.precision == "fp16" and state.loss_scale is not None:
            zero.loss_scaler.cur_scale = state.loss_scale
        zero.optimizer.state.clear()
        if not state.moments:
            return
        for flat in _flat_masters(zero):
            entry = {key: torch.zeros_like(flat) for key in state.moments}
            step = torch.tensor(float(state.step), device=flat.device)
            zero.optimizer.state[flat] = {"step": step, **entry}
        _link_states(zero)
        for name, parameter in trainable(self.module):
            for key, by_name in state.moments.items():
                if name in by_name:
                    self._put(parameter, by_name[name], key)


class _OneByOne(nn.Module):
    """Shows ``zero.Init`` a module whose parameters become private memory only when it gets to
    them: until then they are pages of a file, and afterwards shards."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for parameter in self.module.parameters(recurse):
            parameter.data = parameter.data.to(self.dtype, copy=True)
            yield parameter


def _flat_masters(zero: Any) -> list[Tensor]:
    """The fp32 tensors that the inner optimizer keeps its state by."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(zero, name):  # ZeRO-3; ZeRO-1 and 2
            return list(getattr(zero, name))
    return list(zero.fp32_groups_flat_partition)  # bf16 with ZeRO-1


def _link_states(zero: Any) -> None:
    """Point every parameter at its piece of the flat optimizer state.

    DeepSpeed does so after the first step of the *first* parameter group, when the others have no
    state yet, and never again; a restored state it does not know of at all. ZeRO-3 looks it up.
    """
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _refused(error: Exception) -> RecipeError:
    text = str(error).strip().splitlines()
    return RecipeError(
        f"DeepSpeed cannot set this stage up: {text[0] if text else type(error).__name__} "
        "Change the deepspeed section, or try scpl.sharding: fsdp, ddp or none."
    )
