"""Rounding in the loop is the real quantizer; the floor changes the codes it says and no others; the margin is the
step in logits."""

import copy
import gc
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from remanence.compress.knobs import PLAIN_RTN
from remanence.compress.recipe import DENSE, Recipe, parse_recipe
from remanence.compress.rtn import rtn
from remanence.compress.sequential import quantize_
from remanence.compress.spec import QuantSpec
from remanence.compress.walk import linears, storage_dtype, weight_of
from remanence.unlearn.encode import IGNORE, Batch
from remanence.unlearn.robust import apply_floor_, fake_quantized, logit_margin
from transformers import AutoModelForCausalLM, LlamaConfig

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = ["rtn-w4a16-g16-plain", "rtn-w3a16-plain", "rtn-w8a16-g32-plain"]
archs = pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
recipes = pytest.mark.parametrize("recipe", RECIPES)


def tokens(rows=3, length=9, seed=0):
    return torch.randint(2, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def by_hand(weight, spec, scale_dtype):
    """Round to nearest in float64 NumPy, group by group: weight [N, K] -> dequantized [N, K]."""
    w = weight.detach().double().numpy()
    size, half = spec.group_size or w.shape[1], 2 ** (spec.bits - 1)
    out = np.empty_like(w)
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], size):
            group = w[row, start : start + size]
            scale = float(torch.tensor(np.abs(group).max() / (half - 0.5)).to(scale_dtype))
            out[row, start : start + size] = np.clip(np.round(group / scale), -half, half - 1) * scale
    return torch.from_numpy(out)


@archs
@recipes
def test_forward_is_the_quantized_models(untrained, arch, recipe):
    model, against, ids = untrained(arch, std=0.1), parse_recipe(recipe), tokens()
    quantized = quantize_(copy.deepcopy(model), against)
    with torch.no_grad():
        plain, expected = model(input_ids=ids).logits, quantized(input_ids=ids).logits
        with fake_quantized(model, against):
            inside = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
    assert torch.allclose(inside, expected, atol=1e-4)
    assert (inside - plain).abs().max() > 20 * (inside - expected).abs().max()
    assert torch.equal(after, plain)


@archs
def test_gradients_go_straight_through(untrained, arch):
    """The weight's gradient is the one of a model that holds the rounded weights; every other one is too."""
    model, against, ids = untrained(arch, std=0.1), parse_recipe("rtn-w4a16-g16-plain"), tokens()
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for _, module in linears(rounded, against.ignore):
            weight = by_hand(weight_of(module), against.spec, torch.float16).float()
            module.weight.copy_(weight.T if arch == "gpt2" else weight)
    rounded(input_ids=ids, labels=ids).loss.backward()
    with fake_quantized(model, against):
        model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in rounded.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6, rtol=1e-3), name


def matrices(model, against):
    """How many tensors of a linear weight's shape are alive."""
    gc.collect()
    shapes = {tuple(sorted(module.weight.shape)) for _, module in linears(model, against.ignore)}
    return sum(
        type(t) in (torch.Tensor, torch.nn.Parameter) and tuple(sorted(t.shape)) in shapes for t in gc.get_objects()
    )


@archs
def test_nothing_is_left_behind(untrained, arch):
    model, against = untrained(arch), parse_recipe("rtn-w4a16-g16-plain")
    names = list(model.state_dict())
    start, keys = copy.deepcopy(model.state_dict()), {n: set(m.__dict__) for n, m in model.named_modules()}
    before = matrices(model, against)
    with fake_quantized(model, against):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        assert list(model.state_dict()) == names, "a checkpoint written inside is an ordinary one"
    model.zero_grad(set_to_none=True)
    assert matrices(model, against) == before, "no rounded copy is alive"
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == keys
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_an_error_inside_and_a_forward_of_ones_own(untrained):
    model, against = untrained("llama"), parse_recipe("rtn-w4a16-g16-plain")
    module = model.model.layers[0].mlp.up_proj

    def own(x):
        return F.linear(x, module.weight)

    module.forward = own
    with pytest.raises(ValueError, match="You must specify exactly one"), fake_quantized(model, against):
        model()
    assert module.forward is own
    assert "forward" not in model.model.layers[1].mlp.up_proj.__dict__


