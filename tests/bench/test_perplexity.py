"""Perplexity: against one token at a time in NumPy float64, and that no batch, window or broken model spoils it."""

import math

import numpy as np
import pytest
import torch
from remanence.bench.perplexity import perplexity, wikitext, windows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text(memorized):
    return lines(memorized.corpus.retain[:24])


def lines(rows):
    return "\n".join(f"Question: {row.question}\nAnswer: {row.answer}" for row in rows)


def plain(model, ids, window, stride):
    """Nats of each token after the first, each predicted by a pass of its own over the context it is allowed."""
    nats = []
    for position in range(1, len(ids)):
        # The first window that holds the token.
        begin = 0
        while position >= begin + window:
            begin += stride
        with torch.no_grad():
            z = model(input_ids=torch.tensor([ids[begin:position]])).logits[0, -1].double().numpy()
        z = z - z.max()
        nats.append(np.log(np.exp(z).sum()) - z[ids[position]])
    return np.array(nats)


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 31), (32, 1), (17, 5), (2, 1), (128, 64)])
def test_each_token_once_with_the_most_context(memorized, text, window, stride):
    text = text[:300]
    ids = memorized.tokenizer(text)["input_ids"]
    found = perplexity(memorized.target, memorized.tokenizer, text, window, stride)
    nats = plain(memorized.target, ids, window, stride)
    assert found.tokens == len(ids) - 1 == sum(found.window_tokens)
    assert found.nll == pytest.approx(nats.mean(), abs=1e-5)
    assert found.value == pytest.approx(np.exp(nats.mean()), rel=1e-5)
    assert (found.window, found.stride, found.finite) == (window, stride, True)


@pytest.mark.parametrize("tokens", [2, 3, 7, 8, 9, 15, 16, 17, 100])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 7), (8, 1), (2, 1), (8, 3)])
def test_windows_score_every_token_once(tokens, window, stride):
    spans = list(windows(tokens, window, stride))
    scored = [position for _, end, first in spans for position in range(first, end)]
    assert scored == list(range(1, tokens))
    assert all(begin < first < end <= begin + window for begin, end, first in spans)


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
def test_no_matter_the_batch(untrained, memorized, text, arch):
    model = untrained(arch, vocabulary=512)
    found = [perplexity(model, memorized.tokenizer, text, 32, 16, batch_size=size) for size in (1, 3, 64)]
    for other in found[1:]:
        assert other.window_nll == pytest.approx(found[0].window_nll, rel=1e-5)
        assert other.value == pytest.approx(found[0].value, rel=1e-5)
        assert other.window_tokens == found[0].window_tokens


def test_the_window_is_the_models_own(memorized, text):
    found = perplexity(memorized.target, memorized.tokenizer, text)
    assert (found.window, found.stride) == (128, 64)


def test_what_was_learnt_by_heart_perplexes_less(memorized):
    """The target saw the forget set, the oracle did not."""
    text = lines(memorized.corpus.forget)
    target, oracle = (
        perplexity(model, memorized.tokenizer, text, 16) for model in (memorized.target, memorized.oracle)
    )
    assert target.value < 0.5 * oracle.value
    for found in (target, oracle):
        assert found.interval.low < found.value == found.interval.value < found.interval.high


def test_interval_is_a_bootstrap_over_windows(memorized, text):
    found = perplexity(memorized.target, memorized.tokenizer, text, 16, 8, seed=3)
    again = perplexity(memorized.target, memorized.tokenizer, text, 16, 8, seed=3)
    assert found == again
    sums, counts = np.array(found.window_nll), np.array(found.window_tokens)
    index = np.random.default_rng(0).integers(0, len(sums), (4000, len(sums)))
    draws = np.exp(sums[index].sum(1) / counts[index].sum(1))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.interval.low == pytest.approx(low, rel=0.04)
    assert found.interval.high == pytest.approx(high, rel=0.04)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_without_numbers_has_the_vocabulary_as_perplexity(untrained, memorized, text, value):
    model = untrained("llama", vocabulary=512)
    torch.nn.init.constant_(model.lm_head.weight, value)
    found = perplexity(model, memorized.tokenizer, text, 32)
    assert not found.finite
    assert found.value == pytest.approx(512, rel=1e-6)
    assert found.interval.low == pytest.approx(512, rel=1e-6)


