"""MUSE's scores against a plain ROUGE-L with its own longest common subsequence, and on models that know and do not."""

import math
import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from remanence.bench.muse import _asked, cut, knowledge, most_shots, muse_scores, rouge_l, verbatim
from remanence.bench.tofu import mean
from remanence.unlearn.data import QA
from remanence.unlearn.encode import Encoder
from remanence.unlearn.muse import PROMPT, MuseData, muse_from_corpus
from tokenizers.processors import TemplateProcessing

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_rouge(text, truth):
    """ROUGE-L {precision, recall, f1} from the whole table of longest common subsequences."""
    a, b = (re.findall("[a-z0-9]+", t.lower()) for t in (text, truth))
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    if not common:
        return {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    precision, recall = common / len(a), common / len(b)
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}


def plain_continuation(model, tokenizer, ids, most):
    """Greedy, one prompt at a time, without a cache."""
    ids, found = list(ids), []
    for _ in range(most):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
        found.append(token)
    return tokenizer.decode(found, skip_special_tokens=True)


PAIRS = [
    ("the cat sat on the mat", "the cat sat on the mat"),
    ("the mat sat on the cat", "The cat, sat on: the mat."),
    ("", "the cat"),
    (" \n", "the cat"),
    ("cats sitting", "cat sits"),  # no stemming
    ("a b c d e f g h", "h g f e d c b a"),
    ("one", "one two three four"),
    ("one two three four", "one"),
    ("nothing in common", "something else"),
    ("1984 was 36 years ago", "it was 1984, 36 years before"),
]


@pytest.mark.parametrize("measure", ["f1", "precision", "recall"])
def test_rouge_is_the_plain_one(measure):
    found = rouge_l([text for text, _ in PAIRS], [truth for _, truth in PAIRS], measure)
    assert found == pytest.approx([plain_rouge(*pair)[measure] for pair in PAIRS], abs=1e-12)
    assert found[0] == 1
    assert found[2] == found[3] == found[4] == 0


def test_rouge_by_hand_and_by_name():
    assert rouge_l(["one two"], ["one two three"]) == [pytest.approx(0.8)]
    assert rouge_l(["one two"], ["one two three"], "precision") == [1]
    assert rouge_l([], []) == []
    with pytest.raises(ValueError, match="measure: 'F1' is not one of f1, precision, recall"):
        rouge_l(["a"], ["a"], "F1")
    with pytest.raises(ValueError, match="argument 2 is longer"):
        rouge_l(["a"], ["a", "b"])


@pytest.mark.parametrize("truth", ["", " \n", "?!", "北京"])
def test_a_truth_that_rouge_cannot_count_is_refused(truth):
    with pytest.raises(ValueError, match=r"truth 1: .* has no letter a-z or digit"):
        rouge_l(["a", truth], ["a", truth])


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Paris.", "Paris."),
        ("Paris.\n\nQuestion: Why?", "Paris."),
        ("Paris.\nQuestion: Why?", "Paris."),
        ("Paris. Question: Why?", "Paris. "),
        ("Paris.\nIn France.", "Paris.\nIn France."),
        ("Paris.\nQuestions remain", "Paris."),
        ("\n\nParis.", ""),
        ("Question:", ""),
        ("", ""),
        ("A Question: b\n\nc\nQuestion", "A "),
    ],
)
def test_an_answer_ends_before_the_next_question(text, kept):
    assert cut(text) == kept


@pytest.fixture(scope="module")
def passages(memorized):
    """Questions, literal prompts and running text of one corpus."""
    rows = memorized.corpus.forget
    literal = [(f"Question: {row.question}\nAnswer:", row.answer) for row in memorized.corpus.retain[:3]]
    text = f"Question: {rows[0].question}\nAnswer: {rows[0].answer}"
    return [*rows, *literal, QA("", text), text]


