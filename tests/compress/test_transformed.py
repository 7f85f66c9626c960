"""Rotations, FlatQuant, the gate and the KV cache as recipes: from the name to the file and back."""

import copy

import pytest
import torch
from remanence.compress.checkpoint import load_model, save_model
from remanence.compress.gate import halves, through_gate
from remanence.compress.kv_attach import attach_kv_
from remanence.compress.linear import QuantLinear
from remanence.compress.recipe import parse_recipe
from remanence.compress.rotation import hang_, online_layers
from remanence.compress.sequential import compress_
from remanence.compress.stream import compress_to
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(2, 300, (3, 24), generator=torch.Generator().manual_seed(0))
BATCHES = [torch.randint(2, 300, (8, 24), generator=torch.Generator().manual_seed(i)) for i in (1, 2, 3, 4)]


def packed(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def lost(model, dense):
    ours, theirs = (logits(of).double().log_softmax(-1) for of in (model, dense))
    return float(kl_div(ours, theirs, reduction="batchmean", log_target=True))


@pytest.fixture
def with_outliers(untrained):
    """A few channels behind every norm are 30 times as large as the others."""

    def make(arch):
        model = untrained(arch)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name and name.endswith("weight"):
                    parameter[::13] *= 30
                    parameter /= 5
        return model

    return make


@pytest.mark.parametrize(
    ("name", "stock"),
    [
        ("rtn-w4a4+r_kind=hadamard", True),
        ("gptq-w4a16-g16+r_kind=orthogonal+r_seed=3", True),
        ("gptq-w4a4+r_kind=hadamard+r_online=true", False),
        ("gptq-w4a4+r_kind=learned", True),
        ("flatquant-w4a4+epochs=2", False),
        ("flatquant-w4a16-g16+epochs=2", False),
        ("gptq-w4a4+g_draws=2", True),
    ],
)
@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_written_and_read_by_every_way_is_the_same(name, stock, arch, with_outliers, memorized, tmp_path):
    recipe = parse_recipe(name)
    assert recipe.name == name
    model = with_outliers(arch)
    save_model(model, memorized.tokenizer, tmp_path / "dense")
    compress_(model, recipe, BATCHES)
    expected = logits(model)
    save_model(model, memorized.tokenizer, tmp_path / "memory", recipe)
    made = compress_to(tmp_path / "dense", recipe, tmp_path / "stream", BATCHES)
    assert made["stock_readable"] == stock
    for directory in ("memory", "stream"):
        assert bool(list((tmp_path / directory).glob("model*.safetensors"))) == stock
        assert torch.equal(logits(load_model(tmp_path / directory)), expected)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / directory)), expected)
    if not stock:
        with pytest.raises(ValueError, match=r"others would read its layers and run them otherwise"):
            load_model(tmp_path / "memory").save_pretrained(tmp_path / "again")


def test_transforms_keep_their_precision_in_16_bits(with_outliers, memorized, tmp_path):
    save_model(with_outliers("llama").to(torch.bfloat16), memorized.tokenizer, tmp_path / "dense")
    model = load_model(tmp_path / "dense")
    recipe = parse_recipe("flatquant-w4a4+epochs=1")
    compress_(model, recipe, BATCHES)
    assert any(layer.transform is not None for layer in packed(model).values())
    save_model(model, memorized.tokenizer, tmp_path / "out", recipe)
    again = load_model(tmp_path / "out")
    for name, layer in packed(again).items():
        if layer.transform is not None:
            assert {tensor.dtype for tensor in layer.transform.buffers()} == {torch.float32}, name
    assert torch.equal(logits(again), logits(model))


def test_what_is_learned_or_rotated_loses_less(with_outliers):
    dense = with_outliers("llama")
    found = {
        name: lost(compress_(copy.deepcopy(dense), parse_recipe(name), BATCHES), dense)
        for name in ("rtn-w4a4", "rtn-w4a4+r_kind=hadamard", "flatquant-w4a4")
    }
    assert found["rtn-w4a4+r_kind=hadamard"] < found["rtn-w4a4"]
    assert found["flatquant-w4a4"] < found["rtn-w4a4+r_kind=hadamard"]


def test_a_rotation_is_reported(with_outliers):
    reports = []
    compress_(with_outliers("llama"), parse_recipe("rtn-w4a4+r_kind=hadamard"), report=reports.append)
    (first, *layers) = reports
    assert (first.name, first.of) == ("rotation", "logits")
    assert first.error < 1e-4
    assert len(layers) == 14


# The gate


class Choosy:
    """Quantizes a block as if what it sees decided: writes what it saw into the down projection."""

    def __init__(self, factor):
        self.factor, self.seen = factor, []

    def __call__(self, block, recipe):
        assert recipe is not None
        rows = torch.cat([block.hidden(i).flatten(0, 1) for i in range(len(block))])
        self.seen.append(rows)
        block.module.mlp.down_proj.weight *= 1 + 0.01 * self.factor ** len(self.seen)


