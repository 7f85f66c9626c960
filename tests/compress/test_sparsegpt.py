"""SparseGPT against its paper's algorithm written out with an explicit inverse; alone, and in one pass with GPTQ."""

import copy

import numpy as np
import pytest
import torch
from remanence.compress.block import Block, Hidden, block_names, enter
from remanence.compress.gptq import column_order, factor_of, factorize, quantize
from remanence.compress.hessian import Hessian
from remanence.compress.knobs import GPTQ
from remanence.compress.prune import kept
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from remanence.compress.sparsegpt import prune_block_, solve, sparsegpt
from remanence.compress.spec import PATTERNS, PruneSpec, QuantSpec
from remanence.compress.walk import linears, weight_of
from torch import nn
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = PruneSpec(0.5, "sparsegpt")


def correlated(rows, K, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, K, generator=generator) + torch.randn(rows, 8, generator=generator) @ torch.randn(
        8, K, generator=generator
    )
    x *= 0.5 + torch.rand(K, generator=generator)
    x[:, torch.randperm(K, generator=generator)[:3]] *= 10
    return x


def hessian(x):
    H = Hessian(x.shape[1])
    H.add(x)
    return H.matrix()


def random_weight(N, K, seed=1):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.05


def output_error(x, weight, new):
    x, weight, new = x.double(), weight.double(), new.double()
    y = x @ weight.T
    return float((x @ new.T - y).square().sum() / y.square().sum())


class Chosen:
    """The mask as the paper chooses it, and by how much the nearest choice was made, relative."""

    def __init__(self, spec):
        self.spec, self.margin = spec, np.inf

    def smallest(self, scores, count):
        flat = scores.ravel()
        order = np.argsort(flat, kind="stable")
        if 0 < count < flat.size:
            low, high = flat[order[count - 1]], flat[order[count]]
            if high > 0:
                self.margin = min(self.margin, (high - low) / high)
        gone = np.zeros(flat.size, dtype=bool)
        gone[order[:count]] = True
        return gone.reshape(scores.shape)

    def block(self, scores, start):
        N, B = scores.shape
        if self.spec.pattern is not None:
            stay, of = PATTERNS[self.spec.pattern]
            parts = [self.smallest(row[a : a + of], of - stay) for row in scores for a in range(0, B, of)]
            return np.concatenate(parts).reshape(N, B)
        wanted = [round(self.spec.percent * N * end / 100) for end in (start, start + B)]
        return self.smallest(scores, wanted[1] - wanted[0])


def eliminated(inverse):
    """The inverse of what is left of a matrix without its first row and column, from the inverse of all of it."""
    return inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]


def damped(H, damp=0.01):
    H = H.double().numpy()
    diagonal = H.diagonal()
    return H + damp * diagonal[diagonal > 0].mean() * np.eye(len(H))


def literal(weight, H, spec, block=128):
    """Algorithm 1, column by column: (pruned weight, mask, margin), float64."""
    W, inverse = weight.double().numpy().copy(), np.linalg.inv(damped(H))
    there = W != 0
    N, K = W.shape
    pivots, left = [], inverse
    for _ in range(K):
        pivots.append(left[0, 0])
        left = eliminated(left)
    pivots, chosen, gone = np.array(pivots), Chosen(spec), np.zeros((N, K), dtype=bool)
    width = block if spec.pattern is None else PATTERNS[spec.pattern][1]
    for j in range(K):
        if j % width == 0:
            here = slice(j, min(j + width, K))
            scores = np.where(there[:, here], W[:, here] ** 2 / pivots[here], -1)
            gone[:, here] = chosen.block(scores, j) | ~there[:, here]
        error = np.where(gone[:, j], W[:, j], 0) / inverse[0, 0]
        W[:, j:] -= error[:, None] * inverse[0]
        W[gone[:, j], j] = 0
        inverse = eliminated(inverse)
    return W, ~gone, chosen.margin


