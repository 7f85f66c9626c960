"""Learned rotations: orthogonal whatever happens, the same model as before, and better once quantized."""

import copy

import pytest
import torch
import torch.nn.functional as F
from remanence.compress.activations import fake_quantize
from remanence.compress.cayley import cayley_step, learn_rotation_
from remanence.compress.hadamard import orthogonal
from remanence.compress.rotation import rotate_
from remanence.compress.rtn import rtn
from remanence.compress.spec import RTN, ActivationSpec, QuantSpec, Rotation
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SHAPE = {"num_hidden_layers": 2, "max_position_embeddings": 64, "num_attention_heads": 4, **IDS}
CONFIGS = {
    "llama": lambda: LlamaConfig(hidden_size=48, intermediate_size=88, num_key_value_heads=2, **SHAPE),
    "opt": lambda: OPTConfig(hidden_size=56, word_embed_proj_dim=56, ffn_dim=88, dropout=0.0, **SHAPE),
}
A4 = ActivationSpec(4)
W4 = QuantSpec(4)


def build(name):
    """Random, with two channels of the residual stream that are 30 times as large as the others."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter += (0.3 if parameter.dim() == 1 else 0.15) * torch.randn(parameter.shape)
            if "embed" in key:
                parameter[:, [7, 30]] *= 30
            elif key.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
                parameter[[7, 30]] *= 30
        # Answers that are neither sure nor at random.
        final = model.model.norm if name == "llama" else model.model.decoder.final_layer_norm
        scale = 2.5 / model(input_ids=torch.arange(2, 50)[None]).logits.std(-1).mean()
        for parameter in final.parameters():
            parameter *= scale
    return model


def text(model, seed, batches, shape=(4, 32)):
    """What the model itself writes, so that it knows best what comes next."""
    generator = torch.Generator().manual_seed(seed)
    written = []
    for _ in range(batches):
        ids = torch.randint(2, 60, (shape[0], 1), generator=generator)
        while ids.shape[1] < shape[1]:
            with torch.no_grad():
                odds = model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(odds, 1, generator=generator)], 1)
        written.append(ids)
    return written


def quantized(model, weight_spec=None):
    """A copy with fake-quantized inputs of all linear layers in the decoder, and rounded weights."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(lambda _, args: (fake_quantize(args[0], A4),))
            if weight_spec is not None:
                q = rtn(module.weight.data, weight_spec, torch.float16, RTN(clip=False))
                module.weight.data = q.dequantize()
    return model


def loss(model, batches):
    with torch.no_grad():
        each = [
            F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for ids in batches
        ]
    return float(torch.stack(each).double().mean())


def divergence(model, dense, batches):
    """Mean KL per token of what the model answers from what the dense one does."""
    with torch.no_grad():
        pairs = [
            (model(input_ids=ids).logits.log_softmax(-1), dense(input_ids=ids).logits.log_softmax(-1))
            for ids in batches
        ]
    return float(
        torch.stack([F.kl_div(p, q, log_target=True, reduction="none").sum(-1).mean() for p, q in pairs]).mean()
    )


def off(now, before):
    return float((now.double() - before.double()).abs().max() / before.double().abs().max())


def test_a_step_is_the_formula_and_goes_downhill():
    """R(a) = (I + a/2 W)^-1 (I - a/2 W) R starts out in the direction -W R, W = (G R^T - R G^T) / 2."""
    generator = torch.Generator().manual_seed(0)
    R = orthogonal(7, "orthogonal", generator)
    G = torch.randn(7, 7, dtype=torch.float64, generator=generator)
    W = (G @ R.T - R @ G.T) / 2
    rate = 1e-4
    torch.testing.assert_close((cayley_step(R, G, rate) - R) / rate, -W @ R, rtol=1e-3, atol=1e-3)
    identity = torch.eye(7, dtype=torch.float64)
    expected = torch.linalg.inv(identity + 0.05 * W) @ (identity - 0.05 * W) @ R
    torch.testing.assert_close(cayley_step(R, G, 0.1), expected)
    assert torch.equal(cayley_step(R, torch.zeros(7, 7).double(), 1.5), R)


