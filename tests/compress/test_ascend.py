"""What a whole model becomes on an Ascend product, compressed or only planned, and the command that says so."""

import json

import pytest
import torch
from remanence.compress.ascend import packed_layers, planned_layers, preflight
from remanence.compress.checkpoint import save_model
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.people import people_corpus
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from remanence.cli import app

pytestmark = pytest.mark.usefixtures("one_thread")


def llama(**shape):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2} | shape
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


@pytest.mark.parametrize(
    "recipe",
    [
        "rtn-w4a16-g32",
        "rtn-w4a16",
        "rtn-w8a16-asym",
        "rtn-w8a8",
        "rtn-w4a4+a_narrow=true",
        "rtn-w4a16-g32+w8=down_proj",
        "rtn-w4a8-g32",
    ],
)
def test_what_is_planned_is_what_is_made(recipe):
    parsed = parse_recipe(recipe)
    model = llama()
    planned = planned_layers(model, parsed, torch.float16)
    assert planned == packed_layers(compress_(model, parsed), torch.float16)
    assert len(planned) == 14


def test_flatquants_maps_are_planned():
    layers = planned_layers(llama(), parse_recipe("flatquant-w4a4+a_narrow=true"), torch.float16)
    found = preflight(layers, "910C")
    assert {finding.route.rounding for finding in found} == {"npu_kronecker_quant"}


def test_each_layer_has_its_own_word():
    model = llama(hidden_size=128, num_key_value_heads=1)
    found = preflight(planned_layers(model, parse_recipe("rtn-w4a16-g64"), torch.float16), "910B1", "nz")
    assert len(found) == 14
    said = {finding.name.rpartition(".")[2]: finding.refusal for finding in found if finding.route is None}
    assert set(said) == {"k_proj", "v_proj"}  # 32 outputs
    assert "out_features: 32 is not a multiple of 64" in said["k_proj"]


def test_a_model_that_is_not_compressed_is_refused():
    with pytest.raises(ValueError, match="has no packed layer; compress it, or say the recipe"):
        packed_layers(llama(), torch.float16)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = demo_tokenizer(people_corpus(4, "forget30"), DemoConfig(vocab_size=300))
    save_model(llama(), tokenizer, folder / "dense")
    recipe = parse_recipe("rtn-w4a16-g64")
    save_model(compress_(llama(), recipe), tokenizer, folder / "w4", recipe)
    return folder


def run(*arguments):
    done = CliRunner().invoke(app, ["preflight", *map(str, arguments)])
    return done.exit_code, done.output, done.exception


def test_the_command_on_a_compressed_model(directories):
    code, out, _ = run(directories / "w4", "--product", "910B4", "--dtype", "bfloat16")
    assert code == 0
    assert "14 packed layers in bfloat16 on 910B4" in out
    assert "model.layers.*.mlp.down_proj (2): 64 x 128, npu_weight_quant_batchmatmul, int4 along n nd" in out
    assert out.strip().endswith("all of them run")


def test_the_command_ends_with_an_error_where_a_layer_cannot_run(directories):
    code, out, _ = run(directories / "w4", "--product", "310P3", "--dtype", "bfloat16")
    assert code == 1
    assert "refused: dtype: bfloat16 is not supported on 310P: float16" in out
    assert "refused: 14 of 14" in out


def test_the_command_on_a_dense_model_and_a_recipe(directories):
    code, out, _ = run(
        directories / "dense", "--recipe", "rtn-w8a8", "--product", "910C", "--dtype", "float16", "--json"
    )
    assert code == 0
    found = json.loads(out)
    assert len(found) == 14
    assert found[0]["layer"]["dtype"] == "float16"
    assert found[0]["route"]["operator"] == "npu_quant_matmul"
    assert found[0]["refusal"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--product", "910"], "product: '910' is not one of 910B1"),
        (["--product", "910C", "--layout", "fractal"], "layout: 'fractal' is not one of auto, nd, nz"),
        (["--product", "910C", "--dtype", "int8"], "dtype: 'int8' is not one of float16"),
        (["--product", "910C", "--recipe", "rtn-w4a16-g64"], "is compressed already"),
    ],
)
def test_what_cannot_be_asked(directories, arguments, words):
    code, _, error = run(directories / "w4", *arguments)
    assert code != 0
    assert words in str(error)
