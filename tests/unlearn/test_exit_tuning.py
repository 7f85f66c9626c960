"""Tuning for exits: GREEN-CODE's weights to its digits, the loss and its gradient against float64 by hand, on every
family; what trains, what stays, and what the report says."""

import copy

import pytest
import torch
from remanence.compress.early_exit.anatomy import FAMILIES, anatomy
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.encode import IGNORE, Encoder
from remanence.unlearn.exit_tuning import WEIGHTS, ExitTuning, exit_losses, exit_weights, tune_, weighted_loss
from remanence.unlearn.people import people_corpus
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}
MLP = {"intermediate_size": 64, "num_key_value_heads": 1}
CONFIGS = {
    "llama": lambda **ids: LlamaConfig(**SHAPE, **MLP, **ids),
    "mistral": lambda **ids: MistralConfig(**SHAPE, **MLP, sliding_window=None, **ids),
    "qwen2": lambda **ids: Qwen2Config(**SHAPE, **MLP, tie_word_embeddings=True, **ids),
    "qwen3": lambda **ids: Qwen3Config(**SHAPE, **MLP, head_dim=16, **ids),
    "phi3": lambda **ids: Phi3Config(**SHAPE, **MLP, **ids),
    "opt": lambda **ids: OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=16, dropout=0.0, **ids),
}


@pytest.fixture(scope="module")
def data():
    corpus = people_corpus(6, "forget20", seed=0)
    tokenizer = demo_tokenizer(corpus, DemoConfig(vocab_size=400))
    pairs = [(row.question, row.answer) for row in corpus.retain]
    return tokenizer, Encoder(tokenizer, 128), pairs


def build(arch, tokenizer, seed=0):
    torch.manual_seed(seed)
    config = CONFIGS[arch](vocab_size=len(tokenizer))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


# --- weights ----------------------------------------------------------------------------------------------------------


def test_geometric_weights_are_the_published_ones():
    """GREEN-CODE's two lists; its index i is depth i + 1."""
    llama = exit_weights("geometric", [i + 1 for i in (3, 5, 7, 9, 11, 13, 17, 21, 25)], 28)
    assert [f"{w:.4f}"[1:] for w in llama] == (".1494 .1345 .1210 .1089 .0980 .0882 .0738 .0664 .0598 .1000".split())
    opt = exit_weights("geometric", [i + 1 for i in (3, 5, 7, 9, 11, 13, 15, 19, 23, 27)], 32)
    assert [f"{w:.4f}"[1:] for w in opt] == (
        ".1342 .1208 .1087 .0978 .0880 .0792 .0713 .0738 .0664 .0598 .1000".split()
    )


def test_other_weights():
    assert exit_weights("calm", (2, 4, 6), 8) == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert exit_weights("calm", (1, 6), 8) == pytest.approx((1 / 15, 6 / 15, 8 / 15))
    assert exit_weights("uniform", (2, 4, 6), 8) == (0.25,) * 4
    assert exit_weights("plain", (2, 4, 6), 8) == (0, 0, 0, 1)


def test_a_half_without_exits_leaves_its_weight_to_the_other():
    assert exit_weights("geometric", (1, 2), 8) == pytest.approx((0.9 / 1.9, 0.81 / 1.9, 0.1))
    assert exit_weights("geometric", (5, 7), 8) == pytest.approx((0.9 / 1.9, 0.81 / 1.9, 0.1))
    assert exit_weights("geometric", (4, 5), 8, shallow=0.8, deep=0.2) == pytest.approx((0.8, 0.2, 0.0))
    assert exit_weights("geometric", (4, 5), 8, shallow=0.8, deep=0.2)[-1] >= 0
    # The half's border belongs to the shallow ones.
    assert exit_weights("geometric", (4, 5), 8) == pytest.approx((0.7, 0.2, 0.1))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("exits", "layers"), [((1,), 2), ((3,), 4), ((1, 2, 3), 4), (tuple(range(1, 12)), 12)])
