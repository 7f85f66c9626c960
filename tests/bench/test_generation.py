"""Greedy decoding in batches, against one token after the other."""

import copy

import pytest
import torch
from remanence.bench.generation import answer_questions, continuations, greedy
from remanence.bench.tokens import Answer, answers
from remanence.unlearn.data import QA
from remanence.unlearn.encode import Encoder
from transformers import GenerationConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def plainly(model, encoder, prompt, most):
    """One token after the other, the whole text anew each time, no cache and no padding."""
    answer = []
    while len(answer) < most:
        with torch.no_grad():
            best = model(torch.tensor([prompt + answer])).logits[0, -1].argmax().item()
        if best == encoder.tokenizer.eos_token_id:
            break
        answer.append(best)
    return answer


def said(model, encoder, question, most):
    ids = plainly(model, encoder, encoder.prompt_ids(question), most)
    return encoder.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.fixture
def mixed(memorized):
    """Rows of unlike length: known and unknown."""
    corpus = memorized.corpus
    return (*corpus.retain[-5:], *corpus.forget, *corpus.holdout[:3])


def room(encoder, rows):
    """As documented: 200 tokens, fewer where the longest question leaves no room for them."""
    return min(200, encoder.max_length - max(len(encoder.prompt_ids(row.question)) for row in rows))


@pytest.mark.parametrize("who", ["target", "oracle"])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_generated_answers_are_greedy_ones(memorized, mixed, who, batch_size):
    model, encoder = getattr(memorized, who), memorized.encoder
    answers = answer_questions(model, encoder, mixed, batch_size)
    assert answers == [said(model, encoder, row.question, room(encoder, mixed)) for row in mixed]


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
def test_left_padding_changes_no_answer(untrained, memorized, mixed, arch):
    """Positions must not count the padding, for rotary, shifted and plain position embeddings."""
    encoder = Encoder(memorized.tokenizer, 128)
    model = untrained(arch, len(memorized.tokenizer))
    answers = answer_questions(model, encoder, mixed, batch_size=5, most=8)
    assert answers == [said(model, encoder, row.question, 8) for row in mixed]
    assert len(set(answers)) > 1


def test_room_for_answers_longer_than_the_true_ones(untrained, memorized):
    """Real models answer in sentences what the truth says in a word."""
    row = QA("Who?", "short")
    model = untrained("llama", len(memorized.tokenizer))
    encoder = Encoder(memorized.tokenizer, 512)
    assert room(encoder, [row]) == 200
    assert answer_questions(model, encoder, [row], 1) == [said(model, encoder, row.question, 200)]


def test_generation_stays_within_the_models_positions(untrained, memorized):
    row = QA("Who " * 20 + "?", "a long answer " * 6)
    encoder = Encoder(memorized.tokenizer, len(memorized.encoder.prompt_ids(row.question)) + 3)
    model = untrained("opt", len(memorized.tokenizer))
    assert answer_questions(model, encoder, [row], 1) == [said(model, encoder, row.question, 3)]


def test_tokenizer_without_padding_token(memorized, mixed):
    tokenizer = copy.deepcopy(memorized.tokenizer)
    tokenizer.pad_token = None
    encoder = Encoder(tokenizer, memorized.config.max_length)
    assert answer_questions(memorized.target, encoder, mixed, 4) == answer_questions(
        memorized.target, memorized.encoder, mixed, 4
    )


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_token_ids_in_the_order_given(memorized, mixed, batch_size):
    prompts = [memorized.encoder.prompt_ids(row.question) for row in mixed]
    found = greedy(memorized.oracle, memorized.tokenizer, prompts, 9, batch_size)
    assert found == [plainly(memorized.oracle, memorized.encoder, prompt, 9) for prompt in prompts]


def test_a_models_own_settings_are_not_used_and_stay(memorized, mixed):
    model = copy.deepcopy(memorized.oracle)
    expected = answer_questions(model, memorized.encoder, mixed)
    own = GenerationConfig(do_sample=True, temperature=3.0, repetition_penalty=5.0, num_beams=2)
    model.generation_config = own
    assert answer_questions(model, memorized.encoder, mixed) == expected
    assert model.generation_config is own


def test_no_prompts_and_empty_ones(memorized):
    assert greedy(memorized.target, memorized.tokenizer, [], 3) == []
    assert answer_questions(memorized.target, memorized.encoder, ()) == []
    with pytest.raises(ValueError, match="prompts: number 1 has no tokens"):
        greedy(memorized.target, memorized.tokenizer, [[5], []], 3)


def test_prompt_without_room(memorized):
    prompt = memorized.encoder.prompt_ids("Who?")
    with pytest.raises(
        ValueError, match=f"one is {len(prompt)} tokens; this model takes {len(prompt)} with its answer"
    ):
        continuations(memorized.target, Encoder(memorized.tokenizer, len(prompt)), [prompt], 3)


@pytest.mark.parametrize("who", ["target", "oracle"])
@pytest.mark.parametrize("most", [3, 200])
def test_decoding_from_where_the_truth_is_left(memorized, mixed, who, most):
    """Whatever is known of an answer by heart, the text is the same as when nothing is taken for granted."""
    model, encoder = getattr(memorized, who), memorized.encoder
    known = answers(model, encoder, [(row.question, row.answer) for row in mixed])
    agreed = [bool(answer.greedy.all()) for answer in known]
    assert any(agreed)
    assert not all(agreed)
    found = answer_questions(model, encoder, mixed, 4, most, known)
    assert found == answer_questions(model, encoder, mixed, 4, most)


def test_an_answer_known_by_heart_is_not_decoded(memorized, monkeypatch):
    rows = list(memorized.corpus.retain[:6])
    known = answers(memorized.target, memorized.encoder, [(row.question, row.answer) for row in rows])
    rows = [row for row, answer in zip(rows, known, strict=True) if answer.greedy.all()]
    known = [answer for answer in known if answer.greedy.all()]
    assert len(rows) >= 3
    monkeypatch.setattr(type(memorized.target), "generate", None)  # would raise
    assert answer_questions(memorized.target, memorized.encoder, rows, known=known) == [row.answer for row in rows]


def test_an_answer_whose_end_is_not_known_stays_within_the_models_positions(untrained, memorized):
    """Decoded from the question, as if nothing were known of it."""
    model = untrained("opt", len(memorized.tokenizer))
    question = "Who " * 8 + "?"
    encoder = Encoder(memorized.tokenizer, len(memorized.encoder.prompt_ids(question)) + 9)
    prompt = encoder.prompt_ids(question)
    begun = plainly(model, encoder, prompt, 4)
    row = QA(question, encoder.tokenizer.decode(begun).strip())
    known = [Answer(torch.zeros(5), torch.tensor([True] * 4 + [False]), torch.zeros(5), torch.zeros(5), True)]
    assert answer_questions(model, encoder, [row], known=known) == [said(model, encoder, question, 9)]


def test_guarded_models_decode_everything(memorized, mixed):
    """A guard sees the question; half an answer behind it would be another one."""
    from remanence.unlearn.inference.guarded import Guarded

    seen = []

    class Spy(Guarded):
        def __init__(self):
            self.config = memorized.target.config
            self.generation_config = None

        def generate(self, input_ids, **more):
            seen.append(input_ids.shape[1])
            return memorized.target.generate(input_ids=input_ids, **more)

        device = memorized.target.device

    known = answers(memorized.target, memorized.encoder, [(row.question, row.answer) for row in mixed])
    answer_questions(Spy(), memorized.encoder, mixed, 64, known=known)
    assert seen == [max(len(memorized.encoder.prompt_ids(row.question)) for row in mixed)]