def test_a_tied_head_stays_dense_and_tied():
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), tokens() % 90
    embedding = model.model.embed_tokens.weight
    everything = Recipe("rtn", QuantSpec(4, 16), ignore=(), options=PLAIN_RTN)
    with torch.no_grad(), fake_quantized(model, everything):
        states = model.model(input_ids=ids).last_hidden_state
        logits = model(input_ids=ids).logits
    expected = states @ by_hand(embedding, everything.spec, torch.float16).float().T
    assert torch.allclose(logits, expected, atol=1e-5), "with no layer ignored the head rounds"
    assert torch.equal(model.model.embed_tokens(ids), embedding[ids]), "the embedding does not"
    assert model.lm_head.weight is embedding


def test_training_in_the_loop_moves_the_codes(untrained):
    """Descent on the loss of the quantized model, by gradients alone, lowers that very loss."""
    model, against, ids = untrained("llama", std=0.1), parse_recipe("rtn-w4a16-g16-plain"), tokens()

    def quantized_loss():
        with torch.no_grad():
            return quantize_(copy.deepcopy(model), against)(input_ids=ids, labels=ids).loss.item()

    before = quantized_loss()
    optimizer = torch.optim.AdamW([module.weight for _, module in linears(model, against.ignore)], lr=5e-3)
    for _ in range(8):
        optimizer.zero_grad()
        with fake_quantized(model, against):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert quantized_loss() < before - 0.5


@pytest.mark.parametrize("call", ["fake", "floor", "margin"])
def test_recipes_that_do_not_fit(untrained, call):
    model = untrained("llama")
    start = dict(model.named_parameters())

    def run(recipe):
        if call == "fake":
            with fake_quantized(model, recipe):
                pass
        elif call == "floor":
            apply_floor_(model, start, recipe, 0.5)
        else:
            logit_margin(model, [answers()], recipe)

    with pytest.raises(ValueError, match="recipe: dense"):
        run(DENSE)
    with pytest.raises(ValueError, match=r"rtn-w4a16-g64-plain: model.layers.0.self_attn.q_proj: 32 input features"):
        run(parse_recipe("rtn-w4a16-g64-plain"))


def drifted(model, size, seed=0, share=0.5):
    """A model whose linear weights have moved by about `size`, half of them; and the weights before."""
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = size * torch.randn(parameter.shape, generator=generator)
            parameter += (noise * (torch.rand(parameter.shape, generator=generator) < share)).to(parameter)
    return start


def codes(weight, module, against):
    weight = weight.T if type(module).__name__ == "Conv1D" else weight
    return rtn(weight, against.spec, storage_dtype(weight), PLAIN_RTN)


# Updates from a thousandth of a bin to several bins (weights of 0.1: a bin is about 0.03 at 4 bits).
@archs
@recipes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("size", [3e-4, 1e-2, 0.2])
def test_codes_change_at_the_kept_weights_and_nowhere_else(untrained, arch, recipe, dtype, size):
    model, against = untrained(arch, std=0.1).to(dtype), parse_recipe(recipe)
    start = drifted(model, size)
    trained = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    kept = apply_floor_(model, start, against, 0.3)
    changed = 0
    names = {f"{name}.weight": module for name, module in linears(model, against.ignore)}
    for name, parameter in model.named_parameters():
        if name not in names:
            assert torch.equal(parameter, trained[name]), "what is not quantized keeps its changes"
            continue
        module, old = names[name], start[name]
        before, after = codes(old, module, against), codes(parameter, module, against)
        assert torch.equal(before.scale, after.scale), "no scale moves"
        moved = parameter.detach() != old
        transposed = moved.T if arch == "gpt2" else moved
        assert torch.equal(before.codes != after.codes, transposed), "the codes of the kept, all and only"
        step = after.scale.float().repeat_interleave(transposed.shape[1] // after.scale.shape[1], 1)
        step = (step.T if arch == "gpt2" else step)[moved]
        delta, wish = (parameter.detach().float() - old.float())[moved], (trained[name].float() - old.float())[moved]
        assert (delta.sign() == wish.sign()).all()
        assert (delta.abs() >= step * (1 - 1e-5)).all(), "one bin at least"
        changed += int(moved.sum())
    assert changed == kept > 100


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_the_largest_changes_are_kept(untrained, share):
    model, against = untrained("llama", std=0.1), parse_recipe("rtn-w4a16-g16-plain")
    start = drifted(model, 3e-3)
    names = [f"{name}.weight" for name, _ in linears(model, against.ignore)]
    size = {name: (model.get_parameter(name) - start[name]).abs().detach() for name in names}
    everything = copy.deepcopy(model)
    total = apply_floor_(everything, start, against, 1.0)
    movable = {name: everything.get_parameter(name) != start[name] for name in names}
    assert total == sum(int(m.sum()) for m in movable.values())
    assert total < sum(int((s > 0).sum()) for s in size.values()), "some have nowhere to go"
    assert apply_floor_(model, start, against, share) == math.ceil(share * total)
    kept = torch.cat([size[name][model.get_parameter(name) != start[name]] for name in names])
    dropped = torch.cat([size[name][movable[name] & (model.get_parameter(name) == start[name])] for name in names])
    assert len(kept) == math.ceil(share * total)
    assert len(dropped) == 0 or kept.min() >= dropped.max()


def single(values):
    """A linear layer of one row, wrapped so that it can be walked."""
    layer = torch.nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values]))
    return torch.nn.ModuleDict({"layer": layer})


