"""transformers' own from_pretrained on our files: packed layers, the same bits as our reader, stock files untouched."""

import copy
import importlib
import json
import subprocess
import sys
from types import ModuleType

import pytest
import torch
import transformers.quantizers
import transformers.quantizers.auto as registry
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from remanence.backends.on_import import _Watcher
from remanence.compress import checkpoint
from remanence.compress.checkpoint import load_model, save_model
from remanence.compress.integration import MARK, METHOD, arm, register
from remanence.compress.linear import QuantLinear
from remanence.compress.quantizer import PackedConfig, PackedQuantizer, Stored
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import quantize_
from remanence.compress.walk import dequantize_
from remanence.kernels import ops
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.people import people_corpus
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(40)[None]
SYMMETRIC, ASYMMETRIC = "rtn-w4a16-g32", "rtn-w4a16-g32-asym"


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer(people_corpus(4, "forget30"), DemoConfig(vocab_size=300))


@pytest.fixture
def saved(untrained, tokenizer, tmp_path):
    """saved(arch, recipe, dtype, tied) -> a directory that we wrote."""

    def write(arch, name, dtype=torch.float32, tied=False):
        model = untrained(arch).to(dtype)
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
            assert model.lm_head.weight is model.model.embed_tokens.weight
        elif arch != "gpt2":
            for name_, parameter in model.named_parameters():
                if name_.endswith("bias"):  # zero in untrained models
                    parameter.data.normal_(0, 0.1)
        target = tmp_path / f"{arch}-{name}"
        save_model(quantize_(model, parse_recipe(name)), tokenizer, target, parse_recipe(name))
        return target

    return write


def logits(model):
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


def packed(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def edit(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("arch", "dtype", "tied", "recipe"),
    [
        *(("llama", torch.float32, False, name) for name in (SYMMETRIC, ASYMMETRIC, "rtn-w3a16", "rtn-w2a16-g16-asym")),
        *(("llama", torch.bfloat16, True, name) for name in (SYMMETRIC, ASYMMETRIC)),
        *(("opt", torch.float16, False, name) for name in (SYMMETRIC, "rtn-w8a16-plain")),
        *(("gpt2", torch.float32, False, name) for name in (SYMMETRIC, ASYMMETRIC, "rtn-w2a16-g16")),
    ],
)
def test_equals_our_reader_bit_for_bit(arch, dtype, tied, recipe, saved):
    directory = saved(arch, recipe, dtype, tied)
    ours = load_model(directory)
    theirs, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(theirs), logits(ours))
    layers = packed(theirs)
    assert len(layers) == {"llama": 14, "opt": 12, "gpt2": 8}[arch]
    assert not any(isinstance(module, Stored) for module in theirs.modules())
    for name, layer in packed(ours).items():
        assert layer.spec == layers[name].spec
        assert layer.replaces == layers[name].replaces
        assert not layers[name].training
        for (key, mine), (other, its) in zip(layer.named_buffers(), layers[name].named_buffers(), strict=True):
            assert key == other
            assert mine.dtype == its.dtype
            assert torch.equal(mine, its)
    assert theirs.dtype == ours.dtype == dtype
    assert (theirs.lm_head.weight is theirs.get_input_embeddings().weight) == (tied or arch != "llama")
    assert not hasattr(theirs.config, "transformers_weights")
    assert torch.equal(logits(copy.deepcopy(theirs)), logits(ours))
    assert theirs.generate(IDS, max_new_tokens=3, do_sample=False).tolist() == (
        ours.generate(IDS, max_new_tokens=3, do_sample=False).tolist()
    )


