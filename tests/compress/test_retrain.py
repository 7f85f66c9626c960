"""Retraining of pruned models: gradients, zeros that stay, what trains, reconstruction, refusals."""

import copy
import itertools

import pytest
import torch
from remanence.backends.cpu import PeakMemory
from remanence.compress import masked_adapters
from remanence.compress.block import block_names
from remanence.compress.descent import Sequences, rate
from remanence.compress.masked_adapters import new_adapter
from remanence.compress.recipe import parse_recipe
from remanence.compress.retrain import masks_of, retrain_
from remanence.compress.sequential import compress_
from remanence.compress.spec import Retrain
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = parse_recipe("magnitude-s50")
IDS = torch.randint(2, 300, (8, 12), generator=torch.Generator().manual_seed(1))
BATCHES = [IDS[:5], IDS[5:], IDS[:3, :7]]
SHORT = {"steps": 4, "batch": 6, "learning_rate": 1e-2, "rank": 4, "alpha": 8.0}


def mixtral(dtype=torch.float32):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "vocab_size": 300}
    config = MixtralConfig(num_key_value_heads=2, num_local_experts=4, initializer_range=0.3, **shape, **ids)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture
def pruned(untrained):
    """pruned(arch, dtype) -> (dense model, pruned one, masks)"""

    def make(arch, dtype=torch.float32):
        dense = mixtral(dtype) if arch == "mixtral" else untrained(arch).to(dtype)
        model = compress_(copy.deepcopy(dense), RECIPE)
        return dense, model, masks_of(model, RECIPE)

    return make


def weight(model, name):
    layer = model.get_submodule(name)
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def changed(before, model):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


# --- adapters


def effective(kind, W, M, A, B, s):
    return {"mask_lora": W + s * M.to(W.dtype) * (B @ A), "scale_lora": W * (B @ A), "lora": W + s * (B @ A)}[kind]


def adapted(kind, layer, mask, seed=0, rank=3):
    """In float64, with an A and a B that are not those of the start."""
    adapter = new_adapter(layer, mask, kind, rank, 5.0, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for part in (adapter.A, adapter.B):
            part.copy_(torch.randn(part.shape, dtype=torch.float64))
    return adapter


@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora", "lora"])
@pytest.mark.parametrize("make", [nn.Linear, lambda K, N: Conv1D(N, K)], ids=["linear", "conv1d"])
@pytest.mark.parametrize("slices", [True, False])
def test_outputs_and_gradients_are_those_of_plain_autograd(kind, make, slices, monkeypatch):
    if slices:
        monkeypatch.setattr(masked_adapters, "_SLICE", 4 * 63)
    torch.manual_seed(0)
    K, N = 63, 65
    layer = make(K, N).double().requires_grad_(False)
    mask = torch.rand(N, K) > 0.4
    W = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    W.masked_fill_(~mask, 0)
    layer.bias.normal_().requires_grad_(True)
    adapter = adapted(kind, layer, mask)
    x = torch.randn(2, 5, K, dtype=torch.float64)
    leaves = [x.clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in (adapter.A, adapter.B))]
    bias = layer.bias.detach().clone().requires_grad_()
    expected = leaves[0] @ effective(kind, W, mask, *leaves[1:], 5.0 / 3).T + bias
    out = torch.randn_like(expected)
    expected.backward(out)

    mine = x.clone().requires_grad_()
    adapter.attach()
    found = layer(mine)
    adapter.detach()
    found.backward(out)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip((mine, adapter.A, adapter.B, layer.bias), (*leaves, bias), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-11)
    assert "forward" not in vars(layer)

    merged = effective(kind, W.clone(), mask, adapter.A.detach(), adapter.B.detach(), 5.0 / 3) * mask
    adapter.merge_()
    torch.testing.assert_close(W, merged, rtol=1e-13, atol=1e-13)
    assert torch.equal(W == 0, ~mask)
    assert not torch.signbit(W[~mask]).any()


