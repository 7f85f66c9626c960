"""Distance to the oracle: every number against plain NumPy float64 on the models' own logits and hidden states."""

import copy
import math

import numpy as np
import pytest
import torch
from remanence.bench.distance import distance
from remanence.unlearn.encode import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def keeper(kept):
    return lambda _module, _inputs, output: kept.append(output[0] if isinstance(output, tuple) else output)


def plain(model, oracle, encoder, pair):
    """[KL(o||m), KL(m||o), JS, L2] and the relative distances by layer, of one pair, without any batch."""
    ids, labels = encoder.pair(*pair)
    where = [i - 1 for i in range(1, len(ids)) if labels[i] != -100]
    logits, states = [], []
    for network in (model, oracle):
        kept = []
        hooks = [layer.register_forward_hook(keeper(kept)) for layer in network.get_decoder().layers]
        with torch.no_grad():
            logits.append(log_softmax(network(torch.tensor([ids])).logits[0].double().numpy()[where]))
        for hook in hooks:
            hook.remove()
        states.append([h[0].double().numpy()[where] for h in kept])
    m, o = logits
    p, q = np.exp(m), np.exp(o)
    mean = np.log((p + q) / 2)
    found = [
        (q * (o - m)).sum(1).mean(),
        (p * (m - o)).sum(1).mean(),
        (0.5 * (q * (o - mean)).sum(1) + 0.5 * (p * (m - mean)).sum(1)).mean(),
        np.sqrt(((p - q) ** 2).sum(1)).mean(),
    ]
    layers = [(np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).mean() for a, b in zip(*states, strict=True)]
    return found, layers


def pairs_of(memorized, count=6):
    corpus = memorized.corpus
    rows = [*corpus.forget[:count], *corpus.retain[: count - 1]]
    return [(row.question, row.answer) for row in rows] + [("", corpus.retain[7].answer)]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_against_numpy(memorized, batch_size):
    pairs = pairs_of(memorized)
    found = distance(memorized.target, memorized.oracle, memorized.encoder, pairs, batch_size)
    wanted = [plain(memorized.target, memorized.oracle, memorized.encoder, pair) for pair in pairs]
    columns = (found.oracle_to_model, found.model_to_oracle, found.js, found.output)
    for number, column in enumerate(columns):
        assert column == pytest.approx([w[0][number] for w in wanted], rel=1e-4, abs=1e-6)
    assert np.array(found.hidden) == pytest.approx(np.array([w[1] for w in wanted]), rel=1e-4)
    assert (found.finite, found.oracle_finite, found.no_hidden) == (True, True, "")
    means = found.means()
    assert means["oracle_to_model"] == pytest.approx(np.mean([w[0][0] for w in wanted]), rel=1e-4)
    assert means["hidden"] == pytest.approx(np.mean([w[1] for w in wanted]), rel=1e-4)
    assert found.by_layer() == pytest.approx(np.mean([w[1] for w in wanted], axis=0), rel=1e-4)


def test_directions_and_bounds(memorized):
    """On what only the target learnt the models differ far more than on what both did."""
    there = [(row.question, row.answer) for row in memorized.corpus.forget[:8]]
    here = [(row.question, row.answer) for row in memorized.corpus.retain[:8]]
    far = distance(memorized.target, memorized.oracle, memorized.encoder, there)
    near = distance(memorized.target, memorized.oracle, memorized.encoder, here)
    for name in ("oracle_to_model", "model_to_oracle", "js", "output"):
        assert far.means()[name] > 3 * near.means()[name]
    turned = distance(memorized.oracle, memorized.target, memorized.encoder, there)
    assert turned.oracle_to_model == pytest.approx(far.model_to_oracle, rel=1e-6)
    assert turned.js == pytest.approx(far.js, rel=1e-6)
    assert far.oracle_to_model != pytest.approx(far.model_to_oracle, rel=1e-2)
    assert all(0 <= value <= math.log(2) for value in far.js)
    assert all(0 <= value <= math.sqrt(2) for value in far.output)


def test_from_itself_nothing(memorized):
    found = distance(memorized.target, copy.deepcopy(memorized.target), memorized.encoder, pairs_of(memorized))
    # Two copies of one model may differ in the last bit, by where their weights lie in memory.
    assert list(found.means().values()) == pytest.approx([0] * 5, abs=1e-5)


