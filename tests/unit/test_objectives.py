"""The maths of every objective beside supcon, against formulas written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scpl_ds.errors import RecipeError
from scpl_ds.objectives._base import Answer, Objective, StageView
from scpl_ds.objectives._probe import Probe
from scpl_ds.objectives._targets import cosines, similarity_loss, task_loss
from scpl_ds.objectives.deinforeg import deinforeg_terms
from scpl_ds.partition.stage_module import StageOutput
from scpl_ds.recipe_scpl import ObjectiveChoice

D, C, B, T = 12, 3, 7, 5
SIZES: dict[str, Any] = {"hidden_size": D, "num_labels": C}
ALL: dict[str, Any] = {
    "supcon": "supcon",
    "dascpl": "dascpl",
    "early_exit": "early_exit",
    "associated": {"name": "associated", "label_dim": 6},
    "deinforeg": "deinforeg",
    "deinforeg apart": {"name": "deinforeg", "merge": False, "projection": "mlp"},
    "predsim": "predsim",
    "sum": [{"name": "supcon"}, {"name": "reconstruction", "weight": 0.5}],
    "input": [{"name": "early_exit"}, {"name": "reconstruction", "target": "input"}],
}
CLASSIFY = ("dascpl", "early_exit", "associated", "deinforeg", "deinforeg apart", "predsim")


class Block(torch.nn.Module):
    """A body of one linear layer."""

    start, end, is_last, hidden_size = 0, 1, False, D

    def __init__(self, *, is_first: bool = True) -> None:
        super().__init__()
        self.is_first = is_first
        self.layer = torch.nn.Linear(D, D)

    def forward(
        self, inputs: dict[str, Tensor], hidden_states: Tensor | None, **_: Any
    ) -> StageOutput:
        entering = inputs["entering"] if hidden_states is None else hidden_states
        return StageOutput(self.layer(entering), None, None)


def make(asked: Any, block: Block | None = None) -> Objective:
    torch.manual_seed(0)
    objective: Objective = ObjectiveChoice.model_validate(asked).create(**SIZES)
    objective.attach(block or Block())
    return objective


def view(*, rows: int = B, seed: int = 1, **inputs: Tensor) -> StageView:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, T, D, generator=generator, requires_grad=True)
    entering = torch.randn(rows, T, D, generator=generator)
    mask = torch.ones(rows, T, dtype=torch.int64)
    mask[1:, 3:] = 0
    labels = torch.arange(rows) % C
    given = {"attention_mask": mask, "labels": labels, "entering": entering}
    return StageView(hidden, entering, {**given, **inputs}, {})


@pytest.mark.parametrize("name", ALL)
def test_loss_and_gradient_are_finite_for_hard_batches(name: str):
    """One row, rows of no class, fully padded rows holding NaN."""
    objective = make(ALL[name])
    padded = view()
    mask = padded.inputs["attention_mask"].clone()
    mask[2] = 0
    nowhere = padded.hidden_states.detach().masked_fill(~mask.bool()[..., None], float("nan"))
    no_class = torch.full((B,), -100)
    some = no_class.clone()
    some[:2] = torch.tensor([0, 1])
    for case in (
        view(rows=1),
        view(labels=no_class),
        view(labels=some),
        view(attention_mask=mask)._replace(hidden_states=nowhere.requires_grad_()),
    ):
        objective.zero_grad()
        output = objective.learn(case)
        output.loss.backward()
        assert torch.isfinite(output.loss) and output.loss.ndim == 0
        assert case.hidden_states.grad is not None
        assert torch.isfinite(case.hidden_states.grad).all()
        assert all(torch.isfinite(value).all() for value in output.metrics.values())
        assert not any(value.requires_grad for value in output.metrics.values())
        assert not any(value.requires_grad for value in output.extras.values())


@pytest.mark.parametrize("name", ALL)
def test_what_is_padded_has_no_influence(name: str):
    objective = make(ALL[name])
    first = view()
    mask = first.inputs["attention_mask"].bool()
    noise = torch.randn(B, T, D)
    other = torch.where(mask[..., None], first.hidden_states.detach(), noise).requires_grad_()
    second = first._replace(hidden_states=other)
    a, b = objective.learn(first).loss, objective.learn(second).loss
    assert a.item() == pytest.approx(b.item(), rel=1e-6)
    b.backward()
    assert other.grad is not None and float(other.grad[~mask].abs().max()) == 0


@pytest.mark.parametrize("name", ALL)
def test_only_objectives_that_can_classify_answer(name: str):
    answer = make(ALL[name]).answer(view())
    classifies = name in CLASSIFY or name == "input"
    assert (answer.logits is not None) == classifies
    assert ObjectiveChoice.model_validate(ALL[name]).can_answer() == classifies
    if answer.logits is not None:
        assert answer.logits.shape == (B, C)


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("input",)])
def test_a_regression_is_refused_by_what_compares_classes(name: str):
    choice = ObjectiveChoice.model_validate(ALL[name])
    sizes = {"hidden_size": D, "num_labels": 1}
    if name == "early_exit":
        head = choice.create(**sizes)
        given = view(labels=torch.randn(B))
        scores = head.answer(given).logits
        assert scores is not None
        wanted = (scores[:, 0] - given.labels).square().mean()
        assert head.learn(given).loss.item() == pytest.approx(wanted.item())
        return
    with pytest.raises(RecipeError, match="regression"):
        choice.create(**sizes)


def test_early_exit_is_cross_entropy_of_a_tanh_classifier_on_the_mean():
    objective, given = make({"name": "early_exit", "layer_norm": False}), view()
    mask = given.inputs["attention_mask"][..., None]
    pooled = (given.hidden_states * mask).sum(1) / mask.sum(1)
    state = dict(objective.classifier.named_parameters())
    hidden = torch.tanh(F.linear(pooled, state["hidden.0.weight"], state["hidden.0.bias"]))
    scores = F.linear(hidden, state["out.weight"], state["out.bias"])
    wanted = F.cross_entropy(scores, given.labels)
    assert objective.learn(given).loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    answer = objective.answer(given).logits
    assert answer is not None
    torch.testing.assert_close(answer, scores)


def test_several_labels_a_sample_are_binary_cross_entropy():
    objective = make("early_exit")
    given = view(labels=torch.randint(0, 2, (B, C)).float())
    scores = objective.answer(given).logits
    assert scores is not None
    wanted = F.binary_cross_entropy_with_logits(scores, given.labels)
    assert objective.learn(given).loss.item() == pytest.approx(wanted.item())


def test_labels_that_fit_no_loss_are_refused():
    with pytest.raises(RecipeError, match=r"shape \[7, 5\] do not fit 3 scores"):
        task_loss(torch.randn(B, C), torch.zeros(B, T, dtype=torch.int64))


def test_dascpl_teaches_the_layers_what_supcon_alone_does():
    alone, beside, given = make("supcon"), make("dascpl"), view()
    beside.head.load_state_dict(alone.head.state_dict())
    wanted = torch.autograd.grad(alone.learn(given).loss, given.hidden_states)[0]
    found = torch.autograd.grad(beside.learn(given).loss, given.hidden_states)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    beside.learn(given).loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for p in beside.classifier.parameters()
    )


def test_similarities_are_those_of_centred_one_hot_rows():
    labels = torch.tensor([0, 1, 2, 1])
    one_hot = F.one_hot(labels, C).double()
    wanted = torch.where(labels[:, None] == labels[None], 1.0, -1 / (C - 1)).double()
    torch.testing.assert_close(cosines(one_hot), wanted)
    assert similarity_loss(one_hot, labels, C).item() == pytest.approx(0, abs=1e-12)


def test_deinforeg_terms_are_the_authors():
    """Formulas of the authors' code (ianzih, DeInfoReg), in fp64."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(B, D, generator=generator, dtype=torch.float64)
    labels = torch.arange(B) % C
    z = F.normalize(features, dim=1)
    centred = z - z.mean(0)
    covariance = centred.T @ centred / B
    off = covariance[~torch.eye(D, dtype=torch.bool)].square().sum() / D
    rows = z - z.mean(1, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True)
    target = torch.where(labels[:, None] == labels[None], 1.0, -1 / (C - 1)).double()
    invariance = F.mse_loss((rows @ rows.T).clamp(-1, 1), target)
    spread = (z.var(0) + 1e-7).sqrt()
    variance = torch.relu(1 - spread).mean() / B
    found = deinforeg_terms(features, labels, C)
    for term, wanted in zip(found, (variance, invariance, off), strict=True):
        assert term.item() == pytest.approx(wanted.item(), rel=1e-12)


