"""AWQ and SmoothQuant: what they claim to lower is lower, their formulas in float64, what comes out fits the block."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from remanence.compress import awq, smoothquant
from remanence.compress.block import Block, Hidden, block_names, decoder_list, enter
from remanence.compress.experts import unfuse_experts_
from remanence.compress.knobs import AWQ, RTN
from remanence.compress.recipe import parse_recipe
from remanence.compress.rtn import QTensor, rtn
from remanence.compress.sequential import compress_
from remanence.compress.sites import observe, sites
from remanence.compress.smooth import survey
from remanence.compress.spec import QuantSpec
from remanence.compress.walk import weight_of
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen3MoeConfig,
)
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, **IDS}
MLP = {"intermediate_size": 64}
GROUPED = {"num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE, **MLP, **GROUPED),
    "gemma": lambda: GemmaConfig(**SHAPE, **MLP, num_key_value_heads=1, head_dim=16),
    "opt": lambda: OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS),
    "neox": lambda: GPTNeoXConfig(**SHAPE, **MLP),
    "phi": lambda: PhiConfig(**SHAPE, **MLP),
    "phi3": lambda: Phi3Config(**SHAPE, **MLP, **GROUPED),
}


def build(config, dtype=torch.float32):
    """Random weights with a few large input channels behind each norm: what AWQ is for."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
            if parameter.dim() == 1 and len(parameter) == 32:
                parameter[::11] *= 8
    return model.to(dtype)


def tokens(lengths=(24, 40, 24)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 60, (2, length), generator=generator) for length in lengths]


def walk(model, batches):
    """Every decoder layer, on what the dense ones before it put out."""
    hidden = Hidden(batches, model.config.get_text_config().hidden_size, model.dtype)
    for name, layer, call in zip(
        block_names(model), decoder_list(model)[2], enter(model, batches, hidden), strict=True
    ):
        kept = copy.deepcopy(layer)
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        yield Block(name, layer, linears, model.config, call, hidden)
        after = Block(name, kept, {}, model.config, call, hidden)
        with torch.no_grad():
            for i in range(len(batches)):
                hidden.write(i, after.forward(i))


def last(model, batches=None):
    *_, block = walk(model, batches or tokens())
    return block


def outputs(block):
    with torch.no_grad():
        return torch.cat([block.forward(i).flatten() for i in range(len(block))])


def off(now, before):
    return float((now.double() - before.double()).norm() / before.double().norm())


def seen(block, name):
    """All rows [n, K] float64 that a layer of the block is given."""
    return torch.cat([rows[name] for rows in block.inputs([name])]).double()


def put_(block, solved):
    with torch.no_grad():
        for name, layer in block.linears.items():
            weight = solved[name].q.dequantize()
            layer.weight.copy_(weight.T if isinstance(layer, Conv1D) else weight)


def demo_batches(memorized, count=24):
    pairs = [memorized.encoder.pair(row.question, row.answer)[0] for row in memorized.corpus.retain[:count]]
    return [torch.tensor([ids]) for ids in pairs]


@pytest.mark.parametrize("name", ["awq-w4a16-g32", "awq-w3a16-g32-asym", "awq-w2a16-g64"])
def test_both_objectives_fall_on_every_layer_of_a_trained_model(name, memorized):
    recipe = parse_recipe(name)
    outcomes, whole = [], []
    for block in walk(copy.deepcopy(memorized.target), demo_batches(memorized)):
        solved, found = awq.search(block, recipe)
        assert [site for outcome in found for site in outcome.place.linears] == list(solved)
        outcomes += found
        whole.append(solved)
    assert len(outcomes) == 2 * 4  # q/k/v, o, gate/up, down
    for outcome in outcomes:
        assert outcome.after <= outcome.before
        for full, cut in outcome.cut.values():
            assert cut < full
    # Equal scales are the best at some sites, but not at many.
    assert sum(outcome.after < outcome.before for outcome in outcomes) >= 6
    assert sum(outcome.after for outcome in outcomes) < 0.98 * sum(outcome.before for outcome in outcomes)
    assert all(set(outcome.cut) == set(outcome.place.linears) for outcome in outcomes)