def test_weights_add_up_to_one(kind, exits, layers):
    found = exit_weights(kind, exits, layers)
    assert len(found) == len(exits) + 1
    assert sum(found) == pytest.approx(1, abs=1e-12)
    assert min(found) >= 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"exits": ()}, "exits: none"),
        ({"exits": (2, 1)}, r"exits: \[2, 1\]: expected depths from 1, ascending"),
        ({"exits": (0, 1)}, "exits: "),
        ({"weights": "best"}, "weights: 'best' is not one of geometric, calm, uniform, plain"),
        ({"steps": 0}, "steps: 0: expected a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size: 1.5"),
        ({"micro_batch": 0}, "micro_batch: 0"),
        ({"lora_rank": -1}, "lora_rank: -1"),
        ({"learning_rate": 0}, "learning_rate: 0"),
        ({"learning_rate": float("nan")}, "learning_rate: nan"),
        ({"held_out": 1.0}, "held_out: 1.0"),
        ({"ratio": 0}, "ratio: 0"),
        ({"deep": -0.1}, "deep: -0.1"),
        ({"shallow": 0.9, "deep": 0.2}, "shallow: 0.9 and deep: 0.2 are more than 1 together"),
    ],
)
def test_settings_that_make_no_sense(wrong, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        ExitTuning(**({"exits": (1, 2)} | wrong))


def test_weights_of_exits_that_the_model_does_not_have():
    with pytest.raises(ValueError, match="exits: 4 is not below 4, the model's layers"):
        exit_weights("uniform", (2, 4), 4)
    with pytest.raises(ValueError, match="weights: 'best' is not one of"):
        exit_weights("best", (2,), 4)


# --- the loss ---------------------------------------------------------------------------------------------------------


def by_hand(model, batch, depths, weights):
    """With transformers' own hidden states, one token after another; gradients of it too."""
    whole = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, use_cache=False
    )
    layers = model.config.num_hidden_layers
    total = 0.0
    for depth, weight in zip(depths, weights):
        # The last of transformers' hidden states has the final norm behind it: its logits are the model's.
        z = whole.logits if depth == layers else anatomy(model).logits(whole.hidden_states[depth])
        terms = [
            torch.logsumexp(z[b, t - 1], 0) - z[b, t - 1, batch.labels[b, t]]
            for b, t in (batch.labels != IGNORE).nonzero().tolist()
            if t > 0
        ]
        total = total + weight * sum(terms) / len(terms)
    return total


@pytest.mark.parametrize("arch", FAMILIES)
def test_loss_and_gradient_are_the_written_ones(arch, data):
    tokenizer, encoder, pairs = data
    model = build(arch, tokenizer).double()
    batch = encoder.batch([pairs[0], ("", pairs[3][1]), pairs[7]])
    depths = (1, 3, 4)
    weights = exit_weights("geometric", depths[:-1], 4)
    found = weighted_loss(model, anatomy(model), batch, depths, weights)
    assert not any(layer._forward_hooks for layer in anatomy(model).layers)
    theirs = by_hand(model, batch, depths, weights)
    # Norms and rotations are float32 in some families, whatever the weights are.
    assert found.item() == pytest.approx(theirs.item(), rel=1e-6)
    parameters = list(model.parameters())
    pairs_of = zip(torch.autograd.grad(found, parameters), torch.autograd.grad(theirs, parameters))
    for ours, wanted in pairs_of:
        assert (ours - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9


def test_losses_held_out_do_not_depend_on_the_batch(data):
    tokenizer, encoder, pairs = data
    model = build("llama", tokenizer).double()
    alone, tokens = exit_losses(model, encoder, pairs[:7], (2, 4), batch_size=1)
    together, same = exit_losses(model, encoder, pairs[:7], (2, 4), batch_size=7)
    assert tokens == same == sum(len(encoder.pair(*pair)[0]) - len(encoder.prompt_ids(pair[0])) for pair in pairs[:7])
    assert together == pytest.approx(alone, rel=1e-6)
    batch = encoder.batch(pairs[:7])
    assert together[0] == pytest.approx(by_hand(model, batch, (2,), (1,)).item(), rel=1e-6)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("rank", [0, 2])
def test_exits_learn_and_lora_leaves_a_plain_model(arch, rank, data):
    tokenizer, encoder, pairs = data
    model = build(arch, tokenizer)
    start = copy.deepcopy(model.state_dict())
    model.model.requires_grad_(False)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}  # afterwards as before
    tuning = ExitTuning((1, 2, 3), steps=8, learning_rate=1e-2, batch_size=8, lora_rank=rank)
    report = tune_(model, encoder, pairs[:30], tuning, seed=1)
    assert report.depths == (1, 2, 3, 4)
    assert len(report.history) == 8
    assert all(after < before for before, after in zip(report.before, report.after))
    assert report.full_depth == (report.before[-1], report.after[-1])
    now = model.state_dict()
    assert now.keys() == start.keys()
    moved = {name for name, value in now.items() if not torch.equal(value, start[name])}
    outside = {name for name in now if "embed" in name or name.endswith("norm.weight") or "lm_head" in name}
    assert outside
    assert (moved & outside == set()) if rank else (outside <= moved)
    assert any("self_attn" in name for name in moved)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert exit_losses(model, encoder, pairs[:3], report.depths)[0]  # still a model that leaves early


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_run_that_is_broken_off_leaves_the_model_whole(rank, error, data):
    tokenizer, encoder, pairs = data
    model = build("llama", tokenizer)
    model.model.requires_grad_(False)
    start = copy.deepcopy(model.state_dict())
    trained = {name: p.requires_grad for name, p in model.named_parameters()}

    def progress(done, steps, text):  # noqa: ARG001
        if done == 2:
            raise error

    tuning = ExitTuning((1, 2), steps=4, learning_rate=1e-2, batch_size=8, lora_rank=rank)
    with pytest.raises(error):
        tune_(model, encoder, pairs[:20], tuning, progress=progress)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert all(p.grad is None for p in model.parameters())
    assert not any(module.training for module in model.modules())
    now = model.state_dict()
    assert now.keys() == start.keys()
    same = all(torch.equal(value, start[name]) for name, value in now.items())
    assert same == bool(rank)  # adapters are taken out unmerged; a step of the whole model cannot be
    assert not any("lora" in type(module).__name__.lower() for module in model.modules())
    tune_(model, encoder, pairs[:20], tuning)  # and can be tuned again


