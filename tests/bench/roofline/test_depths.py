"""Leaving early and drafting, against passes of models that have only those layers."""

import pytest
import torch
from remanence.backends.ceilings import Ceilings, Rate
from remanence.bench.roofline.bound import floor_s
from remanence.bench.roofline.depths import depths, draft_s, exit_s
from remanence.bench.roofline.walk import walk
from remanence.compress.block import block_names
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

DEVICE = Ceilings("d", Rate(1e9, "s"), {"float32": Rate(1e10, "s")})
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
}


def skeleton(layers, kind=LlamaConfig):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(kind(**SIZES, num_hidden_layers=layers)).eval()


def found(layers, tokens=1, kind=LlamaConfig):
    model = skeleton(layers, kind)
    _, step = walk(model, 1, 8, 12, tokens)
    return depths(step, block_names(model), DEVICE), step


@pytest.mark.parametrize("kind", [LlamaConfig, Phi3Config])
def test_leaving_after_some_layers_is_a_shallower_model_and_the_others_keys(kind):
    six, step = found(6, kind=kind)
    assert six.left_at(6) == pytest.approx(floor_s(step, DEVICE))
    _, two = found(2, kind=kind)
    # 64 -> 2 heads of 16 for keys, and as many for values, from memory: a row's products wait for weights.
    moved = 4 * (2 * 64 * 32) + 4 * (2 * 64 + 2 * 32)
    if kind is Phi3Config:  # one layer for queries, keys and values: half of it is theirs
        moved = 0.5 * 4 * (64 * 128 + 64 + 128)
    assert six.left_at(2) == pytest.approx(floor_s(two, DEVICE) + 4 * moved / 1e9)


def test_a_histogram_is_a_mean():
    six, _ = found(6)
    assert exit_s(six, {2: 30, 6: 10}) == pytest.approx(0.75 * six.left_at(2) + 0.25 * six.left_at(6))
    with pytest.raises(ValueError, match="depth 7 is not from 1 to 6"):
        exit_s(six, {7: 1})
    with pytest.raises(ValueError, match="no token"):
        exit_s(six, {3: 0})


def test_a_draft_by_hand():
    one, step = found(6)
    many, verifying = found(6, tokens=4)
    _, shallow = found(2)
    drafting = floor_s(shallow, DEVICE)
    head = one.beside
    # Three drafts by two layers and the head; then those two once more, and four tokens through the rest.
    round_s = 3 * drafting + (drafting - head) + (floor_s(verifying, DEVICE) - sum(many.layers[:2]))
    assert draft_s(one, many, 2, 3, 1.0) == pytest.approx(round_s / 4)
    assert draft_s(one, many, 2, 3, 0.0) == pytest.approx(round_s)
    assert draft_s(one, many, 2, 3, 0.5) == pytest.approx(round_s / 1.875)
    assert floor_s(step, DEVICE) < draft_s(one, many, 2, 3, 0.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [((0, 3, 0.5), "draft layers: 0"), ((6, 3, 0.5), "draft layers: 6 is not from 1 to 5"), ((2, 0, 0.5), "length: 0"),
     ((2, 3, 1.5), "accept: 1.5")],
)  # fmt: skip
def test_numbers_that_make_no_draft(given, said):
    one, _ = found(6)
    with pytest.raises(ValueError, match=said):
        draft_s(one, one, *given)