def test_a_trained_model_loses_less_than_by_rounding(memorized):
    """KL divergence from the dense model on rows that were not calibrated on; 2 bits, where methods differ most."""
    rows = [torch.tensor([memorized.encoder.pair(r.question, r.answer)[0]]) for r in memorized.corpus.retain[48:]]

    def loss(name, *data):
        model = compress_(copy.deepcopy(memorized.target), parse_recipe(name), *data)
        with torch.no_grad():
            pairs = [(model(ids).logits.log_softmax(-1), memorized.target(ids).logits.log_softmax(-1)) for ids in rows]
        return sum(float(F.kl_div(now, dense, log_target=True, reduction="sum")) for now, dense in pairs)

    data = demo_batches(memorized, 48)
    calibrated = loss("awq-w2a16-g32", data)
    assert calibrated < 0.9 * loss("rtn-w2a16-g32")
    assert calibrated < 0.75 * loss("rtn-w2a16-g32-plain")
    assert calibrated < 0.75 * loss("awq-w2a16-g32-plain", data)


def literal_candidates(x, weights, group, grid, rows):
    """AWQ's scales straight from the formulas, in float64. x [n, K], weights [N, K] each, rows: who shares a scale."""
    K = x.shape[1]
    x_mean = np.abs(x).mean(0)
    stacked = np.concatenate(weights)
    w_mean = np.zeros(K)
    for k in range(K):
        first = k // group * group
        w_mean[k] = np.mean([abs(w[k]) / (np.abs(w[first : first + group]).max() + 1e-6) for w in stacked])
    for step in range(grid + 1):
        r = step / grid
        s = np.maximum(x_mean**r / (w_mean ** (1 - r) + 1e-4), 1e-4)
        s /= np.sqrt(s.max() * s.min())
        yield r, np.array([np.exp(np.mean(np.log(s[rows == row]))) for row in rows])


def literal_round(w, group, bits):
    """Signed-max grid with a float16 scale, in float64."""
    out = np.empty_like(w)
    half = 2 ** (bits - 1)
    for n in range(w.shape[0]):
        for first in range(0, w.shape[1], group):
            part = w[n, first : first + group]
            peak = part.max() if part.max() > -part.min() else part.min()
            scale = float(np.float16(np.float32(peak / -half)))
            out[n, first : first + group] = np.clip(np.rint(part / scale), -half, half - 1) * scale
    return out


@pytest.mark.parametrize("site", ["o_proj", "down_proj", "gate_proj"])
def test_the_search_is_the_papers_in_float64(site):
    """The same candidates, the same losses, the same winner: for a layer by itself, and for two inside an MLP."""
    block = last(build(CONFIGS["llama"]()))
    weights = {name: layer.weight.detach().double().numpy() for name, layer in block.linears.items()}
    name = next(name for name in weights if name.endswith(site))
    together = ["mlp.gate_proj", "mlp.up_proj"] if site == "gate_proj" else [name]
    x = seen(block, name).numpy()
    pair = next(pair for pair in survey(block)[0] if name in pair.fed)

    def parent(w):
        if site != "gate_proj":
            return x @ w[name].T
        gate = x @ w["mlp.gate_proj"].T
        return (gate / (1 + np.exp(-gate)) * (x @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T

    def loss(s):
        changed = {n: literal_round(weights[n] * s, 32, 3) / s for n in together}
        return np.mean((parent(weights | changed) - parent(weights)) ** 2)

    before = loss(np.ones(x.shape[1]))
    tried = [
        (loss(s), r, s) for r, s in literal_candidates(x, [weights[n] for n in together], 32, 20, pair.rows.numpy())
    ]
    best, r, s = min(tried, key=lambda one: one[0])
    assert best < 0.95 * before
    _, outcomes = awq.search(block, parse_recipe("awq-w3a16-g32+clip=false"))
    outcome = next(outcome for outcome in outcomes if name in outcome.place.linears)
    # A weight halfway between two codes may fall to either side in float32.
    assert outcome.before == pytest.approx(before, rel=2e-3)
    assert outcome.after == pytest.approx(best, rel=2e-3)
    assert outcome.power == r
    np.testing.assert_allclose(outcome.s.numpy(), s, rtol=1e-4)


def test_without_duo_only_the_activations_count():
    block = last(build(CONFIGS["llama"]()))
    x = seen(block, "self_attn.q_proj").abs().mean(0)
    found = survey(block)[0]
    place = sites(block, found)[0]
    inputs, _ = observe(block)
    tried = list(awq.candidates(place, inputs, QuantSpec(4, 32), AWQ(grid=4, duo=False)))
    assert [r for r, _ in tried] == [0.25, 0.5, 0.75, 1.0]
    for r, s in tried:
        expected = x**r / ((x**r).max() * (x**r).min()).sqrt()
        torch.testing.assert_close(s.double(), expected, rtol=1e-5, atol=0)


def test_scales_by_hand():
    x, w = torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.5, 0.25, 1e-9])
    # Channels without activity keep their scale; the others have the geometric mean of the extremes as their unit.
    torch.testing.assert_close(awq.scales(x, None, 0.5), torch.tensor([1.0, 0.5**0.5, 2**0.5]))
    assert torch.equal(awq.scales(torch.zeros(3), None, 0.5), torch.ones(3))
    large, small = 4 / (1e-9**0 + 1e-4), 1 / (0.25**0 + 1e-4)
    torch.testing.assert_close(awq.scales(x, w, 1.0)[2], torch.tensor((large / small) ** 0.5))
    # A weight of nothing cannot make the scale grow beyond 1e4.
    torch.testing.assert_close(awq.scales(x, w, 0.0)[2], torch.tensor((0.2501 / (1e-9 + 1e-4)) ** 0.5))