def test_predsim_weighs_similarity_and_cross_entropy():
    given = view()
    parts = [
        make({"name": "predsim", "similarity": share}).learn(given).loss for share in (0.0, 1.0)
    ]
    whole = make({"name": "predsim", "similarity": 0.99}).learn(given).loss
    assert whole.item() == pytest.approx((0.01 * parts[0] + 0.99 * parts[1]).item(), rel=1e-5)


def linear(layer: torch.nn.Module, rows: Tensor) -> Tensor:
    assert isinstance(layer, torch.nn.Linear)
    return rows @ layer.weight.T + layer.bias


def test_associated_is_bridge_and_autoencoder_with_the_code_handed_on():
    asked = {"name": "associated", "label_dim": 6, "layer_norm": False}
    first, second = make(asked), make(asked, Block(is_first=False))
    given = view()
    mask = given.inputs["attention_mask"][..., None]
    pooled = (given.hidden_states * mask).sum(1) / mask.sum(1)
    t0 = F.one_hot(given.labels, C).float()
    t1 = linear(first.encoder, t0).tanh()
    wanted = F.mse_loss(linear(first.bridge, pooled).tanh(), t1.detach())
    wanted = wanted + F.cross_entropy(linear(first.decoder, t1), given.labels)
    output = first.learn(given)
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(output.extras["label_code"], t1.detach())

    t2 = linear(second.encoder, t1.detach()).tanh()
    wanted = F.mse_loss(linear(second.bridge, pooled).tanh(), t2.detach())
    wanted = wanted + F.mse_loss(linear(second.decoder, t2).tanh(), t1.detach())
    found = second.learn(given._replace(extras=output.extras))
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_associated_keeps_layers_and_autoencoder_apart():
    objective, given = make({"name": "associated", "label_dim": 6}), view()
    output = objective.learn(given)
    output.loss.backward()
    encoder, bridge = objective.encoder.weight.grad, objective.bridge.weight.grad
    objective.zero_grad()
    assert given.hidden_states.grad is not None
    again = view()
    code_loss = F.cross_entropy(
        linear(
            objective.decoder, linear(objective.encoder, F.one_hot(again.labels, C).float()).tanh()
        ),
        again.labels,
    )
    code_loss.backward()
    torch.testing.assert_close(encoder, objective.encoder.weight.grad)
    assert bridge.abs().max() > 0