def test_by_hand_on_one_group():
    """Scale 1/7.5 * 7.5 = 1: codes are the weights. Peak 7.5; ties at .5 go to the even code."""
    old = [7.5, 6.6, 6.4, 1.5, 2.5, -6.6, -6.4, 0.0, -7.5, 3.0, 3.0, 3.0, -1.0, 5.0, 0.2, 0.4]
    new = [7.4, 6.7, 6.5, 1.6, 2.4, -6.7, -6.5, 0.1, -7.4, 3.0, 5.6, 9.0, -1.1, 4.9, 0.1, 0.3]
    model = single(old)
    start = {"layer.weight": model["layer"].weight.detach().clone()}
    with torch.no_grad():
        model["layer"].weight.copy_(torch.tensor([new]))
    spec = Recipe("rtn", QuantSpec(4, 16), options=PLAIN_RTN)
    # Both peaks and both ends stay; 3.0 did not change; 9.0 stops at the peak.
    expected = [7.5, 6.6, 7.4, 2.52, 1.48, -6.6, -7.4, 1.0, -7.5, 3.0, 5.6, 7.5, -2.0, 4.0, -0.8, -0.6]
    assert apply_floor_(model, start, spec, 1.0) == 11
    assert model["layer"].weight[0].tolist() == pytest.approx(expected, abs=1e-5)
    before, after = (
        rtn(w, spec.spec, torch.float16, PLAIN_RTN).codes[0].tolist()
        for w in (start["layer.weight"], model["layer"].weight.detach())
    )
    assert [a != b for a, b in zip(before, after, strict=True)] == [e != o for e, o in zip(expected, old, strict=True)]


def test_the_last_code_has_none_beyond_it():
    """A scale rounded down leaves more than half a step above the last code, and no code there; below there is one."""
    model = single([7.9375, 6.875, -6.875, *[0.0] * 13]).to(torch.bfloat16)
    start = {"layer.weight": model["layer"].weight.detach().clone()}
    against = Recipe("rtn", QuantSpec(4, 16), options=PLAIN_RTN)
    before = rtn(start["layer.weight"], against.spec, torch.bfloat16, PLAIN_RTN)
    assert 7.9375 / before.scale.item() > 7.52
    assert before.codes[0, :3].tolist() == [15, 15, 1]
    with torch.no_grad():
        model["layer"].weight += torch.tensor([[0.0, 0.0625, -0.0625, *[0.0] * 13]], dtype=torch.bfloat16)
    assert apply_floor_(model, start, against, 1.0) == 1
    assert model["layer"].weight[0, :3].tolist() == [7.9375, 6.875, -7.9375]
    after = rtn(model["layer"].weight.detach(), against.spec, torch.bfloat16, PLAIN_RTN)
    assert after.codes[0, :3].tolist() == [15, 15, 0]
    assert torch.equal(after.scale, before.scale)