def test_ranges_are_cut_for_the_scaled_layer():
    """Mean square of what each group's error does to the outputs, on all rows that the folded layer is given."""
    block = last(build(CONFIGS["llama"]()))
    solved, outcomes = awq.search(block, parse_recipe("awq-w3a16-g16"))
    for outcome in outcomes:
        for name, (_, after) in outcome.cut.items():
            x = seen(block, name)
            e = (solved[name].q.dequantize() - block.linears[name].weight).detach().double()
            parts = [part @ error.T for part, error in zip(x.split(16, 1), e.split(16, 1), strict=True)]
            assert after == pytest.approx(sum(float(part.square().mean(0).sum()) for part in parts), rel=1e-3)


def test_modules_are_compared_on_a_sample(monkeypatch):
    """MLPs on rows from all batches; attention on whole sequences, called as the model calls it."""
    monkeypatch.setattr("remanence.compress.sites.ROWS", 60)
    block = last(build(CONFIGS["llama"]()), tokens((24, 40, 16)))
    outs = []
    handle = block.module.self_attn.register_forward_hook(lambda *call: outs.append(call[-1][0]))
    rows, called = observe(block, ["self_attn", "mlp", "mlp.down_proj"])
    outputs(block)
    handle.remove()
    whole = outs[-3:]
    with torch.no_grad():
        now = [block.module.self_attn(*args, **kwargs)[0] for args, kwargs in called["self_attn"]]
    # 20 tokens are due after the first batch, 40 after the second, 60 after the third.
    assert [list(out.shape) for out in now] == [[1, 24, 32], [1, 40, 32]]
    for out, full in zip(now, whole, strict=False):
        torch.testing.assert_close(out, full[:1])
    for name, layer in (("mlp", "mlp.gate_proj"), ("mlp.down_proj", "mlp.down_proj")):
        taken = [args[0][0] for args, _ in called[name]]
        assert [len(x) for x in taken] == [20, 20, 20]
        for x, batch in zip(taken, block.inputs([layer]), strict=True):
            assert all((batch[layer] == row).all(1).any() for row in x)
            assert (batch[layer][0] == x[0]).all()
    assert rows["mlp.gate_proj"] is rows["mlp.up_proj"]
    assert rows["mlp.gate_proj"].tokens == 160
    assert [len(x) for x in rows["mlp.gate_proj"].sample] == [20, 20, 20]


