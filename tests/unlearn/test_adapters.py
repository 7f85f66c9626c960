"""LoRA adapters: merged they are the model that was trained, FILA's start changes nothing, and an adapter kept beside
its base comes back with it, whatever the base was made into."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from remanence.compress.checkpoint import load_model, load_tokenizer, save_model
from remanence.compress.linear import QuantLinear
from remanence.compress.places import base_directory
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import quantize_
from remanence.compress.walk import linears
from remanence.unlearn import adapters
from remanence.unlearn.catalog import settings
from remanence.unlearn.feed import Feed
from remanence.unlearn.methods import unlearn
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("one_thread")

ARCHS = ("llama", "opt", "gpt2")
archs = pytest.mark.parametrize("arch", ARCHS)
QUICK = {"steps": 3, "warmup": 0, "forget_batch": 5, "retain_batch": 8, "lora_rank": 4, "learning_rate": 3e-3}


@pytest.fixture
def model(untrained, memorized):
    """model(arch): random weights, for the tokenizer of the rows."""
    return lambda arch: untrained(arch, vocabulary=len(memorized.tokenizer), std=0.1)


def pairs(rows):
    return [(row.question, row.answer) for row in rows]


@pytest.fixture
def feed(memorized):
    sets = {"forget": pairs(memorized.corpus.forget), "retain": pairs(memorized.corpus.retain[:8])}
    return Feed(memorized.encoder, sets, {"forget": 2, "retain": 2}, seed=0)


def logits(model, memorized):
    batch = memorized.encoder.batch(pairs(memorized.corpus.forget))
    with torch.no_grad():
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return out[batch.attention_mask.bool()].float()


def shaken(adapted):
    """As if trained: every A and B away from its start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape, dtype=parameter.dtype)
    return adapted


def run(memorized, model, method, **asked):
    corpus = memorized.corpus
    config = settings(method, **QUICK | asked)
    return unlearn(model, memorized.encoder, corpus.forget, corpus.retain[:16], method, config)


@archs
@pytest.mark.parametrize("fila", [False, True])
def test_the_start_computes_what_the_model_does(arch, fila, model, feed, memorized):
    target = model(arch)
    before = logits(target, memorized)
    adapted = adapters.attach(target, settings("npo", lora_rank=4, fila=fila), feed)
    torch.testing.assert_close(logits(adapted, memorized), before, rtol=1e-4, atol=1e-4)
    trains = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, _ in adapted.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    # Every linear layer has one, the head has none.
    fresh = model(arch)
    layers = [name for name, module in linears(fresh, ()) if module is not fresh.get_output_embeddings()]
    assert len(trains) == 2 * len(layers)
    # FILA takes a part of every base weight away; without it the base is the target.
    now = dict(target.named_parameters())
    for name in layers:
        residual = now[f"{name}.base_layer.weight"]
        assert torch.equal(residual, fresh.get_parameter(f"{name}.weight")) != fila


@archs
def test_merged_is_the_adapted_model(arch, model, feed, memorized):
    target = model(arch)
    adapted = shaken(adapters.attach(target, settings("npo", lora_rank=4, fila=True), feed))
    mine = logits(adapted, memorized)
    assert (mine - logits(model(arch), memorized)).abs().max() > 0.1
    merged = adapters.merged(adapted)
    assert type(merged) is type(target)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in model(arch).named_parameters()]
    torch.testing.assert_close(logits(merged, memorized), mine, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["npo", "loku"])
def test_unlearning_with_an_adapter_gives_an_ordinary_model(method, memorized, tmp_path):
    """The difference has the adapter's rank; what has no adapter is the target's to the bit."""
    target = copy.deepcopy(memorized.target)
    done = run(memorized, target, method)
    assert done.adapted is None
    assert done.record["after"]["forget_probability"] < done.record["before"]["forget_probability"] - 0.01
    adapted = {f"{name}.weight" for name, _ in linears(memorized.target, ("lm_head",))}
    for name, before in memorized.target.named_parameters():
        change = (done.model.get_parameter(name) - before).detach().double()
        if name not in adapted:
            assert not change.any(), name
            continue
        sizes = torch.linalg.svdvals(change)
        # LoKU's change is the difference of two matrices of rank 4.
        rank = 4 if method == "npo" else 8
        assert sizes[rank] < 1e-3 * sizes[0], name
    save_model(done.model, memorized.tokenizer, tmp_path / "out")
    assert torch.equal(logits(load_model(tmp_path / "out"), memorized), logits(done.model, memorized))


@pytest.fixture(scope="module")
def unmerged(memorized, tmp_path_factory):
    """A directory with base/ and adapter/ as `remanence unlearn` writes them, and the logits of both together."""
    out = tmp_path_factory.mktemp("unmerged")
    corpus, config = memorized.corpus, settings("loku-unmerged", **QUICK)
    target = copy.deepcopy(memorized.target)
    done = unlearn(target, memorized.encoder, corpus.forget, corpus.retain[:16], "loku-unmerged", config)
    together = logits(done.model, memorized)
    done.save(out, memorized.tokenizer)
    return out, together


