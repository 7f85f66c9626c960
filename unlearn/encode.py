"""From question and answer to token batches. Only the answer (and the end-of-sequence token) is supervised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data import QA

IGNORE = -100  # the label that torch's cross entropy skips
PROMPT = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Batch:
    """input_ids, attention_mask, labels: [B, T] int64, padded on the right; labels are IGNORE but on the answer.

    rows   the rows' numbers in the set they come from, where a set has stored values by row
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Encoder:
    """Turns (question, answer) pairs into batches for one tokenizer.

    prompt      format string with {question}; the answer follows after one space
    max_length  in tokens; a longer pair raises ValueError rather than being cut
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    prompt: str = PROMPT

    def prompt_ids(self, question: str) -> list[int]:
        ids = list(self.tokenizer(self.prompt.format(question=question))["input_ids"])
        if ids and ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers close every text
            ids.pop()
        return ids

    def pair(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of prompt + answer + end, and their labels. Without a question: of the text, all supervised."""
        if not question:
            return self._text(answer)
        prompt = self.prompt_ids(question)
        ids = list(self.tokenizer(" " + answer, add_special_tokens=False)["input_ids"])
        ids.append(self.tokenizer.eos_token_id)
        if len(prompt) + len(ids) > self.max_length:
            raise ValueError(
                f"question {question!r} with its answer is {len(prompt) + len(ids)} tokens; "
                f"this model takes {self.max_length}"
            )
        return prompt + ids, [IGNORE] * len(prompt) + ids

    def _text(self, text: str) -> tuple[list[int], list[int]]:
        ids = list(self.tokenizer(text)["input_ids"])
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        if len(ids) < 2:
            raise ValueError(f"text {text[:40]!r} is {len(ids)} token; nothing predicts the first, two are needed")
        if len(ids) > self.max_length:
            raise ValueError(f"text {text[:40]!r}... is {len(ids)} tokens; this model takes {self.max_length}")
        return ids, list(ids)

    def windows(self, rows: Sequence[QA], longest: int = 2048) -> tuple[QA, ...]:
        """Rows of text cut into pieces that the model can take, of at most `longest` tokens, at token boundaries;
        questions stay as they are. (Some models take more than a device can train on at once.)"""
        pieces: list[QA] = []
        for row in rows:
            pieces += [row] if row.question else [replace(row, answer=text) for text in self._cut(row.answer, longest)]
        return tuple(pieces)

    def _cut(self, text: str, longest: int) -> list[str]:
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        spans = [(start, end) for start, end in encoded["offset_mapping"] if end > start]
        # A cut may fall where the piece's first token merges differently; one token of slack covers it.
        size = min(self.max_length, longest) - self.tokenizer.num_special_tokens_to_add() - 1
        if len(spans) <= size:
            return [text]
        cuts, begin = [0], 0
        while len(spans) - begin > size:
            at = min(begin + size, len(spans) - 2)  # nothing would predict the only token of a last piece
            # A character of several bytes may be several tokens: no cut inside it.
            while at > begin and spans[at][0] < spans[at - 1][1]:
                at -= 1
            if at <= begin:
                most = min(self.max_length, longest)
                raise ValueError(f"text {text[:40]!r}... has a character that {most} tokens do not hold")
            cuts.append(spans[at - 1][1])
            begin = at
        return [text[start:end] for start, end in pairwise([*cuts, len(text)]) if text[start:end].strip()]

    def batch(self, pairs: Sequence[tuple[str, str]], device: torch.device | str = "cpu") -> Batch:
        """All `pairs` in one batch."""
        return self.collate([self.pair(question, answer) for question, answer in pairs], device)

    def collate(
        self,
        encoded: Sequence[tuple[list[int], list[int]]],
        device: torch.device | str = "cpu",
        rows: tuple[int, ...] = (),
    ) -> Batch:
        """What `pair` returned, padded to the longest."""
        width = max(len(ids) for ids, _ in encoded)
        ids = torch.full((len(encoded), width), pad_id(self.tokenizer))
        labels = torch.full((len(encoded), width), IGNORE)
        mask = torch.zeros((len(encoded), width), dtype=torch.long)
        for row, (tokens, targets) in enumerate(encoded):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, : len(tokens)] = torch.tensor(targets)
            mask[row, : len(tokens)] = 1
        return Batch(ids.to(device), mask.to(device), labels.to(device), rows)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or the end token where there is none (padding is masked either way)."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def epochs(count: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless shuffled batches of row numbers; each epoch visits every row once."""
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, batch_size):
            yield order[start : start + batch_size]