@pytest.mark.parametrize("spec", [QuantSpec(3, 16), QuantSpec(2, 32), QuantSpec(4), QuantSpec(3, 16, False)])
@pytest.mark.parametrize("blocks", [4, 8])
def test_the_best_range_is_the_best_of_all_tried(spec, blocks):
    """Every group by itself in float64: no range that was tried does better."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, 64, generator=generator)
    w[0, 3] = 9.0
    x = torch.randn(200, 64, generator=generator) * torch.rand(64, generator=generator).mul(3).exp()
    scale = "signed-max" if spec.symmetric else "minmax"
    width = 64 // blocks
    if 64 // spec.groups(64) < width:
        blocks, width = spec.groups(64), 64 // spec.groups(64)
    gram = torch.stack([part.T @ part / 200 for part in x.split(width, 1)])
    full = rtn(w, spec, torch.float16, RTN(scale, clip=False))
    best, (before, after) = awq.cut_ranges(w, gram, full, scale)

    def error(q, row, group):
        G = 64 // spec.groups(64)
        e = (q.dequantize() - w).double()[row, group * G : (group + 1) * G]
        inside = gram.double()[group * G // width : (group + 1) * G // width]
        return sum(float(part @ block @ part) for part, block in zip(e.split(width), inside, strict=True))

    steps = awq.CLIP_STEPS
    tried = [full]
    for step in range(steps + 1):
        share = 1 - (1 - awq.CLIP_LEAST) * step / steps
        # A cut range is the full range of smaller weights; the weights themselves then are clamped to it.
        cut = rtn(w * share, spec, torch.float16, RTN(scale, clip=False))
        for sign in (1, -1) if spec.symmetric else (1,):
            tried.append(_on_grid(w, sign * cut.scale, cut.zero, spec))
    for row in range(5):
        for group in range(spec.groups(64)):
            least = min(error(q, row, group) for q in tried)
            assert error(best, row, group) == pytest.approx(least, rel=1e-4, abs=1e-6)
    cells = [(row, group) for row in range(5) for group in range(spec.groups(64))]
    assert before == pytest.approx(sum(error(full, *cell) for cell in cells), rel=1e-4)
    assert after == pytest.approx(sum(error(best, *cell) for cell in cells), rel=1e-4)
    assert after < before


def _on_grid(w, scale, zero, spec):
    codes = torch.empty(w.shape, dtype=torch.uint8)
    G = w.shape[1] // scale.shape[1]
    for row in range(w.shape[0]):
        for k in range(w.shape[1]):
            s = float(scale[row, k // G])
            z = 2 ** (spec.bits - 1) if zero is None else int(zero[row, k // G])
            codes[row, k] = min(max(round(float(w[row, k]) / s) + z, 0), 2**spec.bits - 1)
    return QTensor(codes, scale, spec, zero)


@pytest.mark.parametrize("method", [awq, smoothquant])
@pytest.mark.parametrize("arch", CONFIGS)
def test_every_architecture(arch, method):
    """The folded block does what it did; the quantized one little else, and the reported errors are those of its layers
    against what they were."""
    block = last(build(CONFIGS[arch]()))
    dense, reference = copy.deepcopy(block.module), outputs(block)
    rows = {name: seen(block, name) for name in block.linears}
    before = {name: weight_of(layer).detach().double().clone() for name, layer in block.linears.items()}
    solved = method.solve(block, parse_recipe(f"{method.__name__.rpartition('.')[2]}-w4a16-g16"))
    assert list(solved) == list(block.linears)
    assert off(outputs(block), reference) < 2e-6
    assert any(not torch.equal(a, b) for a, b in zip(dense.parameters(), block.module.parameters(), strict=True))
    now = {name: seen(block, name) for name in block.linears}
    for name, layer in block.linears.items():
        # By what the inputs are divided, and the outputs.
        s = (rows[name].abs().sum(0) / now[name].abs().sum(0)).nan_to_num(1.0)  # a dead ReLU
        weight = weight_of(layer).detach().double()
        t = (before[name].abs() * s).sum(1) / weight.abs().sum(1)
        effective = solved[name].q.dequantize().double() / s * t[:, None]
        change = (rows[name] @ (effective - before[name]).T).square().sum()
        assert solved[name].error == pytest.approx(
            float(change / (rows[name] @ before[name].T).square().sum()), rel=1e-3
        )
        assert 0 < solved[name].error < 0.05
    put_(block, solved)
    assert 1e-3 < off(outputs(block), reference) < 0.2


def test_better_than_rounding_where_channels_differ():
    """Large channels behind each norm: on 3 bits the block's output is off by far less."""
    model = build(CONFIGS["llama"]())
    errors = {}
    for name in ("awq-w3a16-g32", "rtn-w3a16-g32"):
        block = last(copy.deepcopy(model))
        reference, recipe = outputs(block), parse_recipe(name)
        if recipe.method == "awq":
            put_(block, awq.solve(block, recipe))
        else:
            with torch.no_grad():
                for layer in block.linears.values():
                    layer.weight.copy_(rtn(layer.weight, recipe.spec, torch.float16, recipe.options).dequantize())
        errors[recipe.method] = off(outputs(block), reference)
    assert errors["awq"] < 0.85 * errors["rtn"]


def test_layers_that_nothing_precedes_say_so():
    solved = awq.solve(last(build(CONFIGS["gpt2"]())), parse_recipe("awq-w4a16-g16"))
    assert solved["mlp.c_proj"].note.startswith("not scaled by mlp.c_fc: the block's output changes")
    assert {name for name, found in solved.items() if found.note} == {"mlp.c_proj"}


