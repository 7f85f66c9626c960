"""Drafts that are verified give what the whole model gives."""

from __future__ import annotations

import pytest
import torch
from remanence.compress.block import decoder_list
from remanence.compress.early_exit.draft import draft_and_verify

NEW, ENDS = 24, [17, 44, 90, 5]


def weakened(model):
    """Later layers that change little, so that early ones draft what is right more often than not."""
    for layer in list(decoder_list(model)[2])[3:]:
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(0.5)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ENDS, 0
    return model


@pytest.mark.parametrize("drafts", [1, 4, 30])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "phi3", "opt"])
def test_tokens_are_those_of_greedy_decoding(tiny, prompts, kind, drafts) -> None:
    """Five rows with padding, some of which end early. In float64 no two tokens tie within rounding."""
    model, (ids, mask) = weakened(tiny(kind, torch.float64)), prompts()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    found = draft_and_verify(model, ids, mask, 3, max_new_tokens=NEW, drafts=drafts, eos_token_id=ENDS, pad_token_id=0)
    assert torch.equal(found.sequences, expected)
    assert 0.1 < found.acceptance < 1
    assert found.passes <= NEW - 1
    assert "forward" not in decoder_list(model)[2][0].__dict__


def test_what_all_rows_accept_saves_passes(tiny, prompts) -> None:
    """A model whose last layers do nothing accepts every draft."""
    model, (ids, mask) = tiny("llama"), prompts()
    for layer in list(decoder_list(model)[2])[4:]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=21, do_sample=False, pad_token_id=0)
    found = draft_and_verify(model, ids, mask, 4, max_new_tokens=21, drafts=5)
    assert torch.equal(found.sequences, expected)
    assert (found.acceptance, found.passes, found.drafted) == (1, 4, 5 * 20)
    # And no layer runs twice for a token: the first ones draft, the last ones verify.
    calls = [0] * 6
    for number, layer in enumerate(decoder_list(model)[2]):
        layer.mlp.register_forward_hook(lambda *of, n=number: calls.__setitem__(n, calls[n] + of[1][0].shape[1]))
    before = list(calls)
    draft_and_verify(model, ids, mask, 4, max_new_tokens=21, drafts=5)
    looked = 4  # tokens of the look at the model
    assert [after - was for after, was in zip(calls, before, strict=True)] == [ids.shape[1] + 20 + looked] * 6


def test_all_rows_end_with_the_first_token(tiny, prompts) -> None:
    model, (ids, mask) = tiny("llama"), prompts(1)
    first = int(model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1])
    found = draft_and_verify(model, ids, mask, 2, max_new_tokens=8, eos_token_id=first)
    assert found.sequences[0, ids.shape[1] :].tolist() == [first]
    assert found.acceptance != found.acceptance


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": 6}, "depth: 6 is not between 1 and 5"),
        ({"depth": 0}, "depth: 0 is not between 1 and 5"),
        ({"drafts": 0}, "drafts, max_new_tokens: 0, 8: expected at least 1"),
        ({"attention_mask": torch.tensor([[1] * 8 + [0]] * 5)}, "ends in padding; expected it on the left"),
    ],
)
def test_what_cannot_be_drafted(tiny, prompts, change, said) -> None:
    ids, mask = prompts()
    asked = {"depth": 3, "attention_mask": mask, "max_new_tokens": 8} | change
    with pytest.raises(ValueError, match=said):
        draft_and_verify(tiny("llama"), ids, **asked)


def test_a_sliding_window_ends_drafts(tiny, prompts) -> None:
    ids, mask = prompts()
    model = tiny("mistral", sliding_window=12)
    with pytest.raises(ValueError, match="17 tokens in all; drafts work within the sliding window, 12"):
        draft_and_verify(model, ids, mask, 3, max_new_tokens=8)


def test_after_an_error_the_model_is_what_it_was(tiny, prompts) -> None:
    model, (ids, mask) = tiny("llama"), prompts()
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    calls = iter(range(99))
    last = decoder_list(model)[2][5].mlp
    handle = last.register_forward_pre_hook(lambda *_: print(end=str(1 / (next(calls) - 2))[:0]))
    with pytest.raises(ZeroDivisionError):
        draft_and_verify(model, ids, mask, 3, max_new_tokens=6)
    handle.remove()
    again = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(again, plain)