def test_associated_answers_through_the_chain_of_decoders():
    asked = {"name": "associated", "label_dim": 6}
    first, second = make(asked), make(asked, Block(is_first=False))
    given = view()
    extras: dict[str, Tensor] = {}
    answers: list[Answer] = []
    for objective in (first, second):
        answers.append(objective.answer(given._replace(extras=extras)))
        extras = {**extras, **answers[-1].extras}
    bridged = second._bridged(given)
    wanted = linear(first.decoder, linear(second.decoder, bridged).tanh())
    assert answers[1].logits is not None
    torch.testing.assert_close(answers[1].logits, wanted, rtol=1e-5, atol=1e-6)


def test_reconstruction_starts_at_zero_and_grows_as_the_block_moves():
    block = Block(is_first=False)
    objective, given = make("reconstruction", block), view()
    assert given.block_input is not None
    same = given._replace(hidden_states=block({}, given.block_input).hidden_states)
    assert objective.learn(same).loss.item() == 0
    with torch.no_grad():
        block.layer.bias.add_(1.0)
    moved = given._replace(hidden_states=block({}, given.block_input).hidden_states)
    mask = given.inputs["attention_mask"][..., None]
    target = moved.hidden_states - 1
    wanted = mask.expand_as(target).sum() / (target.square() * mask).sum()
    assert objective.learn(moved).loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert not list(objective.parameters()) and not objective.state_dict()


def test_reconstruction_of_the_input_has_none_on_the_first_stage():
    objective = make({"name": "reconstruction", "target": "input"})
    given = view()._replace(block_input=None)
    output = objective.learn(given)
    output.loss.backward()
    assert output.loss.item() == 0 and not given.hidden_states.grad.any()


def test_a_sum_is_the_weighted_sum_of_its_parts():
    given = view()
    whole = make([{"name": "supcon", "weight": 0.5}, {"name": "early_exit", "weight": 2.0}])
    output = whole.learn(given)
    parts = output.metrics["supcon_loss"], output.metrics["early_exit_loss"]
    assert output.loss.item() == pytest.approx((0.5 * parts[0] + 2 * parts[1]).item(), rel=1e-6)
    assert {"valid_anchor_fraction", "exit_accuracy"} <= set(output.metrics)
    assert whole.flops(4, 8) == sum(part.flops(4, 8) for part in whole.parts)
    assert whole.answer(given).logits is not None