def test_steps_stay_orthogonal_however_large_the_gradient():
    generator = torch.Generator().manual_seed(0)
    R = orthogonal(12, "hadamard", generator)
    for size in (1e-6, 1.0, 1e3, 1e9) * 50:
        before = R
        R = cayley_step(R, size * torch.randn(12, 12, dtype=torch.float64, generator=generator), 1.5)
        assert float((R - before).norm()) < 2  # no jump to the other side
    assert float((R @ R.T - torch.eye(12)).abs().max()) < 1e-12


def test_descent_finds_the_best_rotation():
    """min |R A - B|^2 over rotations has a closed solution (Procrustes), U V^T of the SVD of B A^T."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(6, 30, dtype=torch.float64, generator=generator)
    target = orthogonal(6, "orthogonal", generator)
    B = target @ A + 0.1 * torch.randn(6, 30, dtype=torch.float64, generator=generator)
    U, _, V = torch.linalg.svd(B @ A.T)
    best = U @ V
    R = orthogonal(6, "orthogonal", generator)
    if torch.det(R) * torch.det(best) < 0:  # no path leads from a rotation to a reflection
        R[0] *= -1
    for _ in range(400):
        R = cayley_step(R, 2 * (R @ A - B) @ A.T, 0.02)
    torch.testing.assert_close(R, best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "spec"), [("llama", None), ("llama", W4), ("opt", W4)])
def test_learned_beats_fixed(name, spec):
    """On the loss it was trained with, and on text it has not seen, by the distance from the dense model."""
    dense = build(name)
    batches, unseen = text(dense, 0, 8), text(dense, 1, 8)
    fixed, model = copy.deepcopy(dense), copy.deepcopy(dense)
    rotate_(fixed, Rotation("hadamard"), seed=3)
    found = learn_rotation_(model, batches, spec, A4, steps=60, seed=3)
    assert found.rotation.kind == "learned"
    assert found.keeps_mean == (name == "opt")
    # The numbers in the answer are those of the models outside.
    assert found.before == pytest.approx(loss(quantized(fixed, spec), batches), rel=2e-3)
    assert found.after == pytest.approx(loss(quantized(model, spec), batches), rel=2e-3)
    floor = loss(dense, batches)
    assert found.after - floor < 0.9 * (found.before - floor)
    learned, start = (divergence(quantized(m, spec), dense, unseen) for m in (model, fixed))
    none = divergence(quantized(dense, spec), dense, unseen)
    assert learned < 0.95 * start
    assert start < 0.7 * none
    # It is the same model.
    assert off(model(input_ids=unseen[0]).logits, dense(input_ids=unseen[0]).logits) < 1e-4
    assert len(found.rotations) == 3
    for key, R in found.rotations.items():
        assert float((R @ R.T - torch.eye(len(R))).abs().max()) < 1e-10, key
    ones = torch.ones(len(found.rotations[""]), dtype=torch.float64)
    assert torch.allclose(found.rotations[""] @ ones, ones) == (name == "opt")


def test_the_same_data_gives_the_same_rotation():
    dense = build("llama")
    batches = text(dense, 0, 2)
    first, second = (learn_rotation_(copy.deepcopy(dense), batches, None, A4, steps=3) for _ in range(2))
    assert torch.equal(first.rotations[""], second.rotations[""])
    assert first.after <= first.before


def test_wrong_input():
    model = build("llama")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    ids = torch.arange(8)[None]
    for arguments, match in [
        (([], W4, A4), "batches: there are none"),
        (([ids[0]], W4, A4), r"batch 0 has the shape \[8\]"),
        (([ids, ids[:, :1]], W4, A4), r"batch 1 has the shape \[1, 1\]"),
        (([ids], W4, ActivationSpec(8, dynamic=False)), "activation: static scales"),
        (([ids], W4, A4, 0), "steps: 0 is below 1"),
        (([ids], W4, A4, 5, -1.0), "learning_rate: -1.0 is not above 0"),
        (([ids], QuantSpec(4, 64), A4), "48 input features do not divide into groups of 64"),
    ]:
        with pytest.raises(ValueError, match=match):
            learn_rotation_(model, *arguments)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
