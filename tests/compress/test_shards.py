"""Shards: what is read is what transformers reads, damaged files are refused, and a killed writer leaves no trace."""

import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from remanence.backends.memory import peak_rss, reset_peak, rss
from remanence.compress.footprint import steady_heap
from remanence.compress.shards import DTYPES, ShardReader, ShardWriter, fill_, hollow_, hollow_model, names, read_header
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(2, 200, (2, 17), generator=torch.Generator().manual_seed(0))
WIDE = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**WIDE, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**WIDE, tie_word_embeddings=True),
    "llama-yarn": lambda: LlamaConfig(
        **WIDE,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 10000.0,
        },
    ),
    "opt": lambda: OPTConfig(
        vocab_size=200,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=200, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1
    ),
    "neox": lambda: GPTNeoXConfig(**{k: v for k, v in WIDE.items() if k != "num_key_value_heads"}),
    "qwen2": lambda: Qwen2Config(**WIDE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**WIDE, head_dim=8),
    "gemma2": lambda: Gemma2Config(**WIDE, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "phi": lambda: PhiConfig(**WIDE),
}


def save(kind, path, dtype=torch.float32, **options):
    """A checkpoint with random weights, biases too, that transformers wrote."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(path, **options)
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """sharded(kind, dtype) -> directory of several shards."""
    made = {}

    def make(kind, dtype=torch.float32):
        if (kind, dtype) not in made:
            made[kind, dtype] = save(kind, tmp_path_factory.mktemp("models") / kind, dtype, max_shard_size="30KB")
            assert len(list(made[kind, dtype].glob("*.safetensors"))) > 1
        return made[kind, dtype]

    return make


@pytest.fixture
def llama(sharded, tmp_path):
    """A copy of one, to damage."""
    return shutil.copytree(sharded("llama"), tmp_path / "llama")


def rewrite(directory, change):
    """Change the tensors of a checkpoint and write it as one file."""
    state = {}
    for file in directory.glob("*.safetensors"):
        state |= load_file(file)
        file.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    change(state)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, directory / "model.safetensors")


def filled(directory):
    """The hollow model, filled module by module as a driver would."""
    reader, model = ShardReader(directory), hollow_model(directory)
    mapping = names(model, reader)
    for name, module in model.named_modules():
        if module.state_dict() and not any(child.state_dict() for child in module.children()):
            fill_(module, name, mapping, reader)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta:  # parameters that a module holds beside children
            parent = name.rpartition(".")[0]
            fill_(model.get_submodule(parent), parent, mapping, reader)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# Reading


def test_everything_that_safetensors_reads_is_read_alike(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 5),
        "mask": torch.rand(7, generator=generator) > 0.5,
        "Ω.weight": torch.randn(3, 5, generator=generator),
    }
    for tag, dtype in DTYPES.items():
        if dtype != torch.bool:
            state[tag] = torch.randint(0, 100, (3, 7), generator=generator).to(dtype)
    state["nan"] = torch.tensor([float("nan"), -0.0, float("inf")])
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reader = ShardReader(tmp_path)
    assert set(reader.keys()) == set(state)
    for key, tensor in state.items():
        read = reader.read(key)
        assert (reader.shape(key), reader.dtype(key)) == (tuple(tensor.shape), tensor.dtype)
        assert (read.shape, read.dtype) == (tensor.shape, tensor.dtype)
        assert reader.bytes(key) == tensor.numel() * tensor.element_size()
        assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), key


def test_a_cast_in_pieces_is_the_cast_of_the_whole(tmp_path, monkeypatch):
    x = torch.randn(37, 53, generator=torch.Generator().manual_seed(1))
    save_file({"x": x, "same": x.clone(), "off": x + 1e-6 * (torch.arange(53) == 52)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("remanence.compress.shards._PIECE", 4 * 97)  # divides nothing
    reader = ShardReader(tmp_path)
    assert torch.equal(reader.read("x", torch.bfloat16), x.to(torch.bfloat16))
    assert torch.equal(reader.read("x", torch.float64), x.double())
    assert reader.same("x", "same")
    assert not reader.same("x", "off")


def header(tensors, data=b"", pad=b"", length=None):
    raw = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(raw) + len(pad) if length is None else length) + raw + pad + data


def f32(start, end, shape=(2,), **changes):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]} | changes


DAMAGED = {
    "empty": (b"", "0 bytes"),
    "no header": (b"1234567", "header of"),
    "header beyond the file": (header({}, length=50), "header of 50 bytes in a file of 10 bytes"),
    "header too large": (struct.pack("<Q", 100_000_001) + b"{}", "header of 100000001 bytes"),
    "not JSON": (header(b"{'a': 1}"), "header cannot be read"),
    "not UTF-8": (header(b'{"\xff": 1}'), "header cannot be read"),
    "a list": (header(b"[]"), "header is list"),
    "nested": (header(b"[" * 100_000), "header cannot be read"),
    "a name twice": (header(b'{"a": {}, "a": {}}'), "'a' twice"),
    "metadata of numbers": (header({"__metadata__": {"a": 1}}), "__metadata__"),
    "no object": (header({"a": 3}), "'a': expected dtype"),
    "a field too many": (header({"a": f32(0, 8, more=1)}, bytes(8)), "'a': expected dtype"),
    "unknown dtype": (header({"a": f32(0, 8, dtype="F8_E4M3")}, bytes(8)), "'a': dtype: 'F8_E4M3' is not one of"),
    "dtype a list": (header({"a": f32(0, 8, dtype=[])}, bytes(8)), "'a': dtype"),
    "negative shape": (header({"a": f32(0, 8, (-1, -2))}, bytes(8)), "'a': shape"),
    "shape of truths": (header({"a": f32(0, 4, (True,))}, bytes(4)), "'a': shape"),
    "shape of fractions": (header({"a": f32(0, 8, (2.0,))}, bytes(8)), "'a': shape"),
    "huge shape": (header({"a": f32(0, 8, (2**62, 2**62))}, bytes(8)), "'a': data_offsets: 8 bytes for shape"),
    "three offsets": (header({"a": f32(0, 8, data_offsets=[0, 4, 8])}, bytes(8)), "'a': data_offsets"),
    "offsets backwards": (header({"a": f32(8, 0)}, bytes(8)), "'a': data_offsets"),
    "too few bytes": (header({"a": f32(0, 4)}, bytes(4)), "'a': data_offsets: 4 bytes for shape"),
    "too many bytes": (header({"a": f32(0, 12)}, bytes(12)), "'a': data_offsets: 12 bytes for shape"),
    "overlap": (header({"a": f32(0, 8), "b": f32(4, 12)}, bytes(12)), "'b': data_offsets: overlaps"),
    "a hole": (header({"a": f32(0, 8), "b": f32(12, 20)}, bytes(20)), "'b': data_offsets: leaves a hole"),
    "a hole at the start": (header({"a": f32(4, 12)}, bytes(12)), "'a': data_offsets: leaves a hole"),
    "cut off": (header({"a": f32(0, 8)}, bytes(7)), "'a', ends at"),
    "bytes after the end": (header({"a": f32(0, 8)}, bytes(9)), "'a', ends at"),
    "bytes without tensors": (header({}, bytes(1)), "None, ends at"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_by_name(case, tmp_path):
    content, message = DAMAGED[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: ") as error:
        ShardReader(tmp_path)
    assert message in str(error.value)


def test_a_header_is_at_most_100_million_bytes(tmp_path):
    """Were it read, it would be no JSON: the file is all zeros behind its first eight bytes."""
    path = tmp_path / "model.safetensors"
    for length, message in ((100_000_001, "header of 100000001 bytes in a file"), (100_000_000, "cannot be read")):
        path.write_bytes(struct.pack("<Q", length))
        os.truncate(path, 100_000_020)
        with pytest.raises(ValueError, match=message):
            read_header(path)


def test_the_smallest_files_are_read(tmp_path):
    """What the table above breaks one thing of."""
    good = header({"__metadata__": {"a": "b"}, "b": f32(8, 16), "a": f32(0, 8)}, bytes(16), pad=b"   ")
    (tmp_path / "model.safetensors").write_bytes(good)
    assert list(ShardReader(tmp_path).keys()) == ["a", "b"]
    (tmp_path / "model.safetensors").write_bytes(header({}))
    assert not ShardReader(tmp_path).keys()


def test_any_damaged_byte_of_a_header_is_refused_or_changes_no_layout(llama):
    """Bytes at random, in a real file: never another error than ValueError, never a read beyond the file."""
    file = sorted(llama.glob("*.safetensors"))[0]
    good = file.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    generator = torch.Generator().manual_seed(0)
    refused = []
    for _ in range(300):
        at = int(torch.randint(8 + length, (1,), generator=generator))
        byte = int(torch.randint(256, (1,), generator=generator))
        file.write_bytes(good[:at] + bytes([byte]) + good[at + 1 :])
        try:
            entries = read_header(file)
        except ValueError as error:
            refused.append(str(error))
        else:
            assert max(entry.end for entry in entries.values()) == len(good)
    assert len(refused) > 150
    assert all(str(file) in text for text in refused)


def test_a_file_cut_after_its_header_was_read_is_noticed(llama):
    reader = ShardReader(llama)
    for file in llama.glob("*.safetensors"):
        os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match="1 bytes too early"):
        _ = [reader.read(key) for key in reader.keys()]  # noqa: SIM118


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(a="../x.safetensors"), "is not a file in this directory"),
        (lambda w: w.update(a="/etc/passwd"), "is not a file in this directory"),
        (lambda w: w.update(a=min(w.values())), "'a' is not in model-00001"),
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "but listed in None"),
        (lambda w: w.update({"model.layers.1.mlp.up_proj.weight": min(w.values())}), "listed in model-00001"),
    ],
)
def test_an_index_that_does_not_fit_the_files_is_refused(llama, change, message):
    index = llama / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        ShardReader(llama)


def test_an_index_without_a_map_or_none_at_all_is_refused(llama):
    (llama / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        ShardReader(llama)
    (llama / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        ShardReader(llama)


def test_files_that_lie_beside_the_model_are_not_read(llama):
    save_file({"lora": torch.ones(1)}, llama / "adapter_model.safetensors")
    assert "lora" not in ShardReader(llama).keys()  # noqa: SIM118


# Hollow models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_filled_block_by_block_it_is_the_model_that_transformers_loads(kind, dtype, sharded):
    directory = sharded(kind, dtype)
    stock = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    model = filled(directory)
    assert torch.equal(logits(model), logits(stock))
    ours, theirs = model.state_dict(), stock.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
    buffers = dict(stock.named_buffers())
    assert dict(model.named_buffers()).keys() == buffers.keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in stock.named_parameters(remove_duplicate=False) if n in dict(model.named_parameters())
    }
    assert not model.training
    assert model.dtype == model.config.dtype == dtype
    assert model.config._attn_implementation == stock.config._attn_implementation
    if kind != "gemma2":  # whose default has changed
        assert model.config._attn_implementation == "sdpa"
    assert model.generation_config.to_dict() == stock.generation_config.to_dict()
    assert model.generation_config.max_new_tokens == 7


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_hollow_means_no_weights_but_real_buffers(kind, sharded):
    model = hollow_model(sharded(kind))
    assert all(tensor.is_meta for tensor in model.state_dict(keep_vars=True).values())
    assert not any(buffer.is_meta for _, buffer in model.named_non_persistent_buffers())


def test_one_fill_of_the_whole_model_keeps_what_is_tied(sharded):
    reader, model = ShardReader(sharded("llama-tied")), hollow_model(sharded("llama-tied"))
    fill_(model, "", names(model, reader), reader)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(filled(sharded("llama-tied"))))
    hollow_(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(tensor.is_meta for tensor in model.state_dict(keep_vars=True).values())
    assert not model.model.rotary_emb.inv_freq.is_meta
    fill_(model, "", names(model, reader), reader)
    assert torch.equal(logits(model), logits(filled(sharded("llama-tied"))))


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_the_config_ties_and_the_file_does_not(equal, sharded, tmp_path):
    """transformers takes the file's word for it."""
    directory = shutil.copytree(sharded("llama-tied"), tmp_path / "model")
    key = "model.embed_tokens.weight"
    rewrite(directory, lambda state: state.update({"lm_head.weight": state[key].clone() * (1 if equal else 2)}))
    stock = AutoModelForCausalLM.from_pretrained(directory).eval()
    model = filled(directory)
    assert torch.equal(logits(model), logits(stock))
    assert (hollow_model(directory).lm_head.weight is hollow_model(directory).model.embed_tokens.weight) is False
    hollow = hollow_model(directory)
    assert (hollow.lm_head.weight is hollow.model.embed_tokens.weight) == equal