def test_the_control_does_not_train_exits(data):
    """ "plain" minimizes the last loss alone: lower there than with exits, which stay as bad as they were."""
    tokenizer, encoder, pairs = data
    settings = {"exits": (1, 2), "steps": 25, "learning_rate": 5e-3}
    made = {
        kind: tune_(build("llama", tokenizer), encoder, pairs, ExitTuning(weights=kind, **settings))
        for kind in ("plain", "geometric")
    }
    assert made["plain"].before == made["geometric"].before
    assert made["plain"].after[0] > made["geometric"].after[0] + 0.5
    assert made["plain"].weights == (0, 0, 1)


def test_same_seed_same_weights(data):
    tokenizer, encoder, pairs = data
    made = []
    for seed, micro in ((0, None), (0, None), (1, None), (0, 3)):
        model = build("llama", tokenizer)
        tune_(model, encoder, pairs[:40], ExitTuning((2,), steps=2, micro_batch=micro), seed=seed)
        made.append(model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    # Micro-batches give the same gradient but for rounding, which Adam's first steps blow up where it is near zero.
    assert (made[0] - made[3]).abs().mean() < 1e-6


def test_same_seed_same_adapter(data):
    tokenizer, encoder, pairs = data
    made = []
    for seed in (0, 0, 1):
        model = build("llama", tokenizer, seed=0)
        torch.rand(1 + len(made))  # what was drawn before is nothing to it
        tune_(model, encoder, pairs[:20], ExitTuning((2,), steps=1, learning_rate=1e-3, lora_rank=2), seed=seed)
        made.append(model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_running_text_is_cut_and_rows_are_held_out(data):
    tokenizer, encoder, pairs = data
    model = build("llama", tokenizer)
    text = " ".join(answer for _, answer in pairs)
    count = len(tokenizer(text)["input_ids"])
    tuning = ExitTuning((2,), steps=1, length=32, held_out=0.5)
    report = tune_(model, encoder, [("", text)], tuning)
    assert 0.4 * count < report.tokens < 0.6 * count


def test_what_is_refused(data):
    tokenizer, encoder, pairs = data
    model = build("llama", tokenizer)
    with pytest.raises(ValueError, match="pairs: 1 row"):
        tune_(model, encoder, pairs[:1], ExitTuning((2,)))
    with pytest.raises(ValueError, match="exits: 4 is not below 4"):
        tune_(model, encoder, pairs, ExitTuning((4,)))
    with pytest.raises(ValueError, match="bfloat16, in which steps this small are lost"):
        tune_(model.bfloat16(), encoder, pairs, ExitTuning((2,)))


def test_a_quantized_model_is_refused(data):
    from remanence.compress.recipe import parse_recipe
    from remanence.compress.sequential import compress_

    tokenizer, encoder, pairs = data
    model = compress_(build("llama", tokenizer), parse_recipe("rtn-w4a16-g32"), ())
    with pytest.raises(ValueError, match="model: is quantized; tune it first"):
        tune_(model.eval(), encoder, pairs, ExitTuning((2,)))
