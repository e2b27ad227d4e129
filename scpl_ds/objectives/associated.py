"""Associated Learning: each stage meets a code of the label half-way."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, PositiveInt
from torch import Tensor, nn

from scpl_ds.objectives._base import IGNORED_LABEL, Answer, Objective, ObjectiveOutput, StageView
from scpl_ds.objectives._heads import pool
from scpl_ds.objectives._options import (
    PooledOptions,
    need_labels,
    need_size,
    refuse_regression,
    require_classes,
)

_CODE = "label_code"
_DECODER = "label_decoder"


class AssociatedOptions(PooledOptions):
    """Options of ``scpl.objective: {name: associated, ...}``."""

    label_dim: PositiveInt = 128
    """Width of the codes of a label."""


class Associated(Objective):
    """Stage k's pooled output, through a bridge, is to be the code of the label that stage k makes
    of the code before it; a decoder is to make the code before it of that code again.

    With t_0 the one-hot label, f the stage's layers, and everything that enters detached:
    t_k = tanh g_k(t_(k-1)); loss = MSE(tanh b_k(pool(f_k(s))), stopgrad t_k) +
    MSE(tanh h_k(t_k), t_(k-1)), the second cross-entropy of h_1(t_1) at stage 1.
    So the layers and the bridge learn from the first term, encoder
    g and decoder h from the second. A class is found by h_1(h_2(... h_K(b_K(pool(s_K))))), for
    which the decoders' weights travel with the micro-batches of an evaluation.

    The task head of the model is trained on detached features beside it, so that the exported model
    answers too; its accuracy is that of a probe, and the evaluation's that of the codes.

    Source:
        Kao & Chen 2021; Wu et al. 2022 (Hibb-bb/AL, Pipeline-Associated-Learning). No activation on
        h_1, whose scores would be bounded.

    Raises:
        RecipeError: The task has no classes, or a size is not known.
    """

    Options: ClassVar[type[BaseModel]] = AssociatedOptions

    def __init__(
        self, options: AssociatedOptions, *, hidden_size: int | None, num_labels: int | None
    ) -> None:
        super().__init__(options, hidden_size=hidden_size, num_labels=num_labels)
        refuse_regression("associated", num_labels)
        self.options = options
        self.classes = need_labels("associated", num_labels)
        self.size = need_size("associated", hidden_size)
        self.is_first = False

    @classmethod
    def trains_last_stage(cls, options: BaseModel) -> bool:
        del options
        return True

    @classmethod
    def looks_ahead(cls, options: BaseModel) -> bool:
        del options
        return False

    def attach(self, body: nn.Module) -> None:
        """Make bridge, encoder and decoder, which are other ones on the first stage."""
        self.is_first = bool(body.is_first)
        width = self.options.label_dim
        before = self.classes if self.is_first else width
        self.norm = nn.LayerNorm(self.size) if self.options.layer_norm else nn.Identity()
        self.bridge = nn.Linear(self.size, width)
        self.encoder = nn.Linear(before, width)
        self.decoder = nn.Linear(width, before)

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        """As on a first stage: there is no code yet."""
        return self.learn(StageView.of(hidden_states, attention_mask, labels))

    def learn(self, view: StageView) -> ObjectiveOutput:
        """Loss of one micro-batch; metrics: ``bridge_loss`` and ``code_loss``; the code of this
        stage, [B, label_dim], travels on."""
        labels = view.labels
        require_classes("associated", view.hidden_states, labels)
        valid = labels != IGNORED_LABEL  # [B]
        if self.is_first:
            before = F.one_hot(labels.clamp(min=0), self.classes).float()  # [B, C]
        else:
            before = view.extras[_CODE].float()  # [B, label_dim]
        bridged = self._bridged(view)
        code = self._linear(self.encoder, before).tanh()  # [B, label_dim]
        decoded = self._linear(self.decoder, code)
        with torch.autocast(code.device.type, enabled=False):
            code, decoded, bridged = code.float(), decoded.float(), bridged.float()
            bridge_loss = _mean((bridged - code.detach()).square().mean(1), valid)
            if self.is_first:
                rows = F.cross_entropy(
                    decoded, labels, ignore_index=IGNORED_LABEL, reduction="none"
                )
            else:
                rows = (decoded.tanh() - before).square().mean(1)
            code_loss = _mean(rows, valid)
        metrics = {"bridge_loss": bridge_loss.detach(), "code_loss": code_loss.detach()}
        return ObjectiveOutput(bridge_loss + code_loss, metrics, {_CODE: code.detach()})

    def answer(self, view: StageView) -> Answer:
        chain = [
            (view.extras[f"{_DECODER}_{n}.weight"], view.extras[f"{_DECODER}_{n}.bias"])
            for n in range(sum(name.endswith(".weight") for name in view.extras))
        ]
        # Through the module, so that it does not matter how its weights are kept.
        width = self.options.label_dim
        at = view.hidden_states.device
        bias = self._linear(self.decoder, torch.zeros(1, width, device=at)).float()
        weight = self._linear(self.decoder, torch.eye(width, device=at)).float() - bias
        chain.append((weight.T.contiguous(), bias[0]))
        scores = self._bridged(view).float()
        for n, (matrix, offset) in reversed(list(enumerate(chain))):
            scores = F.linear(scores, matrix.float(), offset.float())  # a backend may halve them
            scores = scores if n == 0 else scores.tanh()
        name = f"{_DECODER}_{len(chain) - 1}"
        own = {f"{name}.weight": chain[-1][0], f"{name}.bias": chain[-1][1]}
        return Answer(scores, own)

    def flops(self, batch: int, sequence: int) -> int:
        """Of a stage that is not the first."""
        del sequence
        width = self.options.label_dim
        return 2 * batch * (self.size * width + 2 * width * width)

    def _bridged(self, view: StageView) -> Tensor:
        pooled = pool(view.hidden_states, view.attention_mask, self.options.pooling)
        return self._linear(self.bridge, self.norm(pooled.to(self.bridge.weight.dtype))).tanh()

    @staticmethod
    def _linear(layer: nn.Linear, rows: Tensor) -> Tensor:
        return layer(rows.to(layer.weight.dtype))


def _mean(rows: Tensor, valid: Tensor) -> Tensor:
    return rows.masked_fill(~valid, 0.0).sum() / valid.sum().clamp(min=1)