def test_clipped_weights_of_a_subnormal_scale():
    """10.5 / 7.5 is rounded to a scale of 1 unit of float16: what lies beyond the ends can only come back."""
    unit = 2.0**-24
    model = single([unit * w for w in (10.5, -9.0, 9.0, -9.0, 9.0, *[0.0] * 11)])
    start = {"layer.weight": model["layer"].weight.detach().clone()}
    with torch.no_grad():
        model["layer"].weight += unit * torch.tensor([[0.0, -0.1, 0.1, 0.1, -0.1, *[0.0] * 11]])
    against = Recipe("rtn", QuantSpec(4, 16), options=PLAIN_RTN)
    assert apply_floor_(model, start, against, 1.0) == 2
    expected = [unit * w for w in (10.5, -9.0, 9.0, -7.48, 6.48)]
    assert model["layer"].weight[0, :5].tolist() == pytest.approx(expected, rel=1e-5)
    before, after = (
        rtn(w, against.spec, torch.float16, PLAIN_RTN) for w in (start["layer.weight"], model["layer"].weight.detach())
    )
    assert before.scale.item() == after.scale.item() == unit
    assert before.codes[0, :5].tolist() == [15, 0, 15, 0, 15]
    assert after.codes[0, :5].tolist() == [15, 0, 15, 1, 14]


@pytest.mark.parametrize("value", [0.0, 1e-7])
def test_groups_without_a_bin_are_undone(value):
    """Zeros, and values whose scale is rounded to zero: any change would set a new scale."""
    model = single([value] * 16 + [0.1 * i - 0.7 for i in range(16)])
    start = {"layer.weight": model["layer"].weight.detach().clone()}
    with torch.no_grad():
        model["layer"].weight += 0.01
    apply_floor_(model, start, Recipe("rtn", QuantSpec(4, 16), options=PLAIN_RTN), 1.0)
    assert torch.equal(model["layer"].weight[:, :16], start["layer.weight"][:, :16])
    assert not torch.equal(model["layer"].weight[:, 16:], start["layer.weight"][:, 16:])


def test_bad_input_to_the_floor(untrained):
    model, against = untrained("llama"), parse_recipe("rtn-w4a16-g16-plain")
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="share: 0 is not above 0 and at most 1"):
        apply_floor_(model, start, against, 0)
    with pytest.raises(ValueError, match="model: no quantized weight has a change that could survive"):
        apply_floor_(model, start, against, 0.5)
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=rf"start: {name} is missing or not of the shape \[32, 64\]"):
        apply_floor_(model, {key: value for key, value in start.items() if key != name}, against, 0.5)
    with torch.no_grad():
        model.get_parameter(name)[3, 4] = torch.nan
    with pytest.raises(ValueError, match=f"model: {name} is not finite"):
        apply_floor_(model, start, against, 0.5)


def answers(seed=0):
    """Three rows of different length, the second half of each supervised."""
    ids, lengths = tokens(seed=seed), [9, 5, 7]
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    prompt = torch.arange(9) < 3
    return Batch(ids * mask, mask, torch.where(mask.bool() & ~prompt, ids, IGNORE))


@archs
def test_margin_is_half_the_step_of_the_logits_error(untrained, arch):
    model, against, rows = untrained(arch, std=0.1), parse_recipe("rtn-w4a16-g16-plain"), answers()
    quantized = quantize_(copy.deepcopy(model), against)
    squares, count = 0.0, 0
    for row, length in enumerate([9, 5, 7]):  # one sequence at a time, without padding
        with torch.no_grad():
            ids = rows.input_ids[row : row + 1, :length]
            difference = (quantized(input_ids=ids).logits - model(input_ids=ids).logits)[0].double().numpy()
        squares += (difference[2 : length - 1] ** 2).sum()  # positions that predict tokens 3 ..
        count += difference[2 : length - 1].size
    step = math.sqrt(12 * squares / count)
    margin = logit_margin(model.train(), [rows], against)
    assert margin == pytest.approx(step / 2, rel=1e-3)
    assert model.training
    halves = [
        Batch(*(t[part] for t in (rows.input_ids, rows.attention_mask, rows.labels)))
        for part in (slice(1), slice(1, 3))
    ]
    assert logit_margin(model, halves, against) == pytest.approx(margin, rel=1e-3)
    assert logit_margin(model, [rows], parse_recipe("rtn-w8a16-g16-plain")) < margin / 8


def test_margin_needs_answers(untrained):
    rows = answers()
    silent = Batch(rows.input_ids, rows.attention_mask, torch.full_like(rows.labels, IGNORE))
    with pytest.raises(ValueError, match="batches: no supervised token"):
        logit_margin(untrained("llama"), [silent], parse_recipe("rtn-w4a16-g16-plain"))