def test_a_tied_head_may_be_the_one_in_the_file(sharded, tmp_path):
    directory = shutil.copytree(sharded("llama-tied"), tmp_path / "model")
    rewrite(directory, lambda state: state.update({"lm_head.weight": state.pop("model.embed_tokens.weight")}))
    mapping = names(hollow_model(directory), ShardReader(directory))
    assert mapping["model.embed_tokens.weight"] == mapping["lm_head.weight"] == "lm_head.weight"
    assert torch.equal(logits(filled(directory)), logits(filled(sharded("llama-tied"))))


def test_hub_names_without_prefix_and_what_old_versions_saved(sharded, tmp_path):
    """As in openai-community/gpt2: no "transformer.", and causal masks that newer versions compute."""
    directory = shutil.copytree(sharded("gpt2"), tmp_path / "model")

    def old(state):
        for key in list(state):
            state[key.removeprefix("transformer.")] = state.pop(key)
        state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        state["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(directory, old)
    mapping = names(hollow_model(directory), ShardReader(directory))
    assert mapping["transformer.h.1.attn.c_attn.weight"] == "h.1.attn.c_attn.weight"
    assert mapping["lm_head.weight"] == mapping["transformer.wte.weight"] == "wte.weight"
    assert torch.equal(logits(filled(directory)), logits(filled(sharded("gpt2"))))


def test_frequencies_that_old_llamas_saved_are_left_out(llama, sharded):
    rewrite(llama, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert torch.equal(logits(filled(llama)), logits(filled(sharded("llama"))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), "1 missing: model.layers.1.mlp.up_proj.weight"),
        (lambda s: s.pop("lm_head.weight"), "1 missing: lm_head.weight"),
        (lambda s: s.update(extra=torch.ones(1)), "1 unexpected: extra"),
        (lambda s: s.update({"model.norm.weight": torch.ones(31)}), r"model.norm.weight \[31\] .* for \[32\]"),
        (lambda s: s.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "torch.int8 for"),
        (lambda s: [s.pop(k) for k in list(s) if ".2." in k], "9 missing: .*, ...$"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(llama, change, message):
    rewrite(llama, change)
    with pytest.raises(ValueError, match=message):
        names(hollow_model(llama), ShardReader(llama))


def test_dtype_of_most_of_the_file_where_the_config_has_none_and_casts_where_it_differs(llama):
    def halve(state):
        for key in state:
            state[key] = state[key].to(torch.bfloat16) if "norm" not in key else state[key]

    rewrite(llama, halve)
    config = json.loads((llama / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (llama / "config.json").write_text(json.dumps(config))
    model = filled(llama)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    stock = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).eval()
    assert torch.equal(logits(model), logits(stock))


def test_what_transformers_keeps_in_float32_stays_so(sharded):
    """No such model among the dense ones here; the rule is that of the class."""
    from transformers import LlamaForCausalLM

    directory = sharded("llama", torch.bfloat16)
    before = LlamaForCausalLM._keep_in_fp32_modules_strict
    LlamaForCausalLM._keep_in_fp32_modules_strict = ["input_layernorm", "layers.*.up_proj"]
    try:
        stock = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
        model = filled(directory)
    finally:
        LlamaForCausalLM._keep_in_fp32_modules_strict = before
    theirs = {name: parameter.dtype for name, parameter in stock.named_parameters()}
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == theirs
    assert set(theirs.values()) == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"attn_implementation": "someone/kernel"}, "names outside code"),
        ({"model_type": "nonsense"}, "cannot be read"),
    ],
)
def test_configs_that_say_more_than_is_read_are_refused(llama, change, message):
    config = json.loads((llama / "config.json").read_text()) | change
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        hollow_model(llama)