def test_in_a_sum_the_codes_answer_before_a_classifier():
    block = Block()
    block.is_last = True
    parts = [{"name": "early_exit"}, {"name": "associated", "label_dim": 8}]
    whole = make(parts, block)
    given = view()
    extras = whole.learn(given).extras
    given = given._replace(extras=extras)
    codes, classifier = whole.parts[1].answer(given), whole.parts[0].answer(given)
    assert codes.logits is not None and classifier.logits is not None
    torch.testing.assert_close(whole.answer(given).logits, codes.logits, rtol=0, atol=0)


def test_a_sum_tells_its_parts_when_a_step_is_done_or_dropped():
    whole = make([{"name": "supcon", "feature_queue": 4}, {"name": "early_exit"}])
    queue = whole.parts[0].queue
    whole.learn(view())
    whole.discard_step()
    assert (queue.labels == -100).all()
    whole.learn(view())
    whole.commit_step()
    whole.discard_step()
    assert (queue.labels != -100).all()
    whole.forget()
    assert (queue.labels == -100).all()


def test_a_probe_finds_classes_that_lie_apart_and_rank_one_features():
    labels = torch.arange(40) % 2
    apart, flat = Probe(), Probe()
    noise = torch.randn(40, T, D, generator=torch.Generator().manual_seed(1))
    centre = torch.zeros(40, 1, D)
    centre[:, 0, 0] = 20.0 * labels - 10
    apart.add(noise * 0.1 + centre, None, labels)
    line = torch.linspace(-1, 1, 40)[:, None, None].expand(40, T, D)
    flat.add(line, None, labels)
    found = apart.describe()
    assert found["nearest_class_accuracy"] == 1.0
    assert found["alignment"] < 0.01 and found["uniformity"] < 0
    assert flat.describe()["feature_rank"] == pytest.approx(1.0, abs=1e-3)
    isotropic = Probe()
    isotropic.add(torch.randn(2000, D), None, torch.zeros(2000, dtype=torch.int64))
    assert isotropic.describe()["feature_rank"] > 0.95 * D


def test_a_probe_leaves_out_rows_without_a_class_and_says_nothing_of_too_few():
    probe = Probe()
    probe.add(torch.randn(3, D), None, torch.tensor([0, -100, 1]))
    assert probe.describe() == {}
    probe.add(torch.randn(3000, D), None, torch.arange(3000) % 3)
    probe.add(torch.randn(10, D), None, torch.arange(10) % 3)
    assert sum(len(rows) for rows in probe._rows) == 2048


def test_one_score_a_sample_is_a_regression_whatever_shape_its_labels_have():
    scores, labels = torch.randn(B, 1), torch.randn(B)
    wanted = F.mse_loss(scores[:, 0], labels)
    for given in (labels, labels[:, None]):
        assert task_loss(scores, given).item() == pytest.approx(wanted.item())


def test_padding_that_holds_nan_does_not_reach_a_reconstruction():
    for asked in ("reconstruction", {"name": "reconstruction", "target": "input"}):
        objective, given = make(asked, Block(is_first=False)), view()
        mask = given.inputs["attention_mask"].bool()
        broken = torch.where(mask[..., None], given.hidden_states.detach(), torch.nan)
        broken.requires_grad_()
        loss = objective.learn(given._replace(hidden_states=broken)).loss
        loss.backward()
        assert torch.isfinite(loss)
        assert broken.grad is not None and torch.isfinite(broken.grad[mask]).all()


def test_parts_of_one_name_keep_their_metrics_apart():
    whole = make([{"name": "supcon"}, {"name": "supcon", "temperature": 1.0}])
    metrics = whole.learn(view()).metrics
    assert metrics["supcon_loss"] != metrics["supcon_loss_2"]


def test_half_precision_decoders_answer_as_well_as_whole_ones():
    """A backend casts what enters a stage to the dtype of its weights."""
    asked = {"name": "associated", "label_dim": 6}
    first, second = make(asked), make(asked, Block(is_first=False))
    extras = {k: v.bfloat16() for k, v in first.answer(view()).extras.items()}
    answer = second.answer(view()._replace(extras=extras)).logits
    assert answer is not None and answer.dtype == torch.float32