@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_an_adapter_changes_nothing(kind, dtype):
    layer = nn.Linear(64, 32, dtype=dtype).requires_grad_(False)
    mask = torch.rand(32, 64) > 0.5
    layer.weight.masked_fill_(~mask, 0)
    before = layer.weight.clone()
    adapter = new_adapter(layer, mask, kind, 8, 16.0, torch.Generator().manual_seed(0))
    adapter.merge_()
    torch.testing.assert_close(layer.weight, before, rtol=0 if kind != "scale_lora" else 1e-6, atol=0)
    assert adapter.A.dtype == adapter.B.dtype == torch.float32


def test_what_trains_is_what_is_merged_in_16_bits():
    layer = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    mask = torch.rand(32, 64) > 0.5
    layer.weight.masked_fill_(~mask, 0)
    adapter = new_adapter(layer, mask, "mask_lora", 4, 8.0, torch.Generator().manual_seed(0))
    adapter.B.detach().normal_(std=0.1)
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    while_training = adapter.forward(x)
    adapter.merge_()
    assert torch.equal(while_training, layer(x))


def test_ranks_of_scale_lora_part_only_when_they_start_apart():
    def ranks(start):
        torch.manual_seed(0)
        layer = nn.Linear(32, 24).requires_grad_(False)
        adapter = new_adapter(layer, torch.ones(24, 32, dtype=torch.bool), "scale_lora", 4, 1.0, torch.Generator())
        if start == "paper":
            adapter.A.detach().fill_(0.5)
        torch.testing.assert_close(adapter.B @ adapter.A, torch.ones(24, 32))
        optimizer = torch.optim.AdamW([adapter.A, adapter.B], lr=0.05)
        x, y = torch.randn(64, 32), torch.randn(64, 24)
        for _ in range(20):
            (adapter.forward(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return int((torch.linalg.svdvals((adapter.B @ adapter.A).detach().double()) > 1e-4).sum())

    assert ranks("paper") == 1
    assert ranks("ours") == 4


def test_no_second_weight_is_held():
    torch.manual_seed(0)
    layers = [nn.Linear(256, 512, bias=False).requires_grad_(False) for _ in range(6)]
    masks = [torch.rand(512, 256) > 0.5 for _ in layers]
    for layer, mask in zip(layers, masks, strict=True):
        layer.weight.masked_fill_(~mask, 0)
    adapters = [
        new_adapter(layer, mask, "mask_lora", 4, 8.0, torch.Generator())
        for layer, mask in zip(layers, masks, strict=True)
    ]
    x = torch.randn(16, 256, requires_grad=True)

    def plain(a):
        return x @ (a.layer.weight + a.scale * a.mask * (a.B @ a.A)).T

    peaks = []
    for forward in (lambda a: a.forward(x), plain):
        with PeakMemory(0) as memory:
            sum(forward(adapter).square().sum() for adapter in adapters).backward()
        peaks.append(memory.peak_bytes)
    one = layers[0].weight.nbytes
    assert peaks[0] < 4 * one < 6 * one < peaks[1]


# --- what trains, and what stays


ADAPTED = ["mask_lora", "scale_lora", "lora", "bias|norm|mask_lora"]
CASES = [("llama", groups, "loss") for groups in (*ADAPTED, "all", "head|embeddings")]
CASES += [(arch, groups, "loss") for arch in ("opt", "gpt2", "mixtral") for groups in ("all", "bias|norm|mask_lora")]
CASES += [("gpt2", "scale_lora", "loss"), ("opt", "head|embeddings", "loss")]
CASES += [("llama", groups, "block") for groups in ("all", "lora")]
CASES += [(arch, "bias|norm|mask_lora", "block") for arch in ("opt", "gpt2", "mixtral")]
CASES += [("llama", "all", "sublayer"), ("opt", "bias|norm|scale_lora", "sublayer")]


@pytest.mark.parametrize(("arch", "groups", "by"), CASES)
def test_exactly_the_masked_weights_are_zero(arch, groups, by, pruned):
    dense, model, masks = pruned(arch)
    before = state(model)
    found = retrain_(model, Retrain(groups, by=by, **SHORT), masks, BATCHES, None if by == "loss" else dense)
    for name, mask in masks.items():
        assert torch.equal(weight(model, name) == 0, ~mask), name
        assert not torch.signbit(weight(model, name)[~mask]).any()
    touched = changed(before, model)
    assert touched
    if "lora" in groups:
        assert {f"{name}.weight" for name in masks} <= touched
    assert found.trained == sum(found.groups.values()) > 0
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert list(found.groups) == groups.split("|")
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", ["all", "norm|mask_lora"])
def test_16_bit_models_keep_dtype_and_zeros(dtype, groups, pruned):
    _, model, masks = pruned("llama", dtype)
    retrain_(model, Retrain(groups, **SHORT), masks, BATCHES)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(torch.equal(weight(model, name) == 0, ~mask) for name, mask in masks.items())


def test_updates_below_half_an_ulp_add_up(pruned):
    """A norm's weight is 1 in bfloat16, and 1 - 2^-8 the next number below it; steps are 2^-10 each."""
    _, model, masks = pruned("llama", torch.bfloat16)
    assert all((p == 1).all() for name, p in model.named_parameters() if "norm" in name)
    knobs = {"decay": "constant", "warmup": 0.0, "steps": 12, "batch": 8, "learning_rate": 2**-10}
    retrain_(model, Retrain("norm", **knobs), masks, [IDS])
    moved = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "norm" in name]) != 1
    assert moved.float().mean() > 0.3