def test_a_buffer_that_nothing_sets_is_an_error(sharded, monkeypatch):
    from transformers import LlamaForCausalLM

    made = LlamaForCausalLM.__init__

    def with_buffer(self, config):
        made(self, config)
        self.register_buffer("forgotten", torch.ones(3), persistent=False)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_buffer)
    with pytest.raises(ValueError, match="forgotten: a buffer that its initialisation does not set"):
        hollow_model(sharded("llama"))


def test_no_directory_no_model(tmp_path):
    with pytest.raises(FileNotFoundError):
        hollow_model(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="download"):
        hollow_model("someone/model")


def test_filling_what_is_no_part_of_the_checkpoint_is_an_error(sharded):
    reader, model = ShardReader(sharded("llama")), hollow_model(sharded("llama"))
    mapping = names(model, reader)
    with pytest.raises(ValueError, match=r"model\.layers\.9\.self_attn"):
        fill_(model.model.layers[0], "model.layers.9", mapping, reader)


# Memory


def in_child(function):
    """(exit status, what it gave, or its error) of a function called in a forked process."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        try:
            status, text = 0, str(function())
        except BaseException:
            status, text = 1, traceback.format_exc()
        os.write(into, text.encode())
        os._exit(status)
    os.close(into)
    with os.fdopen(out) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def rationed(source, work, room):
    """Every module from shards to shards, with `room` bytes of addresses more than taken now; growth of the peak."""
    steady_heap()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + room, size + room))
    model, reader = hollow_model(source), ShardReader(source)
    mapping, writer, before = names(model, reader), ShardWriter(work), rss()
    growth = 0 if reset_peak() else float("nan")
    layers = [f"model.layers.{i}" for i in range(len(model.model.layers))]
    for number, name in enumerate(["model.embed_tokens", *layers, "model.norm", "lm_head"]):
        module = model.get_submodule(name)
        fill_(module, name, mapping, reader)
        writer.write(number, {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()})
        hollow_(module)
        growth = max(growth, peak_rss() - before)
    writer.finish()
    return growth


@pytest.mark.skipif(sys.platform != "linux", reason="limits and peaks as Linux counts them")
def test_a_model_beyond_the_memory_limit_goes_through_block_by_block(tmp_path):
    """97 MB of weights, 14 MB a block, 42 MB of addresses to spare: all of it is read, written and read again."""
    config = LlamaConfig(
        vocab_size=500, hidden_size=512, intermediate_size=1536, num_hidden_layers=7, num_attention_heads=4
    )
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    state = {key: torch.randn(tensor.shape).to(torch.float32) for key, tensor in shapes.items()}
    total = sum(tensor.nbytes for tensor in state.values())
    (tmp_path / "source").mkdir()
    (tmp_path / "work").mkdir()
    save_file(state, tmp_path / "source/model.safetensors")
    config.save_pretrained(tmp_path / "source")
    del state
    room = 40 * 2**20
    assert total > 2 * room
    status, text = in_child(lambda: rationed(tmp_path / "source", tmp_path / "work", room))
    assert status == 0, text
    # A block, a piece that is read back, and a quarter of that for all else. NaN: no peak to be had here.
    growth = float(text)
    assert growth != growth or growth < 1.25 * (total / 7 + 2**24)
    reader, written = ShardReader(tmp_path / "source"), ShardReader(tmp_path / "work")
    assert reader.keys() == written.keys()
    assert all(torch.equal(reader.read(key), written.read(key)) for key in reader.keys())  # noqa: SIM118


# Writing


def state(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    made = {f"blocks.{seed}.{i}.weight": torch.randn(5, 7 + i, generator=generator) for i in range(count)}
    made[f"blocks.{seed}.packed"] = torch.randint(0, 9, (4, 3), dtype=torch.int32, generator=generator)
    made[f"blocks.{seed}.scale"] = torch.randn(4, 1, generator=generator).to(torch.bfloat16)
    return made


def snapshot(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def written(directory, order, stem="model"):
    directory.mkdir()
    writer = ShardWriter(directory, stem)
    for number in order:
        writer.write(number, state(number))
    return writer.finish()


def test_a_part_is_byte_for_byte_what_safetensors_writes(tmp_path):
    mixed = {tag: torch.arange(6).reshape(2, 3).to(dtype) for tag, dtype in DTYPES.items()}
    mixed |= {"Ω": torch.tensor(1.5), "a": torch.empty(0, 3), 'quote"d': torch.ones(3), "b": torch.ones(2).half()}
    ShardWriter(tmp_path).write(0, mixed)
    save_file(mixed, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.part-00000.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_strided_tensors_are_written_by_their_values(tmp_path):
    x = torch.arange(12.0).reshape(3, 4)
    ShardWriter(tmp_path).write(0, {"t": x.T, "row": x[1], "step": x[:, ::2], "p": nn.Parameter(x)})
    read = load_file(tmp_path / "model.part-00000.safetensors")
    assert torch.equal(read["t"], x.T)
    assert torch.equal(read["row"], x[1])
    assert torch.equal(read["step"], x[:, ::2])
    assert torch.equal(read["p"], x)


def test_finished_files_are_named_and_indexed_as_transformers_reads_them(sharded, tmp_path):
    source = sharded("llama")
    reader, model = ShardReader(source), hollow_model(source)
    mapping = names(model, reader)
    out = tmp_path / "out"
    out.mkdir()
    writer = ShardWriter(out)
    for number in range(5):
        own = [name for name in mapping if f"layers.{number}." in name] if number < 3 else []
        own = (
            own
            or {3: [n for n in mapping if "layers" not in n and n != "lm_head.weight"], 4: ["lm_head.weight"]}[number]
        )
        writer.write(number, {name: reader.read(mapping[name]) for name in own})
        with pytest.raises(OSError, match=r"model\.safetensors"):  # not a model yet
            AutoModelForCausalLM.from_pretrained(out, config=model.config)
    files = writer.finish()
    assert [file.name for file in files] == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert {path.name for path in out.iterdir()} == {file.name for file in files} | {"model.safetensors.index.json"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(map(reader.bytes, reader.keys()))
    shutil.copy(source / "config.json", out)
    stock = AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.equal(logits(stock), logits(filled(source)))
    assert torch.equal(logits(filled(out)), logits(stock))


def test_a_single_part_is_one_file_without_index(tmp_path):
    assert [file.name for file in written(tmp_path / "a", [0], "remanence")] == ["remanence.safetensors"]
    assert set(snapshot(tmp_path / "a")) == {"remanence.safetensors"}
    assert set(ShardReader(tmp_path / "a", "remanence").keys()) == set(state(0))


def test_the_same_tensors_give_the_same_bytes_in_any_order(tmp_path):
    written(tmp_path / "a", [0, 1, 2, 3])
    written(tmp_path / "b", [3, 1, 0, 2])
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


class Killed(BaseException):
    pass


def steps(monkeypatch):
    """Calls of the system that change a file or a name, each a point to be killed at: before it, and after it."""
    count = {"left": None, "made": 0}

    def guard(function):
        def call(*args, **kwargs):
            for do in (lambda: None, lambda: function(*args, **kwargs)):
                if count["left"] is not None and count["made"] >= count["left"]:
                    raise Killed
                count["made"] += 1
                result = do()
            return result

        return call

    monkeypatch.setattr(os, "replace", guard(os.replace))
    monkeypatch.setattr(os, "rename", guard(os.rename))
    monkeypatch.setattr(os, "fsync", guard(os.fsync))
    # A process that is killed cleans nothing up.
    monkeypatch.setattr(os, "unlink", guard(os.unlink))
    return count


@pytest.mark.parametrize("parts", [1, 3])
def test_killed_at_any_point_and_resumed_it_gives_the_same_bytes(parts, tmp_path, monkeypatch):
    """Every call of the system is such a point, finish included, and then every such point of the resumed run."""
    written(tmp_path / "whole", range(parts))
    expected = snapshot(tmp_path / "whole")

    def run(directory, count, left):
        """Go on until killed; whether it came to the end."""
        count.update(left=left, made=0)
        try:
            writer = ShardWriter.resume(directory)
            for number in range(parts):
                if number not in writer.parts:
                    writer.write(number, state(number))
            writer.finish()
        except Killed:
            return False
        finally:
            count["left"] = None
        return True

    with monkeypatch.context() as patch:
        count = steps(patch)
        for left in range(1000):
            work = tmp_path / f"{left}"
            work.mkdir()
            if run(work, count, left):
                break
            again = 0
            while not run(work, count, (left * 7 + 5) % 6 + 3 + again):
                again += 1
                assert again < 100
            assert snapshot(work) == expected, left
        assert left > 6 * parts
        assert snapshot(work) == expected


def test_sigkill_at_random_moments(tmp_path):
    whole, work = tmp_path / "whole", tmp_path / "work"

    def run(directory):
        directory.mkdir(exist_ok=True)
        writer = ShardWriter.resume(directory)
        for number in range(30):
            if number not in writer.parts:
                writer.write(number, {f"b.{number}": torch.full((300, 300), float(number))})
        writer.finish()

    start = time.perf_counter()
    run(whole)
    taken = time.perf_counter() - start
    chance = random.Random(0)
    killed = 0
    for _ in range(6):
        child = os.fork()
        if not child:
            run(work)
            os._exit(0)
        time.sleep(chance.uniform(0, taken / 3))
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert killed
    run(work)
    assert snapshot(work) == snapshot(whole)


def test_parts_that_are_there_are_not_written_over(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.write(0, state(0))
    with pytest.raises(ValueError, match="number: 0 is written already"):
        writer.write(0, state(1))
    with pytest.raises(ValueError, match=r"'blocks\.0\.0\.weight': written already"):
        writer.write(1, state(0))
    with pytest.raises(ValueError, match="resume it or empty it"):
        ShardWriter(tmp_path)
    resumed = ShardWriter.resume(tmp_path)
    assert resumed.parts == {0}
    with pytest.raises(ValueError, match=r"'blocks\.0\.0\.weight': written already"):
        resumed.write(1, state(0))
    resumed.finish()
    with pytest.raises(ValueError, match="all is finished"):
        ShardWriter.resume(tmp_path).write(1, state(1))


@pytest.mark.parametrize(
    ("number", "tensors", "message"),
    [
        (-1, state(0), "number: -1"),
        (0, {}, "has no tensors"),
        (0, {"": torch.ones(1)}, "''"),
        (0, {"__metadata__": torch.ones(1)}, "'__metadata__'"),
        (0, {"m": torch.ones(1, device="meta")}, "'m': torch.float32 on meta"),
        (0, {"c": torch.ones(1, dtype=torch.complex64)}, "'c': torch.complex64"),
        (0, {"s": torch.eye(2).to_sparse()}, "'s'"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_leaves_nothing(number, tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ShardWriter(tmp_path).write(number, tensors)
    assert not list(tmp_path.iterdir())


def test_finish_names_the_parts_that_are_lacking(tmp_path):
    writer = ShardWriter(tmp_path)
    with pytest.raises(ValueError, match="not written"):
        writer.finish()
    writer.write(1, state(1))
    writer.write(3, state(3))
    with pytest.raises(ValueError, match=r"parts \[0, 2\] of 'model' are not written"):
        writer.finish()


def test_damaged_or_foreign_parts_are_not_resumed(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.write(0, state(0))
    writer.write(1, state(1))
    part = tmp_path / "model.part-00001.safetensors"
    good = part.read_bytes()
    part.write_bytes(good[:-1])
    with pytest.raises(ValueError, match=r"model\.part-00001\.safetensors"):
        ShardWriter.resume(tmp_path)
    shutil.copy(tmp_path / "model.part-00000.safetensors", part)
    with pytest.raises(ValueError, match=r"is in model\.part-00000\.safetensors too"):
        ShardWriter.resume(tmp_path)
    part.write_bytes(good)
    other = tmp_path / "model-00001-of-00002.safetensors"  # part 0 under its final name, too
    save_file({"x": torch.ones(1)}, other)
    with pytest.raises(ValueError, match="not parts of one checkpoint"):
        ShardWriter.resume(tmp_path)
    other.unlink()
    part.rename(tmp_path / "model-00002-of-00003.safetensors")
    assert ShardWriter.resume(tmp_path).parts == {0, 1}
    (tmp_path / "model.part-00000.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="not parts of one checkpoint"):
        ShardWriter.resume(tmp_path)


def test_a_disk_that_stores_other_bytes_is_noticed(tmp_path, monkeypatch):
    """The byte is changed where the file is synced: after it was written, before it is read back."""
    fsync = os.fsync

    def flip(handle):
        fsync(handle)
        os.pwrite(handle, b"\x01", os.fstat(handle).st_size - 1)

    writer = ShardWriter(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", flip)
        with pytest.raises(RuntimeError, match=r"reads back otherwise"):
            writer.write(0, {"x": torch.zeros(9)})
    assert not list(tmp_path.iterdir())
    assert not writer.parts
    writer.write(0, {"x": torch.zeros(9)})


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    writer = ShardWriter(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full while writing"):
        writer.write(0, state(0))
    assert not list(tmp_path.iterdir())
