"""What every local objective has in common: options, a forward, its own parameters, its cost."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from scpl_ds.objectives._calibration import AddUp

IGNORED_LABEL = -100
"""A row with this label is no anchor, no positive and no negative, as in torch's cross-entropy."""


class GatheredRows(NamedTuple):
    """The rows of all data-parallel ranks of a stage for one micro-batch, in rank order, without
    gradient."""

    features: Tensor
    """[N, D]."""
    labels: Tensor
    """int64, [N]."""
    first: int
    """Where this rank's own rows begin."""
    ranks: int
    """How many ranks there are."""

    def with_own(self, features: Tensor) -> Tensor:
        """The features of all ranks, [N, D], with this rank's own [B, D] in their place, so that
        they get a gradient."""
        after = self.first + len(features)
        return torch.cat([self.features[: self.first], features, self.features[after:]])


GatherRows = Callable[[Tensor, Tensor], GatheredRows]
"""(features [B, D], labels [B]) -> the rows of all ranks; a collective of the stage."""


class StageView(NamedTuple):
    """What an objective may see of one micro-batch. B samples, T positions, D hidden size."""

    hidden_states: Tensor
    """Output of the stage's last layer, not detached, [B, T, D] or [B, D]."""
    block_input: Tensor | None
    """What entered the stage's first layer, without gradient, [B, T, D]; None on the first
    stage."""
    inputs: Mapping[str, Tensor]
    """What the model was given: ids, mask ..."""
    extras: Mapping[str, Tensor]
    """What the objectives of earlier stages sent along."""

    @classmethod
    def of(cls, hidden_states: Tensor, attention_mask: Tensor | None, labels: Tensor) -> StageView:
        """Of an output alone, as on a first stage."""
        inputs = {"labels": labels}
        inputs |= {} if attention_mask is None else {"attention_mask": attention_mask}
        return cls(hidden_states, None, inputs, {})

    @property
    def attention_mask(self) -> Tensor | None:
        """1 for a real position, 0 for padding, [B, T]; None: no padding."""
        return self.inputs.get("attention_mask")

    @property
    def labels(self) -> Tensor:
        """As the collator gives them; usually int64, [B], or [B, T] of a causal language model."""
        return self.inputs["labels"]


class ObjectiveOutput(NamedTuple):
    """What one micro-batch gave: the loss to go backward from, and numbers to log."""

    loss: Tensor
    """Scalar, attached to the graph, float32 (float64 stays float64). The stage averages its
    gradient over the data-parallel ranks, like that of any loss."""
    metrics: dict[str, Tensor]
    """Detached 0-dim tensors, still on the device: reading one waits for the device."""
    extras: dict[str, Tensor] = {}  # noqa: RUF012 - a default that nobody writes to
    """Tensors that the next stages' objectives see; they carry no gradient over."""


class Answer(NamedTuple):
    """What an objective says of one micro-batch in evaluation."""

    logits: Tensor | None = None
    """Scores of the classes, [B, C]; None where the objective cannot classify."""
    extras: dict[str, Tensor] = {}  # noqa: RUF012 - a default that nobody writes to
    """Tensors that the next stages' objectives see; nothing of single samples, which may leave
    between stages (``EarlyExitModel``)."""


