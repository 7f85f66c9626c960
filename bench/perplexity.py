"""Perplexity of a causal language model on running text, by a sliding window.

Each token after the first is scored once, in the first window that holds it: there it has the most context that the
windows give. (The usual code for WikiText takes windows side by side instead, which leaves the first token of each
unscored and gives the next ones hardly any context; its numbers are higher.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compress.checkpoint import max_length
from ..unlearn.data import read_text
from ..unlearn.encode import Batch, pad_id
from ..unlearn.layers import device_of, forward
from .statistics import Interval, bootstrap_mean
from .tokens import CHUNK, FLOOR, log_probabilities

# The window of published numbers; many a model takes more than a device can hold logits of.
WINDOW = 2048
# exp() of more is not a float.
_MOST = 700.0

_HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet")
_NAMES = ("test.txt", "wiki.test.raw", "wiki.test.tokens", "test-00000-of-00001.parquet")


@dataclass(frozen=True)
class Perplexity:
    """value     exp(nll)
    nll          nats per scored token
    tokens       that were scored: all of the text but the first
    window, stride   in tokens
    interval     of value, 95%: windows are drawn with replacement, as tokens that stand together are alike
    finite       whether all logits were numbers; where they are not, every token counts as equally likely, so that
                 a broken model has the vocabulary's size as its perplexity
    window_nll, window_tokens   sum of nats and number of tokens scored, of each window
    """

    value: float
    nll: float
    tokens: int
    window: int
    stride: int
    interval: Interval
    finite: bool
    window_nll: list[float]
    window_tokens: list[int]


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> Perplexity:
    """Perplexity of `text`; the same for every batch size but for float32 rounding.

    window   in tokens; None: as many as the model takes, WINDOW at most
    stride   tokens from one window's begin to the next; None: half a window
    Raises ValueError for a text of fewer than two tokens, a window that the model does not take, or a stride that
    would leave tokens out.
    """
    longest = max_length(model)
    window = min(longest, WINDOW) if window is None else window
    if not 2 <= window <= longest:
        raise ValueError(f"window: {window} tokens; this model takes 2 to {longest}")
    stride = window // 2 if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"stride: {stride}; a window of {window} tokens needs 1 to {window - 1}")
    ids = _ids(tokenizer, text)
    spans = list(windows(len(ids), window, stride))
    training = model.training
    model.eval()
    try:
        sums, finite = _sums(model, ids, spans, batch_size, pad_id(tokenizer))
    finally:
        model.train(training)
    counts = [end - first for _, end, first in spans]
    nll = math.fsum(sums) / sum(counts)
    return Perplexity(
        _exp(nll), nll, sum(counts), window, stride, _interval(sums, counts, nll, seed), finite, sums, counts
    )


def windows(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first scored token) of each window over `tokens` tokens."""
    first = 1
    for begin in range(0, tokens, stride):
        end = min(begin + window, tokens)
        yield begin, end, first
        if end == tokens:
            return
        first = end


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose: it would warn that the text is longer than the model takes, which is what the windows are for.
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
        ids.pop()
    if len(ids) < 2:
        raise ValueError(f"text: {text[:40]!r} is {len(ids)} token(s); nothing predicts the first, two are needed")
    return ids


def _sums(
    model: nn.Module, ids: list[int], spans: Sequence[tuple[int, int, int]], batch_size: int, pad: int
) -> tuple[list[float], bool]:
    """Nats summed over the scored tokens of each span, and whether all logits were numbers."""
    device, sums, sound = device_of(model), [], True
    for start in range(0, len(spans), batch_size):
        chosen = spans[start : start + batch_size]
        pieces = [ids[begin:end] for begin, end, _ in chosen]
        width = max(len(piece) for piece in pieces)
        tokens = torch.tensor([piece + [pad] * (width - len(piece)) for piece in pieces], device=device)
        mask = torch.tensor([[1] * len(piece) + [0] * (width - len(piece)) for piece in pieces], device=device)
        with torch.no_grad():
            logits = forward(model, Batch(tokens, mask, tokens))
            for row, (begin, end, first) in enumerate(chosen):
                part = slice(first - begin - 1, end - begin - 1)
                log_p, finite = taken(logits[row, part], tokens[row, 1:][part])
                sums.append(-float(log_p.double().sum()))
                sound &= finite
    return sums, sound


def taken(logits: Tensor, tokens: Tensor) -> tuple[Tensor, bool]:
    """Log-probability [n] float32, on the CPU, of each token under logits [n, V]; whether all of those are numbers."""
    parts, sound = [], True
    size = max(1, CHUNK // logits.shape[1])
    for z, y in zip(logits.split(size), tokens.split(size), strict=True):
        log_p, finite = log_probabilities(z)
        parts.append(log_p.gather(1, y[:, None])[:, 0].clamp(min=FLOOR).cpu())
        sound &= bool(finite.all())
    return torch.cat(parts), sound


def _interval(sums: Sequence[float], counts: Sequence[int], nll: float, seed: int) -> Interval:
    """Bootstrap over windows of a ratio of sums, linearised: exact where windows score equally many tokens, as all
    do but the first and the last."""
    size = sum(counts) / len(counts)
    found = bootstrap_mean([nll + (total - nll * count) / size for total, count in zip(sums, counts)], seed)
    value = _exp(nll)
    return Interval(value, min(value, _exp(found.low)), max(value, _exp(found.high)))


def _exp(nll: float) -> float:
    return math.exp(min(_MOST, nll))


def wikitext(path: Path | str | None = None) -> str:
    """The test text of WikiText-2: from a file, a directory that has it, or (None) the hub.

    A text file is taken as it is, and may be the word-level edition with its `<unk>`: numbers on different editions
    are not comparable. Of parquet, as the hub has it (the raw edition), the lines are joined by a blank one, as in
    published numbers. Raises FileNotFoundError naming what is missing, ValueError for an empty text.
    """
    file = _from_hub() if path is None else _file(Path(path))
    text = "\n\n".join(_column(file)) if file.suffix == ".parquet" else read_text(file)
    if not text.strip():
        raise ValueError(f"{file}: empty; expected running text")
    return text


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    found = [path / name for name in _NAMES if (path / name).is_file()]
    if not found:
        what = f"has none of {', '.join(_NAMES)}" if path.is_dir() else "no such file or directory"
        raise FileNotFoundError(f"{path}: {what}")
    return found[0]


def _from_hub() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(*_HUB, repo_type="dataset"))
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"{_HUB[0]}: not to be had from the hub ({reason})") from None


def _column(path: Path) -> list[str]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{path}: parquet needs pyarrow; pip install pyarrow") from None
    try:
        return [text or "" for text in parquet.read_table(path, columns=["text"]).column("text").to_pylist()]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: text: not a parquet file with that column ({error})") from None
