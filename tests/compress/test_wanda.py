"""Wanda against its formula in NumPy: layer by layer, block by block, with experts that few tokens reach."""

import copy

import numpy as np
import pytest
import torch
from remanence.compress.block import Block, Hidden, block_names, enter
from remanence.compress.experts import unfuse_experts_
from remanence.compress.prune import kept
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from remanence.compress.spec import PATTERNS, PruneSpec
from remanence.compress.stream import compress_to
from remanence.compress.walk import linears, weight_of
from remanence.compress.wanda import Inputs, prune_block_
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.people import people_corpus
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.usefixtures("one_thread")

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [torch.randint(2, 300, shape, generator=GENERATOR) for shape in ((3, 40), (2, 23))]
HALF = PruneSpec(0.5, "wanda")


def literal(weight, x, spec):
    """bool [N, K] in float64, as the paper's figure 2 has it: sort by |W| * |X|, the first go; equal ones in order."""
    W, X = weight.double().numpy(), x.double().numpy()
    metric = np.abs(W) * np.sqrt((X**2).sum(0))
    N, K = W.shape
    if spec.pattern is not None:
        stay, of = PATTERNS[spec.pattern]
        metric, count = metric.reshape(-1, of), of - stay
    elif spec.compared == "row":
        count = round(spec.percent * K / 100)
    else:
        metric, count = metric.reshape(1, -1), round(spec.percent * N * K / 100)
    gone = np.zeros(metric.shape, dtype=bool)
    np.put_along_axis(gone, np.argsort(metric, axis=1, kind="stable")[:, :count], True, axis=1)
    return ~gone.reshape(N, K)