def away_from_ties(make, weight):
    """What `make` finds of the weight, moved a little until no choice is closer than float32 computes."""
    for seed in range(30):
        *found, margin = make(weight)
        if margin > 2e-4:
            return weight, *found
        weight = weight + random_weight(*weight.shape, seed=seed + 100) / 20 * (weight != 0)
    pytest.fail("no weights away from ties found")


@pytest.mark.parametrize("shape", [(7, 192), (1, 130), (33, 65), (5, 300)], ids=str)
@pytest.mark.parametrize("percent", [10, 50, 63, 90])
def test_masks_and_weights_are_those_of_the_paper(shape, percent):
    N, K = shape
    H, spec = hessian(correlated(900, K, seed=0)), PruneSpec(percent / 100, "sparsegpt")
    weight, expected, mask = away_from_ties(lambda w: literal(w, H, spec), random_weight(N, K))
    new, _, damp = sparsegpt(weight, H, spec)
    assert damp == 0.01
    assert np.array_equal((new != 0).numpy(), mask)
    assert int((new == 0).sum()) == round(percent * N * K / 100)
    assert np.abs(new.double().numpy() - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(expected - weight.double().numpy() * mask).max() > 0.01 * np.abs(expected).max()  # it did something


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("K", [8, 136, 264])
def test_patterns_are_chosen_as_their_columns_are_reached(pattern, K):
    H, spec = hessian(correlated(900, K, seed=2)), PruneSpec(0.5, "sparsegpt", pattern)
    weight, expected, mask = away_from_ties(lambda w: literal(w, H, spec), random_weight(3, K))
    new, _, _ = sparsegpt(weight, H, spec)
    stay, of = PATTERNS[pattern]
    assert np.array_equal((new != 0).numpy(), mask)
    assert ((new.view(3, -1, of) != 0).sum(2) == stay).all()
    assert np.abs(new.double().numpy() - expected).max() <= 1e-4 * np.abs(expected).max()


def test_zeros_that_were_there_go_first_and_stay():
    H, weight = hessian(correlated(500, 64, seed=3)), random_weight(6, 64)
    weight[:, 5:30] = 0  # of the first block more than it would lose at 30%
    weight, _, mask = away_from_ties(lambda w: literal(w, H, HALF), weight)
    new, _, _ = sparsegpt(weight, H, HALF)
    assert np.array_equal((new != 0).numpy(), mask)
    assert (new[:, 5:30] == 0).all()
    assert int((new == 0).sum()) == 192
    few, _, _ = sparsegpt(weight, H, PruneSpec(0.3, "sparsegpt"))
    assert torch.equal(few != 0, weight != 0)


def test_columns_without_input_go_first():
    x = correlated(500, 64, seed=4)
    x[:, [3, 40, 41]] = 0
    new, error, _ = sparsegpt(random_weight(6, 64), hessian(x), PruneSpec(0.1, "sparsegpt"))
    assert (new[:, [3, 40, 41]] == 0).all()
    assert error < 0.03


@pytest.mark.parametrize("spec", [HALF, PruneSpec(0.8, "sparsegpt"), PruneSpec(0.5, "sparsegpt", "2:4")], ids=str)
def test_what_stays_makes_up_for_what_goes(spec):
    """Better than the same mask alone, and than Wanda; no better than the best that this mask allows."""
    x, weight = correlated(2000, 256, seed=5), random_weight(64, 256)
    H = hessian(x)
    new, error, _ = sparsegpt(weight, H, spec)
    assert error == pytest.approx(output_error(x, weight, new), rel=1e-3)
    mask = new != 0
    best = torch.zeros(64, 256, dtype=torch.float64)
    for n in range(64):
        k = mask[n].nonzero()[:, 0]
        best[n, k] = torch.linalg.solve(H[k][:, k].double(), (H.double() @ weight[n].double())[k])
    wanda = kept("layer", weight, PruneSpec(spec.sparsity, "wanda", spec.pattern), x.norm(dim=0))
    assert output_error(x, weight, best) <= error
    assert error < 0.6 * output_error(x, weight, weight * mask)
    assert error < 0.8 * output_error(x, weight, weight * wanda)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    """What stays is rounded on the way: no worse than rounded afterwards."""
    x = correlated(1000, 192, seed=6)
    weight, H = random_weight(16, 192).to(dtype), hessian(x)
    new, error, _ = sparsegpt(weight, H, HALF)
    assert new.dtype == dtype
    assert int((new == 0).sum()) == 16 * 96
    wide, _, _ = sparsegpt(weight.float(), H, HALF)
    assert error == pytest.approx(output_error(x, weight, new), rel=1e-3)
    assert error <= 1.02 * output_error(x, weight, wide.to(dtype))


def test_what_cannot_be_solved_is_refused():
    weight, H = random_weight(4, 30), hessian(correlated(90, 30, seed=7))
    with pytest.raises(ValueError, match="30 input features do not divide into groups of 4, for the pattern 2:4"):
        sparsegpt(weight, H, PruneSpec(0.5, "sparsegpt", "2:4"))
    with pytest.raises(ValueError, match="weight: contains NaN or infinity and cannot be pruned"):
        sparsegpt(weight * torch.nan, H, HALF)
    with pytest.raises(ValueError, match="inputs: contain NaN or infinity"):
        sparsegpt(weight, H * torch.inf, HALF)


# In one pass with GPTQ.


def literal_one_pass(weight, H, spec, quant, options):
    """GPTQ's algorithm with SparseGPT's mask, column by column, on a grid from -2^(b-1) to 2^(b-1) - 1 times
    absmax / (2^(b-1) - 0.5): (what the codes stand for, mask, margin)."""
    W, H = weight.double().numpy().copy(), damped(H)
    N, K = W.shape
    G, of = quant.group_size or K, 1 if spec.pattern is None else PATTERNS[spec.pattern][1]
    order = literal_order(H.diagonal(), G, of, options.act_order)
    W, H = W[:, order], H[np.ix_(order, order)]
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    d, half = U.diagonal() ** 2, 2 ** (quant.bits - 1)
    chosen, gone = Chosen(spec), np.zeros((N, K), dtype=bool)
    fixed = options.act_order == "static" or quant.group_size is None
    width = options.block if fixed else max(G, options.block // G * G)

    def pick(here, gone_in, pieces):
        """Mask of columns `here`, which are compared in pieces."""
        for a in range(here.start, here.stop, pieces):
            part = slice(a, min(a + pieces, here.stop))
            gone_in[:, part] = chosen.block(W[:, part] ** 2 / d[part], a)

    def scales(w):
        with np.errstate(invalid="ignore"):
            s = np.float64(np.float16(np.abs(w).max(1) / (half - 0.5)))
        return np.where(s == 0, 1.0, s)

    scale, result = np.zeros((N, K)), np.zeros((N, K))
    if fixed:
        guess = np.zeros((N, K), dtype=bool)
        pick(slice(0, K), guess, of if of > 1 else width)
        for g in range(K // G):
            places = [i for i, k in enumerate(order) if k // G == g]
            scale[:, places] = scales((W * ~guess)[:, places])[:, None]
    for i in range(K):
        if of == 1 and i % width == 0:
            pick(slice(i, min(i + width, K)), gone, width)
        if not fixed and i % G == 0:
            guess, part = gone.copy(), slice(i, i + G)
            if of > 1:
                pick(part, guess, of)
            scale[:, part] = scales((W * ~guess)[:, part])[:, None]
        if of > 1 and i % of == 0:
            pick(slice(i, i + of), gone, of)
        steps = W[:, i] / scale[:, i]
        chosen.margin = min(
            chosen.margin, 40 * np.abs(np.abs(steps - np.floor(steps)) - 0.5)[~gone[:, i]].min(initial=1)
        )
        result[:, i] = np.where(gone[:, i], 0, np.clip(np.rint(steps), -half, half - 1) * scale[:, i])
        W[:, i + 1 :] -= np.outer((W[:, i] - result[:, i]) / U[i, i], U[i, i + 1 :])
    back = np.argsort(order)
    return result[:, back], ~gone[:, back], chosen.margin


def literal_order(diagonal, G, of, act_order):
    """Units of a pattern by their largest, inside a group, and groups by theirs."""
    K = len(diagonal)
    if act_order == "none":
        return list(range(K))
    size = K if act_order == "static" else G
    units = [range(a, a + of) for a in range(0, K, of)]
    groups = [units[a : a + size // of] for a in range(0, K // of, size // of)]

    def peak(unit):
        return -max(diagonal[k] for k in unit)

    groups.sort(key=lambda group: min(peak(unit) for unit in group))
    return [k for group in groups for unit in sorted(group, key=peak) for k in unit]


@pytest.mark.parametrize("act_order", ["none", "static", "gar"])
@pytest.mark.parametrize("group_size", [None, 16, 64])
@pytest.mark.parametrize("pattern", [None, "2:4", "4:8"])
def test_one_pass_is_both_algorithms_at_once(act_order, group_size, pattern):
    K, N = 128, 3
    H, spec, quant = hessian(correlated(700, K, seed=8)), PruneSpec(0.5, "sparsegpt", pattern), QuantSpec(4, group_size)
    options = GPTQ(act_order, block=32, scale="absmax", clip=False)

    def made(weight):
        return literal_one_pass(weight, H, spec, quant, options)

    weight, expected, stays = away_from_ties(made, random_weight(N, K))
    factor = factorize(H, quant, options, None, spec)
    of = 1 if pattern is None else PATTERNS[pattern][1]
    assert factor.order.tolist() == literal_order(damped(H).diagonal(), group_size or K, of, act_order)
    mask = weight != 0
    q, error = quantize(weight, factor, quant, torch.float16, options, mask, measure=True, prune=spec)
    assert np.array_equal(mask.numpy(), stays)
    new = q.dequantize()
    assert np.abs(new.double().numpy() - expected).max() <= 1e-6
    assert (new[~mask] == 0).all()
    assert int(mask.sum()) == N * K // 2
    y = weight.double() @ H.double()
    off = (weight - new).double()
    exact = ((off @ H.double()) * off).sum() / (y * weight.double()).sum()
    assert error == pytest.approx(float(exact), rel=1e-3)


def test_units_stay_together_in_every_order():
    diagonal = torch.rand(64, generator=torch.Generator().manual_seed(9))
    for act_order in ("static", "gar"):
        order = column_order(diagonal, QuantSpec(4, 16), act_order, 4)
        assert sorted(order.tolist()) == list(range(64))
        units = order.view(-1, 4)
        assert (units - units[:, :1] == torch.arange(4)).all()
        assert (units[:, 0] % 4 == 0).all()


def test_one_pass_is_better_than_one_after_the_other():
    x, weight, quant = correlated(2000, 256, seed=10), random_weight(64, 256), QuantSpec(3, 64)
    H, options = hessian(x), GPTQ()

    def error(mask, prune=None, start=weight):
        factor = factorize(H, quant, options, None, prune)
        return quantize(start, factor, quant, torch.float16, options, mask, measure=True, prune=prune)[0].dequantize()

    together = output_error(x, weight, error(weight != 0, HALF))
    pruned, _ = solve(weight, factor_of(H, torch.arange(256), 0.01), HALF)
    after = output_error(x, weight, error(pruned != 0, start=pruned))
    wanda = kept("layer", weight, PruneSpec(0.5, "wanda"), x.norm(dim=0))
    assert together < after
    assert together < output_error(x, weight, error(wanda))


# Blocks and models.


def make_block(model, batches, index=0):
    hidden = Hidden(batches, model.config.hidden_size, model.dtype)
    calls = enter(model, batches, hidden)
    name = block_names(model)[index]
    module = model.get_submodule(name)
    inside = {n: layer for n, layer in module.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    return Block(name, module, inside, model.config, calls[index], hidden)


IDS = torch.randint(2, 300, (6, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
def test_later_layers_see_what_earlier_ones_became(arch, untrained):
    model = untrained(arch)
    by_hand = make_block(copy.deepcopy(model), [IDS])
    block = make_block(model, [IDS])
    found = prune_block_(block, HALF)
    names = list(by_hand.linears)
    done = set()
    while len(done) < len(names):
        # The layers whose input does not change any more are those that are run next.
        name = next(n for n in run_order(by_hand) if n not in done)
        x = torch.cat(list(make_block_inputs(by_hand, name)))
        same = [
            n
            for n in run_order(by_hand)
            if n not in done and torch.equal(torch.cat(list(make_block_inputs(by_hand, n))), x)
        ]
        for n in same:
            layer = by_hand.linears[n]
            weight = weight_of(layer).detach().clone()
            new, error, damp = sparsegpt(weight, hessian(x), HALF)
            layer.weight.data.copy_(new.T if isinstance(layer, Conv1D) else new)
            assert torch.equal(weight_of(block.linears[n]), new), n
            assert found[n].error == pytest.approx(error, rel=1e-3)
            assert (found[n].damp, found[n].note) == (damp, "50% zero")
            done.add(n)


def make_block_inputs(block, name):
    return (seen[name] for seen in block.inputs([name]))


def run_order(block):
    return list(next(block.inputs(list(block.linears))))


def test_few_tokens_prune_by_magnitude(untrained):
    model = untrained("llama")
    dense = {name: module.weight.detach().clone() for name, module in linears(model, ("lm_head",))}
    block = make_block(model, [torch.arange(20)[None]])
    for name, layer in prune_block_(block, HALF).items():
        weight = dense[f"{block.name}.{name}"]
        expected = weight * kept("", weight, PruneSpec(0.5))
        assert torch.equal(block.linears[name].weight, expected)
        assert layer.note == "20 tokens: by magnitude, 50% zero"
        assert layer.damp is None
        x = torch.cat(list(make_block_inputs(make_block(untrained("llama"), [torch.arange(20)[None]]), name)))
        if "q_proj" in name:
            assert layer.error == pytest.approx(output_error(x, weight, expected), rel=1e-3)


def test_a_layer_that_nothing_reaches_and_one_without_input(untrained):
    model = untrained("llama")
    block = make_block(model, [IDS])
    block.module.post_attention_layernorm.weight.data.zero_()
    block.linears["unused"] = nn.Linear(32, 8)
    found = prune_block_(block, HALF)
    assert found["unused"].note == "no token reaches it: by magnitude, 50% zero"
    assert found["mlp.up_proj"].note == "its inputs are all zero: by magnitude, 50% zero"
    assert found["unused"].error is found["mlp.up_proj"].error is None


def test_errors_name_the_layer(untrained):
    block = make_block(untrained("llama"), [IDS])
    block.linears["mlp.up_proj"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"mlp\.up_proj: weight: contains NaN or infinity and cannot be pruned"):
        prune_block_(block, HALF)


@pytest.mark.parametrize("what", ["s60", "s70", "2:4"])
def test_the_papers_order_on_a_trained_model(memorized, what):
    """SparseGPT, Wanda, magnitude, random: by how much the model's output changes; and layers whose inputs do not."""
    pairs = memorized.corpus.retain + memorized.corpus.forget
    batches = [torch.tensor([memorized.encoder.pair(row.question, row.answer)[0]]) for row in pairs]

    def outputs(model):
        with torch.no_grad():
            return torch.cat([model(ids).logits.flatten() for ids in batches])

    dense, changed, errors = outputs(memorized.target), {}, {}
    for method in ("sparsegpt", "wanda", "magnitude", "random"):
        reports: list = []
        model = compress_(copy.deepcopy(memorized.target), parse_recipe(f"{method}-{what}"), batches, reports.append)
        changed[method] = float((outputs(model) - dense).square().sum() / dense.square().sum())
        errors[method] = {report.name: report.error for report in reports}
        assert [report.of for report in reports] == ["outputs" if method in ("sparsegpt", "wanda") else "weights"] * 14
    assert changed["sparsegpt"] < 0.7 * changed["wanda"]
    assert changed["wanda"] < changed["magnitude"] < changed["random"] < 1.5
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{name}"
        assert errors["sparsegpt"][name] < errors["wanda"][name]


def test_the_same_data_gives_the_same_model(untrained):
    one, other = (compress_(untrained("llama"), parse_recipe("sparsegpt-s60"), [IDS]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
