"""Rollouts of the whole model: every number beside one that is computed without a cache, a batch or a hook."""

import pytest
import torch
from remanence.compress.early_exit.anatomy import anatomy
from remanence.compress.early_exit.policy import NEVER, Confidence, Fixed, Full
from remanence.compress.early_exit.states import States, collect, contexts
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

pytestmark = pytest.mark.usefixtures("one_thread")

END = 1
SHAPE = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 60, "pad_token_id": 0}
IDS = {"eos_token_id": END, "bos_token_id": None, "max_position_embeddings": 64}
EXITS = (1, 3)
PROMPTS = [[5, 9, 33, 2], [7], [50, 3, 3, 41, 12, 9, 8], [11, 30]]


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request):
    torch.manual_seed(3)
    if request.param == "llama":
        config = LlamaConfig(**SHAPE, **IDS, intermediate_size=40, num_key_value_heads=1, initializer_range=0.3)
    else:
        config = OPTConfig(**SHAPE, **IDS, ffn_dim=40, word_embed_proj_dim=24, dropout=0.0, init_std=0.3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


def one_by_one(model, prompt, new_tokens, end):
    """Each token from the whole text anew: (state, before, guess, final, position) of every decoded one."""
    text, found = list(prompt), []
    for position in range(new_tokens):
        with torch.no_grad():
            whole = model(torch.tensor([text]), output_hidden_states=True, use_cache=False)
        final = int(whole.logits[0, -1].argmax())
        if position:
            states = [whole.hidden_states[depth][0, -1] for depth in EXITS]
            before = [whole.hidden_states[depth - 1][0, -1] for depth in EXITS]
            guess = [int(anatomy(model).logits(state).argmax()) for state in states]
            found.append((torch.stack(states), torch.stack(before), guess, final, position))
        text.append(final)
        if final == end:
            break
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_states_are_those_of_single_texts_without_a_cache(model, batch_size):
    hooks = [len(layer._forward_hooks) for layer in anatomy(model).layers]
    collect(model, PROMPTS, EXITS, pad=0, new_tokens=2)
    assert [len(layer._forward_hooks) for layer in anatomy(model).layers] == hooks
    ends = [None, one_by_one(model, PROMPTS[0], 6, None)[2][3]]  # the second is said by the first prompt
    for end in ends:
        states = collect(model, PROMPTS, EXITS, pad=0, end=end, new_tokens=6, batch_size=batch_size)
        wanted = [(number, *row) for number, prompt in enumerate(PROMPTS) for row in one_by_one(model, prompt, 6, end)]
        assert len(states) == len(wanted) == (20 if end is None else len(wanted)) > 8
        assert states.layers == 4
        assert states.exits == EXITS
        for i, (number, state, before, guess, final, position) in enumerate(wanted):
            assert states.episode[i] == number
            assert states.position[i] == position
            assert states.final[i] == final
            assert states.guess[i].tolist() == guess
            assert torch.allclose(states.state[i].double(), state, rtol=1e-4, atol=1e-5)
            assert torch.allclose(states.before[i].double(), before, rtol=1e-4, atol=1e-5)
    assert len(collect(model, PROMPTS, EXITS, pad=0, end=ends[1], new_tokens=6)) < 20


def made(agrees, episode):
    """States with this table of agreement."""
    n, e = agrees.shape
    final = torch.arange(n) + 1
    guess = torch.where(agrees, final[:, None], 0)
    zeros = torch.zeros(n, e, 3)
    return States((1, 2, 3)[:e], 4, zeros, zeros, guess, final, episode, torch.ones(n, dtype=torch.int64))


def test_first_agreement():
    table = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()
    states = made(table, torch.arange(4))
    assert torch.equal(states.agrees, table)
    assert states.first_agreement.tolist() == [0, 1, 2, 3]


def test_an_episode_stays_in_one_part():
    states = made(torch.ones(200, 2).bool(), torch.arange(200) // 10)
    parts = states.split((0.3, 0.2), seed=4)
    sets = [set(part.episode.tolist()) for part in parts]
    assert [len(s) for s in sets] == [6, 4, 10]
    assert set.union(*sets) == set(range(20))
    assert sum(len(part) for part in parts) == 200
    again = states.split((0.3, 0.2), seed=5)
    assert set(again[0].episode.tolist()) != sets[0]
    assert [len(set(p.episode.tolist())) for p in made(torch.ones(3, 2).bool(), torch.arange(3)).split((0.9, 0.9))] == [
        1,
        1,
        1,
    ]
    with pytest.raises(ValueError, match="states: 2 episodes do not make 3 parts"):
        made(torch.ones(4, 2).bool(), torch.arange(4) // 2).split((0.3, 0.2))


def test_where_a_policy_leaves(model):
    states = collect(model, PROMPTS, EXITS, pad=0, new_tokens=5)
    logits = torch.nn.Linear(24, 60).requires_grad_(False)
    assert states.leaving(Full(), logits).tolist() == [2] * len(states)
    assert states.leaving(Fixed(exits=(3,)), logits).tolist() == [1] * len(states)
    assert states.leaving(Confidence(exits=EXITS, threshold=NEVER), logits).tolist() == [2] * len(states)
    gaps = torch.stack(
        [logits(states.state[:, e]).softmax(-1).topk(2).values.diff(dim=-1).neg()[:, 0] for e in range(2)], 1
    )
    threshold = float(gaps.median())
    leaves = torch.cat([gaps >= threshold, torch.ones(len(states), 1).bool()], 1)
    wanted = [row.tolist().index(True) for row in leaves]
    assert states.leaving(Confidence(exits=EXITS, threshold=threshold), logits).tolist() == wanted
    assert len(set(wanted)) > 1


def test_contexts_are_shares_of_their_texts():
    texts = [list(range(100))] * 500 + [[1, 2]]
    lengths = [len(c) for c in contexts(texts, seed=0)]
    assert 20 <= min(lengths[:-1]) <= 22
    assert 48 <= max(lengths[:-1]) <= 50
    assert abs(sum(lengths[:-1]) / 500 - 35) < 1
    assert lengths[-1] == 1
    assert contexts(texts, 0)[3] == list(range(lengths[3]))
    assert [len(c) for c in contexts(texts, seed=1)] != lengths
    with pytest.raises(ValueError, match=r"context: 0.5 to 0.2"):
        contexts(texts, 0, 0.5, 0.2)
    with pytest.raises(ValueError, match="texts: number 1 has no tokens"):
        contexts([[1], []], 0)


def test_what_is_refused(model):
    for exits in ((), (0, 1), (3, 1), (4,)):
        with pytest.raises(ValueError, match="expected depths from 1 to 3, ascending"):
            collect(model, PROMPTS, exits, pad=0)
    with pytest.raises(ValueError, match="prompts: none, or one has no tokens"):
        collect(model, [[3], []], EXITS, pad=0)
    with pytest.raises(ValueError, match="new_tokens: 1: the first comes from the prompt"):
        collect(model, PROMPTS, EXITS, pad=0, new_tokens=1)
    said = int(model(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())
    with pytest.raises(ValueError, match="nothing was decoded"):
        collect(model, PROMPTS[:1], EXITS, pad=0, end=said)
