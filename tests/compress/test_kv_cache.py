"""The quantized KV cache: its numbers, what each query sees, and that all ways of running a model agree on it."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from remanence.compress.hadamard import orthogonal
from remanence.compress.kv_attach import attach_kv_, check_rounded, detach_kv_
from remanence.compress.kv_cache import KVCache
from remanence.compress.kv_grid import decode_chunks, encode_chunks
from remanence.compress.kv_rows import Rows
from remanence.compress.spec import KVSpec
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128, **IDS}
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.3}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE, **GROUPED),
    "qwen2": lambda: Qwen2Config(**SHAPE, **GROUPED),
    "qwen3": lambda: Qwen3Config(**SHAPE, **GROUPED, head_dim=16),
    "mistral": lambda: MistralConfig(**SHAPE, **GROUPED, sliding_window=None),
    "phi": lambda: PhiConfig(**SHAPE, **GROUPED, partial_rotary_factor=0.5),
    "opt": lambda: OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, init_std=0.3),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, **IDS),
}
LENGTHS = (21, 9, 14, 30)


def make(arch="llama", bias=0.0, dtype=torch.float64, seed=0):
    """Two layers with random weights; `bias`: the size of the keys' bias. In float64 both ways of adding up a row give
    the same integers."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[arch](), dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if bias and name.endswith("k_proj.bias"):
            parameter.data = bias * torch.randn(parameter.shape, dtype=dtype)
        if bias and name.endswith("c_attn.bias"):
            parameter.data[32:64] = bias * torch.randn(32, dtype=dtype)
    return model


def attached(spec, *args, **kwargs):
    model = make(*args, **kwargs)
    attach_kv_(model, spec)
    return model


def batch(lengths=LENGTHS, seed=1):
    """Rows of random tokens, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(2, 60, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def logits(model, ids, mask, **kwargs):
    return model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), **kwargs).logits


@torch.no_grad()
def in_pieces(model, ids, mask, sizes):
    """Logits of passes over so many columns each, one cache through all."""
    cache, out, at = KVCache(model), [], 0
    for size in sizes:
        there = slice(at, at + size)
        out.append(
            model(
                input_ids=ids[:, there],
                attention_mask=mask[:, : at + size],
                position_ids=positions(mask)[:, there],
                past_key_values=cache,
                use_cache=True,
            ).logits
        )
        at += size
    assert at == ids.shape[1]
    return torch.cat(out, 1), cache


def divergence(expected, found):
    """KL per token, in nats."""
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


# The definition, written a second time: one row, no padding, no cache, query by query, in NumPy's float64.


def plain_round(x, bits):
    """x [n]: one scale."""
    low, high = x.min(), x.max()
    step = (high - low) / (2**bits - 1)
    return x if step == 0 else low + np.rint((x - low) / step) * step


def plain_chunks(keys, values, spec):
    """keys, values [S, D] of one head -> both as whole chunks give them back, the rest as it is."""
    keys, values, g = keys.copy(), values.copy(), spec.group_size
    width = min(g, values.shape[1])
    for c in range(len(keys) // g):
        if spec.keys == "channel":
            for d in range(keys.shape[1]):
                keys[c * g : (c + 1) * g, d] = plain_round(keys[c * g : (c + 1) * g, d], spec.bits)
        for t in range(c * g, (c + 1) * g):
            for x in (values,) if spec.keys == "channel" else (keys, values):
                for d in range(0, x.shape[1], width):
                    x[t, d : d + width] = plain_round(x[t, d : d + width], spec.bits)
    return keys, values


def plain_attention(spec, shift_of):
    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):  # noqa: ARG001
        assert len(query) == 1
        assert query.shape[2] == key.shape[2]
        q, k, v = (x[0].double().numpy() for x in (query, key, value))
        shift = shift_of(module, k.shape[1]) if spec.pre_bias else np.zeros_like(k)
        if spec.rotate:
            turn = orthogonal(q.shape[2], "hadamard", torch.Generator().manual_seed(0)).numpy()
            q, k, shift = q @ turn.T, k @ turn.T, shift @ turn.T
        out = np.zeros((q.shape[0], q.shape[1], v.shape[2]))
        for h in range(len(q)):
            kv = h * len(k) // len(q)
            rounded, values = plain_chunks(k[kv] - shift[kv], v[kv], spec)
            rounded = rounded + shift[kv]
            for t in range(q.shape[1]):
                closed = max(0, (t + 1 - spec.residual) // spec.group_size) * spec.group_size
                seen = np.concatenate([rounded[:closed], k[kv, closed : t + 1]])
                score = seen @ q[h, t] * (q.shape[2] ** -0.5 if scaling is None else scaling)
                weight = np.exp(score - score.max())
                out[h, t] = weight / weight.sum() @ np.concatenate([values[:closed], v[kv, closed : t + 1]])
        return torch.from_numpy(out)[None].transpose(1, 2).to(query.dtype), None

    return attention


def qwen_shift(module, length):
    """The bias as RoPE turns it, [H, S, D]."""
    bias = module.k_proj.bias.detach().numpy().reshape(2, 8)
    angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(4) / 4)  # [S, D / 2]
    cos, sin = np.cos(angle), np.sin(angle)
    one, two = bias[:, None, :4], bias[:, None, 4:]
    return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


@contextmanager
def plainly(model, spec):
    """Inside the block the model's attention is the one above."""
    AttentionInterface.register("plain_kv", plain_attention(spec, qwen_shift))
    AttentionMaskInterface.register("plain_kv", lambda *args, **kwargs: None)  # noqa: ARG005
    model.set_attn_implementation("plain_kv")
    yield
    model.set_attn_implementation("sdpa")