class ObjectiveOptions(BaseModel):
    """Base of the options of an objective: the recipe's ``scpl.objective`` without ``name``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


Matrix = Literal["input_embeddings", "output_embeddings"]
"""A matrix of the model, [V, E], that a stage's objective may ask for although the stage does not
own it: the rows by which tokens enter, or those of the language-model head."""


class Objective(nn.Module, abc.ABC):
    """The loss one stage is trained by, with the head it needs.

    An objective is pure maths: it knows no process group, no optimizer and no model. Its parameters
    belong to the stage: they are trained with the stage's layers, saved as
    ``scpl_heads.layer_{last layer of the stage}.*`` and left out of the exported model. Persistent
    buffers are what it remembers of earlier micro-batches: saved with the parameters, but a
    checkpoint that has none, or of another size, still loads, and the memory starts empty. One that
    has such buffers also writes ``commit_step``, ``discard_step`` and ``forget``.

    The parameters are drawn from torch's global generator when the objective is built, in the order
    of the modules; whoever builds it seeds.

    Args:
        options: An instance of this class's ``Options``.
        hidden_size: Width D of the stage's hidden states; None when it is not known.
        num_labels: Number of classes of the task; None when the task has none.
    """

    Options: ClassVar[type[BaseModel]] = ObjectiveOptions
    gather_rows: GatherRows | None = None
    """How to see the rows of the stage's other data-parallel ranks; set by the stage, and None
    where there is only one rank. To be called for every micro-batch of training or for none."""

    def __init__(
        self, options: BaseModel, *, hidden_size: int | None, num_labels: int | None
    ) -> None:
        super().__init__()
        if not isinstance(options, self.Options):
            raise TypeError(
                f"{type(self).__name__} needs options of type {self.Options.__qualname__}, "
                f"got {type(options).__name__}."
            )
        self.hidden_size = hidden_size
        self.num_labels = num_labels
        self.replaces_head = self.trains_last_stage(options)
        """Its answer on the last stage is the model's, in the place of the task head's."""

    @classmethod
    def trains_last_stage(cls, options: BaseModel) -> bool:
        """Whether the last stage's layers learn from it too (the task head then reads detached
        features) unless the recipe says otherwise (``scpl.head.detach_features``)."""
        del options
        return False

    @classmethod
    def looks_ahead(cls, options: BaseModel) -> bool:
        """Whether it means the same behind copies of the next layers (``scpl.lookahead``)."""
        del options
        return True

    @classmethod
    def borrows(cls, options: BaseModel) -> frozenset[Matrix]:
        """Matrices of the model that it needs whichever stage it is on; ``lend`` hands them over.
        Decided by the options alone, so that a stage knows what to load before anything is
        built."""
        del options
        return frozenset()

    def lend(self, weights: Mapping[Matrix, Tensor]) -> None:
        """Called once, right after it was built: before ``attach`` and ``flops``, before anything
        is sharded, moved or cast, and still under the stage's seed. Not called at all when
        ``borrows`` is empty.

        ``weights`` has what ``borrows`` names and the model has, each [V, E]: V tokens, E the
        width of the embedding, which need not be the hidden size. A name that the model has no
        matrix for (no vocabulary) is left out, and the objective refuses then. Every stage with an
        objective is lent the same values, those of the model before training; all data-parallel
        ranks of a stage alike.

        The tensors are the objective's to keep and stay as they are: whoever lends a parameter that
        is trained lends a copy. They are kept as given, without another copy, so that two
        parts of a sum share them: lend them on the stage's device, in the dtype that products with
        them are to be computed in (usually the model's). On ``meta``, or fake, they are enough for
        a plan or an estimate of memory.

        An objective keeps them as non-persistent buffers: not trained, not counted as parameters,
        in no checkpoint and no export. A resumed run is lent them again, from where the
        model's first weights came.

        Raises:
            RecipeError: A matrix is missing, or does not fit the hidden size.
        """
        del weights

    @abc.abstractmethod
    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        """Loss and metrics of one micro-batch.

        Args:
            hidden_states: Output of the stage's last layer, not detached, [B, T, D] or [B, D].
            attention_mask: 1 for a real position, 0 for padding, [B, T]; None: no padding.
            labels: As the collator gives them; usually int64, [B].
        """

    def learn(self, view: StageView) -> ObjectiveOutput:
        """What the stage calls in training. An objective that needs more than the output of the
        stage, its mask and the labels writes this method, and ``forward`` stays for who has only
        those."""
        return self(view.hidden_states, attention_mask=view.attention_mask, labels=view.labels)

    @classmethod
    def can_answer(cls, options: BaseModel) -> bool:
        """Whether ``answer`` gives logits."""
        del options
        return cls.answer is not Objective.answer

    def answer(self, view: StageView) -> Answer:
        """What the stage calls in evaluation, without gradient; there may be no labels."""
        del view
        return Answer()

    def attach(self, body: nn.Module) -> None:
        """Called once, before anything is sharded and still under the stage's seed: the layers
        that this objective trains, with ``start``, ``end``, ``is_first`` and ``is_last``."""

    def see_all_ranks(self, gather: GatherRows | None) -> None:
        """The stage says how to see the rows of its other data-parallel ranks."""
        self.gather_rows = gather

    @classmethod
    def calibrates(cls, options: BaseModel) -> bool:
        """Whether ``calibrate`` is to be called, which needs a model with a language-model head."""
        del options
        return False

    def calibration(self) -> int:
        """How many positions, over all data-parallel ranks, ``calibrate`` wants; 0: it is not
        called."""
        return 0

    def calibrate(self, rows: Tensor, targets: Tensor, add_up: AddUp) -> dict[str, Tensor]:
        """Called once before the first step, unless a checkpoint has this head: what its parameters
        begin as, by name. It may be sharded, so it cannot set them itself.

        Args:
            rows: What this stage makes of positions of the first micro-batches, float32 on the CPU,
                [n, D]; n may differ between data-parallel ranks, and a row may hold NaN.
            targets: What the language-model head reads there, [n, E], at the length at which its
                product with the head's matrix is nearest to the model's scores.
            add_up: Sums over the stage's data-parallel ranks.
        """
        del rows, targets, add_up
        return {}

    def commit_step(self) -> None:
        """The optimizer step is done: what its micro-batches left in the buffers stays."""

    def discard_step(self) -> None:
        """The step will not be finished: the buffers as they were before it."""

    def forget(self) -> None:
        """The buffers as they were at the start of training."""

    @abc.abstractmethod
    def flops(self, batch: int, sequence: int) -> int:
        """Forward FLOPs of this objective for ``batch`` rows of ``sequence`` positions.

        Counted as ``torch.utils.flop_counter`` does (matrix products, two per multiply-add), so
        that it can be added to the FLOPs of the layers when a plan balances the stages.
        """