def random(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SPECS = [
    HALF,
    PruneSpec(0.63, "wanda"),
    PruneSpec(0.1, "wanda", scope="layer"),
    PruneSpec(0.9, "wanda", scope="layer"),
    PruneSpec(0.5, "wanda", "2:4"),
    PruneSpec(0.5, "wanda", "4:8"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.percent}-{s.pattern or s.compared}")
@pytest.mark.parametrize("shape", [(1, 8), (7, 40), (33, 136)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masks_are_those_of_the_formula(spec, shape, dtype):
    weight, x = random(shape, 1, dtype), random((90, shape[1]), 2) * torch.rand(shape[1])
    mask = kept("layer", weight, spec, x.norm(dim=0))
    assert np.array_equal(mask.numpy(), literal(weight, x, spec))


@pytest.mark.parametrize("shape", [(5, 13), (3, 65), (1, 1)], ids=str)
def test_odd_rows_lose_their_exact_share(shape):
    weight = random(shape, 3)
    for percent in (10, 33, 50, 90):
        mask = kept("layer", weight, PruneSpec(percent / 100, "wanda"), torch.rand(shape[1]) + 0.1)
        assert ((~mask).sum(1) == round(percent * shape[1] / 100)).all()


def test_inputs_that_are_never_seen_go_first():
    norm = torch.ones(10)
    norm[[2, 7]] = 0
    mask = kept("layer", random((6, 10), 4) + 3, PruneSpec(0.2, "wanda"), norm)
    assert torch.equal(~mask, (norm == 0).expand(6, 10))
    weight = random((6, 10), 4) + 3
    weight[:, 5] = 0  # what is zero already before what counts nothing
    mask = kept("layer", weight, PruneSpec(0.1, "wanda"), norm)
    assert torch.equal(~mask, (torch.arange(10) == 5).expand(6, 10))


def test_norms_are_those_of_all_rows():
    rows = random((300, 17), 5)
    inputs = Inputs(0, torch.zeros(17, dtype=torch.float64))
    for part in rows.split([1, 99, 0, 200]):
        inputs.add(part, 50)
    assert inputs.tokens == 300
    assert torch.allclose(inputs.norm, rows.norm(dim=0), rtol=1e-6)
    assert sum(len(part) for part in inputs.sample) == 101


def make_block(model, batches=BATCHES):
    hidden = Hidden(batches, model.config.hidden_size, model.dtype)
    calls = enter(model, batches, hidden)
    name = block_names(model)[0]
    module = model.get_submodule(name)
    inside = {n: layer for n, layer in module.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    return Block(name, module, inside, model.config, calls[0], hidden)


def seen_by(model, names, batches=BATCHES):
    """Rows that layers are given, by hooks on the whole model."""
    rows = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: rows[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with torch.no_grad():
        for ids in batches:
            model(ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["wanda-s60", "wanda-2:4", "wanda-s30+scope=layer"])
def test_blocks_one_after_another(arch, dtype, name, untrained):
    """Masks of a block are those of what its layers see while the blocks before it are pruned and it is not."""
    recipe, reports = parse_recipe(name), []
    model = untrained(arch).to(dtype)
    dense = copy.deepcopy(model)
    compress_(model, recipe, BATCHES, reports.append)
    by_hand, blocks = copy.deepcopy(dense), block_names(dense)
    for block in blocks:
        names = [n for n, _ in linears(by_hand, ("lm_head",)) if n.startswith(f"{block}.")]
        for n, x in seen_by(by_hand, names).items():
            layer = by_hand.get_submodule(n)
            weight = weight_of(layer).detach().clone()
            mask = torch.from_numpy(literal(weight.float(), x.float(), recipe.prune))
            new = weight.masked_fill(~mask, 0)
            layer.weight.data.copy_(new.T if isinstance(layer, Conv1D) else new)
            there = weight_of(model.get_submodule(n)).detach()
            # Sums of other lengths: where two count the same but for that, either may go.
            assert float((there != new).float().mean()) <= (0 if dtype == torch.float32 else 0.01), n
            layer.weight.data.copy_(there.T if isinstance(layer, Conv1D) else there)
            (report,) = [report for report in reports if report.name == n]
            y, off = (x.double() @ w.double().T for w in (weight, weight - there))
            assert report.error == pytest.approx(float(off.square().sum() / y.square().sum()), rel=2e-2)
            assert (report.of, report.bits) == ("outputs", None)
            zero = float((there == 0).float().mean())
            assert report.note == f"{100 * zero:.4g}% zero"
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, dense.state_dict()[n])}
    assert changed == {f"{n}.weight" for n, _ in linears(dense, ("lm_head",))}


@pytest.mark.parametrize(("tokens", "few"), [(31, True), (32, False)])
def test_few_tokens_prune_by_magnitude(tokens, few, untrained):
    block = make_block(untrained("llama"), [torch.arange(tokens)[None]])
    dense = {name: layer.weight.detach().clone() for name, layer in block.linears.items()}
    for name, layer in prune_block_(block, HALF).items():
        by_size = kept("", dense[name], PruneSpec(0.5, scope="row"))
        assert torch.equal(block.linears[name].weight != 0, by_size) == few
        assert layer.note == (f"{tokens} tokens: by magnitude, 50% zero" if few else "50% zero")
        assert ((block.linears[name].weight == 0).sum(1) == by_size.shape[1] // 2).all()


def test_what_is_no_number_is_named(untrained):
    block = make_block(untrained("llama"))
    block.linears["mlp.up_proj"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"mlp\.up_proj: weight: contains NaN or infinity and cannot be pruned"):
        prune_block_(block, HALF)
    with pytest.raises(ValueError, match="inputs: contain NaN or infinity"):
        kept("layer", torch.ones(2, 2), HALF, torch.tensor([1.0, torch.inf]))
    model = untrained("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"wanda-s50: model\.layers\.1\.mlp\.down_proj: weight: contains NaN"):
        compress_(model, parse_recipe("wanda-s50"), BATCHES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="calibration: wanda-s50 needs data"):
        compress_(untrained("llama"), parse_recipe("wanda-s50"))


# Experts


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=1,
        initializer_range=0.3,
        bos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["wanda-s50", "sparsegpt-2:4", "random-s50", "magnitude-s50+scope=global"])
def test_experts_one_by_one_and_the_router_whole(name, tmp_path):
    """In memory and from shard to shard: the same."""
    recipe, reports, dense = parse_recipe(name), [], mixtral()
    tokenizer = demo_tokenizer(people_corpus(4, "forget30"), DemoConfig(vocab_size=320))
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    apart = copy.deepcopy(dense)
    unfuse_experts_(apart)
    whole = apart.state_dict()
    model = compress_(dense, recipe, BATCHES, reports.append)
    assert len(reports) == 2 * (4 + 6 * 3)
    after = model.state_dict()
    for key in whole:
        pruned = key.removesuffix(".weight") in {report.name for report in reports}
        assert pruned or torch.equal(after[key], whole[key]), key
        if pruned and "global" not in name:
            assert int((after[key] == 0).sum()) == after[key].numel() // 2
    if recipe.calibrated:
        starved = [report for report in reports if "by magnitude" in report.note]
        assert 0 < len(starved) < 36
        assert all(".experts." in report.name for report in starved)
    made = compress_to(tmp_path / "dense", recipe, tmp_path / "out", BATCHES)
    assert made["max_abs_logit_difference"] == 0
    assert [layer["note"] for layer in made["layers"]] == [report.note for report in reports]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        # Whose experts are fused again: sums in another order.
        assert torch.allclose(stock(BATCHES[0]).logits, model(BATCHES[0]).logits, atol=1e-3)
    fused = {n: t for n, t in stock.named_parameters() if t.dim() == 3}
    zeros = sum(int((t == 0).sum()) for n, t in after.items() if ".experts." in n)
    assert fused
    assert sum(int((t == 0).sum()) for t in fused.values()) == zeros