@torch.no_grad()
def plain_generate(model, spec, ids, mask, count):
    """Greedy tokens of each row alone [B, count], the whole prefix run again for each."""
    rows = []
    with plainly(model, spec):
        for row, kept in zip(ids, mask, strict=True):
            text = row[kept.bool()][None]
            for _ in range(count):
                last = model(input_ids=text, use_cache=False).logits[:, -1]
                text = torch.cat([text, last.argmax(-1, keepdim=True)], 1)
            rows.append(text[0, -count:])
    return torch.stack(rows)


# Numbers


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("shape", [(8, 8), (16, 10), (24, 63)])
def test_chunks_come_back_as_the_definition_says(bits, shape):
    g, D = shape
    spec = KVSpec(bits, group_size=g)
    x = torch.randn(2, 3, 5, g, D, generator=torch.Generator().manual_seed(0)).double()
    x[0, 0, 0] = 0
    x[0, 0, 1] = 3.25
    for tile, part in ((spec.key_tile(D), 0), ((1, D), 1)):
        codes = encode_chunks(x, bits, tile, torch.float64)
        assert codes.packed.dtype == torch.uint8
        assert codes.packed.shape == (2, 3, 5, 4 * -(-g * D * bits // 32))
        found = decode_chunks(codes, bits, tile, shape).view(x.shape)
        for chunk, back in zip(x.view(-1, g, D).numpy(), found.view(-1, g, D).numpy(), strict=True):
            expected = plain_chunks(chunk, chunk, spec)[0] if part == 0 else [plain_round(row, bits) for row in chunk]
            np.testing.assert_allclose(back, expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_fit_the_scales_that_are_stored(dtype):
    x = 40 + torch.randn(1, 1, 4, 32, 16, generator=torch.Generator().manual_seed(0))
    spec = KVSpec(8)
    codes = encode_chunks(x, 8, spec.key_tile(16), dtype)
    assert codes.scale.dtype == codes.low.dtype == dtype
    off = (decode_chunks(codes, 8, spec.key_tile(16), (32, 16)).view(x.shape) - x).abs()
    step = codes.scale.float().view(1, 1, 4, 1, 16)
    low_off = (codes.low.float().view(1, 1, 4, 1, 16) - x.amin(3, keepdim=True)).clamp(min=0)
    # Half a step, what the smallest lost when it was stored, and the top of the range that a rounded scale misses.
    assert bool((off <= step * (0.5 + 255 * torch.finfo(dtype).eps) + low_off + 1e-5).all())


def test_scales_per_channel_keep_outlier_channels_of_keys_apart():
    keys = torch.randn(1, 1, 8, 32, 16, generator=torch.Generator().manual_seed(0))
    keys[..., 3] += 30
    error = {}
    for name in ("channel", "token"):
        tile = KVSpec(4, keys=name).key_tile(16)
        codes = encode_chunks(keys, 4, tile, torch.float32)
        error[name] = float((decode_chunks(codes, 4, tile, (32, 16)).view(keys.shape) - keys).square().mean())
    assert error["channel"] < error["token"] / 20


def test_rotation_spreads_outlier_channels_that_share_a_scale_per_token():
    """One channel of the keys is 30 times as large in queries as it is small there, so that their products stay."""
    errors = {}
    for name, spec in (
        ("channel", KVSpec(4, 8, 0)),
        ("token", KVSpec(4, 8, 0, keys="token")),
        ("rotated", KVSpec(4, 8, 0, keys="token", rotate=True)),
    ):
        model = make("gpt2")
        with torch.no_grad():
            for block in model.transformer.h:
                weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
                for part in (weight, bias):
                    part[..., 32 + 3 : 64 : 8] *= 30
                    part[..., 3:32:8] /= 30
        ids = batch((40,))[0]
        exact = logits(model, ids, torch.ones_like(ids))
        attach_kv_(model, spec)
        errors[name] = divergence(exact, logits(model, ids, torch.ones_like(ids)))
    # By the weights that a release of torch draws: .38 of it in 2.13, .53 in 2.10.
    assert errors["channel"] < errors["rotated"] < 0.7 * errors["token"]


# What a query sees


@pytest.mark.parametrize("residual", [0, 1, 8, 13])
def test_bookkeeping_by_brute_force(residual):
    """Columns come in passes of different widths, with padding anywhere; tokens are known by their numbers."""
    spec = KVSpec(4, group_size=8, residual=residual)
    generator = torch.Generator().manual_seed(residual)
    rows, tokens = Rows(spec), [0, 0, 0]
    closed = recent = torch.zeros(3, 1, 0, 1)
    for width in (19, 1, 1, 30, 2, 1, 1, 1, 1, 1, 1, 1, 1, 40):
        real = torch.rand(3, width, generator=generator) < torch.tensor([[1.0], [0.7], [0.3]])
        number = torch.tensor(tokens)[:, None] + real.cumsum(1) - 1
        step = rows.advance(real, None)
        exact = step.exact.of(torch.cat([recent, number[:, None, :, None].float()], 2))
        shown = torch.cat([closed, exact[:, :, : step.fresh * 8], exact], 2)[:, 0, :, 0]
        inexact = closed.shape[2] + step.fresh * 8
        for b in range(3):
            for q in range(width):
                seen = step.seen[b, 0, q]
                if real[b, q]:
                    t = int(number[b, q])
                    count = max(0, (t + 1 - residual) // 8) * 8
                    assert shown[b, :inexact][seen[:inexact]].tolist() == list(range(count))
                    assert shown[b, inexact:][seen[inexact:]].tolist() == list(range(count, t + 1))
                else:
                    assert bool(seen.all())
        tokens = [n + int(row.sum()) for n, row in zip(tokens, real, strict=True)]
        chunks = torch.cat([closed, exact[:, :, : step.fresh * 8]], 2).unflatten(
            2, (closed.shape[2] // 8 + step.fresh, 8)
        )[..., 0]  # [3, 1, C, 8]
        closed = step.chunks.of(chunks).flatten(2)[..., None]
        recent = step.rest.of(exact)
        assert (closed.shape[2], recent.shape[2]) == (rows.chunks * 8, rows.tail)
    assert rows.chunks > 8
    assert len(set(tokens)) == 3


@pytest.mark.parametrize(
    ("arch", "spec"),
    [
        ("llama", KVSpec(4, 8, 5)),
        ("llama", KVSpec(2, 8, 0)),
        ("llama", KVSpec(2, 16, 16)),
        ("qwen2", KVSpec(2, 8, 3, pre_bias=True)),
        ("llama", KVSpec(2, 8, 3, keys="token", rotate=True)),
        ("qwen2", KVSpec(2, 8, 3, pre_bias=True, rotate=True)),
    ],
)
def test_generate_with_padding_is_the_plain_loop_without_a_cache(arch, spec):
    model = make(arch, bias=3.0)
    ids, mask = batch()
    expected = plain_generate(model, spec, ids, mask, 12)
    exact = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, ids.shape[1] :]
    attach_kv_(model, spec)
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert found[:, ids.shape[1] :].tolist() == expected.tolist()
    assert exact.tolist() != expected.tolist()  # rounding shows
    cache = KVCache(model)
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, past_key_values=cache)
    assert cache.get_seq_length() == ids.shape[1] + 11
    assert (
        cache.layers[0].kept[0].closed.packed.shape[2] == max(0, max(LENGTHS) + 11 - spec.residual) // spec.group_size
    )


@pytest.mark.parametrize("arch", CONFIGS)
def test_one_pass_is_the_plain_definition(arch):
    spec = KVSpec(2, 8, 3)
    ids = batch((37,))[0]
    model = make(arch, bias=2.0)
    exact = logits(model, ids, torch.ones_like(ids))
    with plainly(model, spec):
        expected = logits(model, ids, torch.ones_like(ids), use_cache=False)
    attach_kv_(model, spec)
    found = logits(model, ids, torch.ones_like(ids), use_cache=False)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[:, : 8 + 2], exact[:, : 8 + 2], atol=1e-6, rtol=1e-6)  # no chunk is closed yet
    assert (found - exact)[:, 8 + 2].abs().max() > 1e-3


@pytest.mark.parametrize("arch", CONFIGS)
def test_one_pass_is_step_by_step(arch):
    ids, mask = batch()
    biased = arch in ("qwen2", "phi", "opt", "gpt2")
    for spec in (KVSpec(2, 8, 5), KVSpec(4, 8, 0, pre_bias=biased)):
        model = attached(spec, arch, bias=2.0 * biased)
        whole = logits(model, ids, mask, use_cache=False)
        stepped, _ = in_pieces(model, ids, mask, [1] * ids.shape[1])
        prefilled, _ = in_pieces(model, ids, mask, [17, 1, 1, 11])
        served = logits(model, ids, mask)  # with a cache of its own
        detach_kv_(model)
        exact = logits(model, ids, mask)
        real = mask.bool()
        for other in (stepped, prefilled, served):
            torch.testing.assert_close(other[real], whole[real], atol=1e-6, rtol=1e-6)
        assert (whole - exact)[real].abs().max() > 1e-2


def test_a_row_does_not_depend_on_the_others_or_on_padding():
    spec = KVSpec(2, 8, 3)
    model = attached(spec)
    ids, mask = batch()
    together = logits(model, ids, mask, use_cache=False)
    answers = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for b, length in enumerate(LENGTHS):
        row = ids[b : b + 1, -length:]
        alone = logits(model, row, torch.ones_like(row), use_cache=False)
        torch.testing.assert_close(alone[0], together[b, -length:], atol=1e-6, rtol=1e-6)
        answer = model.generate(input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=10, do_sample=False)
        assert answer[0, length:].tolist() == answers[b, ids.shape[1] :].tolist()


def test_padding_on_the_right_and_in_between():
    """Rows that ended with padding go on afterwards, as when several are asked the next question."""
    model = attached(KVSpec(2, 8, 3))
    right = batch()[1].flip(1)
    more = torch.cat([right, torch.ones(4, 11, dtype=torch.long)], 1)
    text = torch.randint(2, 60, more.shape, generator=torch.Generator().manual_seed(3))
    found, _ = in_pieces(model, text, more, [30, 1, 10])
    for b in range(4):
        row = text[b][more[b].bool()][None]
        alone = logits(model, row, torch.ones_like(row), use_cache=False)
        torch.testing.assert_close(found[b][more[b].bool()], alone[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("how", [{"do_sample": True, "top_k": 20}, {"do_sample": False, "num_beams": 3}])
def test_sampling_and_beams_are_the_same_with_and_without_a_cache(how):
    model = attached(KVSpec(2, 8, 3))
    ids, mask = batch()
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        answers.append(
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10, use_cache=use_cache, **how).tolist()
        )
    assert answers[0] == answers[1]


# How good, how small


def test_more_bits_are_nearer_to_full_precision():
    model = make()
    ids, mask = batch((60, 60, 60))
    exact = logits(model, ids, mask)
    off = {}
    for bits in (8, 4, 2):
        attach_kv_(model, KVSpec(bits, 8, 0))
        off[bits] = divergence(exact, logits(model, ids, mask, use_cache=False))
        detach_kv_(model)
    assert off[8] < off[4] / 20 < off[2] / 60
    assert off[8] < 1e-3
    attach_kv_(model, KVSpec(2, 8, 60))  # all of it is recent
    torch.testing.assert_close(logits(model, ids, mask, use_cache=False), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("arch", ["qwen2", "phi", "opt", "gpt2"])
def test_keys_are_rounded_better_without_their_bias(arch):
    model = make(arch, bias=20.0)
    ids, mask = batch((60, 60, 60))
    exact = logits(model, ids, mask)
    off = {}
    for pre_bias in (False, True):
        attach_kv_(model, KVSpec(4, 8, 0, pre_bias=pre_bias))
        off[pre_bias] = divergence(exact, logits(model, ids, mask, use_cache=False))
        detach_kv_(model)
    if arch in ("qwen2", "phi"):
        assert off[True] < off[False] / 5
    else:  # a constant is in no range of a channel: the same rounding
        assert off[True] == pytest.approx(off[False], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [KVSpec(8, 32, 32), KVSpec(4, 32, 32), KVSpec(2, 16, 0), KVSpec(4, 8, 8, True)])
def test_memory_is_counted_and_small(spec, dtype):
    arch = "qwen2" if spec.pre_bias else "llama"
    model = attached(spec, arch, bias=1.0, dtype=dtype)
    ids, mask = batch((120, 100))
    _, cache = in_pieces(model, ids, mask, [119, 1])
    B, H, D, layers, s, g = 2, 2, 8, 2, dtype.itemsize, spec.group_size
    chunks = max(0, 120 - spec.residual) // g
    longest = max(n - max(0, n - spec.residual) // g * g for n in (120, 100))
    codes = g * D * spec.bits // 8
    keys = B * H * (chunks * (codes + 2 * s * D) + longest * D * s)
    values = B * H * (chunks * (codes + 2 * s * g * D // min(g, D)) + longest * D * s)
    turns = 2 * B * 120 * D * s if spec.pre_bias else 0
    assert cache.memory_bytes() == layers * (keys + values) + 8 * B + turns
    kept = [t for layer in cache.layers for part in layer.kept for t in (part.closed.packed, part.recent)]
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in kept)
    full = layers * 2 * B * H * 120 * D * s
    if not spec.pre_bias:  # two layers share the turns of their positions here, dozens elsewhere
        assert cache.memory_bytes() < full * {8: 0.95, 4: 0.8, 2: 0.55}[spec.bits]


def test_half_precision_serves():
    model = attached(KVSpec(8, 8, 4, pre_bias=True), "qwen2", bias=2.0, dtype=torch.bfloat16)
    ids, mask = batch()
    whole = logits(model, ids, mask, use_cache=False)
    stepped, _ = in_pieces(model, ids, mask, [25, 1, 1, 1, 1, 1])
    detach_kv_(model)
    exact = logits(model, ids, mask)
    real = mask.bool()
    assert whole.dtype == torch.bfloat16
    assert divergence(exact[real].float(), whole[real].float()) < 0.05
    assert divergence(exact[real].float(), stepped[real].float()) < 0.05


# Attaching


def test_detaching_leaves_no_trace(tmp_path):
    model = make()
    ids, mask = batch()
    before, attributes, config = logits(model, ids, mask), set(vars(model)), model.config.to_dict()
    training = [module.training for module in model.train().modules()]
    attach_kv_(model, KVSpec(4, 8, 0))
    assert [module.training for module in model.modules()] == training
    assert model.config.to_dict() == config
    model.eval()
    quantized = logits(model, ids, mask)
    assert not torch.equal(quantized, before)
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert stock.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(stock, ids, mask), before)
    detach_kv_(model)
    assert model.config._attn_implementation == "sdpa"
    assert set(vars(model)) == attributes
    assert not any(hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    torch.testing.assert_close(logits(model, ids, mask), before, atol=0, rtol=0)
    cache = model(input_ids=ids).past_key_values
    assert isinstance(cache, DynamicCache)
    torch.testing.assert_close(logits(twin, ids, mask), quantized, atol=0, rtol=0)
    detach_kv_(twin)
    torch.testing.assert_close(logits(twin, ids, mask), before, atol=0, rtol=0)


def test_forward_makes_its_own_cache():
    model = attached(KVSpec(4, 8, 0))
    ids, _ = batch((20, 20))
    with torch.no_grad():
        assert isinstance(model(ids).past_key_values, KVCache)
        assert isinstance(model(ids, None, None, None, use_cache=True).past_key_values, KVCache)
        assert model(ids, use_cache=False).past_key_values is None


def test_rows_of_a_cache_can_be_chosen():
    """The longest row goes, so that what is kept becomes narrower, too."""
    model = attached(KVSpec(2, 8, 3, pre_bias=True), "qwen2", bias=2.0)
    ids, mask = batch()
    whole = logits(model, ids, mask, use_cache=False)
    _, cache = in_pieces(model, ids[:, :-2], mask[:, :-2], [28])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([7, 3, 0, 0, 1, 2, 5, 6]))
    cache.batch_select_indices(torch.tensor([1, 3]))
    rows = torch.tensor([1, 0])
    for at in (28, 29):
        with torch.no_grad():
            found = model(
                input_ids=ids[rows, at : at + 1],
                attention_mask=mask[rows, : at + 1],
                position_ids=positions(mask)[rows, at : at + 1],
                past_key_values=cache,
            ).logits
        torch.testing.assert_close(found[:, 0], whole[rows, at], atol=1e-6, rtol=1e-6)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory_bytes() == 0


def test_gradients_pass_rounding():
    """As if it were not there: with 8 bits they are nearly those of full precision."""
    model = make()
    ids, mask = batch((40, 40))
    grads = []
    for spec in (None, KVSpec(8, 8, 0)):
        if spec is not None:
            attach_kv_(model, spec)
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 0.1


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3}, "bits: 3"),
        ({"bits": 4, "group_size": 12}, "group_size: 12"),
        ({"bits": 4, "group_size": 0}, "group_size: 0"),
        ({"bits": 4, "residual": -1}, "residual: -1"),
    ],
)
def test_bad_specs(fields, message):
    with pytest.raises(ValueError, match=message):
        KVSpec(**fields)


def twice_as_sharp(module, query, *args, **kwargs):
    return sdpa_attention_forward(module, 2 * query, *args, **kwargs)


def test_models_that_cannot_be_served():
    AttentionInterface.register("twice_as_sharp", twice_as_sharp)
    AttentionMaskInterface.register("twice_as_sharp", sdpa_mask)
    window = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, **GROUPED, sliding_window=8))
    capped = AutoModelForCausalLM.from_config(
        Gemma2Config(**SHAPE, **GROUPED, head_dim=8, layer_types=["full_attention"] * 2)
    )
    both = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=60))
    wide = AutoModelForCausalLM.from_config(LlamaConfig(**(SHAPE | {"hidden_size": 48}), **GROUPED))
    odd = make("llama")
    odd.set_attn_implementation("twice_as_sharp")
    for model, spec, message in (
        (odd, KVSpec(4), r"more than softmax\(q k\) v"),
        (window, KVSpec(4), "SlidingWindow"),
        (capped, KVSpec(4), "softcap"),
        (both, KVSpec(4), "encoder"),
        (wide, KVSpec(4, 8), "12 channels .* groups of 8"),
        (make("llama"), KVSpec(4, pre_bias=True), "pre_bias"),
        (make("qwen3"), KVSpec(4, pre_bias=True), "pre_bias"),
    ):
        before = model.config._attn_implementation
        with pytest.raises(ValueError, match=message):
            attach_kv_(model, spec)
        assert model.config._attn_implementation == before
        with pytest.raises(ValueError, match="call attach_kv_ first"):
            detach_kv_(model)


