"""Options and checks that several objectives share."""

from __future__ import annotations

from typing import Self

from pydantic import PositiveInt, model_validator
from torch import Tensor

from scpl_ds.errors import RecipeError
from scpl_ds.objectives._base import ObjectiveOptions
from scpl_ds.objectives._heads import Pooling, Projection, ProjectionHead


class PooledOptions(ObjectiveOptions):
    """Options of an objective that looks at one vector a sample."""

    pooling: Pooling = "mean"
    """How a sequence becomes one vector: ``mean`` over its real positions, ``cls`` (the first real
    one), ``last`` (the last real one, for decoders)."""
    layer_norm: bool = True
    """Normalise the pooled vector before the head. Pre-norm models (GPT-2, Llama, ModernBERT, ...)
    hand over a residual stream that nobody has normalised, in which a few features are far larger
    than the rest. false is the paper's setting; its own blocks end in a LayerNorm."""


class HeadOptions(ObjectiveOptions):
    """Options of a head between features and a loss that compares them."""

    projection: Projection = "mlp"
    """Head between the features and the loss; trained with the stage, not exported."""
    projection_dim: PositiveInt | None = None
    """Width of the vectors that are compared. Unset: the model's hidden size."""
    hidden_dim: PositiveInt | None = None
    """Width of the hidden layer of ``mlp``. Unset: the model's hidden size."""

    @model_validator(mode="after")
    def _dims_belong_to_the_projection(self) -> Self:
        if self.projection == "identity" and self.projection_dim is not None:
            raise ValueError(
                f"projection_dim: {self.projection_dim} needs a head, but projection is "
                "'identity'; use projection: linear or mlp, or leave projection_dim out"
            )
        if self.projection != "mlp" and self.hidden_dim is not None:
            raise ValueError(
                f"hidden_dim: {self.hidden_dim} is the hidden layer of an mlp, but projection is "
                f"'{self.projection}'; use projection: mlp, or leave hidden_dim out"
            )
        return self


class ProjectionOptions(HeadOptions, PooledOptions):
    """Options of an objective that compares projected vectors, one a sample."""

    projection: Projection = "mlp"
    """Head between the pooled vector and the loss; trained with the stage, not exported. The
    paper's language experiments use ``identity``."""


class TokenOptions(ObjectiveOptions):
    """Options of an objective that looks at single positions of a text, each with the next token
    for its label."""

    layer_norm: bool = True
    """Normalise a position's features before the head: decoders hand over a residual stream that
    nobody has normalised."""


class TokenHeadOptions(HeadOptions, TokenOptions):
    """Options of an objective that compares projected vectors, one a position."""


def projection_head(
    hidden_size: int | None, options: ProjectionOptions | TokenHeadOptions
) -> ProjectionHead:
    """The head that the options ask for.

    Raises:
        RecipeError: It has parameters, and the hidden size is not known.
    """
    try:
        return ProjectionHead(
            hidden_size,
            projection=options.projection,
            hidden_size=options.hidden_dim,
            output_size=options.projection_dim,
            layer_norm=options.layer_norm,
        )
    except ValueError as error:
        raise RecipeError(
            f"scpl.objective: {error} Use projection: identity with layer_norm: false, or "
            "a model whose config has a hidden_size."
        ) from error


def width_of(head: ProjectionHead, hidden_size: int | None) -> int:
    """Width of what leaves a head; 0 where it is not known."""
    return head.shapes[-1][1] if head.shapes else (hidden_size or 0)


def need_size(name: str, hidden_size: int | None) -> int:
    """The hidden size.

    Raises:
        RecipeError: It is not known.
    """
    if hidden_size is None:
        raise RecipeError(
            f"scpl.objective: {name} has a head with parameters and needs the hidden size, which "
            "is not known. Use a model whose config has a hidden_size."
        )
    return hidden_size


def need_labels(name: str, num_labels: int | None) -> int:
    """The number of classes.

    Raises:
        RecipeError: It is not known.
    """
    if num_labels is None:
        raise RecipeError(
            f"scpl.objective: {name} needs the number of classes. Set model.num_labels, or use a "
            "model whose config has it."
        )
    return num_labels


def refuse_regression(name: str, num_labels: int | None) -> None:
    """
    Raises:
        RecipeError: The task has no classes.
    """
    if num_labels == 1:
        raise RecipeError(
            f"scpl.objective: {name} compares samples by class, but model.num_labels is 1, "
            "which means regression in transformers. Use a classification task "
            "(num_labels: 2 or more), or scpl.objective: early_exit."
        )


def require_classes(name: str, hidden_states: Tensor, labels: Tensor | None) -> None:
    """Check that there is one class a sample.

    Args:
        name: Of the objective, for messages.
        hidden_states: [B, ...].
        labels: Hopefully integer, [B].

    Raises:
        RecipeError: There is not: regression, several labels a sample, a label a token, none.
        ValueError: The number of labels does not fit the hidden states.
    """
    if labels is None:
        raise RecipeError(
            f"scpl.objective: {name} needs the class of every sample, but the batch has no "
            "'labels'. Use a labelled data set."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise RecipeError(
            f"scpl.objective: {name} compares samples by class and needs integer labels, got "
            f"{labels.dtype} of shape {list(labels.shape)}: regression and multi-label targets "
            "have no classes. Use a single-label classification task."
        )
    if labels.ndim != 1:
        raise RecipeError(
            f"scpl.objective: {name} needs one label per sample, [batch], got shape "
            f"{list(labels.shape)}. Labels per token (causal-lm) have no class per sample; use "
            "model.task: sequence-classification."
        )
    if labels.shape[0] != hidden_states.shape[0]:
        raise ValueError(
            f"{name} needs one label per sample, got {labels.shape[0]} labels for "
            f"{hidden_states.shape[0]} rows of hidden states."
        )
