"""2:4 on disk against NumPy, and in torch's semi-structured tensors against the dense layer: exact, or refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from remanence.compress.formats import sparse24
from remanence.compress.formats.sparse24 import (
    PARTS,
    check_config,
    compress24,
    decompress24,
    is_24,
    layers_in,
    pack_state,
    to_config,
    unpack_weight,
)
from remanence.compress.sparse_linear import (
    KERNELS,
    BitmaskLinear,
    SemiStructuredLinear,
    check_layer,
    kernel_of,
    layers_24,
    semi_structured_,
    swap_,
)
from remanence.compress.walk import linears, weight_of
from safetensors.torch import load_file, save_file
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 4), (1, 12), (3, 8), (5, 20), (63, 64), (65, 132), (64, 256)]
IDS = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(0))


def pruned(N, K, dtype=torch.float32, seed=0, std=1.0):
    """A random weight with two of every four in a random place."""
    generator = torch.Generator().manual_seed(seed)
    weight = std * torch.randn(N, K, generator=generator)
    kept = torch.rand(N, K // 4, 4, generator=generator).argsort(-1) < 2
    return weight.masked_fill(~kept.view(N, K), 0).to(dtype)


def bits_of(tensor):
    """The tensor's bytes, as -0.0 and NaN compare by them alone."""
    return tensor.contiguous().view(torch.uint8)


def numpy_parts(weight):
    """What NumPy makes of a weight with exactly two of every four: values, and bits by numpy.packbits."""
    array = weight.double().numpy()
    values = np.stack([row[row != 0] for row in array])
    return values, np.packbits(array != 0, axis=1, bitorder="little")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_as_numpy_packs_and_back_bit_for_bit(shape, dtype):
    weight = pruned(*shape, dtype)
    assert (weight != 0).view(shape[0], -1, 4).sum(-1).eq(2).all()
    parts = compress24(weight)
    values, bits = numpy_parts(weight)
    assert np.array_equal(parts["compressed"].double().numpy(), values)
    assert np.array_equal(parts["bitmask"].numpy(), bits)
    again = decompress24(parts)
    assert again.dtype == dtype
    assert torch.equal(bits_of(again), bits_of(weight))


def test_layout_is_the_one_that_compressed_tensors_wrote():
    """Bytes that compressed-tensors 0.14.0 makes of this weight."""
    weight = torch.tensor([[0, 1, 2, 0, 3, 0, 0, 4, 5, 0, 6, 0], [-1, 0, 0, 2, 0, 0, 3, 4, 0, -5, 0, 6]]).half()
    parts = compress24(weight)
    assert parts["compressed"].tolist() == [[1, 2, 3, 4, 5, 6], [-1, 2, 3, 4, -5, 6]]
    assert parts["bitmask"].tolist() == [[150, 5], [201, 10]]
    assert parts["shape"].tolist() == [[2], [12]]
    assert [str(parts[part].dtype) for part in PARTS] == ["torch.float16", "torch.uint8", "torch.int64"]
    flat = parts | {"shape": torch.tensor([2, 12])}
    assert torch.equal(decompress24(flat), weight)