def test_misuse():
    model, other = attached(KVSpec(4, 8, 0)), attached(KVSpec(4, 8, 0))
    ids, mask = batch((12, 9))
    with pytest.raises(ValueError, match="already"):
        attach_kv_(model, KVSpec(4))
    with pytest.raises(ValueError, match="call attach_kv_ first"):
        KVCache(make())
    for past in (DynamicCache(), KVCache(other)):
        with pytest.raises(ValueError, match="expected a KVCache of this model"):
            model(ids, past_key_values=past)
    with pytest.raises(ValueError, match="hides more than padding"):
        model(ids, attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="one entry per token"):
        model(ids, attention_mask=torch.zeros(2, 1, 12, 12))
    _, cache = in_pieces(model, ids, mask, [12])
    with pytest.raises(ValueError, match="other columns are padding"):
        model(ids[:, :1], past_key_values=cache)
    for call in (lambda: cache.crop(-1), cache.layers[0].offload):
        with pytest.raises(ValueError, match="cannot be"):
            call()
    stock = make()
    cache = KVCache(model)
    with pytest.raises(ValueError, match="the model it was made for"):
        stock(ids, past_key_values=cache)
    exact = DynamicCache()
    stock(ids, past_key_values=exact)
    with pytest.raises(ValueError, match="13 keys for 1 queries"):
        model.model(ids[:, :1], past_key_values=exact)


def test_a_model_that_has_rounded_nothing_is_told():
    spec = KVSpec(4, group_size=16, residual=8)
    model = attached(spec)
    for length in (23, 24):
        ids, mask = batch((length,))
        logits(model, ids, mask)
        if length == 23:
            with pytest.raises(ValueError, match=r"kv: no key or value was rounded: no text has 24 tokens"):
                check_rounded(model)
    check_rounded(model)
