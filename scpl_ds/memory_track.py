"""How much memory one forward and backward of a stage takes, watched on tensors without values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from scpl_ds.sharding._footprint import Moment


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the block that are still alive.

    Every storage counts once, whatever views it has, from the operation that made it until nobody
    holds it. Works on real tensors and under ``FakeTensorMode``. What a kernel allocates inside
    itself is not seen.

    torch's own ``MemTracker`` reports each module's peak; here the whole course is needed, with
    gradients apart, because a sharding backend keeps activations but not all gradients.

    Args:
        known: Tensors that were there before and do not count: parameters, buffers, inputs.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.gradients = 0
        """How much of ``live`` is gradients of parameters, as ``watch`` was told."""
        self.moments: list[Moment] = []
        """The instants at which more was live than at any other with as many gradients."""
        self._sizes: dict[int, int] = {}
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._gradient_keys: set[int] = set()
        self._known = [tensor.untyped_storage() for tensor in known]
        self._ignored = {storage._cdata for storage in self._known}

    @property
    def peak(self) -> int:
        return max((m.activations + m.gradients for m in self.moments), default=0)

    def watch(self, module: nn.Module) -> list[Any]:
        """Count what becomes the gradient of a parameter as gradients; returns hooks to remove."""

        def gradient(parameter: Tensor) -> None:
            assert parameter.grad is not None
            key = parameter.grad.untyped_storage()._cdata
            if key in self._sizes and key not in self._gradient_keys:
                self._gradient_keys.add(key)
                self.gradients += self._sizes[key]
                self._note()

        return [
            parameter.register_post_accumulate_grad_hook(gradient)
            for parameter in module.parameters()
            if parameter.requires_grad
        ]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._refs or key in self._ignored:
            return
        self._sizes[key] = storage.nbytes()
        self._refs[key] = weakref.ref(storage, self._forget(key))
        self.live += self._sizes[key]
        self._note()

    def _forget(self, key: int) -> Callable[[Any], None]:
        def gone(reference: Any) -> None:
            size = self._sizes.pop(key)
            del self._refs[key]
            self.live -= size
            if key in self._gradient_keys:
                self._gradient_keys.discard(key)
                self.gradients -= size

        return gone

    def _note(self) -> None:
        now = Moment(self.live - self.gradients, self.gradients)
        if self.moments and self.moments[-1].gradients == now.gradients:
            if self.moments[-1].activations < now.activations:
                self.moments[-1] = now
        else:
            self.moments.append(now)


class FusedAttention(TorchFunctionMode):
    """Attention as a GPU computes it. On the CPU torch has no fused kernel with dropout and keeps
    two [B, heads, T, T] matrices a layer instead; without dropout it has one."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)