def test_chunks_change_nothing(memorized, monkeypatch):
    pairs = pairs_of(memorized)
    whole = distance(memorized.target, memorized.oracle, memorized.encoder, pairs)
    monkeypatch.setattr("remanence.bench.distance._CHUNK", 3 * 512)
    assert distance(memorized.target, memorized.oracle, memorized.encoder, pairs) == whole


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_is_far_and_flagged(memorized, value):
    broken = copy.deepcopy(memorized.target)
    broken.model.layers[0].mlp.down_proj.weight.data.fill_(value)
    pairs = pairs_of(memorized)
    found = distance(broken, memorized.oracle, memorized.encoder, pairs)
    assert (found.finite, found.oracle_finite) == (False, True)
    uniform = copy.deepcopy(memorized.target)
    uniform.set_output_embeddings(torch.nn.Linear(64, 512, bias=False))
    torch.nn.init.zeros_(uniform.get_output_embeddings().weight)
    even = distance(uniform, memorized.oracle, memorized.encoder, pairs)
    assert even.finite
    for name in ("oracle_to_model", "model_to_oracle", "js", "output"):
        assert getattr(found, name) == pytest.approx(getattr(even, name), rel=1e-6)
    assert np.array(found.hidden) == pytest.approx(np.ones((len(pairs), 2)), abs=1e-6)
    other = distance(memorized.oracle, broken, memorized.encoder, pairs)
    assert (other.finite, other.oracle_finite) == (True, False)
    assert all(math.isfinite(value) for value in other.means().values())


def test_disjoint_and_forbidden_tokens(memorized):
    """Logits of -inf: what one model says and the other never does is far, in JS at its bound, and a number."""

    def only(token):
        model = copy.deepcopy(memorized.target)

        def forbid(_module, _inputs, output):
            output.logits[...] = -math.inf
            output.logits[..., token] = 0.0

        model.register_forward_hook(forbid)
        return model

    found = distance(only(5), only(9), memorized.encoder, pairs_of(memorized, 2))
    assert found.js == pytest.approx([math.log(2)] * 4, rel=1e-6)
    assert max(found.js) <= math.log(2)
    assert found.output == pytest.approx([math.sqrt(2)] * 4, rel=1e-6)
    assert found.oracle_to_model == [1e4] * 4
    assert found.finite


def test_layers_that_do_not_correspond(memorized, untrained):
    pairs = pairs_of(memorized, 2)
    shallow = copy.deepcopy(memorized.target)
    shallow.model.layers = shallow.model.layers[:1]
    shallow.config.num_hidden_layers = 1
    found = distance(shallow, memorized.oracle, memorized.encoder, pairs)
    assert (found.hidden, found.by_layer()) == (None, None)
    assert found.no_hidden == "the model has 1 decoder layers, the oracle 2"
    assert set(found.means()) == {"oracle_to_model", "model_to_oracle", "js", "output"}
    narrow = distance(untrained("opt", vocabulary=512), memorized.oracle, memorized.encoder, pairs)
    assert narrow.hidden is None
    assert narrow.no_hidden == "the model is 32 wide, the oracle 64"


def test_different_vocabularies(memorized, untrained):
    with pytest.raises(ValueError, match="vocabularies of 600 and 512 tokens"):
        distance(untrained("llama", vocabulary=600), memorized.oracle, memorized.encoder, pairs_of(memorized, 2))


def test_no_pairs(memorized):
    with pytest.raises(ValueError, match="pairs: none"):
        distance(memorized.target, memorized.oracle, memorized.encoder, [])


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
def test_architectures_modes_and_single_tokens(memorized, untrained, arch):
    model, oracle = untrained(arch, vocabulary=512, seed=1), untrained(arch, vocabulary=512, seed=2)
    model.train()
    found = distance(model, oracle, Encoder(memorized.tokenizer, 128), [("Who?", "A"), ("Who was it?", "No one.")])
    assert model.training
    assert not oracle.training
    assert np.array(found.hidden).shape == (2, 2)
    assert min(found.js) > 0
    assert not any(layer._forward_hooks for layer in model.modules())