def test_fewer_than_two_of_four_not_zero():
    weight = torch.tensor([[0.0, 0, 0, 7, 0, 0, 0, 0, 0, 5, 0, 0]])
    parts = compress24(weight)
    assert parts["compressed"].tolist() == [[0, 7, 0, 0, 0, 5]]  # the first zeros fill up
    assert parts["bitmask"].tolist() == [[0b00111001, 0b0011]]
    assert torch.equal(decompress24(parts), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_no_arithmetic_would_keep_is_kept(dtype):
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    weight = torch.tensor([[float("nan"), 0, float("inf"), 0, 0, tiny, 0, -tiny]], dtype=dtype)
    assert torch.equal(bits_of(decompress24(compress24(weight))), bits_of(weight))
    # A dropped zero has no sign.
    signed = torch.tensor([[1.0, -0.0, 2.0, -0.0]], dtype=dtype)
    assert bits_of(decompress24(compress24(signed))).equal(bits_of(signed.abs()))


def test_a_strided_weight_is_packed_like_its_copy():
    weight = pruned(24, 16).T.contiguous().T
    assert not weight.is_contiguous()
    parts, expected = compress24(weight), compress24(weight.contiguous())
    assert all(torch.equal(parts[part], expected[part]) for part in PARTS)
    assert is_24(weight)


def test_bytes_on_disk(tmp_path):
    """A row takes K/2 values and K/8 bytes: 9/16 of it at 16 bits, 17/32 at 32."""
    for dtype in DTYPES:
        N, K = 96, 512
        weight = pruned(N, K, dtype)
        sizes = {}
        for kind, state in (("dense", {"a.weight": weight}), ("sparse", pack_state("a", weight))):
            save_file(state, tmp_path / kind)
            header = 8 + int.from_bytes((tmp_path / kind).read_bytes()[:8], "little")
            sizes[kind] = (tmp_path / kind).stat().st_size - header
        assert sizes["dense"] == N * K * weight.itemsize
        assert sizes["sparse"] == N * (K // 2 * weight.itemsize + K // 8) + 16  # shape: two int64
        again = load_file(tmp_path / "sparse")
        assert torch.equal(unpack_weight("a", again), weight)
        assert again == {}


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (torch.zeros(3, 8), True),
        (torch.ones(1, 4), False),
        (torch.tensor([[1.0, 1, 0, 0, 0, 0, 1, 1]]), True),
        (torch.tensor([[0.0, 0, 1, 1, 1, 0, 1, 1]]), False),
        (torch.tensor([[1.0, 0, 0, 1, 0, 0, 0, float("nan")]]), True),
        (torch.tensor([[1.0, 1, -0.0, 0]]), True),
        (torch.tensor([[1.0, 1, 0, 0, 0, 0]]), False),  # no multiple of four
        (torch.zeros(8), False),
        # Two of four along the outputs, and across the rows' ends, but not along the inputs.
        (torch.tensor([[1.0] * 4, [0.0] * 4, [1.0] * 4, [0.0] * 4]), False),
    ],
)
def test_is_24(weight, expected):
    assert is_24(weight) is expected


@pytest.mark.parametrize("seed", range(3))
def test_is_24_finds_the_one_four_that_is_not(seed):
    weight = pruned(17, 64, seed=seed)
    assert is_24(weight)
    zeros = (weight == 0).nonzero()
    row, column = zeros[seed * 100].tolist()
    weight[row, column] = 1.0
    assert not is_24(weight)
    four = column // 4 * 4
    with pytest.raises(ValueError, match=rf"not 2:4: 3 of inputs {four} to {four + 3} of row {row} are not zero"):
        compress24(weight)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(2, 6), "6 input features do not divide into fours"),
        (torch.zeros(2, 2, 4), r"3 dimensions; expected \[N, K\]"),
        (torch.zeros(2, 4, dtype=torch.int8), "dtype torch.int8; expected float32, float16, bfloat16"),
        (torch.zeros(2, 4, dtype=torch.float64), "dtype torch.float64"),
    ],
)
def test_weights_that_cannot_be_packed(weight, message):
    with pytest.raises(ValueError, match=message):
        compress24(weight)
    with pytest.raises(ValueError, match=rf"a\.b: .*{message}"):
        pack_state("a.b", weight)


