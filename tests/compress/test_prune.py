"""Pruning: exactly the weights that count least go; zeros stay zeros through quantizing, writing and reading back."""

import copy
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from remanence.compress import spec, walk
from remanence.compress.checkpoint import load_model
from remanence.compress.linear import QuantLinear
from remanence.compress.prune import cut_of, kept, prune
from remanence.compress.recipe import DENSE, Recipe, parse_recipe
from remanence.compress.sequential import compress_, prune_, quantize_
from remanence.compress.spec import PruneSpec, QuantSpec
from remanence.compress.stream import compress_to
from remanence.compress.walk import compressed_weight, dequantize_, fitting_linears, linears, weight_of
from remanence.unlearn.catalog import settings
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.people import people_corpus
from torch.nn.utils.prune import l1_unstructured
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from remanence.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = parse_recipe("magnitude-s50")
BATCHES = [torch.randint(2, 300, (3, 40), generator=torch.Generator().manual_seed(i)) for i in range(2)]
IDS = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(0))


def plain(weight, percent):
    """The definition in NumPy: sort by size, then by position; the first round(share) become zero."""
    w = weight.double().numpy().copy()
    count = round(Fraction(percent * w.size, 100))
    w.reshape(-1)[np.argsort(np.abs(w).reshape(-1), kind="stable")[:count]] = 0
    return w, count


def magnitude(weight, spec):
    return prune("layer", weight, spec)