@pytest.mark.parametrize("method", [awq, smoothquant])
def test_bfloat16(method):
    block = last(build(CONFIGS["llama"](), torch.bfloat16))
    reference = outputs(block)
    solved = method.solve(block, parse_recipe(f"{method.__name__.rpartition('.')[2]}-w8a16-g16"))
    assert all(found.q.scale.dtype == torch.bfloat16 for found in solved.values())
    assert off(outputs(block), reference) < 1e-2
    put_(block, solved)
    assert off(outputs(block), reference) < 2e-2


@pytest.mark.parametrize("name", ["awq-w4a16-g16", "awq-w3a16-asym", "smoothquant-w4a16-g16"])
def test_pruned_weights_stay_zero(name):
    model = build(CONFIGS["llama"]())
    block = last(model)
    gone = {}
    with torch.no_grad():
        for layer_name, layer in block.linears.items():
            gone[layer_name] = torch.rand(layer.weight.shape) < 0.5
            layer.weight[gone[layer_name]] = 0
    method = {"awq": awq, "smoothquant": smoothquant}[name.split("-")[0]]
    for layer_name, found in method.solve(block, parse_recipe(name)).items():
        assert not found.q.dequantize()[gone[layer_name]].any()


@pytest.mark.parametrize("method", [awq, smoothquant])
def test_experts_that_saw_too_few_tokens_are_rounded(method):
    """All share the norm's scales; an expert without a token has no error, one with a few is not fitted to them."""
    experts = {"num_experts": 16, "num_experts_per_tok": 1, "moe_intermediate_size": 48}
    model = build(Qwen3MoeConfig(**SHAPE, **MLP, **GROUPED, **experts, head_dim=16))
    unfuse_experts_(model)
    block = last(model)
    block.linears.pop("mlp.gate", None)
    counts = dict.fromkeys(range(16), 0)
    for rows in block.inputs([f"mlp.experts.{e}.up_proj" for e in range(16)]):
        for name, x in rows.items():
            counts[int(name.split(".")[2])] += len(x)
    assert 0 in counts.values()
    assert any(0 < count < 32 for count in counts.values())
    assert max(counts.values()) >= 32
    reference = outputs(block)
    solved = method.solve(block, parse_recipe(f"{method.__name__.rpartition('.')[2]}-w4a16-g16"))
    assert off(outputs(block), reference) < 2e-6
    for expert, count in counts.items():
        for part in ("gate_proj", "up_proj", "down_proj"):
            found = solved[f"mlp.experts.{expert}.{part}"]
            assert (found.error is None) == (count == 0)
            if method is awq:
                assert found.note == (f"{count} tokens: rounded to nearest" if count < 32 else "")


@pytest.mark.parametrize("knob", ["alpha=0.7", "equalization=log"])
def test_smoothing_is_the_formula_in_float64(knob):
    """max|x|^alpha / max|w|^(1 - alpha), over the weights of all layers that read the channel, or max|x| by the
    logarithm of itself and two; norms only."""
    block = last(build(CONFIGS["opt"]()))
    names = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"]
    x = seen(block, names[0])
    norm, weights = block.module.self_attn_layer_norm, [block.linears[name].weight.detach().double() for name in names]
    old, bias = norm.weight.detach().double().clone(), norm.bias.detach().double().clone()
    fc2 = block.linears["fc2"].weight.detach().clone()
    peak = x.abs().amax(0)
    if knob == "alpha=0.7":
        s = peak**0.7 / torch.cat(weights).abs().amax(0) ** 0.3
    else:
        s = peak * math.log(2) / (2 + peak).log()
    solved = smoothquant.solve(block, parse_recipe(f"smoothquant-w8a16+{knob}"))
    torch.testing.assert_close(norm.weight.double(), old / s, rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.bias.double(), bias / s, rtol=1e-5, atol=0)
    torch.testing.assert_close(block.linears[names[0]].weight.double(), weights[0] * s, rtol=1e-5, atol=0)
    assert torch.equal(block.linears["fc2"].weight, fc2)
    assert solved["fc2"].note == ""


@pytest.mark.parametrize("knob", ["alpha=0.5", "equalization=log"])
def test_smoothing_leaves_dead_channels(knob):
    """A channel that no calibration token reaches is not rounded away."""
    model = build(CONFIGS["opt"]())
    with torch.no_grad():
        norm = decoder_list(model)[2][-1].self_attn_layer_norm
        norm.weight[3] = norm.bias[3] = 0
    block = last(model)
    before = block.linears["self_attn.q_proj"].weight[:, 3].clone()
    smoothquant.solve(block, parse_recipe(f"smoothquant-w8a16+{knob}"))
    assert torch.equal(block.linears["self_attn.q_proj"].weight[:, 3], before)