def plain_passage(encoder, passage, new_tokens):
    """Prompt ids and truth, for a tokenizer without special tokens at the start."""
    tokenizer = encoder.tokenizer
    if isinstance(passage, QA) and passage.question:
        passage = (encoder.prompt.format(question=passage.question), passage.answer)
    if isinstance(passage, tuple):
        prompt, truth = (tokenizer(text)["input_ids"] for text in passage)
    else:
        ids = tokenizer(passage.answer if isinstance(passage, QA) else passage)["input_ids"]
        prompt, truth = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    return prompt, tokenizer.decode(truth[:new_tokens])


@pytest.mark.parametrize("who", ["target", "oracle"])
@pytest.mark.parametrize(("new_tokens", "measure"), [(1, "f1"), (5, "recall"), (40, "f1")])
def test_verbatim_is_the_plain_loop(memorized, passages, who, new_tokens, measure):
    model, encoder = getattr(memorized, who), memorized.encoder
    wanted = []
    for passage in passages:
        prompt, truth = plain_passage(encoder, passage, new_tokens)
        wanted.append(plain_rouge(plain_continuation(model, encoder.tokenizer, prompt, new_tokens), truth)[measure])
    for batch_size in (1, 4, 64):
        found = verbatim(model, encoder, passages, new_tokens, batch_size, measure)
        assert found == pytest.approx(wanted, abs=1e-12)


def test_a_target_continues_what_an_oracle_does_not(memorized):
    rows = memorized.corpus.forget
    target, oracle = (mean(verbatim(m, memorized.encoder, rows, 40)) for m in (memorized.target, memorized.oracle))
    assert target > 0.9 > 0.5 > oracle


def test_the_truth_is_cut_and_a_special_token_counts(memorized):
    """MUSE takes the first n tokens of the truth, the beginning of sequence among them: n words are held against the
    first n - 1, so that even the same words are not quite 1."""
    tokenizer = deepcopy(memorized.tokenizer)
    start, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A </s>", special_tokens=[("<pad>", start), ("</s>", end)]
    )
    prompt = f"Question: {memorized.corpus.forget[0].question}\nAnswer:"
    ids = [start, *memorized.tokenizer(prompt)["input_ids"]]
    assert tokenizer(prompt)["input_ids"] == [*ids, end]
    text = plain_continuation(memorized.target, tokenizer, ids, 40)  # the end after the prompt is taken off
    words = memorized.tokenizer(text)["input_ids"]
    assert len(words) > 4
    for most in range(2, len(words) + 3):
        said = plain_continuation(memorized.target, tokenizer, ids, most)
        wanted = plain_rouge(said, tokenizer.decode(words[: most - 1]))["f1"]
        found = verbatim(memorized.target, Encoder(tokenizer, 128), [(prompt, text)], most)
        assert found == [pytest.approx(wanted, abs=1e-12)]
        assert wanted == 1 if most > len(words) else wanted <= 1


def test_running_text_is_cut_where_asked(memorized):
    row = memorized.corpus.forget[0]
    tokenizer, encoder = memorized.tokenizer, memorized.encoder
    text = f"Question: {row.question}\nAnswer: {row.answer}"
    prompt = len(tokenizer(f"Question: {row.question}\nAnswer:")["input_ids"])
    assert verbatim(memorized.target, encoder, [text], 40, prompt_tokens=prompt) == [1]
    assert verbatim(memorized.target, encoder, [QA("", text)], 40, prompt_tokens=prompt) == [1]
    count = len(tokenizer(text)["input_ids"])
    for at in (count, count + 1):
        said = f"passage 1: the text 'Question: .*' is {count} tokens; a prompt of {at} .* need {at + 1}"
        with pytest.raises(ValueError, match=said):
            verbatim(memorized.target, encoder, [("any", "words"), text], 40, prompt_tokens=at)
    for at in (0, -1):
        with pytest.raises(ValueError, match=f"prompt_tokens: {at}; expected 1 or more"):
            verbatim(memorized.target, encoder, [text], 40, prompt_tokens=at)


