"""Unlearning a pruned model: with keep_zeros every weight that pruning took is 0 afterwards, whatever the method."""

import copy
from dataclasses import replace

import pytest
import torch
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from remanence.unlearn.catalog import METHODS, MethodConfig, settings
from remanence.unlearn.masks import Zeros
from remanence.unlearn.methods import Setup, unlearn
from remanence.unlearn.workers import Workers
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"steps": 3, "learning_rate": 1e-3, "warmup": 1, "forget_batch": 4, "retain_batch": 4}
# What moves weights otherwise than by a gradient of each.
WAYS = {
    "all weights": ("graddiff", {}),
    "weight decay": ("npo", {"weight_decay": 0.1}),
    "merged adapter": ("graddiff", {"lora_rank": 4}),
    "adapter of FILA": ("loku", {"lora_rank": 4}),
    "sharpness-aware": ("npo", {"rho": 0.01}),
    "mask of weights": ("graddiff", {"mask": "wagle", "share": 0.5}),
    "buckets": ("bucketed", {"against": "rtn-w4a16-g16-plain"}),
    "floor": ("graddiff", {"floor": 0.5, "against": "rtn-w4a16-g16-plain"}),
    "task vector": ("task-vector", {}),
    "some layers": ("rmu", {}),
    "redirection": ("rocr", {}),
}


@pytest.fixture(scope="module")
def pruned(memorized):
    return compress_(copy.deepcopy(memorized.target), parse_recipe("magnitude-s30"))


def zeros(model):
    return {name: weight == 0 for name, weight in model.named_parameters() if weight.dim() > 1}


def moved(model, start, where):
    before = dict(start.named_parameters())
    return sum(
        int((weight != before[name])[where[name]].sum()) for name, weight in model.named_parameters() if name in where
    )


def run(model, memorized, method, more):
    corpus = memorized.corpus
    shape = {} if METHODS[method].kind == "weights" else SHORT
    config = replace(settings(method, demo=True), **shape, **more)
    return unlearn(model, memorized.encoder, corpus.forget, corpus.retain, method, config, 0).model


@pytest.mark.parametrize("way", WAYS)
def test_zeros_stay(memorized, pruned, way):
    method, more = WAYS[way]
    before = zeros(pruned)
    model = run(copy.deepcopy(pruned), memorized, method, {**more, "keep_zeros": True})
    assert all(torch.equal(weight == 0, before[name]) for name, weight in model.named_parameters() if name in before)
    assert moved(model, pruned, {name: ~gone for name, gone in before.items()}) > 0


@pytest.mark.parametrize("way", ["all weights", "merged adapter", "redirection"])
def test_without_it_they_do_not(memorized, pruned, way):
    method, more = WAYS[way]
    model = run(copy.deepcopy(pruned), memorized, method, more)
    assert moved(model, pruned, zeros(pruned)) > 0


def test_a_model_without_zeros_is_refused(memorized):
    """That of padding is no pruned weight."""
    there = {name for name, gone in zeros(memorized.target).items() if gone.any()}
    assert there <= {"model.embed_tokens.weight"}
    with pytest.raises(ValueError, match="keep_zeros: no weight is zero; prune the model first"):
        run(copy.deepcopy(memorized.target), memorized, "graddiff", {"keep_zeros": True})


def test_who_takes_the_setting():
    assert settings("rocr", keep_zeros=True).keep_zeros
    with pytest.raises(ValueError, match="keep_zeros: icu does not train"):
        settings("icu", keep_zeros=True)


def test_fused_experts_and_embeddings_count_and_biases_do_not():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, attention_bias=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    layer = model.model.layers[0]
    stack, bias = layer.mlp.experts.gate_up_proj, layer.self_attn.q_proj.bias
    with torch.no_grad():
        stack[:, ::2] = 0
        model.model.embed_tokens.weight[3] = 0
    assert not bias.any()
    held = Zeros(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    held.hold_gradients_()
    assert not stack.grad[:, ::2].any()
    assert stack.grad[:, 1::2].all()
    assert not model.model.embed_tokens.weight.grad[3].any()
    assert bias.grad.all()
    with torch.no_grad():
        stack.fill_(1.0)
    held.restore_()
    assert torch.equal(stack == 0, (torch.arange(stack.shape[1]) % 2 == 0)[None, :, None].expand_as(stack))


@pytest.mark.parametrize("more", [{"unmerged": True}, {"quantized_base": True}])
def test_an_adapter_that_is_not_merged_is_refused(more):
    with pytest.raises(ValueError, match=f"keep_zeros: does not go with {next(iter(more))}"):
        MethodConfig(lora_rank=4, keep_zeros=True, **more)


def test_split_weights_are_refused(memorized, pruned):
    corpus = memorized.corpus
    workers = Workers(device="cpu")
    workers.parallel = "fsdp"
    config = replace(settings("graddiff", demo=True), **SHORT, keep_zeros=True)
    with pytest.raises(ValueError, match="parallel: fsdp splits weights that keep_zeros needs whole; use ddp"):
        unlearn(
            copy.deepcopy(pruned), memorized.encoder, corpus.forget, corpus.retain, "graddiff", config, 0,
            setup=Setup(workers),
        )  # fmt: skip
