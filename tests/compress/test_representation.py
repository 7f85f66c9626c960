"""CMPQ against canonical correlations of a textbook, between hidden states of blocks run one after the other."""

import copy

import numpy as np
import pytest
import scipy.linalg
import torch
from remanence.compress.block import block_names
from remanence.compress.recipe import parse_recipe
from remanence.compress.representation import layer_scores
from remanence.compress.sensitivity import sensitivities
from transformers import AutoModelForCausalLM, LlamaConfig


@pytest.fixture(scope="module")
def three_layers():
    """A model of three layers in float64, 16 wide, and 290 tokens: one direction for ten tokens takes none away."""
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    return model, [torch.randint(2, 60, shape) for shape in ((2, 40), (3, 30), (2, 60))]


@torch.no_grad()
def blocks_states(model, batches):
    """What enters the first block and what each puts out, [n, d] each."""
    entering, seen = [], {name: [] for name in block_names(model)}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: seen[name].append(out[0] if isinstance(out, tuple) else out)
        )
        for name in seen
    ]
    for ids in batches:
        entering.append(model(ids, output_hidden_states=True).hidden_states[0])
    for hook in hooks:
        hook.remove()
    states = (entering, *seen.values())
    return [torch.cat([part.flatten(0, 1) for part in parts]).double().numpy() for parts in states]


def textbook(X, Y):
    """Correlations and the variates of X, from Sxy Syy^-1 Syx a = rho^2 Sxx a."""
    X, Y = X - X.mean(0), Y - Y.mean(0)
    squares, vectors = scipy.linalg.eigh(X.T @ Y @ np.linalg.solve(Y.T @ Y, Y.T @ X), X.T @ X)
    count = min(X.shape[1], Y.shape[1])
    variates = X @ vectors[:, ::-1][:, :count]
    return np.sqrt(squares[::-1][:count].clip(0, 1)), variates / np.linalg.norm(variates, axis=0)


def components(X, energy):
    values, vectors = np.linalg.eigh(np.cov(X.T))
    count = int(np.argmax(np.cumsum(values[::-1]) / values.sum() >= energy)) + 1
    return (X - X.mean(0)) @ vectors[:, ::-1][:, :count]


LIKENESS = {
    "cmpq": lambda X, Y: textbook(X, Y)[0].mean(),
    "svcca": lambda X, Y: textbook(components(X, 0.99), components(Y, 0.99))[0].mean(),
    "pwcca": lambda X, Y: np.average(textbook(X, Y)[0], weights=np.abs(textbook(X, Y)[1].T @ (X - X.mean(0))).sum(1)),
}


@pytest.mark.parametrize("measure", LIKENESS)
def test_one_minus_the_mean_correlation_with_other_layers(three_layers, measure):
    model, batches = three_layers
    entering, *out = blocks_states(model, batches)
    alike = LIKENESS[measure]
    expected = [1 - np.mean([alike(h, other) for other in out if other is not h]) for h in out]
    found = layer_scores(model, measure, batches)
    assert list(found.scores.values()) == pytest.approx(expected, abs=1e-8)
    through = [1 - alike(h, before) for before, h in zip([entering, *out], out)]
    assert list(found.through.values()) == pytest.approx(through, abs=1e-8)
    assert len(set(found.scores.values())) == 3
    of_linears = sensitivities(model, measure, batches, parse_recipe("rtn-w4a16-g16"))
    for block, score in found.scores.items():
        inside = [value for name, value in of_linears.scores.items() if name.startswith(f"{block}.")]
        assert inside == [score] * 7


@pytest.mark.parametrize("measure", LIKENESS)
def test_a_layer_that_does_nothing_is_like_the_one_before(three_layers, measure):
    model = copy.deepcopy(three_layers[0])
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    found = layer_scores(model, measure, three_layers[1])
    assert found.through["model.layers.1"] == pytest.approx(0, abs=1e-9)
    assert all(found.through[f"model.layers.{i}"] > 0.01 for i in (0, 2))


def test_few_tokens_do_not_make_everything_alike(three_layers):
    """17 tokens in 16 dimensions: CCA of all would find every layer in every other one."""
    model, (_, _, ids) = three_layers
    scores = layer_scores(model, "cmpq", [ids[:1, :17]]).scores
    assert all(0.01 < score <= 1 for score in scores.values())
    with pytest.raises(ValueError, match=r"what enters model\.layers\.0: 9 samples; 10 are needed"):
        layer_scores(model, "cmpq", [ids[:1, :9]])


def test_how_tokens_are_put_into_batches_changes_nothing(three_layers):
    """Rows of one length, one after the other or at once, and the last batch in another one."""
    model, (_, ids, more) = three_layers
    one = layer_scores(model, "pwcca", [ids, more])
    other = layer_scores(model, "pwcca", [*ids.split(1), more[1:], more[:1]])
    assert one.scores == pytest.approx(other.scores, abs=1e-6)
    assert one.through == pytest.approx(other.through, abs=1e-6)


@pytest.mark.parametrize("arch", ["opt", "gpt2"])
def test_blocks_of_other_models(untrained, arch):
    model = untrained(arch)
    batches = [torch.randint(2, 300, (4, 100), generator=torch.Generator().manual_seed(0))]
    entering, *out = blocks_states(model, batches)
    found = layer_scores(model, "cmpq", batches)
    expected = [1 - LIKENESS["cmpq"](*pair) for pair in ((out[0], entering), (out[1], out[0]))]
    assert list(found.through.values()) == pytest.approx(expected, abs=1e-5)
    assert list(found.scores.values()) == pytest.approx([1 - LIKENESS["cmpq"](*out)] * 2, abs=1e-5)


def test_what_cannot_be_compared(untrained):
    model = untrained("llama")
    batches = [torch.randint(2, 300, (2, 30), generator=torch.Generator().manual_seed(0))]
    with pytest.raises(ValueError, match="measure: 'kl' is not one of cmpq, svcca, pwcca"):
        layer_scores(model, "kl", batches)
    with pytest.raises(ValueError, match="lm_head is in none; add it to the recipe's ignore"):
        sensitivities(model, "cmpq", batches, parse_recipe("rtn-w4a16-g16+ignore="))
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="cmpq: compares decoder layers, and LlamaForCausalLM has 1"):
        layer_scores(model, "cmpq", batches)