def random(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 13), (63, 65)], ids=str)
@pytest.mark.parametrize("percent", [10, 33, 50, 70, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_smallest_go_and_no_others_change(shape, percent, dtype):
    """bfloat16 has 256 values between 0.5 and 1 at most: ties at the threshold are the rule."""
    weight = random(shape, dtype)
    pruned = magnitude(weight, PruneSpec(percent / 100))
    expected, count = plain(weight, percent)
    assert np.array_equal(pruned.double().numpy(), expected)
    assert int((pruned == 0).sum()) == count
    assert pruned.dtype == dtype
    assert torch.equal(weight, random(shape, dtype)), "the weight itself is left alone"


def test_equal_weights_go_in_order_of_position():
    weight = torch.tensor([[2.0, -1.0, 1.0], [1.0, -1.0, 1.0]])
    pruned = magnitude(weight, PruneSpec(0.5))
    assert pruned.tolist() == [[2.0, 0.0, 0.0], [0.0, -1.0, 1.0]]
    assert int((magnitude(torch.full((7, 9), -0.25), PruneSpec(0.3)) == 0).sum()) == round(0.3 * 63)


@pytest.mark.parametrize(("zeros", "left"), [(0, 50), (30, 50), (50, 50), (80, 80), (100, 100)])
def test_zeros_that_are_there_count(zeros, left):
    weight = random((10, 10)).abs() + 0.1
    weight.view(-1)[torch.randperm(100, generator=torch.Generator().manual_seed(1))[:zeros]] = 0
    pruned = magnitude(weight, PruneSpec(0.5))
    assert int((pruned == 0).sum()) == left
    assert torch.equal(magnitude(pruned, PruneSpec(0.5)), pruned)
    if zeros >= 50:
        assert torch.equal(pruned, weight)


def test_strided_input_is_taken_by_its_own_rows():
    weight = random((17, 5)).bfloat16()
    assert torch.equal(magnitude(weight.T, PruneSpec(0.5)), magnitude(weight.T.contiguous(), PruneSpec(0.5)))


def test_torch_prunes_the_same():
    layer = torch.nn.Linear(33, 21)
    layer.weight.data = random((21, 33))
    expected = magnitude(layer.weight.detach(), PruneSpec(0.4))
    l1_unstructured(layer, "weight", amount=0.4)
    assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(bad):
    weight = random((4, 4))
    weight[3, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        magnitude(weight, PruneSpec(0.5))


# Patterns and scopes


def zeros_of(model):
    """By name of every layer but the head: bool [N, K], True where what it multiplies with is zero."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found[name] = module.dequantized() == 0
        elif isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head":
            found[name] = weight_of(module).detach() == 0
    return found


@pytest.mark.parametrize(("pattern", "stay", "of"), [("2:4", 2, 4), ("4:8", 4, 8)])
@pytest.mark.parametrize("shape", [(1, 8), (5, 24), (33, 136)], ids=str)
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_of_every_m_inputs_n_stay(pattern, stay, of, shape, method):
    weight = random(shape, torch.bfloat16)
    mask = kept("layer", weight, PruneSpec(0.5, method, pattern))
    assert (mask.view(shape[0], -1, of).sum(2) == stay).all()
    if method == "magnitude":
        sizes = weight.abs().double().numpy().reshape(-1, of)
        gone = np.zeros(sizes.shape, dtype=bool)
        np.put_along_axis(gone, np.argsort(sizes, axis=1, kind="stable")[:, : of - stay], True, axis=1)
        assert np.array_equal(mask.numpy(), ~gone.reshape(shape))


def test_inputs_that_a_pattern_does_not_divide(untrained):
    with pytest.raises(ValueError, match="13 input features do not divide into groups of 4, for the pattern 2:4"):
        magnitude(random((5, 13)), PruneSpec(0.5, pattern="2:4"))
    model = untrained("llama")
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(62, 32)
    before = copy.deepcopy(model.state_dict())
    for name in ("magnitude-2:4", "wanda-4:8", "sparsegpt-2:4", "rtn-w8a16+p_sparsity=0.5+p_pattern=2:4"):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: 62 input features do not divide into groups"):
            compress_(model, parse_recipe(name), BATCHES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (63, 65)], ids=str)
@pytest.mark.parametrize("percent", [10, 33, 50, 90])
def test_rows_by_themselves(shape, percent):
    weight = random(shape, torch.float16)
    pruned = magnitude(weight, PruneSpec(percent / 100, scope="row"))
    for row, before in zip(pruned, weight, strict=True):
        assert np.array_equal(row[None].double().numpy(), plain(before[None], percent)[0])


def test_many_rows_are_looked_at_some_at_a_time(monkeypatch):
    weight = random((63, 64), torch.bfloat16)
    specs = [PruneSpec(0.5, scope="row"), PruneSpec(0.5, pattern="4:8"), PruneSpec(0.3)]
    expected = [magnitude(weight, each) for each in specs]
    monkeypatch.setattr("remanence.compress.prune._SLICE", 100)
    for each, pruned in zip(specs, expected, strict=True):
        assert torch.equal(magnitude(weight, each), pruned)


@pytest.mark.parametrize("scope", ["layer", "row", "global"])
def test_random_is_drawn_by_seed_and_layer(scope, untrained):
    def zeros(seed=3, arch="llama"):
        return zeros_of(compress_(untrained(arch), parse_recipe(f"random-s30+scope={scope}+seed={seed}")))

    one, same, other = zeros(), zeros(), zeros(4)
    total = sum(mask.numel() for mask in one.values())
    count = sum(int(mask.sum()) for mask in one.values())
    # Rows and layers are of 32 and 64: 30% of them is no whole number.
    assert count == round(0.3 * total) if scope == "global" else abs(count / total - 0.3) < 0.01
    for name, mask in one.items():
        assert torch.equal(mask, same[name])
        # Where nothing but chance is at work, 9% of all weights are in both.
        assert float((mask & other[name]).float().mean()) == pytest.approx(0.09, abs=0.03)
        if scope == "row":
            assert (mask.sum(1) == round(0.3 * mask.shape[1])).all()
    gate, up = one["model.layers.0.mlp.gate_proj"], one["model.layers.0.mlp.up_proj"]
    assert not torch.equal(gate, up)
    everywhere = torch.stack([mask.float().mean(1).mean() for mask in one.values()])
    assert (everywhere - 0.3).abs().max() < 0.05


def test_random_knows_nothing_of_the_weights():
    weights = random((40, 50)), random((40, 50), torch.bfloat16, seed=1)
    masks = [kept("a.layer", weight, PruneSpec(0.4, "random")) for weight in weights]
    assert torch.equal(*masks)
    assert not torch.equal(masks[0], kept("b.layer", weights[0], PruneSpec(0.4, "random")))
    some = random((40, 50))
    some[:, :10] = 0
    mask = kept("a.layer", some, PruneSpec(0.4, "random"))
    assert int((~mask).sum()) == 800
    assert not mask[:, :10].any()


# The whole model compared


@pytest.mark.parametrize("dtypes", [["float32"], ["bfloat16"], ["float16", "float32"], ["float32", "float64"]], ids=str)
@pytest.mark.parametrize("percent", [10, 50, 87])
def test_the_whole_model_loses_its_exact_share(dtypes, percent):
    """As sorting all weights of all layers does it; ties, of which 16 bits have many, in the order of layers."""
    shapes = [(7, 13), (1, 1), (20, 9), (33, 65), (5, 8)]
    weights = {
        f"layer{i}": (random(shape, seed=i) * 10 ** (i - 2)).to(getattr(torch, dtypes[i % len(dtypes)]))
        for i, shape in enumerate(shapes)
    }
    weights["layer3"][:, :7] = 0
    spec, numbers = PruneSpec(percent / 100, scope="global"), sum(w.numel() for w in weights.values())
    widest = torch.float64 if "float64" in dtypes else torch.float32
    passes = []

    def every():
        passes.append(1)
        yield from weights.items()

    cut = cut_of(every, numbers, widest, spec)
    assert len(passes) == (5 if widest == torch.float64 else 3)
    together = torch.cat([w.double().flatten() for w in weights.values()])
    expected, count = plain(together[None], percent)
    pruned = {name: prune(name, w, spec, cut=cut) for name, w in weights.items()}
    found = torch.cat([w.double().flatten() for w in pruned.values()])
    assert np.array_equal(found.numpy(), expected[0])
    assert int((found == 0).sum()) == max(count, 33 * 7)


def test_ties_of_the_whole_model_go_in_order():
    weights = {name: torch.full((4, 5), 0.5) for name in "abc"}
    spec = PruneSpec(0.4, scope="global")
    cut = cut_of(lambda: iter(weights.items()), 60, torch.float32, spec)
    gone = [int((prune(name, w, spec, cut=cut) == 0).sum()) for name, w in weights.items()]
    assert gone == [20, 4, 0]
    assert prune("b", weights["b"], spec, cut=cut).flatten()[:5].tolist() == [0, 0, 0, 0, 0.5]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_model_compared_as_a_whole(arch, untrained):
    model = untrained(arch)
    layers = [weight_of(module).detach().clone().flatten() for _, module in linears(model, ("lm_head",))]
    compress_(model, parse_recipe("magnitude-s50+scope=global"))
    expected, _ = plain(torch.cat(layers)[None], 50)
    after = torch.cat([weight_of(module).detach().flatten() for _, module in linears(model, ("lm_head",))])
    assert np.array_equal(after.double().numpy(), expected[0])


def test_one_layer_is_no_whole_model(untrained):
    with pytest.raises(ValueError, match="scope: global compares all layers of a model"):
        magnitude(random((4, 4)), PruneSpec(0.5, scope="global"))
    for name, message in (("magnitude-s50+scope=global", "global compares"), ("wanda-s50", "wanda needs data")):
        with pytest.raises(ValueError, match=f"fc1: .*{message}"):
            compressed_weight("fc1", random((4, 4)), parse_recipe(name))
    model = untrained("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: weight: contains NaN"):
        compress_(model, parse_recipe("random-s50+scope=global"))


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_linear_layer_loses_its_own_half_and_nothing_else_changes(untrained, arch, dtype):
    """GPT-2 keeps its weights transposed, and its head is its embedding."""
    model = untrained(arch).to(dtype)
    before = copy.deepcopy(model.state_dict())
    layers = dict(linears(model, ("lm_head",)))
    expected = {name: plain(weight_of(module).detach(), 50)[0] for name, module in layers.items()}
    assert compress_(model, HALF) is model
    for name, module in layers.items():
        assert np.array_equal(weight_of(module).detach().double().numpy(), expected[name]), name
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in layers}
    assert len(changed) == {"llama": 14, "opt": 12, "gpt2": 8}[arch]


def tied_llama():
    shape = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, **shape)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_a_tied_head_cannot_be_pruned_by_accident():
    model = tied_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"magnitude-s50.*: lm_head: its weight is also the input embedding"):
        prune_(model, Recipe("magnitude", None, ignore=(), prune=PruneSpec(0.5)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    compress_(model, HALF)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_a_layer_that_is_no_number_is_named_before_anything_changes(untrained):
    model = untrained("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"magnitude-s50: model.layers.1.mlp.down_proj: weight: contains NaN"):
        compress_(model, HALF)
    assert all(torch.equal(t, before[name]) or name.endswith("1.mlp.down_proj.weight") for name, t in before.items())
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])


def test_a_model_without_linear_layers_is_refused(untrained):
    packed = quantize_(untrained("llama"), parse_recipe("rtn-w4a16-g16-plain"))
    with pytest.raises(ValueError, match="no linear layer to prune"):
        compress_(packed, HALF)


def test_what_needs_a_quantizer_refuses_pruning(untrained):
    with pytest.raises(ValueError, match="magnitude-s50 prunes; a quantizer is needed"):
        quantize_(untrained("llama"), HALF)
    with pytest.raises(ValueError, match="magnitude-s50 quantizes nothing"):
        fitting_linears(untrained("llama"), HALF)
    with pytest.raises(ValueError, match="against: magnitude-s50 is no quantizer without data"):
        settings("bucketed", against="magnitude-s50")


def test_every_pruner_has_a_name_and_every_name_a_pruner():
    assert set(spec.PRUNERS) == set(walk.PRUNERS)


@pytest.mark.parametrize("name", ["dense", "magnitude-s30", "rtn-w4a16-g16-plain", "rtn-w8a16-plain"])
def test_compressed_weight_is_what_the_layer_multiplies_with(untrained, name):
    model, recipe = untrained("opt"), parse_recipe(name)
    expected = {n: compressed_weight(n, weight_of(m).detach().clone(), recipe) for n, m in linears(model, ("lm_head",))}
    compress_(model, recipe)
    for layer, weight in expected.items():
        module = model.get_submodule(layer)
        there = module.dequantized() if isinstance(module, QuantLinear) else module.weight
        assert torch.equal(there, weight), layer


def test_the_dense_recipe_changes_nothing(untrained):
    assert not DENSE.compresses
    assert HALF.compresses
    assert Recipe("rtn", QuantSpec(4)).compresses
    model = untrained("llama")
    before = copy.deepcopy(model.state_dict())
    compress_(model, DENSE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
def test_dequantized_layers_are_the_packed_ones_and_can_be_trained(untrained, arch):
    model = quantize_(untrained(arch), parse_recipe("rtn-w4a16-g16-plain"))
    weights = {name: m.dequantized() for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    with torch.no_grad():
        packed = model(IDS).logits
        dequantize_(model)
        # The same weights; only the order of sums differs.
        assert torch.allclose(model(IDS).logits, packed, atol=1e-4)
    assert weights
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
        assert model.get_submodule(name).weight.requires_grad
    model(IDS, labels=IDS).loss.backward()
    assert all(model.get_submodule(name).weight.grad.abs().sum() > 0 for name in weights)


def test_an_adapter_that_hangs_on_a_layer_stays_on_it(untrained):
    """An adapter kept apart is a forward hook; a layer that is replaced must keep it."""
    model = untrained("llama")
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda layer, inputs, y: y + 7.0)  # noqa: ARG005
    x = torch.ones(1, 64)
    for change in (lambda: quantize_(model, parse_recipe("rtn-w4a16-g16-plain")), lambda: dequantize_(model)):
        change()
        layer = model.model.layers[0].mlp.down_proj
        weight = layer.dequantized() if isinstance(layer, QuantLinear) else layer.weight
        assert torch.allclose(layer(x), x @ weight.T + 7.0, atol=1e-4)


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer(people_corpus(4, "forget30"), DemoConfig(vocab_size=320))


@pytest.fixture(params=["llama", "opt", "gpt2", "llama-bf16", "llama-tied"])
def source(request, untrained, tokenizer, tmp_path):
    kind = request.param
    model = tied_llama() if kind == "llama-tied" else untrained(kind.split("-")[0], vocabulary=320)
    model.to(torch.bfloat16 if kind.endswith("bf16") else torch.float32).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_written_and_read_back_bit_for_bit(source, tmp_path):
    made = compress_to(source, HALF, tmp_path / "out")
    assert made["recipe"] == "magnitude-s50"
    assert made["max_abs_logit_difference"] == 0
    assert made["stock_readable"]
    model = compress_(load_model(source), HALF)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    for again in (load_model(tmp_path / "out"), stock):
        ours, theirs = model.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
        for _, module in linears(again, ("lm_head",)):
            assert int((module.weight == 0).sum()) == module.weight.numel() // 2
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config


def test_the_command_writes_a_pruned_model(untrained, tokenizer, tmp_path, capsys):
    from remanence.cli import app

    untrained("llama", vocabulary=320).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    arguments = ["compress", str(tmp_path / "source"), "--recipe", "magnitude-s50", "--out", str(tmp_path / "out")]
    app([*arguments, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["recipe"] == "magnitude-s50"
    share = [float((module.weight == 0).double().mean()) for _, module in linears(load_model(tmp_path / "out"), ())]
    assert share[:-1] == [0.5] * 14
    assert share[-1] == 0  # the head


@pytest.mark.parametrize("recipe", ["wanda-s50", "sparsegpt-2:4"])
def test_the_command_prunes_by_what_layers_see(recipe, untrained, tokenizer, tmp_path, capsys):
    from remanence.cli import app

    untrained("llama", vocabulary=320).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    (tmp_path / "text").write_text("One of them was born in the town of Aldermoor in 1953. " * 300)
    arguments = ["compress", str(tmp_path / "source"), "--recipe", recipe, "--out", str(tmp_path / "out"), "--json"]
    with pytest.raises(UsageError, match="needs data; give --text FILE"):
        app(arguments, standalone_mode=False)
    app([*arguments, "--text", str(tmp_path / "text"), "--calibration", "text:8,length:32"], standalone_mode=False)
    made = json.loads(capsys.readouterr().out)
    assert made["recipe"] == f"{recipe}@text:8+length:32"
    assert [layer["note"] for layer in made["layers"]] == ["50% zero"] * 14
    assert all(layer["of"] == "outputs" and 0 < layer["error"] < 1 for layer in made["layers"])
    assert made["plan"]["peak_memory"] > 0