def test_an_unmerged_adapter_comes_back_with_its_base(unmerged, memorized):
    out, together = unmerged
    assert {path.name for path in out.iterdir()} == {"base", "adapter", "unlearning.json"}
    base = load_model(base_directory(out))
    alone = logits(base, memorized)
    torch.testing.assert_close(logits(adapters.with_adapter(base, out), memorized), together, rtol=1e-4, atol=1e-4)
    # FILA's base is a residual, and no model that anybody wants.
    target = logits(memorized.target, memorized)
    assert (alone - target).abs().mean() > 1
    assert (together - target).abs().mean() < (alone - target).abs().mean() / 3
    assert load_tokenizer(out / "base").get_vocab() == memorized.tokenizer.get_vocab()
    with pytest.raises(FileNotFoundError, match=r"no config.json in it"):
        load_model(out)


def test_peft_reads_it_too(unmerged, memorized):
    from peft import PeftModel

    out, together = unmerged
    adapted = PeftModel.from_pretrained(load_model(out / "base"), str(out / "adapter"))
    torch.testing.assert_close(logits(adapted, memorized), together, rtol=1e-4, atol=1e-4)


def test_an_adapter_beside_a_quantized_base(unmerged, memorized):
    """y = Q(W) x + scaling B A x, layer by layer: what quantizing W + scaling B A would not give."""
    out, _ = unmerged
    recipe = parse_recipe("rtn-w4a16-g32-plain")
    quantized = quantize_(load_model(out / "base"), recipe)
    expected = load_model(out / "base")
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    with torch.no_grad():
        for name, layer in linears(expected, recipe.ignore):
            A, B = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
            rounded = quantized.get_submodule(name)
            assert isinstance(rounded, QuantLinear)
            layer.weight.copy_(rounded.dequantized() + config["lora_alpha"] / config["r"] * B @ A)
    alone = logits(quantized, memorized)
    together = logits(adapters.with_adapter(quantized, out), memorized)
    torch.testing.assert_close(together, logits(expected, memorized), rtol=1e-3, atol=1e-3)
    assert (together - alone).abs().max() > 1


@archs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_apart_by_architecture(arch, dtype, model, feed, memorized, tmp_path):
    """GPT-2 keeps its weights the other way round; 16-bit models keep 16-bit adapters."""
    adapted = shaken(adapters.attach(model(arch), settings("npo", lora_rank=4, fila=True), feed)).to(dtype)
    together = logits(adapted, memorized)
    adapters.save_unmerged(adapted, memorized.tokenizer, tmp_path)
    base = load_model(base_directory(tmp_path))
    assert base.dtype == dtype
    alone = logits(base, memorized)
    back = logits(adapters.with_adapter(base, tmp_path), memorized)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1  # peft rounds the sum at other places
    torch.testing.assert_close(back, together, rtol=tolerance, atol=tolerance)
    assert (together - alone).abs().max() > 10 * tolerance


def test_an_adapter_beside_a_quantized_conv1d(model, feed, memorized, tmp_path):
    adapted = shaken(adapters.attach(model("gpt2"), settings("npo", lora_rank=4), feed))
    together = logits(adapted, memorized)
    adapters.save_unmerged(adapted, memorized.tokenizer, tmp_path)
    # In 8 bit little is lost.
    quantized = quantize_(load_model(tmp_path / "base"), parse_recipe("rtn-w8a16-g32-plain"))
    assert any(isinstance(module, QuantLinear) for module in quantized.modules())
    alone = logits(quantized, memorized)
    back = logits(adapters.with_adapter(quantized, tmp_path), memorized)
    assert (back - together).abs().max() < (back - alone).abs().max() / 5


def test_a_directory_without_an_adapter_is_left_alone(memorized, tmp_path):
    save_model(memorized.target, memorized.tokenizer, tmp_path / "plain")
    assert base_directory(tmp_path / "plain") == tmp_path / "plain"
    base = load_model(tmp_path / "plain")
    assert adapters.with_adapter(base, tmp_path / "plain") is base
    assert torch.equal(logits(base, memorized), logits(memorized.target, memorized))


def rewrite(directory, **values):
    path = directory / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def retensor(directory, change):
    path = directory / "adapter" / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


A = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
BAD = {
    "no config": (lambda d: (d / "adapter/adapter_config.json").unlink(), FileNotFoundError, "adapter_config.json"),
    "config is no JSON": (
        lambda d: (d / "adapter/adapter_config.json").write_text("{"),
        ValueError,
        "adapter_config.json:1: not JSON",
    ),
    "another kind": (lambda d: rewrite(d, peft_type="LOHA"), ValueError, "peft_type: 'LOHA' is not LORA"),
    "no rank": (lambda d: rewrite(d, r=None), ValueError, "r: expected a whole number above 0, got None"),
    "rank zero": (lambda d: rewrite(d, r=0), ValueError, "r: expected a whole number above 0, got 0"),
    "alpha is text": (
        lambda d: rewrite(d, lora_alpha="8"),
        ValueError,
        "lora_alpha: expected a number above 0, got '8'",
    ),
    "dora": (lambda d: rewrite(d, use_dora=True), ValueError, "use_dora: True is not supported"),
    "rslora": (lambda d: rewrite(d, use_rslora=True), ValueError, "use_rslora: True is not supported"),
    "another rank": (
        lambda d: rewrite(d, r=5),
        ValueError,
        r"down_proj: A \[4, 128\] and B \[64, 4\] do not fit rank 5",
    ),
    "no tensors": (lambda d: (d / "adapter/adapter_model.safetensors").unlink(), FileNotFoundError, "no such file"),
    "cut off": (
        lambda d: os.truncate(d / "adapter/adapter_model.safetensors", 1000),
        ValueError,
        "adapter_model.safetensors: not a readable safetensors file",
    ),
    "empty": (lambda d: retensor(d, dict.clear), ValueError, "expected lora_A.weight and lora_B.weight.* got nothing"),
    "half a pair": (lambda d: retensor(d, lambda t: t.pop(B)), ValueError, "down_proj: lora_B.weight is missing"),
    "other half": (lambda d: retensor(d, lambda t: t.pop(A)), ValueError, "down_proj: lora_A.weight is missing"),
    "strange tensor": (
        lambda d: retensor(d, lambda t: t.update({B.replace("lora_B", "lora_magnitude_vector"): torch.ones(2)})),
        ValueError,
        "expected lora_A.weight and lora_B.weight of layers, got .*lora_magnitude_vector",
    ),
    "another layer": (
        lambda d: retensor(d, lambda t: [t.update({k.replace("layers.0", "layers.9"): t.pop(k)}) for k in (A, B)]),
        ValueError,
        r"layers.9.mlp.down_proj: .* this model, where it is \[0, 0\]",
    ),
    "no linear layer": (
        lambda d: retensor(d, lambda t: [t.update({k.replace(".down_proj", ""): t.pop(k)}) for k in (A, B)]),
        ValueError,
        r"layers.0.mlp: .* this model, where it is \[0, 0\]",
    ),
    "another width": (
        lambda d: retensor(d, lambda t: t.update({A: t[A][:, :64].contiguous()})),
        ValueError,
        r"down_proj: A \[4, 64\] and B \[64, 4\] do not fit rank 4 and this model, where it is \[64, 128\]",
    ),
}


@pytest.fixture(scope="module")
def base(unmerged):
    return load_model(unmerged[0] / "base")


@pytest.mark.parametrize("case", BAD)
def test_damaged_adapters(case, base, unmerged, tmp_path):
    damage, kind, message = BAD[case]
    for name in ("adapter", "base"):
        (tmp_path / name).mkdir()
    for path in (unmerged[0] / "adapter").iterdir():
        (tmp_path / "adapter" / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        adapters.with_adapter(base, tmp_path)
    assert str(tmp_path / "adapter") in str(caught.value)
    # Nothing was hung onto the model on the way.
    assert not any(module._forward_hooks for module in base.modules())


@pytest.mark.parametrize("setting", ["fila", "unmerged"])
def test_settings_about_adapters_need_a_rank(setting):
    with pytest.raises(ValueError, match=f"{setting}: is about LoRA; set lora_rank"):
        settings("npo", **{setting: True})


@pytest.mark.parametrize("asked", [{"mask": "wagle"}, {"floor": 0.1}, {"through": True}])
def test_masks_are_about_weights(asked, memorized):
    with pytest.raises(ValueError, match="lora_rank: 4 trains adapters; this method, mask or floor is about weights"):
        run(memorized, copy.deepcopy(memorized.target), "npo", against="rtn-w4a16-g32-plain", **asked)


def test_a_rank_too_large_for_fila(memorized):
    with pytest.raises(ValueError, match="rank: 65 is not between 1 and 64"):
        run(memorized, copy.deepcopy(memorized.target), "loku", lora_rank=65)


BLOCKED = """
import sys
sys.modules["peft"] = None  # what an import of a package that is not installed comes to
sys.argv = ["remanence", *sys.argv[1:]]
from remanence.cli import main
main()
"""


def test_without_peft_it_is_said_what_to_install(memorized, tmp_path):
    save_model(memorized.target, memorized.tokenizer, tmp_path / "target")
    for name, rows in (("forget", memorized.corpus.forget), ("retain", memorized.corpus.retain)):
        lines = [json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in pairs(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    given = ["unlearn", "--model", "target", "--method", "loku", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    ran = subprocess.run(
        [sys.executable, "-c", BLOCKED, *given, "--out", "out", "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == "remanence: peft: LoRA needs it; pip install remanence[train]"
    assert not (tmp_path / "out").exists()
