"""Leaving early while generating: what the cache holds, what comes out, what is left behind."""

from __future__ import annotations

import sys

import pytest
import torch
from remanence.compress.block import decoder_list
from remanence.compress.early_exit import generation
from remanence.compress.early_exit.anatomy import anatomy
from remanence.compress.early_exit.generation import early_exit
from remanence.compress.early_exit.parallel import frozen_at, scored
from remanence.compress.early_exit.policy import Confidence, Fixed, Full, Probe, Saturation, Schedule
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.masking_utils import create_causal_mask

NEW, LAYERS = 12, 6
KINDS = ["llama", "mistral", "qwen2", "qwen3", "phi3", "opt"]


def generate(model, ids: Tensor, mask: Tensor, new: int = NEW, **options):
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **options)


def token_by_layer(model, ids: Tensor, mask: Tensor, depths: Tensor) -> Tensor:
    """Logits [B, T, V] without a cache, without our code: each decoder layer is called as the architecture calls it, on
    all positions, and a position's state is put back once it has left."""
    kind, position = model.config.model_type, (mask.cumsum(1) - 1).clamp(min=0)
    owner, _, layers = decoder_list(model)
    h = owner.embed_tokens(ids)
    if kind == "opt":
        h = h + owner.embed_positions(mask, 0, position_ids=position)
    causal = create_causal_mask(
        config=model.config, inputs_embeds=h, attention_mask=mask, past_key_values=None, position_ids=position
    )
    more = {} if kind == "opt" else {"position_embeddings": owner.rotary_emb(h, position_ids=position)}
    for number, layer in enumerate(layers):
        out = layer(h, attention_mask=causal, position_ids=position, past_key_values=None, use_cache=False, **more)
        h = torch.where((number < depths)[..., None], out, h)
    norm = owner.final_layer_norm if kind == "opt" else owner.norm
    return model.lm_head(norm(h))


@torch.no_grad()
def reference(model, sequences: Tensor, prompt_mask: Tensor, depths: Tensor, how=token_by_layer) -> Tensor:
    """Logits [B, n, V] that the generated tokens were chosen from; depths [B, n]."""
    P, T = prompt_mask.shape[1], sequences.shape[1] - 1
    mask = torch.ones(len(sequences), T, dtype=torch.long)
    mask[:, :P] = prompt_mask
    whole = torch.full((len(sequences), T), LAYERS)
    whole[:, P - 1 :] = depths
    return how(model, sequences[:, :T], mask, whole)[:, P - 1 :]


@pytest.fixture(params=["together", "split"])
def rows_run(request, monkeypatch):
    """Rows that are there run beside those that have left, or by themselves."""
    monkeypatch.setattr(generation, "SPLIT_ROWS", 1 if request.param == "split" else 100)


