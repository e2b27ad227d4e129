"""What one stage does with its inputs, gradients and memory."""

from __future__ import annotations

import copy
import itertools
import logging

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from scpl_ds.errors import PartitionError
from scpl_ds.partition.anatomy import Anatomy, analyze, anatomy_of
from scpl_ds.partition.stage_module import StageModule, stage_from_model
from tests.support.models import BY_TYPE, batch, build

CLASSIFY = "sequence-classification"


def stages_of(
    model_type: str, task: str, *bounds: int, **options
) -> tuple[nn.Module, list[StageModule]]:
    config = BY_TYPE[model_type].config(**options)
    model = build(config, task)
    anatomy = anatomy_of(config, task)
    spans = itertools.pairwise(bounds)
    return model, [stage_from_model(model, anatomy, a, b) for a, b in spans]


def test_a_stage_shares_memory_with_the_model_it_was_cut_from() -> None:
    model, stages = stages_of("bert", CLASSIFY, 0, 1, 3)
    owned = {k: t for stage in stages for k, t in stage.model.named_parameters()}
    whole = dict(model.named_parameters())
    assert owned.keys() == whole.keys()
    assert all(owned[k] is whole[k] for k in whole)


def test_the_model_is_left_whole_and_usable() -> None:
    config = BY_TYPE["gpt2"].config()
    model = build(config, "causal-lm")
    inputs = batch("causal-lm", "right")
    with torch.no_grad():
        before = model(**inputs).logits
    anatomy = analyze(model)
    for start, end in [(0, 1), (1, 3), (0, 3), (2, 3)]:
        stage_from_model(model, anatomy, start, end)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_tie_across_stages_is_copied_once_and_said_loudly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        model, stages = stages_of("gpt2", "causal-lm", 0, 1, 2, 3)
    first = stages[0].model.transformer.wte.weight
    last = stages[-1].model.lm_head.weight
    assert first is model.transformer.wte.weight
    assert torch.equal(first, last)
    assert first.data_ptr() != last.data_ptr()
    assert [s.model.config.tie_word_embeddings for s in stages] == [False] * 3
    assert sum("UNTIED" in record.message for record in caplog.records) == 1


def test_names_inside_a_stage_are_those_of_hugging_face() -> None:
    _, stages = stages_of("llama", "causal-lm", 0, 2, 3, tie_word_embeddings=False)
    assert all(k.startswith("model.layers.2.") or k in {"model.norm.weight", "lm_head.weight"}
               for k in stages[1].hf_state_dict())  # fmt: skip
    assert "model.embed_tokens.weight" in stages[0].hf_state_dict()


def test_only_the_last_stage_gives_loss_and_logits() -> None:
    _, stages = stages_of("bert", CLASSIFY, 0, 1, 3)
    inputs = batch(CLASSIFY, "right")
    first = stages[0](inputs, None)
    assert first.loss is None and first.logits is None
    assert first.hidden_states.shape == (4, 12, 32)
    last = stages[1](inputs, first.hidden_states)
    assert last.loss is not None and last.logits is not None
    without = {k: v for k, v in inputs.items() if k != "labels"}
    assert stages[1](without, first.hidden_states).loss is None


def test_hidden_states_of_the_last_stage_are_those_before_the_final_norm() -> None:
    model, (stage,) = stages_of("llama", "causal-lm", 0, 3)
    inputs = batch("causal-lm", "none")
    with torch.no_grad():
        output = stage(inputs, None)
        normed = model.model(input_ids=inputs["input_ids"]).last_hidden_state
    assert torch.equal(model.model.norm(output.hidden_states), normed)
    assert not torch.equal(output.hidden_states, normed)


@pytest.mark.parametrize("detach", [False, True])
def test_detached_features_train_the_epilogue_only(detach: bool) -> None:
    _, stages = stages_of("bert", CLASSIFY, 0, 1, 3)
    inputs = batch(CLASSIFY, "right")
    hidden = stages[0](inputs, None).hidden_states.detach()
    output = stages[1](inputs, hidden, detach_features=detach)
    output.loss.backward(retain_graph=True)
    reached = {k for k, p in stages[1].model.named_parameters() if p.grad is not None}
    epilogue = {k for k in stages[1].hf_state_dict() if "pooler" in k or "classifier" in k}
    assert reached == (epilogue if detach else set(stages[1].hf_state_dict()))
    assert output.hidden_states.requires_grad
    output.hidden_states.sum().backward()
    assert stages[1].model.bert.encoder.layer[2].output.dense.weight.grad is not None


@pytest.mark.parametrize(("stage", "given"), [(0, True), (1, False)])
def test_hidden_states_on_the_wrong_stage_are_refused(stage: int, given: bool) -> None:
    _, stages = stages_of("bert", CLASSIFY, 0, 1, 3)
    hidden = torch.zeros(4, 12, 32) if given else None
    with pytest.raises(
        ValueError, match="takes no hidden_states" if given else "needs hidden_states"
    ):
        stages[stage](batch(CLASSIFY, "none"), hidden)