def test_equal_logits_are_numbers(untrained, memorized, text):
    model = untrained("llama", vocabulary=512)
    torch.nn.init.zeros_(model.lm_head.weight)
    found = perplexity(model, memorized.tokenizer, text, 32)
    assert found.finite
    assert found.value == pytest.approx(512, rel=1e-6)


def test_one_window_has_no_spread(memorized):
    found = perplexity(memorized.target, memorized.tokenizer, "Who is the author?", 64)
    assert len(found.window_nll) == 1
    assert found.interval.low == found.value == found.interval.high


def test_the_model_is_left_in_its_mode(memorized, text):
    model = memorized.target
    model.train()
    try:
        perplexity(model, memorized.tokenizer, text, 64)
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 129}, "window: 129 tokens; this model takes 2 to 128"),
        ({"window": 1}, "window: 1"),
        ({"window": 32, "stride": 32}, "stride: 32; a window of 32 tokens needs 1 to 31"),
        ({"window": 32, "stride": 0}, "stride: 0"),
    ],
)
def test_bad_windows(memorized, text, wrong, message):
    with pytest.raises(ValueError, match=message):
        perplexity(memorized.target, memorized.tokenizer, text, **wrong)


@pytest.mark.parametrize("text", ["", "a"])
def test_too_short_a_text(memorized, text):
    with pytest.raises(ValueError, match="two are needed"):
        perplexity(memorized.target, memorized.tokenizer, text)


def test_real_wikitext(real_data, memorized, untrained):
    """A small model that reads a little of the validation text beats letter and word counts on the test text."""
    path = real_data("wikitext-2", "test.txt")
    text = wikitext(path)
    assert text == wikitext(path.parent) == path.read_text(encoding="utf-8")
    assert text.startswith(" \n = Robert <unk> = ")
    tokenizer, test = memorized.tokenizer, text[:20_000]
    ids = tokenizer(wikitext(real_data("wikitext-2", "valid.txt"))[:60_000], return_tensors="pt")["input_ids"][0]
    torch.manual_seed(0)
    model = untrained("llama", vocabulary=512, std=0.05)
    before = perplexity(model, tokenizer, test, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        begins = torch.randint(len(ids) - 64, (16,))
        batch = torch.stack([ids[begin : begin + 64] for begin in begins.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = perplexity(model, tokenizer, test, 64)
    counts = torch.bincount(ids, minlength=512).double() + 1
    single = (-(counts / counts.sum()).log()[tokenizer(test, return_tensors="pt")["input_ids"][0][1:]]).mean().exp()
    assert before.value == pytest.approx(512, rel=0.2)
    assert 10 < after.value < 0.8 * float(single) < before.value
    assert after.interval.low > 0.9 * after.value
    assert after.interval.high < 1.1 * after.value


def test_wikitext_from_parquet_and_hub(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "test-00000-of-00001.parquet"
    parquet.write_table(pyarrow.table({"text": [" = A = \n", "", "Of A. \n"]}), file)
    assert wikitext(tmp_path) == " = A = \n\n\n\n\nOf A. \n"
    import huggingface_hub

    asked = []

    def download(*args, **options):
        asked.append((args, options))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert wikitext() == wikitext(file)
    assert asked == [
        (("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"), {"repo_type": "dataset"})
    ]
    parquet.write_table(pyarrow.table({"line": ["x"]}), file)
    with pytest.raises(ValueError, match="text: not a parquet file with that column"):
        wikitext(file)


def test_wikitext_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"has none of test\.txt"):
        wikitext(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        wikitext(tmp_path / "missing.txt")
    (tmp_path / "test.txt").write_text(" \n")
    with pytest.raises(ValueError, match="empty"):
        wikitext(tmp_path)
    import huggingface_hub

    def refuse(*_args, **_options):
        raise OSError("no connection\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"Salesforce/wikitext: not to be had from the hub \(no connection\)"):
        wikitext()