@pytest.fixture
def block(untrained):
    from remanence.compress.block import Block, Hidden, block_names, enter

    model, alone = untrained("llama"), [row[None] for ids in BATCHES for row in ids]
    hidden = Hidden(alone, 32, torch.float32)
    calls = enter(model, alone, hidden)
    name = block_names(model)[0]
    module = model.get_submodule(name)
    linears = {inner: layer for inner, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
    return Block(name, module, linears, model.config, calls[0], hidden)


def test_draws_are_halves_and_leave_the_block_alone(block):
    before = copy.deepcopy(block.module.state_dict())
    trial = Choosy(1.0)
    recipe = parse_recipe("gptq-w4a4+g_draws=4")
    passed, spread, note = through_gate(block, recipe, trial)
    assert (passed, note) == (recipe, "all draws give the same block")
    assert spread == 1
    assert all(torch.equal(tensor, before[key]) for key, tensor in block.module.state_dict().items())
    whole = torch.cat([block.hidden(i).flatten(0, 1) for i in range(len(block))])
    assert [len(rows) for rows in trial.seen] == [len(whole) // 2] * 4
    assert len({float(rows.sum()) for rows in trial.seen}) > 1


def test_what_is_unstable_stays_at_8_bits_or_aborts(block):
    recipe = parse_recipe("gptq-w4a4-g16+g_draws=2+g_limit=3")
    passed, spread, note = through_gate(block, recipe, Choosy(2.0))
    assert spread == pytest.approx(4.0, rel=1e-3)  # of the squared error
    assert (passed.spec.bits, passed.spec.group_size, passed.activation.bits) == (8, 16, 8)
    assert "over 2 draws of the calibration data: kept at 8 bits" in note
    assert through_gate(block, parse_recipe("gptq-w4a4+g_draws=2+g_limit=5"), Choosy(2.0))[2] == ""
    with pytest.raises(ValueError, match=r"unstable: block error .* more than 3 times apart"):
        through_gate(block, parse_recipe("gptq-w4a4+g_draws=2+g_limit=3+g_action=abort"), Choosy(2.0))


def test_halves_of_the_sequences_are_all_different():
    for count, draws in ((2, 2), (3, 3), (5, 10), (64, 7)):
        found = halves(count, draws)
        assert len({tuple(half) for half in found}) == draws
        assert all(len(set(half)) == count // 2 and max(half) < count for half in found)


def test_draws_are_of_sequences_however_they_are_batched(untrained):
    recipe, ids = parse_recipe("gptq-w4a4+g_draws=3"), torch.cat(BATCHES)
    told = []
    for batches in ([ids], [row[None] for row in ids]):
        reports = []
        compress_(untrained("llama"), recipe, batches, reports.append)
        told.append([report.spread for report in reports])
    assert told[0] == told[1]
    assert min(told[0]) > 1


def test_too_few_sequences_have_no_such_halves(untrained):
    for ids, draws in ((IDS[:1], 2), (IDS[:2], 3)):
        model = untrained("llama")
        before = logits(model)
        with pytest.raises(
            ValueError, match=f"gate: {draws} draws of half the calibration data, which is {len(ids)} s"
        ):
            compress_(model, parse_recipe(f"gptq-w4a4+r_kind=hadamard+g_draws={draws}"), [ids])
        assert torch.equal(logits(model), before)


def test_a_block_at_8_bits_is_stored_so(untrained, memorized, tmp_path, monkeypatch):
    from remanence.compress import gate

    errors = iter((1.0, 9.0, 1.0, 1.0))  # the first block's two draws, the second's
    monkeypatch.setattr(gate, "_error", lambda *_: next(errors))
    save_model(untrained("llama"), memorized.tokenizer, tmp_path / "dense")
    made = compress_to(tmp_path / "dense", parse_recipe("gptq-w4a4+g_draws=2"), tmp_path / "out", BATCHES)
    bits = {layer["name"]: (layer["bits"], layer["input_bits"], layer["spread"]) for layer in made["layers"]}
    assert {bits[name] for name in bits if ".layers.0." in name} == {(8, 8, 9.0)}
    assert {bits[name] for name in bits if ".layers.1." in name} == {(4, 4, 1.0)}
    model = load_model(tmp_path / "out")
    for name, layer in packed(model).items():
        assert (layer.spec.bits, layer.activation.bits) == bits[name][:2]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_online_rotations_are_for_what_is_quantized(untrained, memorized, tmp_path):
    """A layer that stays dense has no place for one: its weights are not turned either."""
    dense = untrained("llama")
    one = compress_(copy.deepcopy(dense), parse_recipe("rtn-w8a8+r_online=true+ignore=lm_head|re:.*1.mlp.down_proj"))
    assert packed(one)["model.layers.0.mlp.down_proj"].transform is not None
    assert lost(one, dense) < 0.2  # with one side of a rotation alone it is 10 and more
    save_model(one, memorized.tokenizer, tmp_path / "one", parse_recipe("rtn-w8a8"))
    assert torch.equal(logits(load_model(tmp_path / "one")), logits(one))
    before = logits(dense)
    with pytest.raises(ValueError, match="r_online: none of the layers it is for"):
        compress_(dense, parse_recipe("rtn-w8a8+r_online=true+ignore=lm_head|down_proj"))
    assert torch.equal(logits(dense), before)
    hang_(dense, online_layers(dense))
    with pytest.raises(ValueError, match=r"0\.mlp\.down_proj: is not quantized, and has a transform in front of it"):
        save_model(dense, memorized.tokenizer, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize(
    ("name", "batches"),
    [
        ("gptq-w4a4-g32+r_kind=hadamard", []),
        ("gptq-w4a4+r_kind=hadamard", [torch.tensor([[2, 3000]])]),
        ("rtn-w4a4-g48+r_online=true", []),
    ],
)
def test_what_is_refused_is_not_rotated(name, batches, untrained):
    model = untrained("llama")
    before = logits(model)
    with pytest.raises(ValueError, match=r"calibration|groups of 48"):
        compress_(model, parse_recipe(name), batches)
    assert torch.equal(logits(model), before)


def test_grids_and_rotations_keep_their_precision_when_the_model_is_cast(untrained):
    for name in ("smoothquant-w8a8+a_dynamic=false+a_symmetric=false", "rtn-w8a8+r_online=true"):
        recipe = parse_recipe(name)
        model = compress_(untrained("llama"), recipe, BATCHES if recipe.calibrated else ())
        before = logits(model)
        assert (logits(model.to(torch.bfloat16)).float() - before).norm() < 0.1 * before.norm()
        for layer in packed(model).values():
            assert layer.x_scale is None or layer.x_scale.dtype == torch.float32
            assert layer.transform is None or layer.transform.core.dtype == torch.float32


# Serving


def test_few_bits_in_weights_activations_and_cache_together(untrained):
    recipe = parse_recipe("rtn-w8a8+kv_bits=4+kv_group_size=8+kv_residual=4")
    dense = untrained("llama")
    model = compress_(copy.deepcopy(dense), recipe)
    before = logits(model)
    attach_kv_(model, recipe.kv)
    assert (logits(model) - before).abs().max() > 0
    step = [model.generate(IDS[i : i + 1], max_new_tokens=6, do_sample=False)[0, 24:].tolist() for i in range(3)]
    assert model.generate(IDS, max_new_tokens=6, do_sample=False)[:, 24:].tolist() == step


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtn-w4a4+r_kind=learned", "r_kind: learned needs data, and rtn takes none"),
        ("gptq-w4a16+r_kind=learned", "r_kind: learned goes with activations"),
        ("dense+r_kind=hadamard", "rotation: goes with integer weights, not with dense"),
        ("rtn-w4a4+r_kind=givens", "r_kind: 'givens' is not one of hadamard, orthogonal, learned"),
        ("flatquant-w4a4+r_kind=hadamard+r_online=true", "r_online: flatquant puts a map of its own"),
        ("flatquant-w4a4+a_dynamic=false", "a_dynamic: flatquant learns with a grid per token"),
        ("rtn-w4a4+g_draws=3", "gate: is about calibration data, and rtn takes none"),
        ("gptq-w4a4+g_draws=1", "g_draws: 1 is below 2"),
        ("gptq-w4a4+g_limit=0.5", "g_limit: 0.5 is not a number from 1 on"),
        ("gptq-w4a4+g_limit=inf", "g_limit: inf is not a number from 1 on"),
        ("gptq-w8a8+g_limit=2", "g_action: all layers have 8 bits already; expected abort"),
        ("gptq-w8a8+a_fallback=0.1", "a_fallback: 0.1 is given, and inputs have 8 bits already"),
        ("gptq-w4a4+a_fallback=inf", "a_fallback: inf is not a number above 0"),
        ("flatquant-w4a4+a_clip=0.7", "a_clip: flatquant learns the clip itself"),
        ("flatquant-w4a4+a_search=true", "a_search: flatquant learns the clip itself"),
        ("smoothquant-w8a8+alpha=3", "alpha: 3.0 is above 1"),
        ("gptq-w4a4+g_action=cry", "g_action: 'cry' is not one of keep, abort"),
        ("dense+kv_residual=3", "kv_residual: without kv_bits"),
        ("dense+kv_bits=3", "kv bits: 3 is not one of 8, 4, 2"),
    ],
)
def test_recipes_that_cannot_be(name, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(name)