def test_a_kept_weight_of_zero_trains(pruned):
    _, model, masks = pruned("llama")
    name = next(iter(masks))
    with torch.no_grad():
        weight(model, name)[masks[name]] = 0
    for groups in ("all", "mask_lora"):
        again = copy.deepcopy(model)
        retrain_(again, Retrain(groups, **SHORT), masks, BATCHES)
        assert torch.equal(weight(again, name) == 0, ~masks[name])


@pytest.mark.parametrize(
    ("arch", "groups", "expected"),
    [
        ("opt", "bias", lambda name: name.endswith(".bias")),
        ("opt", "norm", lambda name: "layer_norm" in name),
        ("gpt2", "norm", lambda name: ".ln_" in name),
        ("gpt2", "bias|norm", lambda name: ".ln_" in name or name.endswith(".bias")),
        ("llama", "norm", lambda name: "norm" in name),
        ("llama", "bias|norm", lambda name: "norm" in name),
        ("llama", "head", lambda name: name == "lm_head.weight"),
        ("llama", "embeddings", lambda name: "embed_tokens" in name),
        ("opt", "head|embeddings", lambda name: "embed" in name or name == "lm_head.weight"),
        ("mixtral", "norm", lambda name: "norm" in name),
        ("llama", "all", lambda name: name),
    ],
)
def test_a_group_is_what_it_says(arch, groups, expected, pruned):
    _, model, masks = pruned(arch)
    before = state(model)
    found = retrain_(model, Retrain(groups, **SHORT), masks, BATCHES)
    assert changed(before, model) == {name for name in before if expected(name)}
    assert found.trained == sum(p.numel() for name, p in model.named_parameters() if expected(name))


def test_a_layer_that_trains_whole_has_no_adapter(untrained):
    model = untrained("llama")
    recipe = parse_recipe("magnitude-s50+ignore=re:model.*")
    compress_(model, recipe)
    masks = masks_of(model, recipe)
    assert list(masks) == ["lm_head"]
    found = retrain_(model, Retrain("head|norm|mask_lora", **SHORT), masks, BATCHES)
    assert found.groups == {"head": 300 * 32, "norm": 5 * 32, "mask_lora": 0}
    assert torch.equal(model.lm_head.weight == 0, ~masks["lm_head"])


# --- the steps


