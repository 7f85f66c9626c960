"""Checkpoints: ours reads back bit for bit, stock transformers agrees, and no file is trusted."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from remanence.compress.checkpoint import load_model, load_tokenizer, save_model, weight_bytes
from remanence.compress.linear import QuantLinear
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import quantize_
from remanence.compress.stream import compress_to
from remanence.compress.walk import linears
from remanence.unlearn.demo import DemoConfig, demo_model, demo_tokenizer
from remanence.unlearn.people import people_corpus
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GPT2Config, GPT2LMHeadModel

RECIPES = [
    "rtn-w8a16-plain",
    "rtn-w8a16-g64-plain",
    "rtn-w4a16-g64-plain",
    "rtn-w4a16-plain",
    "rtn-w4a16-g16-plain",
    "rtn-w3a16-g64-plain",
    "rtn-w3a16-plain",
    "rtn-w2a16-g16",
    "rtn-w4a16-g32",
    "rtn-w4a16-g32-asym",
    "rtn-w3a16-asym",
    "rtn-w2a16-g16-asym",
    "hqq-w4a16-g32-asym",
]
IDS = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer(people_corpus(4, "forget30"), DemoConfig(vocab_size=320))


def dense(kind, path, tokenizer):
    """An untrained model directory."""
    if kind == "gpt2":
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=2, n_positions=64))
    else:
        config = DemoConfig(arch=kind.removesuffix("-bf16"), hidden_size=64, intermediate_size=192, layers=2)
        model = demo_model(config, tokenizer, seed=0)
        # Untrained OPT has zero biases; a real one has not.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    model.to(torch.bfloat16 if "bf16" in kind else torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["llama", "opt", "llama-bf16", "gpt2"])
def source(request, tokenizer, tmp_path_factory):
    return dense(request.param, tmp_path_factory.mktemp("models") / request.param, tokenizer)


@pytest.fixture(scope="module", params=["llama", "opt", "llama-bf16"])
def linear_source(request, tokenizer, tmp_path_factory):
    """Those whose layers are all nn.Linear."""
    return dense(request.param, tmp_path_factory.mktemp("models") / request.param, tokenizer)


@pytest.fixture(scope="module")
def llama(tokenizer, tmp_path_factory):
    return dense("llama", tmp_path_factory.mktemp("models") / "llama", tokenizer)


@pytest.fixture(scope="module")
def gpt2(tokenizer, tmp_path_factory):
    return dense("gpt2", tmp_path_factory.mktemp("models") / "gpt2", tokenizer)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("recipe", RECIPES)
def test_reloaded_model_is_the_one_in_memory_bit_for_bit(source, recipe, tmp_path):
    model = quantize_(load_model(source), parse_recipe(recipe))
    save_model(model, load_tokenizer(source), tmp_path / "out", parse_recipe(recipe))
    again = load_model(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert load_tokenizer(tmp_path / "out").get_vocab() == load_tokenizer(source).get_vocab()


@pytest.mark.parametrize("recipe", RECIPES)
def test_stock_transformers_agrees(linear_source, recipe, tmp_path):
    pytest.importorskip("compressed_tensors", reason="the stock reader; comes with the extra `ct`")
    made = compress_to(linear_source, parse_recipe(recipe), tmp_path / "out")
    assert made["stock_readable"]
    # Of asymmetric files compressed-tensors 0.19 and 0.20 read the zero points on this path alone.
    symmetric = parse_recipe(recipe).spec.symmetric
    how = CompressedTensorsConfig(dequantize=not symmetric)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=how).eval()
    ours = load_model(tmp_path / "out")
    # float32: the same weights, sums in another order. bfloat16: stock multiplies in bfloat16, we in float32.
    # That path multiplies code and scale in the scale's 16 bits.
    limit = (1e-5 if symmetric else 1e-3) if ours.dtype == torch.float32 else 2e-2
    assert (logits(stock) - logits(ours)).abs().max() <= limit
    for name, layer in ours.named_modules():
        if isinstance(layer, QuantLinear):
            weight = stock.get_submodule(name).weight
            exact = layer.dequantized().to(weight.dtype)
            assert torch.equal(weight, exact) if symmetric else torch.allclose(weight, exact, rtol=2**-7, atol=0), name


def test_every_linear_but_the_head_is_packed(source):
    dense = load_model(source)
    names = [name for name, _ in linears(dense, ("lm_head",))]
    model = quantize_(dense, parse_recipe("rtn-w4a16-g64-plain"))
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert packed == names
    assert len(names) == {"llama": 14, "llama-bf16": 14, "opt": 12, "gpt2": 8}[source.name]


def test_size_on_disk_is_what_the_format_says(source, tmp_path):
    parameters = sum(m.weight.numel() for _, m in linears(load_model(source), ("lm_head",)))
    sizes = {
        r: compress_to(source, parse_recipe(r), tmp_path / r)["size_bytes"]
        for r in ("rtn-w8a16-plain", "rtn-w4a16-plain")
    }
    assert sizes["rtn-w8a16-plain"] - sizes["rtn-w4a16-plain"] == pytest.approx(parameters / 2, abs=64)
    assert sizes["rtn-w4a16-plain"] < weight_bytes(source)


def test_gpt2_is_written_so_that_stock_readers_stop(gpt2, tmp_path):
    """Its layers are Conv1D, which compressed-tensors does not unpack."""
    made = compress_to(gpt2, parse_recipe("rtn-w4a16-g64-plain"), tmp_path / "out")
    assert not made["stock_readable"]
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=CompressedTensorsConfig())


def test_sharded_checkpoints_are_read(source, tmp_path):
    shutil.copytree(source, tmp_path / "sharded")
    model = load_model(source)
    (tmp_path / "sharded/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load_model(tmp_path / "sharded")), logits(model))


@pytest.fixture
def written(llama, tmp_path):
    recipe = parse_recipe("rtn-w4a16-g64-plain")
    save_model(quantize_(load_model(llama), recipe), load_tokenizer(llama), tmp_path / "w4", recipe)
    return tmp_path / "w4"


def edit_config(path, **quantization):
    config = json.loads((path / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    for key, value in quantization.items():
        (weights if key in weights else config["quantization_config"])[key] = value
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, r"quant_method: 'gptq' is not supported"),
        ({"format": "int-quantized"}, r"format: 'int-quantized'"),
        ({"num_bits": 5}, r"num_bits: 5"),
        ({"symmetric": None}, r"symmetric: None"),
        ({"symmetric": False}, r"weight_zero_point: missing"),
        ({"actorder": "group"}, r"actorder: 'group'"),
        ({"transform_config": {"R3": 1}}, r"transform_config"),
        ({"group_size": 32}, r"weight_scale: shape .*, expected .* group_size=32"),
        ({"num_bits": 8}, r"weight_packed: shape"),
        ({"num_bits": 3, "version": "0.17.0"}, r"version: '0.17.0'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_configs_that_we_would_misread_are_refused(written, change, message):
    edit_config(written, **change)
    with pytest.raises(ValueError, match=message):
        load_model(written)


@pytest.mark.parametrize("harm", ["missing scale", "missing norm", "extra tensor", "truncated", "not a layer"])
def test_damaged_files_are_refused(written, harm):
    file = written / "model.safetensors"
    state = load_file(file)
    if harm == "missing scale":
        del state["model.layers.0.self_attn.q_proj.weight_scale"]
    elif harm == "missing norm":
        del state["model.norm.weight"]
    elif harm == "extra tensor":
        state["model.layers.9.nothing"] = torch.ones(1)
    elif harm == "not a layer":
        state["model.norm.weight_packed"] = torch.ones(1, 1, dtype=torch.int32)
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing|unexpected|not a readable|no linear layer"):
        load_model(written)


@pytest.mark.parametrize("harm", ["layer missing", "truncated", "wrong width"])
def test_a_dense_checkpoint_with_gaps_is_refused(llama, tmp_path, harm):
    """Transformers would fill them with random weights."""
    shutil.copytree(llama, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    state = load_file(file)
    if harm == "layer missing":
        state = {key: value for key, value in state.items() if ".layers.1." not in key}
    elif harm == "wrong width":
        state["model.norm.weight"] = torch.ones(7)
    save_file(state, file, metadata={"format": "pt"})
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"missing keys|cannot be read|mismatched keys"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("shard", ["../elsewhere/model.safetensors", "/etc/passwd", "absent.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(llama, tmp_path, shard):
    shutil.copytree(llama, tmp_path / "model")
    shutil.copytree(llama, tmp_path / "elsewhere")
    with safe_open(llama / "model.safetensors", framework="pt") as file:
        index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), shard)}
    (tmp_path / "model/model.safetensors").unlink()
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not a file in this directory"):
        load_model(tmp_path / "model")


def test_a_config_that_names_outside_kernels_is_refused(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    config = json.loads((llama / "config.json").read_text())
    config["_attn_implementation"] = "someone/kernel"
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names outside code"):
        load_model(tmp_path / "model")


def test_pickled_weights_are_not_read(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(llama / "model.safetensors"), tmp_path / "model/pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{tmp}/nothing", "no such model directory"),
        ("{tmp}", "no config.json"),
        ("no/../such", "no such model directory"),
    ],
)
def test_missing_models_are_named(tmp_path, path, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_model(path.format(tmp=tmp_path))


def test_a_model_without_tokenizer_is_named(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(ValueError, match="no tokenizer beside the model"):
        load_tokenizer(tmp_path / "model")


def test_layers_that_do_not_divide_are_named_before_anything_changes(llama):
    model = load_model(llama)
    with pytest.raises(
        ValueError, match=r"rtn-w4a16-g128-plain: .*: 64 input features do not divide into groups of 128"
    ):
        quantize_(model, parse_recipe("rtn-w4a16-g128-plain"))
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_nothing_is_overwritten(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        compress_to(llama, parse_recipe("rtn-w4a16-g64-plain"), tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "precious"]


def test_a_full_disk_is_named_and_what_is_done_stays(llama, tmp_path):
    """On a real file system of 200 KiB, until it has 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    code = f"""
from pathlib import Path
from remanence.compress.stream import compress_to
from remanence.compress.recipe import parse_recipe
try:
    compress_to({str(llama)!r}, parse_recipe("rtn-w8a16-plain"), {str(disk / "out")!r})
except OSError as error:
    print(error.strerror, [path.name for path in Path({str(disk)!r}).iterdir()])
import subprocess
from remanence.compress.checkpoint import load_tokenizer
from remanence.compress.stream import Job, compress_streamed
subprocess.run(["mount", "-o", "remount,size=2m", {str(disk)!r}], check=True)
job = Job(Path({str(llama)!r}), parse_recipe("rtn-w8a16-plain"))
begun = []
compress_streamed(job, load_tokenizer(job.source), Path({str(disk / "out")!r}), resume=True,
                  notify=lambda text, layer: begun.append(text) if layer is None else None)
print(len(begun) < len(job.units), [path.name for path in Path({str(disk)!r}).iterdir()])
"""
    mount = f'mount -t tmpfs -o size=200k none "{disk}" && exec "$0" -c "$1"'
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount, sys.executable, code], capture_output=True, text=True)
    assert "disk full while writing" in done.stdout, done.stdout + done.stderr
    assert done.stdout.splitlines()[0].endswith("['.out.unfinished']")
    assert done.stdout.splitlines()[1] == "True ['out']", done.stderr