@pytest.mark.parametrize(("start", "end"), [(2, 2), (0, 4), (-1, 2), (2, 1)])
def test_a_span_outside_the_model_is_refused(start: int, end: int) -> None:
    model = build(BY_TYPE["bert"].config(), CLASSIFY)
    with pytest.raises(PartitionError, match="has layers 0 to 2"):
        stage_from_model(model, analyze(model), start, end)


def test_no_cache_is_filled() -> None:
    _, stages = stages_of("llama", "causal-lm", 0, 1, 3, use_cache=True)
    seen = []

    def look(module: nn.Module, args, kwargs) -> None:
        seen.append(kwargs.get("past_key_values"))

    for stage in stages:
        for layer in stage.model.model.layers:
            layer.register_forward_pre_hook(look, with_kwargs=True)
    inputs = batch("causal-lm", "none")
    stages[1](inputs, stages[0](inputs, None).hidden_states)
    assert seen == [None] * 6


def test_nothing_is_kept_between_two_forwards() -> None:
    _, stages = stages_of("bert", CLASSIFY, 0, 1, 3)
    inputs = batch(CLASSIFY, "none")
    stages[1](inputs, stages[0](inputs, None).hidden_states)
    assert stages[1]._relay.received is None
    assert not stages[1].model.bert.encoder.layer[2]._forward_hooks


def test_a_copied_stage_is_independent() -> None:
    _, stages = stages_of("bert", CLASSIFY, 0, 1, 3)
    twin = copy.deepcopy(stages[1])
    inputs = batch(CLASSIFY, "none")
    hidden = stages[0](inputs, None).hidden_states
    assert torch.equal(twin(inputs, hidden).logits, stages[1](inputs, hidden).logits)
    assert twin._relay is not stages[1]._relay


def test_an_embedding_scaled_in_place_does_not_touch_what_was_received() -> None:
    """The stand-in used to return the received tensor itself: CTRL scaled it, and was wrong in
    silence."""

    class Scaling(LlamaForCausalLM):
        def forward(self, input_ids, labels=None, use_cache=None, **kwargs):
            hidden = self.model.embed_tokens(input_ids)
            hidden *= 3.0
            return super().forward(
                inputs_embeds=hidden, labels=labels, use_cache=use_cache, **kwargs
            )

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=99,
    )
    model = Scaling(config).eval()
    anatomy = anatomy_of(config, "causal-lm")
    last = stage_from_model(model, anatomy, 1, 2)
    received = torch.randn(4, 12, 32)
    before = received.clone()
    with torch.no_grad():
        last(batch("causal-lm", "none"), received)
    assert torch.equal(received, before)


GRADIENTS = ["bert", "modernbert", "gpt2", "llama", "mixtral"]


@pytest.mark.parametrize("model_type", GRADIENTS)
def test_gradients_through_an_open_boundary_are_those_of_the_whole_model(model_type: str) -> None:
    """Train mode without dropout; the two stages share no tied matrix, so sums are the same too."""
    architecture = BY_TYPE[model_type]
    task = architecture.tasks[-1]
    model, stages = stages_of(model_type, task, 0, 1, 3, tie_word_embeddings=False)
    model.train()
    inputs = batch(task, "right")
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    for stage in stages:
        stage.train()
    stages[1](inputs, stages[0](inputs, None).hidden_states).loss.backward()
    actual = {k: g for stage in stages for k, g in gradients(stage.model).items()}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_activation_checkpointing_gives_the_same_gradients(model_type: str) -> None:
    task = BY_TYPE[model_type].tasks[-1]
    inputs = batch(task, "right")
    results = []
    for checkpointing in (False, True):
        _, stages = stages_of(model_type, task, 0, 1, 3, tie_word_embeddings=False)
        if checkpointing:
            for stage in stages:
                stage.model.gradient_checkpointing_enable()
        hidden: Tensor = stages[0].train()(inputs, None).hidden_states.detach()
        stages[1].train()(inputs, hidden).loss.backward()
        results.append(gradients(stages[1].model))
        assert hidden.requires_grad is False
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=0, atol=0, msg=name)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def test_anatomy_tells_the_owner_of_every_tensor() -> None:
    model, _ = stages_of("llama", "causal-lm", 0, 3)
    anatomy: Anatomy = analyze(model)
    for name in model.state_dict():
        owners = [anatomy.owns(name, a, b) for a, b in [(0, 1), (1, 2), (2, 3)]]
        assert sum(owners) == 1, name


def test_a_stage_runs_in_inference_mode() -> None:
    whole, (first, last) = stages_of("bert", CLASSIFY, 0, 1, 3)
    inputs = batch(CLASSIFY, "right")
    with torch.inference_mode():
        output = last(inputs, first(inputs, None).hidden_states)
        assert torch.equal(output.logits, whole(**inputs).logits)