def test_all_is_adamw_on_the_mean_loss_with_a_warm_and_falling_rate(pruned):
    """Against AdamW by hand in float64, full batches: the order of the data plays no part."""
    _, model, masks = pruned("llama")
    model = model.double()
    reference = copy.deepcopy(model)
    knobs = {"steps": 6, "batch": 11, "learning_rate": 3e-3, "warmup": 0.34}
    found = retrain_(model, Retrain("all", **knobs), masks, BATCHES)
    rates = [3e-3 * share for share in (1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4)]
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in reference.named_parameters()}
    losses = []
    for step, lr in enumerate(rates, 1):
        nlls = []
        for row in itertools.chain(*BATCHES):
            logits = reference(row[None]).logits[0, :-1].log_softmax(-1)
            nlls.append(-logits[torch.arange(len(row) - 1), row[1:]])
        loss = torch.cat(nlls).mean()
        losses.append(loss.item())
        names, parameters = zip(*reference.named_parameters(), strict=True)
        for name, p, g in zip(names, parameters, torch.autograd.grad(loss, parameters), strict=True):
            g = g * masks[name.removesuffix(".weight")] if name.removesuffix(".weight") in masks else g
            m, v = moments[name]
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g**2)
            p.data -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(found.losses, losses, rtol=1e-9, atol=0)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_the_rate_rises_then_falls(decay):
    retrain = Retrain(steps=20, warmup=0.1, learning_rate=1.0, decay=decay)
    rates = [rate(retrain, step) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    if decay == "constant":
        assert set(rates[1:]) == {1.0}
    else:
        assert all(a > b for a, b in itertools.pairwise(rates[2:]))
        assert 0 < rates[-1] < 0.06
        middle = rates[2 + 9]
        assert middle == pytest.approx(0.5)


def test_every_epoch_has_every_sequence_once_in_another_order():
    data = Sequences([row for batch in BATCHES for row in batch], most=36)
    steps = list(itertools.islice(data.steps(4, seed=0), 8))  # two epochs of 11, and 10 more
    seen = [number for passes in steps for numbers in passes for number in numbers]
    assert all(sum(map(len, passes)) == 4 for passes in steps)
    assert sorted(seen[:32].count(i) for i in range(11)).count(3) == 10
    for passes in steps:
        for numbers in passes:
            assert len({len(data.rows[number]) for number in numbers}) == 1
            assert sum(len(data.rows[number]) for number in numbers) <= 36
    one, two = (sorted(seen[start : start + 11]) for start in (0, 11))
    assert set(one) | set(two) == set(range(11))
    assert list(itertools.islice(data.steps(4, seed=0), 8)) == steps
    assert list(itertools.islice(data.steps(4, seed=1), 8)) != steps


@pytest.mark.parametrize("groups", ["all", "mask_lora"])
def test_the_split_into_passes_does_not_matter(groups, pruned):
    _, model, masks = pruned("llama")
    one, other = model.double(), copy.deepcopy(model).double()
    first = retrain_(one, Retrain(groups, **SHORT), masks, [IDS])
    second = retrain_(other, Retrain(groups, **SHORT), masks, [row[None] for row in IDS])
    torch.testing.assert_close(first.losses, second.losses, rtol=1e-9, atol=0)
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_the_seed_decides(pruned):
    _, model, masks = pruned("llama")
    states = []
    for seed in (0, 0, 1):
        again = copy.deepcopy(model)
        retrain_(again, Retrain("norm|mask_lora", seed=seed, **SHORT), masks, BATCHES)
        states.append(state(again))
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_adapters_hold_less_than_training_all(pruned):
    _, model, masks = pruned("llama")
    peaks = {
        groups: retrain_(copy.deepcopy(model), Retrain(groups, **SHORT), masks, [IDS[:2]]).peak_bytes
        for groups in ("norm", "mask_lora", "all")
    }
    weights = sum(p.nbytes for p in model.parameters())
    assert weights < peaks["norm"] < peaks["mask_lora"] < peaks["all"]
    # Weights, gradients, two states.
    assert peaks["all"] > 4 * weights


# --- reconstruction


def test_a_block_learns_the_dense_models_outputs(pruned):
    dense, model, masks = pruned("llama")
    kept, before = state(dense), copy.deepcopy(model)
    knobs = {"steps": 40, "batch": 8, "learning_rate": 1e-2}
    found = retrain_(model, Retrain("all", by="block", **knobs), masks, [IDS], dense)

    def hidden(of):
        with torch.no_grad():
            return [h.double() for h in of(IDS, output_hidden_states=True).hidden_states]

    there, pruned_there, now = hidden(dense), hidden(before), hidden(model)
    # The first block's loss before any step, on all data, and what the second has to start from.
    t, h = there[1], there[0]
    off = (pruned_there[1] - t).square().sum() / (t - h).square().sum()
    assert found.losses[0] == pytest.approx(off.item(), rel=1e-4)
    assert found.losses[39] < 0.5 * found.losses[0]
    with torch.no_grad():
        block = before.model.layers[1]
        positions = torch.arange(IDS.shape[1])[None]
        h = now[1].float()
        second = block(h, position_embeddings=before.model.rotary_emb(h, positions), attention_mask=None).double()
    target, entered = raw_output(dense, 1), there[1]
    off = (second - target).square().sum() / (target - entered).square().sum()
    assert found.losses[40] == pytest.approx(off.item(), rel=1e-3)
    assert found.losses[-1] < 0.7 * found.losses[40]
    assert same(state(dense), kept)
    assert all("layers." in name for name in changed(state(before), model))


def raw_output(model, index):
    """What a decoder layer puts out, before the final norm."""
    kept = []
    handle = model.get_submodule(block_names(model)[index]).register_forward_hook(
        lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return kept[0].double()


# What runs until the first block's attention has put out something.
EARLY = {
    "llama": ("model.layers.0.input_layernorm.", "model.layers.0.self_attn."),
    "opt": ("model.decoder.layers.0.self_attn_layer_norm.", "model.decoder.layers.0.self_attn."),
    "gpt2": ("transformer.h.0.ln_1.", "transformer.h.0.attn."),
    "mixtral": ("model.layers.0.input_layernorm.", "model.layers.0.self_attn."),
}


@pytest.mark.parametrize("arch", EARLY)
def test_by_sublayer_attention_learns_first(arch, pruned):
    dense, model, masks = pruned(arch)
    before = copy.deepcopy(model)
    attention = EARLY[arch][1].removesuffix(".")
    kept = []
    for of in (before, dense):
        handle = of.get_submodule(attention).register_forward_hook(lambda _, __, out: kept.append(out[0].double()))
        with torch.no_grad():
            of(IDS)
        handle.remove()
    seen = {}

    def look(done, steps, _text):
        assert steps == 4 * 5  # two blocks of two halves
        seen[done] = changed(state(before), model)

    found = retrain_(model, Retrain("all", by="sublayer", steps=5, batch=8), masks, [IDS], dense, look)
    assert found.losses[0] == pytest.approx(
        float((kept[0] - kept[1]).square().sum() / kept[1].square().sum()), rel=1e-4
    )
    assert found.losses[4] < found.losses[0]
    assert seen[5]
    assert all(name.startswith(EARLY[arch]) for name in seen[5])
    block = block_names(model)[0]
    later = {name for name in seen[10] - seen[5] if name.startswith(block)}
    assert later
    assert not any(name.startswith(EARLY[arch]) for name in later)
    assert all(name.startswith(block) for name in seen[10])


def test_by_sublayer_needs_an_attention_of_its_own(pruned):
    dense, model, masks = pruned("llama")
    for of in (dense, model):
        for layer in of.model.layers:
            layer.mixer = layer.self_attn
            del layer.self_attn
    masks = {name.replace("self_attn", "mixer"): mask for name, mask in masks.items()}
    with pytest.raises(ValueError, match=r"t_by: sublayer: model\.layers\.0 has 0 attentions"):
        retrain_(model, Retrain("all", by="sublayer", **SHORT), masks, BATCHES, dense)


@pytest.mark.parametrize(
    ("arch", "by"),
    [*((arch, "block") for arch in ("llama", "opt", "gpt2", "mixtral")), ("opt", "sublayer"), ("mixtral", "sublayer")],
)
def test_reconstruction_comes_nearer_to_the_dense_model(arch, by, pruned):
    dense, model, masks = pruned(arch)
    batches = [IDS[:, :9], IDS]

    def off(of):
        return float((raw_output(of, 1) - raw_output(dense, 1)).square().sum())

    before = off(model)
    knobs = {"steps": 15, "batch": 8, "learning_rate": 1e-2, "rank": 8}
    found = retrain_(model, Retrain("bias|norm|mask_lora", by=by, **knobs), masks, batches, dense)
    assert len(found.losses) == (30 if by == "block" else 60)
    assert off(model) < 0.8 * before


# --- refusals


@pytest.mark.parametrize("by", ["loss", "block"])
@pytest.mark.parametrize("groups", ["all", "norm|mask_lora"])
def test_a_loss_that_is_not_finite_changes_nothing(by, groups, pruned):
    dense, model, masks = pruned("llama")
    before = state(model)
    knobs = SHORT | {"learning_rate": 1e30, "warmup": 0.0}
    with pytest.raises(ValueError, match=r"retrain: the loss is (nan|inf) at step 2 of 4; the learning rate, 1e\+30"):
        retrain_(model, Retrain(groups, by=by, **knobs), masks, BATCHES, dense if by == "block" else None)
    assert same(state(model), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_last_step_that_is_not_finite_changes_nothing(pruned):
    _, model, masks = pruned("llama", torch.float16)
    before = state(model)
    knobs = SHORT | {"learning_rate": 1e6, "warmup": 0.0, "steps": 1}
    with pytest.raises(ValueError, match="retrain: weights are not finite after step 1"):
        retrain_(model, Retrain("all", **knobs), masks, BATCHES)
    assert same(state(model), before)


def test_an_interrupted_run_changes_nothing(pruned):
    dense, model, masks = pruned("llama")
    before = state(model)

    def interrupt(done, total, text):
        assert total == 8
        assert text.startswith("loss ")
        if done == 6:  # in the second block
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrain_(model, Retrain("norm|mask_lora", by="block", **SHORT), masks, BATCHES, dense, interrupt)
    assert same(state(model), before)


def test_what_cannot_be_done_is_refused(pruned):
    _, model, masks = pruned("opt")
    before = state(model)
    name = next(iter(masks))

    def refused(match, groups="mask_lora", masks=masks, batches=BATCHES, dense=None, **knobs):
        with pytest.raises(ValueError, match=match):
            retrain_(model, Retrain(groups, **SHORT, **knobs), masks, batches, dense)
        assert same(state(model), before)

    refused("t_groups: head: head and input embedding are one tensor here; ask for head", "head")
    refused("t_groups: embeddings: head and input embedding are one tensor here", "embeddings")
    refused("t_groups: 'mask_lora': .*has nothing of it to train", masks={})
    refused("retrain: needs data, and there is none", batches=[])
    refused(r"retrain: batch 1 has the shape \[5, 1\]", batches=[IDS, IDS[:5, :1]])
    refused("retrain: token 300, but the model embeds 300", batches=[IDS + 300 - int(IDS.max())])
    refused("retrain: block by block needs the dense model", by="block")
    refused("retrain: the dense model is the pruned one", by="block", dense=model)
    refused(f"masks: {name}: float32", masks={name: masks[name].float()})
    refused(r"bool \[64, 32\]; expected bool \[32, 64\]", masks={"model.decoder.layers.0.fc2": torch.ones(64, 32) > 0})
    refused("masks: nowhere: no linear layer of OPTForCausalLM has this name", masks={"nowhere": masks[name]})
    refused("masks: .* weights that the mask takes away are not 0", masks={name: torch.zeros_like(masks[name])})


def test_a_group_that_is_nowhere_is_refused_by_itself(pruned):
    _, model, masks = pruned("llama")
    with pytest.raises(ValueError, match="t_groups: 'bias': LlamaForCausalLM has nothing of it to train"):
        retrain_(model, Retrain("bias", **SHORT), masks, BATCHES)