@pytest.mark.usefixtures("rows_run")
@pytest.mark.parametrize("sync", ["row", "batch"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_step_is_that_of_the_whole_text_with_frozen_states(
    tiny, prompts, at_random, kind, attention, sync
) -> None:
    """The gold test: five rows, padding on the left, every row leaving by itself, in float32."""
    model, (ids, mask) = tiny(kind, attention=attention), prompts()
    with early_exit(model, at_random(), sync) as run:
        found = generate(model, ids, mask, return_dict_in_generate=True, output_logits=True)
    depths, logits = run.depths(NEW), torch.stack(found.logits, 1)

    expected = reference(model, found.sequences, mask, depths)
    assert (logits - expected).abs().max() <= 1e-5
    # Every layer has one entry for each token that was read, and the exits did make a difference.
    assert {layer.get_seq_length() for layer in found.past_key_values.layers} == {len(mask[0]) + NEW - 1}
    whole = reference(model, found.sequences, mask, torch.full_like(depths, LAYERS))
    assert (logits - whole).abs().max() > 0.1
    assert len(depths.unique()) > 3
    if sync == "row":
        assert any(len(column.unique()) > 1 for column in depths.T)
    else:
        assert all(len(column.unique()) == 1 for column in depths.T)


@pytest.mark.usefixtures("rows_run")
@pytest.mark.parametrize("kind", KINDS)
def test_in_float64_nothing_but_rounding_is_left(tiny, prompts, at_random, kind) -> None:
    model, (ids, mask) = tiny(kind, torch.float64), prompts()
    with early_exit(model, at_random()) as run:
        found = generate(model, ids, mask, return_dict_in_generate=True, output_logits=True)
    expected = reference(model, found.sequences, mask, run.depths(NEW))
    # generate gives logits in float32; turns are made in it, too.
    assert (torch.stack(found.logits, 1).double() - expected).abs().max() <= 2e-6


@pytest.mark.parametrize("rows", [1, 5])
def test_when_all_have_left_only_keys_and_values_are_made(tiny, prompts, rows) -> None:
    model = tiny("llama")
    ids, mask = prompts(rows)
    calls = {"mlp": 0, "keys": 0}
    _, _, layers = decoder_list(model)
    for layer in layers:
        layer.mlp.register_forward_hook(lambda *_: calls.update(mlp=calls["mlp"] + 1))
        layer.self_attn.k_proj.register_forward_hook(lambda *_: calls.update(keys=calls["keys"] + 1))
    with early_exit(model, Fixed(exits=(2,))) as run:
        calls.update(mlp=0, keys=0)  # without those of the look at the model
        generate(model, ids, mask)
    assert calls == {"mlp": LAYERS + 2 * (NEW - 1), "keys": LAYERS * NEW}
    assert run.histogram() == {2: rows * (NEW - 1)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_threshold_above_one_is_generate_itself(tiny, prompts, kind) -> None:
    model, (ids, mask) = tiny(kind), prompts()
    plain = generate(model, ids, mask, return_dict_in_generate=True, output_logits=True)
    with early_exit(model, Confidence(exits=(1, 2, 3, 4, 5), threshold=1.01)) as run:
        found = generate(model, ids, mask, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(found.sequences, plain.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(plain.logits))
    assert run.histogram() == {LAYERS: 5 * (NEW - 1)}
    with early_exit(model, Full()):
        assert torch.equal(generate(model, ids, mask), plain.sequences)


@pytest.mark.parametrize("where", ["policy", "layer"])
def test_after_an_error_the_model_is_what_it_was(tiny, prompts, at_random, where) -> None:
    model, (ids, mask) = tiny("llama"), prompts()
    plain, before = generate(model, ids, mask), {name: dict(m.__dict__) for name, m in model.named_modules()}
    policy = at_random()
    calls = iter(range(100))

    def fail(*_: object) -> None:
        if next(calls) == 8:
            raise RuntimeError("on purpose")

    if where == "policy":
        object.__setattr__(policy, "score", lambda step: fail() or torch.ones(len(step.state)))
    with early_exit(model, policy):
        generate(model, ids, mask, 3)
        handle = decoder_list(model)[2][0].mlp.register_forward_pre_hook(fail if where == "layer" else lambda *_: None)
        with pytest.raises(RuntimeError, match="on purpose"):
            generate(model, ids, mask)
        handle.remove()
    assert {name: m.__dict__.keys() for name, m in model.named_modules()} == {n: d.keys() for n, d in before.items()}
    assert not model._forward_pre_hooks
    assert torch.equal(generate(model, ids, mask), plain)


@pytest.mark.usefixtures("rows_run")
def test_rows_do_not_feel_each_other(tiny, prompts) -> None:
    """A row in a batch leaves where it leaves alone: the decision is its own."""
    model, (ids, mask) = tiny("qwen3"), prompts()
    policy = Saturation(exits=(1, 2, 3, 4, 5), threshold=0.8)
    with early_exit(model, policy) as together:
        sequences = generate(model, ids, mask)
    depths = together.depths(NEW)
    assert len(depths[:, 1:].unique()) > 2
    for row in range(5):
        real = mask[row].bool()
        with early_exit(model, policy) as alone:
            found = generate(model, ids[row : row + 1, real], mask[row : row + 1, real])
        assert torch.equal(found[0, -NEW:], sequences[row, -NEW:])
        assert torch.equal(alone.depths(NEW)[0], depths[row])


def test_rows_that_have_ended_count_no_more(tiny, prompts) -> None:
    model, (ids, mask) = tiny("llama"), prompts()
    plain = generate(model, ids, mask)[:, -NEW:]
    end = int(plain[2, 4])  # row 2 says it as its fifth token
    model.generation_config.eos_token_id = end
    with early_exit(model, Confidence(exits=(3,), threshold=1.01)) as run:
        found = generate(model, ids, mask)
    depths = run.depths(NEW)
    for row in range(5):
        said = (plain[row] == end).nonzero()
        last = int(said[0]) if len(said) else NEW - 1
        assert (depths[row, : last + 1] == LAYERS).all()
        assert (depths[row, last + 1 :] == 0).all()
    assert torch.equal(found[2, -NEW:][5:], torch.zeros(NEW - 5, dtype=torch.long))
    # One that has ended is no reason for the others to stay.
    with early_exit(model, Fixed(exits=(2,)), "batch") as run:
        generate(model, ids, mask)
    assert set(run.histogram()) == {2}
    assert run.mean_depth == 2


def test_beams_and_sampling_go_through(tiny, prompts) -> None:
    model, (ids, mask) = tiny("llama"), prompts()
    with early_exit(model, Fixed(exits=(3,))) as run:
        found = model.generate(ids, attention_mask=mask, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)
        sampled = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=True, pad_token_id=0)
    assert found.shape == sampled.shape == (5, 15)
    assert len(run.calls) == 2
    assert [len(step) for step in run.calls[0]] == [15] * 5
    assert set(run.histogram()) == {3}


def test_the_prompt_is_read_at_full_depth(tiny, prompts) -> None:
    model, (ids, mask) = tiny("opt"), prompts()
    with early_exit(model, Fixed(exits=(1,))) as run:
        found = generate(model, ids, mask, 1, return_dict_in_generate=True, output_logits=True)
    plain = generate(model, ids, mask, 1, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(found.logits[0], plain.logits[0])
    with pytest.raises(ValueError, match="no token was decoded"):
        _ = run.mean_depth
    with early_exit(model, Fixed(exits=(1,))) as run:  # a prompt of one token, too
        generate(model, ids[:1, :1], mask[:1, :1], 3)
    assert run.depths(3).tolist() == [[LAYERS, 1, 1]]


@pytest.mark.usefixtures("rows_run")
@pytest.mark.parametrize("recipe", ["rtn-w4a16-g32", "rtn-w8a8"])
def test_a_packed_model_leaves_early_too(tiny, prompts, at_random, recipe) -> None:
    model, (ids, mask) = compress_(tiny("llama"), parse_recipe(recipe)), prompts()
    with early_exit(model, at_random()) as run:
        found = generate(model, ids, mask, return_dict_in_generate=True, output_logits=True)
    expected = reference(model, found.sequences, mask, run.depths(NEW))
    # Inputs that are rounded to 8 bits move to the next code where a sum is added up otherwise.
    assert (torch.stack(found.logits, 1) - expected).abs().max() <= (1e-4 if recipe.endswith("a16") else 0.15)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_pass_over_a_whole_text_is_the_reference(tiny, prompts, at_random, kind) -> None:
    model, (ids, mask) = tiny(kind), prompts()
    with early_exit(model, at_random()) as run:
        sequences = generate(model, ids, mask)

    def frozen(model, ids: Tensor, mask: Tensor, depths: Tensor) -> Tensor:
        position = (mask.cumsum(1) - 1).clamp(min=0)
        with frozen_at(model, depths):
            return model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits

    ours = reference(model, sequences, mask, run.depths(NEW), frozen)
    assert (ours - reference(model, sequences, mask, run.depths(NEW))).abs().max() <= 1e-5
    assert "forward" not in decoder_list(model)[2][0].__dict__


@pytest.mark.parametrize(
    "policy",
    [
        Saturation(exits=(1, 2, 4), threshold=0.75),
        Confidence(exits=(2, 4), threshold=0.03, decay=4.0, horizon=6),
        Schedule(exits=(1, 3, 5), horizon=8),
        Fixed(exits=(4,)),
    ],
    ids=["saturation", "confidence", "schedule", "fixed"],
)
def test_a_policy_decides_over_a_whole_text_as_step_by_step(tiny, prompts, policy) -> None:
    model, (ids, mask) = tiny("llama"), prompts()
    with early_exit(model, policy) as run:
        found = generate(model, ids, mask, return_dict_in_generate=True, output_logits=True)
    T, P = found.sequences.shape[1] - 1, ids.shape[1]
    whole = torch.ones(5, T, dtype=torch.long)
    whole[:, :P] = mask
    decoding = torch.zeros(5, T, dtype=torch.bool)
    decoding[:, P:] = True
    position = (whole.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), scored(model, policy, decoding) as at:
        logits = model(input_ids=found.sequences[:, :T], attention_mask=whole, position_ids=position).logits
    assert torch.equal(at.depths[:, P - 1 :], run.depths(NEW))
    assert (at.depths[:, :P] == LAYERS).all()
    assert (logits[:, P - 1 :] - torch.stack(found.logits, 1)).abs().max() <= 1e-5
    if policy.name != "fixed":
        assert len(run.histogram()) > 1


def test_a_model_of_another_kind_is_refused(tiny) -> None:
    moe = tiny("mixtral", num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ValueError, match=r"MixtralForCausalLM \(mixtral\) cannot leave early; known: llama"):
        anatomy(moe)
    with pytest.raises(ValueError, match="training mode"):
        anatomy(tiny("llama").train())


def test_a_model_that_does_something_else_is_refused(tiny) -> None:
    """A change that the family's code knows nothing of would make other keys than the model does."""
    model = tiny("llama")
    attention = decoder_list(model)[2][2].self_attn
    original = attention.forward
    attention.forward = lambda hidden_states, **more: original(hidden_states * 1.5, **more)
    with pytest.raises(ValueError, match="its keys of layer 2 are not those of its architecture"):
        anatomy(model)
    head = tiny("llama")
    head.lm_head.register_forward_hook(lambda module, args, out: 30 * torch.tanh(out / 30))  # noqa: ARG005
    assert anatomy(head).depth == LAYERS  # what hangs on the head itself is seen
    head = tiny("llama")
    inner = head.forward

    def doubled(*args: object, **kwargs: object) -> object:
        out = inner(*args, **kwargs)
        out.logits.mul_(2)
        return out

    head.forward = doubled
    with pytest.raises(ValueError, match="its logits are not those of its architecture"):
        anatomy(head)


def test_what_does_not_fit_is_one_line(tiny, prompts) -> None:
    model, (ids, mask) = tiny("llama"), prompts()
    with pytest.raises(ValueError, match="exits: 6 is not below 6"), early_exit(model, Fixed(exits=(6,))):
        pass
    with pytest.raises(ValueError, match="exit-sync: 'rows' is not one of"), early_exit(model, Full(), "rows"):  # type: ignore[arg-type]
        pass
    e, d = 1, 7
    probe = Probe(
        exits=(1,), mean=torch.zeros(e, d), deviation=torch.ones(e, d), weight=torch.ones(e, d), bias=torch.zeros(e)
    )
    with pytest.raises(ValueError, match=r"mean: \[1, 7\]; expected \[1, 64\]"), early_exit(model, probe):
        pass
    cache = StaticCache(config=model.config, max_cache_len=32)
    static = pytest.raises(ValueError, match="StaticCache; leaving early works with a DynamicCache")
    with early_exit(model, Fixed(exits=(1,))), static:
        generate(model, ids, mask, past_key_values=cache)


def test_a_conversation_goes_on_from_its_cache(tiny, prompts) -> None:
    """A second call with the cache of the first one reads its new tokens at full depth and decodes on."""
    model, (ids, mask) = tiny("llama"), prompts(1)
    cache = DynamicCache(config=model.config)
    with early_exit(model, Fixed(exits=(2,))) as run:
        first = generate(model, ids, mask, 4, past_key_values=cache)
        longer = torch.cat([first, ids[:, :3]], 1)
        generate(model, longer, torch.ones_like(longer), 4, past_key_values=cache)
    assert [len(call) for call in run.calls] == [3, 3]
    assert run.histogram() == {2: 6}


def test_the_family_turns_its_own_way(tiny) -> None:
    """Phi-3 turns a part of each head alone; keys have to be turned as its module does it."""
    model = tiny("phi3", rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5})
    assert anatomy(model).depth == LAYERS
    assert "apply_rotary_pos_emb" in vars(sys.modules[type(decoder_list(model)[2][0].self_attn).__module__])


def _ends(plain, way: str):
    """Ways to say when a row ends; what `generate` makes of each is its own matter."""
    config = GenerationConfig(eos_token_id=int(plain[1, 5]), pad_token_id=0, max_new_tokens=NEW, do_sample=False)
    return {
        "none": ((), {"eos_token_id": None, "max_new_tokens": NEW, "do_sample": False}),
        "keyword": ((), {"eos_token_id": [int(plain[1, 5]), 3], "max_new_tokens": NEW, "do_sample": False}),
        "by place": ((config,), {}),
        "config": ((), {"generation_config": config}),
    }[way]


@pytest.mark.parametrize("way", ["none", "keyword", "by place", "config"])
def test_a_row_ends_where_generate_says(tiny, prompts, way) -> None:
    """The model's own end is another one: rows that still write must not be taken for ended."""
    model, (ids, mask) = tiny("llama"), prompts()
    plain = generate(model, ids, mask)[:, -NEW:]
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = int(plain[0, 2]), 0
    args, kwargs = _ends(plain, way)
    expected = model.generate(ids, *args, attention_mask=mask, **kwargs)
    with early_exit(model, Confidence(exits=(1, 2), threshold=1.01)) as run:
        found = model.generate(ids, *args, attention_mask=mask, **kwargs)
    assert torch.equal(found, expected)
    depths = run.depths(found.shape[1] - ids.shape[1])
    ends = {"none": []}.get(way, [int(plain[1, 5]), 3] if way == "keyword" else [int(plain[1, 5])])
    for row, written in zip(depths, found[:, ids.shape[1] :], strict=True):
        said = torch.isin(written, torch.tensor(ends)).nonzero()
        last = int(said[0]) if len(said) else len(written) - 1
        assert (row[: last + 1] == LAYERS).all()
        assert (row[last + 1 :] == 0).all()


def test_a_prompt_in_chunks_is_read_at_full_depth(tiny, prompts) -> None:
    """Also where its last chunk is one token."""
    model, (ids, mask) = tiny("llama"), prompts()
    with early_exit(model, Fixed(exits=(1,))) as run:
        whole = generate(model, ids, mask)
        chunks = generate(model, ids, mask, prefill_chunk_size=ids.shape[1] - 1)
    assert torch.equal(whole, chunks)
    assert [len(call) for call in run.calls] == [NEW - 1] * 2


def test_one_new_token_of_a_conversation_is_read_at_full_depth(tiny, prompts) -> None:
    model, (ids, mask) = tiny("llama"), prompts(1)
    with early_exit(model, Fixed(exits=(1,))) as run:
        cache = DynamicCache(config=model.config)
        first = generate(model, ids, mask, 4, past_key_values=cache, return_dict_in_generate=True, output_logits=True)
        # The cache ends before the last token that was written: that one is the only new one.
        again = generate(
            model,
            first.sequences,
            torch.ones_like(first.sequences),
            4,
            past_key_values=cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert [len(call) for call in run.calls] == [3, 3]
    depths = torch.full((1, first.sequences.shape[1] + 3), LAYERS)
    depths[:, ids.shape[1] : ids.shape[1] + 3] = depths[:, ids.shape[1] + 4 :] = 1
    with torch.no_grad():
        expected = token_by_layer(model, again.sequences[:, :-1], torch.ones_like(again.sequences[:, :-1]), depths)
    assert (again.logits[0] - expected[:, first.sequences.shape[1] - 1]).abs().max() <= 1e-5


def test_what_cannot_be_served_is_one_line(tiny, prompts) -> None:
    model, (ids, mask) = tiny("llama", attention="eager"), prompts()
    with early_exit(model, Fixed(exits=(1,))):
        with pytest.raises(ValueError, match="use_cache: False; leaving early works with a KV cache alone"):
            generate(model, ids, mask, use_cache=False)
        with pytest.raises(ValueError, match="output_attentions: rows that have left"):
            generate(model, ids, mask, output_attentions=True, return_dict_in_generate=True)
        with pytest.raises(ValueError, match="leaves early already"), early_exit(model, Fixed(exits=(1,))):
            pass
        assert generate(model, ids, mask).shape == (5, ids.shape[1] + NEW)
    own = model.generate
    model.generate = own  # one of the instance, as others may have put it there
    with early_exit(model, Fixed(exits=(1,))):
        pass
    assert model.__dict__["generate"] == own


def test_a_model_inside_another_is_refused(tiny) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (remanence[train])")
    around = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="is around a model; merge it, or give the model inside"):
        anatomy(around.eval())
