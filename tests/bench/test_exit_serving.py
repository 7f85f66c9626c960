"""Given answers under a policy, against decoding them token by token with a cache; written answers; depths."""

import math

import pytest
import torch
from remanence.bench.exit_serving import Exits, decoded
from remanence.bench.forgetting import evaluate
from remanence.bench.tokens import answers
from remanence.compress.early_exit.generation import early_exit
from remanence.compress.early_exit.policy import Confidence, Fixed, Full, Saturation, Schedule
from remanence.unlearn.data import EvalSet
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.cache_utils import DynamicCache

pytestmark = pytest.mark.usefixtures("one_thread")

POLICIES = {
    "fixed": Fixed(exits=(2,)),
    "schedule": Schedule(exits=(1, 3), horizon=4),
    "saturation": Saturation(exits=(1, 2, 3), threshold=0.75),
    "confidence": Confidence(exits=(1, 2, 3), threshold=0.04),
}


def made(kind, **more):
    shape = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = kind(**shape, **more, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.3)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request):
    return {"llama": lambda: made(LlamaConfig), "qwen3": lambda: made(Qwen3Config, head_dim=8)}[request.param]()


def stepwise(model, policy, encoder, row):
    """Log-probabilities [n] float64 of the answer's tokens, forced one by one through the cache; depth of each step."""
    ids, labels = encoder.pair(row.question, row.answer)
    start = next(i for i, token in enumerate(labels) if token != -100)
    cache, found = DynamicCache(config=model.config), []
    with early_exit(model, policy) as run:
        given = torch.tensor([ids[:start]])
        for position in range(start, len(ids)):
            mask = torch.ones(1, position, dtype=torch.long)
            out = model(input_ids=given, attention_mask=mask, past_key_values=cache, use_cache=True)
            found.append(float(out.logits[0, -1].double().log_softmax(-1)[ids[position]]))
            given = torch.tensor([[ids[position]]])
    return found, [int(step) for call in run.calls for step in call]


@pytest.mark.parametrize("name", POLICIES)
def test_given_answers_are_read_as_they_would_be_decoded(model, memorized, name):
    policy, rows = POLICIES[name], memorized.corpus.forget
    served = Exits(model, policy)
    pairs = [(row.question, row.answer) for row in rows]
    found = answers(model, memorized.encoder, pairs, batch_size=3, around=served.reading)
    depths = []
    for answer, row in zip(found, rows, strict=True):
        expected, steps = stepwise(model, policy, memorized.encoder, row)
        assert answer.log_p.tolist() == pytest.approx(expected, abs=1e-5)
        depths += steps
    assert sorted(torch.cat(served.read).tolist()) == sorted(depths)
    assert served.mean_depth() == pytest.approx(sum(depths) / len(depths))
    assert served.histogram() == [depths.count(depth) for depth in range(1, 5)]
    assert min(depths) < 4, "nobody left early"
    if name in ("saturation", "confidence"):
        assert len(set(depths)) > 2, "the policy does not choose"
    # The comparison has power: without exits the same tokens are given other probabilities.
    plain = answers(model, memorized.encoder, pairs)
    assert max((a.log_p - b.log_p).abs().max() for a, b in zip(found, plain, strict=True)) > 0.05


def test_the_first_token_comes_from_all_layers(model, memorized):
    pairs = [(row.question, row.answer) for row in memorized.corpus.forget]
    served = answers(model, memorized.encoder, pairs, around=Exits(model, Fixed(exits=(1,))).reading)
    for answer, whole in zip(served, answers(model, memorized.encoder, pairs), strict=True):
        assert float(answer.log_p[0]) == pytest.approx(float(whole.log_p[0]), abs=1e-5)


def test_a_text_without_a_question_has_its_first_token_for_a_prompt(model, memorized):
    served = Exits(model, Fixed(exits=(1,)))
    text = "".join(row.answer for row in memorized.corpus.forget[:3])
    (found,) = answers(model, memorized.encoder, [("", text)], around=served.reading)
    # n tokens predicted: the first from the prompt, the others each from a decoded one.
    assert len(torch.cat(served.read)) == len(found.log_p) - 1


def test_what_is_decoded():
    labels = torch.tensor([[-100, -100, 5, 6, 1, -100], [-100, 5, 1, -100, -100, -100], [7, 8, 9, -100, -100, -100]])
    before = labels.clone()
    expected = [[0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert decoded(labels).int().tolist() == expected
    assert torch.equal(labels, before)


def test_scores_and_written_answers_under_a_policy(memorized):
    """The target read by its first layer alone: its answers are what that layer writes, token by token."""
    model, items, policy = memorized.target, EvalSet(memorized.corpus.forget), Fixed(exits=(1,))
    served = Exits(model, policy)
    found, whole = (evaluate(model, memorized.encoder, items, serving=serving) for serving in (served, None))
    expected = [sum(stepwise(model, policy, memorized.encoder, row)[0]) for row in items.rows]
    lengths = [len(memorized.encoder.pair(r.question, r.answer)[0]) for r in items.rows]
    starts = [len(memorized.encoder.prompt_ids(r.question)) for r in items.rows]
    likely = [math.exp(e / (n - s)) for e, n, s in zip(expected, lengths, starts, strict=True)]
    assert found.items.probability == pytest.approx(likely, rel=1e-4)
    assert sum(whole.items.probability) > 1.1 * sum(found.items.probability)
    assert found.answers != whole.answers
    for row, said in zip(items.rows[:2], found.answers[:2], strict=True):
        ids = torch.tensor([memorized.encoder.prompt_ids(row.question)])
        mask = torch.ones_like(ids)
        with early_exit(model, policy):
            out = model.generate(ids, attention_mask=mask, max_new_tokens=60, do_sample=False)
        text = memorized.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert text.strip().startswith(said) or said.startswith(text.strip())
    assert served.mean_depth("written") == 1


def test_full_depth_is_the_plain_model(memorized):
    items = EvalSet(memorized.corpus.forget)
    served = Exits(memorized.target, Full())
    found, whole = (evaluate(memorized.target, memorized.encoder, items, serving=s) for s in (served, None))
    assert found.items.nll == pytest.approx(whole.items.nll, abs=1e-6)
    assert found.answers == whole.answers
    assert served.mean_depth() == 2
    assert served.histogram()[0] == 0


def test_no_token_no_depth(memorized):
    assert Exits(memorized.target, Full()).mean_depth() is None


def test_exits_that_do_not_fit_are_refused(memorized):
    served = Exits(memorized.target, Fixed(exits=(2,)))
    with pytest.raises(ValueError, match="exits: 2 is not below 2"):
        answers(memorized.target, memorized.encoder, [("a", "b c")], around=served.reading)