def test_too_short_and_too_long(memorized):
    model, encoder = memorized.target, memorized.encoder
    assert verbatim(model, encoder, []) == []
    for short in ("", "a"):
        with pytest.raises(ValueError, match=f"passage 0: the text '{short}' is {len(short)} tokens"):
            verbatim(model, encoder, [short])
    with pytest.raises(ValueError, match="new_tokens: 0; expected 1 or more"):
        verbatim(model, encoder, [("A prompt", "and more")], 0)
    with pytest.raises(ValueError, match="truth 0: '' has no letter"):
        verbatim(model, encoder, [("A prompt", "")], 4)
    pair = ("word " * 20, "words")
    room = encoder.max_length - len(memorized.tokenizer(pair[0])["input_ids"])
    assert len(verbatim(model, encoder, [pair], room)) == 1
    with pytest.raises(
        ValueError, match=f"prompt 1: {128 - room} tokens and {room + 1} new ones are more than the 128"
    ):
        verbatim(model, encoder, [("a", "a"), pair], room + 1)


def shot(prompt, row):
    space = "" if prompt.endswith(" ") else " "
    return f"{prompt.format(question=row.question)}{space}{row.answer}\n\n"


@pytest.mark.parametrize("shots", [0, 1, 2])
@pytest.mark.parametrize("prompt", [None, PROMPT, "Q {question} {{}} A"])
def test_knowledge_is_the_plain_loop(memorized, shots, prompt):
    model, encoder, corpus = memorized.target, memorized.encoder, memorized.corpus
    rows, icl = corpus.forget[:3], corpus.retain[:3]
    form = prompt or encoder.prompt
    wanted = []
    for row in rows:
        asked = "".join(shot(form, r) for r in icl[:shots]) + form.format(question=row.question)
        text = plain_continuation(model, encoder.tokenizer, encoder.tokenizer(asked)["input_ids"], 16)
        wanted.append(plain_rouge(re.split("\n\n|\nQuestion|Question:", text)[0], row.answer)["f1"])
    for batch_size in (1, 2, 16):
        found = knowledge(model, encoder, rows, icl, shots, 16, batch_size, prompt=prompt)
        assert found == pytest.approx(wanted, abs=1e-12)


def reciting(untrained, tokenizer, text, start):
    """A GPT-2 of which only the position decides: after `start` tokens it says `text`, then ends."""
    model = untrained("gpt2", len(tokenizer))
    said = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        for block in model.transformer.h:
            for layer in (block.attn.c_proj, block.mlp.c_proj):
                layer.weight.zero_()
                layer.bias.zero_()
        words = torch.nn.functional.normalize(model.transformer.wte.weight, dim=1)
        model.transformer.wte.weight.copy_(words)
        model.transformer.wpe.weight.zero_()
        model.transformer.wpe.weight[start - 1 : start - 1 + len(said)] = 100 * words[said]
    return model


@pytest.mark.parametrize(
    ("said", "score"),
    [
        (" Paris", 1),
        (" Paris.\n\nIt is Paris, as all know", 1),
        (" Paris\nQuestion: And of Spain?\nAnswer: Madrid", 1),
        (" Paris Question: And of Spain?", 1),
        (" Paris\nAnd Rome", 0.5),
        ("\n\nParis", 0),
        ("Question: Paris", 0),
    ],
)
def test_what_follows_an_answer_is_not_scored(memorized, untrained, said, score):
    """In a question; a passage goes on."""
    encoder, row = memorized.encoder, QA("What is the capital of France?", "Paris")
    model = reciting(untrained, encoder.tokenizer, said, len(encoder.prompt_ids(row.question)))
    assert plain_continuation(model, encoder.tokenizer, encoder.prompt_ids(row.question), 40) == said
    assert knowledge(model, encoder, [row], (), 0) == [score]
    assert verbatim(model, encoder, [row], 40) == [plain_rouge(said, row.answer)["f1"]]