@pytest.mark.parametrize("recipe", [SYMMETRIC, ASYMMETRIC])
@pytest.mark.parametrize(("arch", "tied"), [("llama", True), ("opt", False)])
def test_save_pretrained_writes_what_was_read(arch, tied, recipe, saved, tmp_path):
    directory = saved(arch, recipe, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert (tmp_path / "again/model.safetensors.index.json").exists()
    shards = [load_file(file) for file in (tmp_path / "again").glob("*.safetensors")]
    again = {key: tensor for shard in shards for key, tensor in shard.items()}
    once = load_file(directory / "model.safetensors")
    assert again.keys() == once.keys()
    assert [key for key in once if not torch.equal(once[key], again[key])] == []
    described = [json.loads((path / "config.json").read_text()) for path in (directory, tmp_path / "again")]
    assert described[0]["quantization_config"] == described[1]["quantization_config"]
    for reader in (load_model, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(reader(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("how", ["read", "made"])
def test_our_models_save_themselves_too(how, saved, untrained, tmp_path):
    """What load_model reads, and what was compressed in memory, by transformers' own save_pretrained."""
    directory = saved("opt", ASYMMETRIC)
    model = load_model(directory) if how == "read" else quantize_(untrained("opt"), parse_recipe(ASYMMETRIC))
    model.save_pretrained(tmp_path / "again")
    described = [json.loads((path / "config.json").read_text()) for path in (directory, tmp_path / "again")]
    assert described[0]["quantization_config"] == described[1]["quantization_config"]
    for reader in (load_model, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(reader(tmp_path / "again")), logits(model))
    dense = dequantize_(model)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())


def test_saved_again_without_a_recipe_it_keeps_its_own(saved, tokenizer, tmp_path):
    directory = saved("llama", SYMMETRIC)
    save_model(load_model(directory), tokenizer, tmp_path / "again")
    once, again = (json.loads((path / "config.json").read_text()) for path in (directory, tmp_path / "again"))
    assert again == once
    assert torch.equal(logits(load_model(tmp_path / "again")), logits(load_model(directory)))


@pytest.mark.parametrize("knob", ["a_clip=0.9", "a_narrow=true"])
def test_activations_of_our_own_are_not_saved_for_others(knob, untrained, tmp_path):
    model = quantize_(untrained("llama"), parse_recipe(f"rtn-w8a8+{knob}"))
    with pytest.raises(ValueError, match=r"others would read its layers and run them otherwise; .*save_model"):
        model.save_pretrained(tmp_path / "again")


def test_gpt2_is_not_saved_under_the_name_that_stock_readers_look_for(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved("gpt2", SYMMETRIC))
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn: a packed Conv1D .*checkpoint\.save_model"):
        model.save_pretrained(tmp_path / "again")
    assert list((tmp_path / "again").iterdir()) == []


def test_what_we_load_from_several_own_shards(saved, monkeypatch):
    split = checkpoint.split_torch_state_dict_into_shards
    small = {"max_shard_size": "20KB"}
    monkeypatch.setattr(checkpoint, "split_torch_state_dict_into_shards", lambda *a, **k: split(*a, **(k | small)))
    directory = saved("gpt2", SYMMETRIC)
    assert (directory / "remanence.safetensors.index.json").exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory)), logits(load_model(directory)))


@pytest.mark.skipif(not ops.available_isas(), reason="the native kernels are not built here")
def test_layers_that_share_their_input_are_one_product(saved):
    model = AutoModelForCausalLM.from_pretrained(saved("llama", SYMMETRIC))
    joined = {name.rpartition(".")[2] for name, layer in packed(model).items() if layer.joint is not None}
    assert joined == {"gate_proj", "up_proj"}  # 64 rows each; q, k and v have fewer


