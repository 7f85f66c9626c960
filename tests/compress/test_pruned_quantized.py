"""Pruned and quantized by one recipe: zeros stay zeros, in memory, on disk, and as stock transformers reads them."""

import copy
import importlib.util
from dataclasses import replace

import pytest
import torch
from remanence.compress.bnb import dequantized_weight
from remanence.compress.checkpoint import load_model
from remanence.compress.linear import QuantLinear
from remanence.compress.prune import kept
from remanence.compress.recipe import Recipe, parse_recipe
from remanence.compress.sequential import compress_, quantizing_alone
from remanence.compress.spec import PruneSpec
from remanence.compress.stream import compress_to
from remanence.compress.walk import data_free_prune, weight_of
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.people import people_corpus
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = [torch.randint(2, 300, (3, 40), generator=torch.Generator().manual_seed(i)) for i in range(2)]
IDS = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer(people_corpus(4, "forget30"), DemoConfig(vocab_size=320))


def zeros_of(model):
    """By name of every layer but the head: bool [N, K], True where what it multiplies with is zero."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found[name] = module.dequantized() == 0
        elif isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head":
            found[name] = weight_of(module).detach() == 0
    return found


COMBINED = [
    "rtn-w4a16-g16+p_sparsity=0.5",
    "rtn-w3a16-g16-asym+p_sparsity=0.7+p_method=wanda",
    "rtn-w8a8+a_dynamic=false+p_sparsity=0.5+p_method=sparsegpt",
    "hqq-w4a16-g16-asym+p_sparsity=0.5+p_method=sparsegpt+p_pattern=2:4",
    "hqq-w2a16-g16+p_sparsity=0.5+p_method=random",
    "awq-w4a16-g16-asym+p_sparsity=0.6+p_method=wanda",
    "awq-w4a16-g16+p_sparsity=0.5+p_scope=global",
    "smoothquant-w8a8+p_sparsity=0.5+p_method=sparsegpt+p_pattern=4:8",
    "signround-w3a16-g16-asym+iterations=8+p_sparsity=0.5+p_method=wanda",
    "signround-w4a16-g16+iterations=8+p_sparsity=0.5+p_method=random+p_scope=row",
    "gptq-w4a16-g16+p_sparsity=0.5",
    "gptq-w4a16-g16-asym+p_sparsity=0.5+p_scope=global",
    "gptq-w3a16-g16+p_sparsity=0.6+p_method=wanda",
    "gptq-w4a16-g16+p_sparsity=0.5+p_method=sparsegpt",
    "gptq-w4a16-g16-asym+act_order=static+p_sparsity=0.5+p_method=sparsegpt+p_pattern=2:4",
    "gptq-w4a16+alpha=0.5+w8=down_proj|fc2|c_proj+p_sparsity=0.5+p_method=sparsegpt",
    "gptq-w4a8+p_sparsity=0.5+p_method=wanda+p_pattern=2:4",
]


def check_zeros(zeros, spec):
    """At least as many as `spec` says, where it says so."""
    for name, mask in zeros.items():
        if spec.pattern is not None:
            of = int(spec.pattern[-1])
            assert (mask.view(len(mask), -1, of).sum(2) >= of // 2).all(), name
        elif spec.compared == "row":
            assert (mask.sum(1) >= round(spec.percent * mask.shape[1] / 100)).all(), name
        elif spec.compared == "layer":
            assert int(mask.sum()) >= round(spec.percent * mask.numel() / 100), name
    numbers = sum(mask.numel() for mask in zeros.values())
    assert sum(int(mask.sum()) for mask in zeros.values()) >= spec.percent * numbers / 100 - len(zeros) * 64


@pytest.mark.parametrize(
    ("arch", "name"), [*(("llama", name) for name in COMBINED), *(("gpt2", name) for name in COMBINED[1::3])]
)
def test_zeros_stay_through_quantizing_writing_and_reading(name, arch, untrained, tokenizer, tmp_path):
    if arch == "gpt2":
        name = name.replace("down_proj|fc2|", "")
    else:
        name = name.replace("|fc2|c_proj", "")
    recipe, reports = parse_recipe(name), []
    source, out = tmp_path / "dense", tmp_path / "out"
    untrained(arch, vocabulary=320).save_pretrained(source)
    tokenizer.save_pretrained(source)
    dense = load_model(source)
    model = compress_(copy.deepcopy(dense), recipe, BATCHES, reports.append)
    zeros = zeros_of(model)
    assert {report.name for report in reports} == zeros.keys()
    assert all("% zero" in report.note for report in reports)
    check_zeros(zeros, recipe.prune)
    # What the pruner alone takes of the first block, whose inputs are the same, is zero; and what stays is not lost.
    alone = zeros_of(compress_(dense, recipe.pruning, BATCHES))
    first = [layer for layer in zeros if ".0." in layer]
    assert first
    for layer in first:
        if recipe.method != "gptq" or not recipe.prune.calibrated:
            assert not (alone[layer] & ~zeros[layer]).any(), layer
        assert float((zeros[layer] & ~alone[layer]).float().mean()) < (0.45 if recipe.spec.bits < 4 else 0.2)

    made = compress_to(source, recipe, out, BATCHES)
    assert made["max_abs_logit_difference"] == 0
    assert [layer["note"] for layer in made["layers"]] == [report.note for report in reports]
    again = load_model(out)
    for layer, mask in zeros_of(again).items():
        assert torch.equal(mask, zeros[layer]), layer
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    if made["stock_readable"] and importlib.util.find_spec("compressed_tensors"):
        how = CompressedTensorsConfig(dequantize=not recipe.spec.symmetric)
        stock = AutoModelForCausalLM.from_pretrained(out, quantization_config=how)
        with torch.no_grad():
            stock(IDS)  # it makes dense weights at the first pass
        for layer, mask in zeros.items():
            weight = weight_of(stock.get_submodule(layer))
            assert (weight[mask] == 0).all(), layer
            assert int((weight == 0).sum()) == int(mask.sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["gptq-w4a16-g16+p_sparsity=0.5+p_method=sparsegpt", "sparsegpt-2:4", "wanda-s70"])
def test_zeros_of_models_in_16_bits(name, dtype, untrained, tokenizer, tmp_path):
    recipe = parse_recipe(name)
    untrained("llama", vocabulary=320).to(dtype).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    zeros = zeros_of(compress_(load_model(tmp_path / "dense"), recipe, BATCHES))
    check_zeros(zeros, recipe.prune)
    compress_to(tmp_path / "dense", recipe, tmp_path / "out", BATCHES)
    again = zeros_of(load_model(tmp_path / "out"))
    assert all(torch.equal(again[layer], zeros[layer]) for layer in zeros)


def test_gptq_makes_up_for_what_is_pruned(memorized):
    """Pruned and rounded together, a trained model comes nearer to the dense one than one after the other."""
    pairs = memorized.corpus.retain + memorized.corpus.forget
    batches = [torch.tensor([memorized.encoder.pair(row.question, row.answer)[0]]) for row in pairs]

    def outputs(model):
        with torch.no_grad():
            return torch.cat([model(ids).logits.flatten() for ids in batches])

    def off(*names):
        model = copy.deepcopy(memorized.target)
        for name in names:
            compress_(model, parse_recipe(name), batches)
        return float((outputs(model) - dense).square().sum() / dense.square().sum())

    dense = outputs(memorized.target)
    one_pass = off("gptq-w3a16-g32+p_sparsity=0.3+p_method=sparsegpt")
    assert one_pass < off("sparsegpt-s30", "rtn-w3a16-g32")
    from_dense = off("gptq-w3a16-g32+p_sparsity=0.3+p_method=wanda")
    assert one_pass < from_dense < off("wanda-s30", "gptq-w3a16-g32") < off("wanda-s30", "rtn-w3a16-g32")


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-int8"])
def test_bitsandbytes_keeps_zeros_that_are_there(name, untrained):
    pytest.importorskip("bitsandbytes", reason="comes with the extra `bnb`")
    zeros = zeros_of(model := compress_(untrained("llama"), parse_recipe("magnitude-2:4")))
    compress_(model, parse_recipe(name))
    for layer, mask in zeros.items():
        assert mask.float().mean() == 0.5
        assert (dequantized_weight(model.get_submodule(layer))[mask] == 0).all()


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt+p_pattern=2:4", "random+p_seed=2", "magnitude+p_scope=global"])
def test_few_tokens_prune_by_magnitude_and_round_to_nearest(method, pruner, untrained):
    recipe = parse_recipe(f"{method}-w4a16-g16-asym+p_sparsity=0.5+p_method={pruner}")
    reports: list = []
    weights = {name: layer.weight.detach() for name, layer in untrained("llama").named_modules() if "_proj" in name}
    model = compress_(untrained("llama"), recipe, [BATCHES[0][:1, :20]], reports.append)
    by_size = data_free_prune(recipe.prune)
    whole = torch.cat([weight.flatten().abs() for weight in weights.values()]).sort().values
    for report in reports:
        weight, zero = weights[report.name], model.get_submodule(report.name).dequantized() == 0
        if "global" in pruner:
            mask = weight.abs() > whole[len(whole) // 2 - 1]
        else:
            mask = kept(report.name, weight, by_size)
        assert zero[~mask].all(), report.name
        assert float(zero[mask].float().mean()) < 0.3
        assert ("20 tokens: by magnitude" in report.note) == (recipe.prune.calibrated and method != "gptq")
        assert ("by magnitude" in report.note) == recipe.prune.calibrated
        assert ("20 tokens: rounded to nearest" in report.note) == (method != "rtn")
        assert (report.of, report.error is None) == (
            "weights" if method == "rtn" and not recipe.calibrated else "outputs",
            False,
        )


def test_halves_of_a_recipe():
    both = parse_recipe("rtn-w4a16-g16+p_sparsity=0.5+p_method=wanda@text:9")
    assert both.pruning.name == "wanda-s50@text:9"
    assert quantizing_alone(both).name == "rtn-w4a16-g16"
    both = parse_recipe("gptq-w4a16-g16+p_sparsity=0.3+p_method=random+p_seed=2@text:9")
    assert both.pruning.name == "random-s30+seed=2"
    assert quantizing_alone(both).name == "gptq-w4a16-g16@text:9"


@pytest.mark.parametrize(
    "name",
    [
        "gptq-w4a16-g16+p_sparsity=0.5+p_method=sparsegpt",
        "gptq-w4a16-g16+act_order=static+p_sparsity=0.5+p_method=sparsegpt",
        "rtn-w4a16-g16+p_sparsity=0.6+p_method=random",
        "wanda-s50",
        "magnitude-s50+scope=global+t_groups=norm+t_steps=2",
    ],
)
def test_a_model_that_was_pruned_before_keeps_its_zeros_and_gets_no_more(name, untrained):
    """GPTQ's pass would find SparseGPT's mask in another order of columns."""
    recipe = parse_recipe(name)
    first = replace(recipe, prune=replace(recipe.prune, order="prune-unlearn"))
    model = compress_(untrained("llama", vocabulary=320), recipe.pruning, BATCHES)
    before, expected = zeros_of(model), copy.deepcopy(model)
    compress_(model, first, BATCHES, retraining=BATCHES)
    for layer, mask in zeros_of(model).items():
        assert torch.equal(mask & before[layer], before[layer]), layer
        assert recipe.spec is not None or torch.equal(mask, before[layer]), layer
    if recipe.spec is not None:
        compress_(expected, quantizing_alone(recipe), BATCHES)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, expected(IDS).logits)
    with pytest.raises(ValueError, match=r"order: prune-unlearn is for a model that was pruned .* 0\.0% of its"):
        compress_(untrained("llama", vocabulary=320), first, BATCHES, retraining=BATCHES)


def test_layers_outside_the_blocks_are_pruned_by_magnitude(untrained):
    for name, note in (
        ("wanda-s50+ignore=", "outside the decoder blocks: by magnitude, 50% zero"),
        ("gptq-w8a16+p_sparsity=0.5+ignore=", "outside the decoder blocks: round to nearest, 50% zero"),
        (
            "awq-w8a16+p_sparsity=0.5+p_method=wanda+ignore=",
            "outside the decoder blocks: round to nearest, by magnitude, 50% zero",
        ),
        ("rtn-w8a16+p_sparsity=0.5+p_method=wanda+ignore=", "outside the decoder blocks: by magnitude, 50% zero"),
        ("rtn-w8a16+p_sparsity=0.5+ignore=", "50% zero"),
    ):
        reports: list = []
        model, weight = untrained("llama"), untrained("llama").lm_head.weight
        compress_(model, parse_recipe(name), BATCHES, reports.append)
        (head,) = [report for report in reports if report.name == "lm_head"]
        assert (head.note, head.of) == (note, "weights")
        row = {"scope": "row"} if "wanda" in name else {}
        there = model.lm_head.dequantized() if isinstance(model.lm_head, QuantLinear) else model.lm_head.weight
        assert (there[~kept("lm_head", weight, PruneSpec(0.5, **row))] == 0).all()


def test_what_is_not_carried_out_is_said(untrained):
    model = untrained("llama")
    before = copy.deepcopy(model.state_dict())
    for name, message in (
        ("wanda-s50+t_groups=bias|norm", "retrain: wanda-s50.* needs data, and there is none"),
        ("wanda-s50+g_draws=2", "gate: keeps blocks at 8 bits, and wanda quantizes nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            compress_(model, parse_recipe(name), BATCHES)
    with pytest.raises(ValueError, match="prune: magnitude does not go with bnb"):
        Recipe("bnb", None, prune=PruneSpec(0.5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_gate_looks_at_pruned_and_rounded_blocks(untrained):
    reports: list = []
    recipe = parse_recipe("gptq-w3a16-g16+p_sparsity=0.5+p_method=sparsegpt+g_draws=2+g_limit=1.0")
    model = compress_(untrained("llama"), recipe, BATCHES, reports.append)
    assert all(report.bits == 8 and "unstable" in report.note and "50% zero" in report.note for report in reports)
    check_zeros(zeros_of(model), recipe.prune)