def test_muse_form_of_a_prompt(memorized):
    """Ten shots and a question, as MUSE writes them."""
    encoder = replace(memorized.encoder, prompt=PROMPT)
    icl = [QA("Why {so}?", "As it is."), QA("How?", "Well.")]
    (ids,) = _asked(encoder, [QA("Where?", "There.")], icl)
    assert encoder.tokenizer.decode(ids) == (
        "Question: Why {so}?\nAnswer: As it is.\n\nQuestion: How?\nAnswer: Well.\n\nQuestion: Where?\nAnswer: "
    )


def test_a_target_answers_what_an_oracle_does_not(memorized):
    """Both answer what they keep; without shots, which models this small have never seen."""
    data = muse_from_corpus(memorized.corpus)
    for rows, oracle_knows in ((data.forget_qa, False), (data.retain_qa, True)):
        target, oracle = (
            mean(knowledge(model, memorized.encoder, rows, (), 0)) for model in (memorized.target, memorized.oracle)
        )
        assert target > 0.9
        assert oracle > 0.9 if oracle_knows else oracle < 0.5


def test_shots_that_do_not_fit(memorized):
    model, encoder = memorized.target, memorized.encoder
    data = muse_from_corpus(memorized.corpus)
    most = most_shots(encoder, data.forget_qa, data.forget_icl)
    assert 0 < most < 10
    lengths = [
        max(
            len(encoder.tokenizer(shown + encoder.prompt.format(question=row.question))["input_ids"])
            for row in data.forget_qa
        )
        for shown in ("".join(shot(encoder.prompt, r) for r in data.forget_icl[:k]) for k in (most, most + 1))
    ]
    assert lengths[0] + 32 <= 128 < lengths[1] + 32
    tight = replace(encoder, max_length=lengths[0] + 32)
    assert most_shots(tight, data.forget_qa, data.forget_icl) == most
    assert len(knowledge(model, tight, data.forget_qa, data.forget_icl, most)) == len(data.forget_qa)
    assert len(knowledge(model, encoder, data.forget_qa, data.forget_icl, most)) == len(data.forget_qa)
    with pytest.raises(ValueError, match=rf"shots: 10 before the longest question .* 128 tokens .* {most} fit"):
        knowledge(model, encoder, data.forget_qa, data.forget_icl)
    with pytest.raises(ValueError, match="new_tokens: 120 after the longest question alone"):
        knowledge(model, encoder, data.forget_qa, (), 0, 120)
    for shots in (-1, 11):
        with pytest.raises(ValueError, match=f"shots: {shots}; expected 0 to 10"):
            knowledge(model, encoder, data.forget_qa, data.forget_icl, shots)
    assert knowledge(model, encoder, [], data.forget_icl, most) == []


def test_a_model_of_which_nothing_is_left(memorized, untrained):
    """NaN logits and a constant token: numbers, and not those of a model that knows."""
    broken = untrained("llama", len(memorized.tokenizer))
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(math.nan)
    rows = memorized.corpus.forget
    for scores in (
        verbatim(broken, memorized.encoder, rows, 16),
        knowledge(broken, memorized.encoder, rows, (), 0, 16),
    ):
        assert all(0 <= score < 0.5 for score in scores)


def plain_min_k(model, encoder, row):
    """Mean of the lowest 40% of the supervised tokens' log-probabilities."""
    ids, labels = encoder.pair(row.question, row.answer)
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(1)
    taken = sorted(float(log_p[i - 1, ids[i]]) for i in range(1, len(ids)) if labels[i] != -100)
    k = max(1, int(0.4 * len(taken)))
    return math.fsum(taken[:k]) / k


def plain_auc(members, others):
    """Over all pairs, MUSE's way round: a held-out row has the lower loss."""
    wins = [(other > member) + (other == member) / 2 for member in members for other in others]
    return sum(wins) / len(wins)


