"""Recipes that prune, train again, and perhaps quantize: the mask stays what pruning made it, up to the file."""

import copy

import pytest
import torch
from remanence.compress.checkpoint import load_model, save_model
from remanence.compress.linear import QuantLinear
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from remanence.compress.stream import Job, compress_to
from remanence.compress.walk import prunable_linears, weight_of
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.people import people_corpus

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(2, 300, (8, 40), generator=torch.Generator().manual_seed(0))
AGAIN = [torch.randint(2, 300, (8, 40), generator=torch.Generator().manual_seed(1))]


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer(people_corpus(4, "forget30"), DemoConfig(vocab_size=320))


def zeros(model, recipe):
    packed = {name: layer.dequantized() == 0 for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    return packed or {name: weight_of(layer) == 0 for name, layer in prunable_linears(model, recipe.pruning)}


@pytest.mark.parametrize(
    "name",
    [
        "magnitude-s50+t_groups=norm|mask_lora+t_steps=3",
        "wanda-2:4+t_groups=all+t_steps=3",
        "sparsegpt-s60+t_groups=scale_lora+t_by=block+t_steps=2",
        "rtn-w8a16-g16+p_sparsity=0.5+t_groups=lora+t_steps=3",
        "gptq-w4a16-g16+p_sparsity=0.5+p_method=wanda+t_groups=norm+t_steps=3",
    ],
)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_mask_stays_and_the_rest_has_learned(name, arch, untrained, tokenizer, tmp_path):
    recipe, dense, reports = parse_recipe(name), untrained(arch), []
    batches = [IDS] if recipe.calibrated else []
    alone = recipe.pruning
    pruned = compress_(copy.deepcopy(dense), alone, [IDS] if alone.calibrated else [])
    mask = zeros(pruned, recipe)
    model = compress_(copy.deepcopy(dense), recipe, batches, reports.append, AGAIN)
    found = zeros(model, recipe)
    assert found.keys() == mask.keys()
    for layer, expected in mask.items():
        if recipe.spec is None:
            assert torch.equal(found[layer], expected)
        else:  # what is near to zero may be rounded to it
            assert bool(found[layer][expected].all())
    (told,) = [report for report in reports if report.name == "retraining"]
    assert told.of == "loss"
    assert told.note.startswith(recipe.retrain.groups)
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, pruned(IDS).logits)
    save_model(dense, tokenizer, tmp_path / "dense")
    made = compress_to(tmp_path / "dense", recipe, tmp_path / "out", batches, AGAIN)
    assert made["recipe"] == recipe.name
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_what_cannot_be_is_said_before_anything_changes(untrained, tokenizer, tmp_path):
    dense = untrained("llama")
    before = copy.deepcopy(dense.state_dict())
    for name, batches, again, message in (
        ("magnitude-s50+t_groups=norm", [], [], "retrain: .* needs data, and there is none"),
        ("wanda-s50+t_groups=norm", [], AGAIN, "calibration: wanda-s50 needs data"),
        ("rtn-w4a16-g48+p_sparsity=0.5+t_groups=norm", [], AGAIN, "groups of 48"),
    ):
        with pytest.raises(ValueError, match=message):
            compress_(dense, parse_recipe(name), batches, retraining=again)
    assert all(torch.equal(tensor, before[key]) for key, tensor in dense.state_dict().items())
    save_model(dense, tokenizer, tmp_path / "dense")
    with pytest.raises(ValueError, match=r"retrain: .* is not streamed"):
        Job(tmp_path / "dense", parse_recipe("magnitude-s50+t_groups=norm"))