def harmed(**changes):
    parts = compress24(pruned(3, 12))
    for part, change in changes.items():
        parts[part] = change(parts[part])
    return parts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": lambda s: s.int()}, r"a\.shape: torch.int32 \(2, 1\); expected torch.int64"),
        ({"shape": lambda s: s.T}, r"a\.shape: torch.int64 \(1, 2\)"),
        ({"shape": lambda s: s * 0 - 4}, r"a\.shape: \(-4, -4\); expected no negative number"),
        ({"shape": lambda s: s + 1}, r"a\.shape: 13 input features do not divide into fours"),
        ({"shape": lambda s: s + 4}, r"a\.compressed: shape \(3, 6\); expected \(7, 8\) for a weight \(7, 16\)"),
        ({"compressed": lambda c: c.double()}, r"a\.compressed: dtype torch.float64"),
        ({"compressed": lambda c: c[:, :5]}, r"a\.compressed: shape \(3, 5\); expected \(3, 6\)"),
        ({"compressed": lambda c: c.flatten()}, r"a\.compressed: shape \(18,\)"),
        ({"bitmask": lambda b: b.to(torch.int8)}, r"a\.bitmask: torch.int8"),
        ({"bitmask": lambda b: b[:, :1]}, r"a\.bitmask: torch.uint8 \(3, 1\); expected torch.uint8 \(3, 2\)"),
        ({"bitmask": lambda b: b + 16}, r"a\.bitmask: has bits set beyond the 12 inputs"),
        ({"bitmask": lambda b: b * 0 + 7}, r"a\.bitmask: does not mark two of every four"),
        ({"bitmask": lambda b: b * 0}, r"a\.bitmask: does not mark two of every four"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_parts_that_contradict_each_other_are_refused(changes, message):
    state = {f"a.{part}": tensor for part, tensor in harmed(**changes).items()}
    with pytest.raises(ValueError, match=message):
        unpack_weight("a", state)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(part):
    state = pack_state("a", pruned(3, 12))
    del state[f"a.{part}"]
    assert layers_in(state) == ["a"]
    with pytest.raises(ValueError, match=rf"a\.{part}: missing from the checkpoint"):
        unpack_weight("a", state)


def test_a_weight_that_is_there_twice_is_refused():
    state = pack_state("a", pruned(3, 12)) | {"a.weight": pruned(3, 12)}
    with pytest.raises(ValueError, match=r"a\.weight: in the checkpoint beside its compressed values"):
        unpack_weight("a", state)


def test_layers_of_a_file_are_found_in_their_order():
    names = ["b.1.shape", "b.1.compressed", "norm.weight", "a.0.compressed", "a.0.bias", "a.0.bitmask"]
    assert layers_in(names) == ["b.1", "a.0"]


CONFIG = to_config(["m.0", "m.1"], ["head"])


def edited(**fields):
    """A field of the sparsity_config where there is one of that name, else of the whole."""
    config = json.loads(json.dumps(CONFIG))
    for field, value in fields.items():
        (config["sparsity_config"] if field in config["sparsity_config"] or "global" in field else config)[
            "format" if field == "outer" else field
        ] = value
    return config


def test_config_is_read_back():
    assert sparse24.is_config(CONFIG)
    check_config(json.loads(json.dumps(CONFIG)), ["m.0", "m.1"])
    check_config(edited(targets=["Linear"], ignore=["re:.*head"], global_sparsity=0.41), ["m.0", "m.1"])
    check_config(edited(targets=["re:m.*"], ignore=None), ["m.0", "m.1"])


@pytest.mark.parametrize(
    "config", [{}, {"sparsity_config": {}}, {"sparsity_config": {"format": "dense"}}, {"sparsity_config": None}]
)
def test_a_config_without_sparse_layers_is_told(config):
    assert not sparse24.is_config(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method: 'gptq'"),
        ({"outer": "pack-quantized"}, "quantization_config.format: 'pack-quantized'"),
        ({"format": "sparse-bitmask"}, "sparsity_config.format: 'sparse-bitmask'"),
        ({"sparsity_structure": "unstructured"}, "sparsity_structure: 'unstructured'"),
        ({"sparsity_config": [1]}, "sparsity_config: expected an object"),
        ({"config_groups": {"group_0": {}}}, "config_groups: does not go with"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: does not go with"),
        ({"transform_config": {"R3": 1}}, "transform_config: does not go with"),
        ({"global_sparsity": 1.5}, "global_sparsity: 1.5"),
        ({"global_sparsity": True}, "global_sparsity: True"),
        ({"targets": "m.0"}, "targets: 'm.0' is not a list"),
        ({"ignore": [3]}, r"ignore: \[3\] is not a list of names"),
        ({"targets": ["m.0"]}, "targets: m.1 is sparse in the file and not named"),
        ({"targets": ["m.0", "m.1", "m.2"]}, "targets: m.2 is not sparse in the file"),
        ({"ignore": ["m.1"]}, "ignore: m.1 is named, and sparse"),
    ],
    ids=str,
)
def test_configs_that_we_would_misread_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check_config(edited(**fields), ["m.0", "m.1"])


# Models: which layers are 2:4, in every architecture.


def prune_model(model, std=0.3):
    """Every linear layer but the head 2:4, along its inputs; their names."""
    names = []
    with torch.no_grad():
        for seed, (name, module) in enumerate(linears(model, ("lm_head",))):
            N, K = weight_of(module).shape
            new = pruned(N, K, module.weight.dtype, seed, std)
            module.weight.copy_(new.T if isinstance(module, Conv1D) else new)
            names.append(name)
    return names


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
def test_2_4_layers_are_found(arch, untrained):
    model = untrained(arch)
    assert layers_24(model) == {}
    names = prune_model(model)
    assert list(layers_24(model)) == names
    spoilt = model.get_submodule(names[3])
    with torch.no_grad():
        spoilt.weight.fill_(1.0)
    assert list(layers_24(model)) == [name for name in names if name != names[3]]


def test_a_head_that_is_the_embedding_is_left_out(untrained):
    model = untrained("opt")
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight.copy_(pruned(300, 32))
    assert layers_24(model) == {}


def test_a_model_without_its_weights_is_refused(untrained):
    model = untrained("llama")
    model.model.layers[1].to("meta")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight: is not in memory"):
        layers_24(model)


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
def test_a_whole_model_goes_through_a_file(arch, untrained, tmp_path):
    model = untrained(arch).to(torch.bfloat16)
    prune_model(model)
    layers, state = layers_24(model), {}
    for name, layer in layers.items():
        state |= pack_state(name, weight_of(layer))
    save_file(state, tmp_path / "remanence.safetensors")
    again = load_file(tmp_path / "remanence.safetensors")
    assert set(layers_in(again)) == set(layers)
    check_config(to_config(list(layers)), layers_in(again))
    for name in layers_in(again):
        assert torch.equal(bits_of(unpack_weight(name, again)), bits_of(weight_of(layers[name])))
    assert again == {}


def test_stock_readers_stop_where_they_would_make_weights_up(untrained, tmp_path):
    pytest.importorskip("compressed_tensors", reason="the stock reader; comes with the extra `ct`")
    model = untrained("llama")
    names = prune_model(model)
    state = {}
    for key, tensor in model.state_dict().items():
        layer = key.removesuffix(".weight")
        state |= pack_state(layer, tensor) if layer in names else {key: tensor}
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = to_config(names, ["lm_head"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "remanence.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    # Why: under the usual name the layers count as missing.
    (tmp_path / "remanence.safetensors").rename(tmp_path / "model.safetensors")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {f"{name}.weight" for name in names} <= set(info["missing_keys"])


# On the device.


@pytest.fixture
def cutlass(monkeypatch):
    """pack() into torch's CUTLASS layout by torch's own code for any device; the product alone is not CUTLASS's: a
    dense one, of the matrix that torch unpacks again."""
    kind = torch.sparse.SparseSemiStructuredTensorCUTLASS
    calls = []

    def product(self, other, *, bias=None, should_transpose_dense=False, **_):
        assert other.numel()  # the libraries take no empty matrix
        weight = sparse_semi_structured_to_dense_cutlass(self.packed, self.meta).double()
        if should_transpose_dense:
            y = other.double() @ weight.T
            calls.append(tuple(other.shape))
            # Transposed, as some versions return it.
            return (y if bias is None else y + bias.double()).to(other.dtype).T.contiguous().T
        y = weight @ other.double()
        return (y if bias is None else y + bias.double()[:, None]).to(other.dtype)

    monkeypatch.setattr(kind, "_mm", product)

    def pack(weight):
        packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
        return kind(
            weight.shape, packed=packed, meta=meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
        )

    return SimpleNamespace(layer=SemiStructuredLinear, pack=pack, calls=calls)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
@torch.no_grad()
def test_a_swapped_model_answers_as_the_dense_one(arch, untrained, cutlass):
    model, dense = (untrained(arch).to(torch.bfloat16) for _ in range(2))
    for each in (model, dense):
        prune_model(each)
    # CUTLASS's layout takes inputs by 64: the second layer of each MLP, 64 or 128 wide, is swapped here.
    names = [name for name, layer in layers_24(model).items() if weight_of(layer).shape[1] % 64 == 0]
    assert len(names) == 2
    seen = []
    model.get_submodule(names[0]).register_forward_hook(lambda _layer, _x, y: seen.append(y))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    swap_(model, names, cutlass)
    for name in names:
        layer, old = model.get_submodule(name), dense.get_submodule(name)
        assert isinstance(layer, SemiStructuredLinear)
        assert (layer.replaces, layer.training) == (type(old).__name__, False)
        assert torch.equal(layer.dense(), weight_of(old))
        # Noncontiguous rows, a single row and none.
        x = torch.randn(layer.in_features, 5, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).T
        for rows in (x, x[:1], x[0], x[:0], x.expand(2, *x.shape)):
            y = layer(rows)
            exact = rows.double() @ weight_of(old).double().T + (0 if old.bias is None else old.bias.double())
            assert y.shape == exact.shape
            assert y.is_contiguous()
            # One rounding to bfloat16 of a sum in float64.
            assert torch.equal(y, exact.to(torch.bfloat16))
    assert cutlass.calls
    logits, expected = (each(IDS).logits.double() for each in (model, dense))
    # bfloat16 sums of the dense layers, rounded in another order, through two blocks.
    assert (logits - expected).norm() <= 2e-2 * expected.norm()
    assert seen
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and after[key].is_contiguous() for key in before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_a_swapped_layer_takes_no_weights(cutlass):
    layer = SemiStructuredLinear(cutlass.pack(pruned(32, 64, torch.float16)), None)
    state = layer.state_dict()
    assert list(state) == ["weight"]
    with pytest.raises(ValueError, match="takes no weights"):
        layer.load_state_dict(state)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_refused_without_a_2_4_layer_or_a_kernel(untrained):
    with pytest.raises(ValueError, match="model: LlamaForCausalLM has no 2:4 layer; prune it first"):
        semi_structured_(untrained("llama"))
    with pytest.raises(ValueError, match=r"device: xpu has no 2:4 sparse product; expected a CPU, or an NVIDIA GPU"):
        kernel_of(torch.device("xpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
@torch.no_grad()
def test_on_a_cpu_a_whole_model(arch, dtype, untrained, tmp_path):
    model, dense = (untrained(arch).to(dtype) for _ in range(2))
    names = prune_model(model)
    prune_model(dense)
    assert semi_structured_(model) == names
    for name in names:
        layer, old = model.get_submodule(name), dense.get_submodule(name)
        assert isinstance(layer, BitmaskLinear)
        assert (layer.replaces, layer.training) == (type(old).__name__, False)
        assert torch.equal(layer.dense(), weight_of(old))
        held = sum(tensor.nbytes for tensor in (layer.compressed, layer.bitmask))
        assert held == old.weight.nbytes // 2 + old.weight.numel() // 8
    logits, expected = (each(IDS).logits.double() for each in (model, dense))
    # Rounded in another order, through two blocks.
    limit = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
    assert (logits - expected).norm() <= limit * expected.norm()
    before, after = dense.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and after[key].is_contiguous() for key in before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert all(torch.equal(before[key], again[key]) for key in before)


def test_on_a_cpu_the_same_tokens(untrained):
    """A Llama pruned by magnitude, dense and sparse; prompts of more rows than the native kernels multiply."""
    model = untrained("llama")
    with torch.no_grad():
        for _, module in linears(model, ("lm_head",)):
            fours = module.weight.view(-1, 4)
            fours.scatter_(1, fours.abs().topk(2, largest=False).indices, 0)

    def tokens():
        return model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=24, do_sample=False)

    expected = tokens()
    assert len(expected[0, IDS.shape[1] :].unique()) > 3, "answers of some variety"
    assert len(semi_structured_(model)) == 14
    assert torch.equal(tokens(), expected)


def test_a_layer_on_a_cpu_passes_gradients_to_its_input(untrained):
    model = untrained("gpt2")
    prune_model(model)
    dense = model.transformer.h[0].mlp.c_fc
    semi_structured_(model)
    layer = model.transformer.h[0].mlp.c_fc
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight_of(dense).detach().sum(0).expand(3, 32))
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    with pytest.raises(ValueError, match="takes no weights"):
        layer.load_state_dict(layer.state_dict())


def device(monkeypatch, capability, cusparselt):
    """What torch says of a GPU that is not here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)
    return torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "cusparselt", "kernel"),
    [
        ((8, 0), True, "cusparselt"),
        ((9, 0), True, "cusparselt"),
        ((8, 9), False, "cutlass"),
        ((8, 0), False, "cutlass"),
    ],
)
def test_kernel_of_a_gpu(monkeypatch, capability, cusparselt, kernel):
    assert kernel_of(device(monkeypatch, capability, cusparselt)) == kernel


@pytest.mark.parametrize(
    ("capability", "cusparselt", "message"),
    [
        ((7, 5), True, r"cuda:0 \(Some GPU, compute capability 7.5\) has no 2:4 sparse product"),
        ((9, 0), False, r"cuda:0 \(Some GPU, compute capability 9.0\) needs cuSPARSELt"),
    ],
)
def test_gpus_without_a_kernel_are_refused(monkeypatch, capability, cusparselt, message):
    where = device(monkeypatch, capability, cusparselt)
    with pytest.raises(ValueError, match=message):
        kernel_of(where)


@pytest.mark.parametrize(
    ("shape", "dtype", "kernel", "message"),
    [
        ((32, 64), torch.float32, "cusparselt", "a: dtype torch.float32; .* takes float16 and bfloat16"),
        ((32, 72), torch.float16, "cusparselt", "a: 32 outputs and 72 inputs; cusparselt takes multiples of 16 .* 16"),
        ((40, 64), torch.float16, "cusparselt", "a: 40 outputs and 64 inputs"),
        ((48, 64), torch.bfloat16, "cutlass", "a: 48 outputs and 64 inputs; cutlass takes multiples of 32 .* 64"),
        ((32, 96), torch.bfloat16, "cutlass", "a: 32 outputs and 96 inputs"),
    ],
)
def test_layers_that_a_kernel_does_not_take(shape, dtype, kernel, message):
    with pytest.raises(ValueError, match=message):
        check_layer("a", torch.zeros(shape, dtype=dtype), kernel)
    check_layer("a", torch.zeros(32, 64, dtype=torch.bfloat16), kernel)


def test_multiples_are_those_of_torch():
    kinds = {
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }
    assert {*kinds, "bitmask"} == KERNELS.keys()
    for key, kind in kinds.items():
        for dtype in (torch.float16, torch.bfloat16):
            limits = kind._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert (limits.sparse_min_rows, limits.sparse_min_cols) == KERNELS[key].multiples


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (96, 192), (256, 1024)], ids=str)
@torch.no_grad()
def test_on_a_gpu_as_the_dense_product(shape, bias, dtype):
    N, K = shape
    model = torch.nn.Sequential(torch.nn.Linear(K, N, bias)).to("cuda", dtype)
    weight = pruned(N, K, dtype).cuda()
    model[0].weight.copy_(weight)
    before = None if model[0].bias is None else model[0].bias.clone()
    assert semi_structured_(model) == ["0"]
    assert isinstance(model[0], SemiStructuredLinear)
    assert torch.equal(model[0].dense(), weight)
    assert torch.equal(model.state_dict()["0.weight"], weight)
    for rows in (1, 7, 8, 63, 65, 300):
        x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).to("cuda", dtype)
        exact = x.double() @ weight.double().T + (0 if before is None else before.double())
        # One rounding of the result, and K sums in float32 (some kernels add in another order and width).
        limit = torch.finfo(dtype).eps * exact.abs() + 2**-20 * (x.double().abs() @ weight.double().abs().T + 1)
        assert ((model(x).double() - exact).abs() <= limit).all()
        assert model(x[None]).shape == (1, rows, N)
    assert model(x.T.contiguous().T).shape == (300, N)
    assert model(x[:0]).shape == (0, N)


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
@torch.no_grad()
def test_on_a_gpu_a_whole_model(arch, untrained, tmp_path):
    """16 to 128 wide: what cuSPARSELt takes, and CUTLASS does not."""
    model = untrained(arch).to("cuda", torch.float16)
    names = prune_model(model)
    expected = model(IDS.cuda()).logits.double()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if kernel_of(torch.device("cuda", torch.cuda.current_device())) == "cutlass":
        with pytest.raises(ValueError, match="cutlass takes multiples"):
            semi_structured_(model)
        return
    assert semi_structured_(model) == names
    logits = model(IDS.cuda()).logits.double()
    assert (logits - expected).norm() <= 2e-2 * expected.norm()
    after = model.state_dict()
    assert all(torch.equal(state[key], after[key]) for key in state)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").to("cuda").eval()
    assert torch.equal(again(IDS.cuda()).logits.double(), expected)