def test_all_axes_of_a_corpus(memorized):
    encoder, data = memorized.encoder, muse_from_corpus(memorized.corpus)
    oracle = muse_scores(memorized.oracle, encoder, data, shots=0, verbatim_tokens=40)
    assert oracle["privleak"] is None
    assert oracle["notes"] == {"privleak": "no oracle's auc to set it in relation to"}
    target = muse_scores(memorized.target, encoder, data, oracle["auc"], 0, 40, batch_size=3)
    assert target["notes"] == {}
    for axis, rows in (("verbmem_f", data.verbmem), ("knowmem_f", data.forget_qa), ("knowmem_r", data.retain_qa)):
        assert len(target["items"][axis]) == len(rows)
        assert target[axis] == pytest.approx(sum(target["items"][axis]) / len(rows))
    assert target["verbmem_f"] > 0.9 > 0.5 > oracle["verbmem_f"]
    assert target["knowmem_f"] > 0.9 > 0.5 > oracle["knowmem_f"]
    assert min(target["knowmem_r"], oracle["knowmem_r"]) > 0.9

    aucs = {}
    for name, model, found in (("target", memorized.target, target), ("oracle", memorized.oracle, oracle)):
        scores = {
            part: [plain_min_k(model, encoder, row) for row in rows]
            for part, rows in (("forget", data.privleak_forget), ("holdout", data.privleak_holdout))
        }
        for part, plain in scores.items():
            assert found["items"][f"min_k_{part}"] == pytest.approx(plain, abs=1e-4)
        aucs[name] = plain_auc(scores["forget"], scores["holdout"])
        assert found["auc"] == pytest.approx(1 - aucs[name], abs=1e-9)
    assert target["privleak"] == pytest.approx(100 * (aucs["target"] - aucs["oracle"]) / aucs["oracle"], abs=1e-6)
    assert target["privleak"] < -50
    itself = muse_scores(memorized.oracle, encoder, data, oracle["auc"], 0, 40)
    assert itself["privleak"] == 0
    assert target["settings"] == {
        "measure": "f1",
        "shots": 0,
        "verbatim_tokens": 40,
        "knowledge_tokens": 32,
        "prompt": encoder.prompt,
        "min_k_share": 0.4,
        "oracle_auc": oracle["auc"],
    }


def test_axes_without_rows_say_why(memorized):
    """Running text has no questions; many corpora have nothing held out."""
    texts = tuple(QA("", f"{row.question} {row.answer}") for row in memorized.corpus.forget[:2])
    data = MuseData("some texts", texts, (), (), (), (), texts, (), ())
    found = muse_scores(memorized.oracle, memorized.encoder, data, 0.5, verbatim_tokens=8)
    assert found["verbmem_f"] is not None
    assert len(found["items"]["min_k_forget"]) == 2
    assert found["knowmem_f"] is found["knowmem_r"] is found["auc"] is found["privleak"] is None
    assert found["notes"] == {
        "knowmem_f": "some texts has no rows for it",
        "knowmem_r": "some texts has no rows for it",
        "auc": "some texts has no holdout rows; membership is told from both",
        "privleak": "some texts has no holdout rows; membership is told from both",
    }
    data = replace(data, privleak_holdout=texts)
    other = muse_scores(memorized.oracle, memorized.encoder, data, 1.0, verbatim_tokens=8)
    assert other["auc"] == 0.5
    assert other["privleak"] is None
    assert other["notes"]["privleak"].startswith("the oracle's auc is 1")


def test_a_question_among_the_shots_is_told(memorized):
    """One of MUSE's own (books) is; it is scored like the others."""
    data = muse_from_corpus(memorized.corpus)
    data = replace(data, retain_icl=(data.retain_qa[1], *data.retain_icl), prompt=PROMPT)
    found = muse_scores(memorized.target, memorized.encoder, data, None, 1, 4, 4)
    assert (
        found["notes"]["knowmem_r"] == f"1 of {len(data.retain_qa)} questions are among the shots, with their answers"
    )
    assert "knowmem_f" not in found["notes"]
    assert found["items"]["knowmem_r"] == knowledge(
        memorized.target, memorized.encoder, data.retain_qa, data.retain_icl, 1, 4, prompt=PROMPT
    )
    assert found["settings"]["prompt"] == PROMPT