def test_the_caller_chooses_dtype_and_device(saved):
    directory = saved("opt", SYMMETRIC)
    exact = logits(AutoModelForCausalLM.from_pretrained(directory))
    for device_map in ("cpu", "auto", {"": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(directory, device_map=device_map)
        assert torch.equal(logits(model), exact)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for layer in packed(model).values():
        assert layer.bias.dtype == torch.bfloat16
        assert layer.scale.dtype == torch.float16  # as stored: the weight stays the same
    assert 0 < (logits(model).float() - exact).abs().max() < 0.1 * exact.abs().max()
    for device_map, message in (
        ({"model.decoder.layers.0": "cpu", "": "disk"}, "cannot be offloaded to disk"),
        ({"": "meta"}, "was offloaded; packed layers have to fit"),
    ):
        with pytest.raises(ValueError, match=f"device_map: .*{message}"):
            AutoModelForCausalLM.from_pretrained(directory, device_map=device_map)


def test_the_body_alone_is_read_from_the_same_file(saved):
    directory = saved("llama", ASYMMETRIC)
    whole, body = AutoModelForCausalLM.from_pretrained(directory), AutoModel.from_pretrained(directory)
    assert len(packed(body)) == 14
    with torch.no_grad():
        assert torch.equal(body(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_dequantized_it_is_dense_and_of_the_same_numbers(arch, saved):
    model = AutoModelForCausalLM.from_pretrained(saved(arch, ASYMMETRIC))
    before = logits(model)
    dense = model.dequantize()
    assert packed(dense) == {}
    assert not hasattr(dense.config, "quantization_config")
    assert all(layer.weight.requires_grad for layer in dense.modules() if isinstance(layer, nn.Linear))
    torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-4)  # sums in another order


def test_nothing_dense_is_made_before_reading(saved, untrained):
    """On the meta device, every packed layer is what the file holds, so that no dense weight is ever allocated."""
    directory = saved("opt", ASYMMETRIC)
    with torch.device("meta"):
        model = type(untrained("opt"))(untrained("opt").config)
    config = PackedConfig(**json.loads((directory / "config.json").read_text())["quantization_config"])
    file = str(directory / "model.safetensors")
    PackedQuantizer(config)._process_model_before_weight_loading(model, checkpoint_files=[file])
    tensors = load_file(file)
    places = {name: module for name, module in model.named_modules() if isinstance(module, Stored)}
    assert len(places) == 12
    for name, place in places.items():
        assert list(place.parameters()) == []
        for part, buffer in place.named_buffers():
            assert buffer.is_meta
            assert (buffer.shape, buffer.dtype) == (tensors[f"{name}.{part}"].shape, tensors[f"{name}.{part}"].dtype)
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    for name, layer in packed(loaded).items():
        assert layer.packed.untyped_storage().nbytes() == tensors[f"{name}.weight_packed"].numel() * 4


def test_a_hook_that_moves_inputs_stays(saved):
    directory = saved("llama", SYMMETRIC)
    model = AutoModelForCausalLM.from_pretrained(directory)
    name, layer = next(iter(packed(model).items()))
    quantizer = model.hf_quantizer
    quantizer._process_model_before_weight_loading(
        bare := AutoModelForCausalLM.from_config(model.config), checkpoint_files=[str(directory / "model.safetensors")]
    )
    for place in bare.modules():
        if isinstance(place, Stored):
            place.to_empty(device="cpu")
    for key, tensor in load_file(directory / "model.safetensors").items():
        holder, _, part = key.rpartition(".")
        if isinstance(bare.get_submodule(holder), Stored):
            setattr(bare.get_submodule(holder), part, tensor)
    add_hook_to_module(bare.get_submodule(name), AlignDevicesHook(execution_device="cpu", io_same_device=True))
    quantizer._process_model_after_weight_loading(bare)
    moved = bare.get_submodule(name)
    assert isinstance(moved, QuantLinear)
    assert moved._hf_hook.execution_device == "cpu"
    x = torch.randn(3, layer.in_features)
    assert torch.equal(moved(x), layer(x))


def change_file(change):
    def damage(directory):
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return damage


KEY = "model.decoder.layers.1.fc1"
DAMAGES = {
    "scale": (
        change_file(lambda t: t.pop(f"{KEY}.weight_scale")),
        rf"{KEY}\.weight_scale: missing from the checkpoint",
    ),
    "zero": (change_file(lambda t: t.pop(f"{KEY}.weight_zero_point")), rf"{KEY}\.weight_zero_point: missing"),
    "bias": (change_file(lambda t: t.pop(f"{KEY}.bias")), rf"{KEY}\.bias: missing from the checkpoint"),
    "shape": (
        change_file(lambda t: t.update({f"{KEY}.weight_packed": t[f"{KEY}.weight_packed"][:-1].clone()})),
        rf"{KEY}\.weight_packed: shape \(63, 4\), expected \(64, 4\)",
    ),
    "name": (
        change_file(lambda t: t.update({"model.fc9.weight_packed": t[f"{KEY}.weight_packed"].clone()})),
        r"model\.fc9 is packed in the file but is no linear layer of OPTForCausalLM",
    ),
    "format": (lambda d: edit(d, lambda q: q.update(format="int-quantized")), r"quantization_config\.format: 'int-q"),
    "stem": (
        lambda d: edit(d, lambda q: q[MARK].update(weights="../other")),
        r"remanence\.weights: '\.\./other' is not",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(damage, saved):
    directory = saved("opt", ASYMMETRIC)
    do, message = DAMAGES[damage]
    do(directory)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_state_dict_is_no_file(saved, untrained):
    config = AutoModelForCausalLM.from_pretrained(saved("opt", SYMMETRIC)).config
    config.quantization_config = config.quantization_config.to_dict()
    with pytest.raises(ValueError, match=r"read from their \.safetensors files only"):
        type(untrained("opt")).from_pretrained(None, config=config, state_dict={})


def test_other_files_and_an_explicit_wish_go_to_the_stock_reader(saved):
    directory = saved("llama", "rtn-w4a16-g32-plain")
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    wished = AutoModelForCausalLM.from_pretrained(directory, **how)
    logits(wished)
    assert packed(wished) == {}
    edit(directory, lambda q: q.pop(MARK))
    stock = AutoModelForCausalLM.from_pretrained(directory)
    assert type(stock.config.quantization_config) is CompressedTensorsConfig
    logits(stock)  # which unpacks
    assert packed(stock) == {}
    assert len(packed(load_model(directory))) == 14
    for name, layer in packed(load_model(directory)).items():
        assert torch.equal(stock.get_submodule(name).weight, layer.dequantized())
        # That path multiplies code and scale in the scale's 16 bits.
        torch.testing.assert_close(wished.get_submodule(name).weight, layer.dequantized(), rtol=2**-10, atol=1e-6)


def test_stock_readers_stop_at_gpt2_in_our_own_file(saved):
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(saved("gpt2", SYMMETRIC), quantization_config=CompressedTensorsConfig())


def test_import_remanence_is_all_it_takes(saved):
    """Before transformers, without compressed-tensors, for layers that its readers do not take."""
    code = """if True:
        import sys
        sys.modules["compressed_tensors"] = None  # as if it were not installed
        before = set(sys.modules)
        import remanence
        assert not {"torch", "transformers"} & (set(sys.modules) - before)
        import torch
        from transformers import AutoModelForCausalLM
        assert "remanence.compress.quantizer" not in sys.modules
        torch.set_num_threads(1)
        for directory in sys.argv[1:]:
            model = AutoModelForCausalLM.from_pretrained(directory)
            print(sorted({type(layer).__name__ for layer in model.modules()} & {"QuantLinear", "Stored", "Conv1D"}))
            assert torch.isfinite(model(torch.arange(9)[None]).logits).all()
    """
    directories = [str(saved("opt", ASYMMETRIC)), str(saved("gpt2", "rtn-w2a16-g16"))]
    done = subprocess.run([sys.executable, "-c", code, *directories], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["['QuantLinear']"] * 2


def test_registered_once_and_again_when_imported_anew(monkeypatch):
    arm()
    arm()
    watchers = [finder for finder in sys.meta_path if isinstance(finder, _Watcher)]
    assert [watcher.name for watcher in watchers].count(registry.__name__) == 1
    merge = registry.AutoHfQuantizer.merge_quantization_configs
    register(registry)
    assert registry.AutoHfQuantizer.merge_quantization_configs is merge
    monkeypatch.setattr(transformers.quantizers, "auto", registry)  # to be put back
    monkeypatch.delitem(sys.modules, registry.__name__)

    class Curious:
        """A hook of somebody else, which asks all the others."""

        asking = False

        def find_spec(self, name, path=None, target=None):
            if self.asking or not name.startswith("transformers.quantizers"):
                return None
            self.asking = True
            specs = [finder.find_spec(name, path, target) for finder in sys.meta_path]
            self.asking = False
            return next(filter(None, specs), None)

    for place in (0, len(sys.meta_path)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "meta_path", [*sys.meta_path[:place], Curious(), *sys.meta_path[place:]])
            patch.delitem(sys.modules, registry.__name__, raising=False)
            anew = importlib.import_module(registry.__name__)
        assert anew is not registry
        assert METHOD in anew.AUTO_QUANTIZER_MAPPING
        assert anew.AutoHfQuantizer.merge_quantization_configs({"quant_method": "awq", "bits": 4}, None).bits == 4
    # Imported while nobody watched: remanence comes later.
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, _Watcher)])
    monkeypatch.delitem(sys.modules, registry.__name__, raising=False)
    late = importlib.import_module(registry.__name__)
    assert METHOD not in late.AUTO_QUANTIZER_MAPPING
    arm()
    assert METHOD in late.AUTO_QUANTIZER_MAPPING


def test_a_transformers_that_has_changed_is_left_alone_with_a_word():
    with pytest.warns(RuntimeWarning, match="keeps its quantizers elsewhere"):
        register(ModuleType("transformers.quantizers.auto"))


def test_a_tokenizer_lies_beside(saved, tokenizer):
    assert AutoTokenizer.from_pretrained(saved("llama", SYMMETRIC)).get_vocab() == tokenizer.get_vocab()
