"""Calibration data for compression: rows of the retain set, rows of the forget set, running text, or a mix.

Which of them a calibrated quantizer sees decides what it keeps: error is pushed to where the data does not look. A
quantizer that never sees the forget set does not know that anything was changed there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..compress.spec import SOURCES, Calibration, Retrain
from .data import QA
from .encode import Encoder

# Tokens of one batch: enough for a matrix product to be efficient, little beside a block's weights.
BATCH_TOKENS = 4096
# What is taken where nothing is asked for: as many rows of what is to be kept, as a deployment would have them.
DEFAULT = 128


def default_calibration(
    rows: Mapping[str, Sequence[QA]], text: str | None, encoder: Encoder, most: int = DEFAULT
) -> Calibration:
    """`most` sequences of the retain set, or of the text where there are no such rows; or all there are.

    A long text row gives several. Raises ValueError where there is neither.
    """
    length = min(Calibration(retain=1).length, encoder.max_length)
    source = "retain" if rows.get("retain") else "text"
    if source == "text" and text is None:
        raise ValueError("calibration: needs data; give --text FILE, --retain FILE, or --data")
    there = len(_sequences(source, encoder, rows, text, length))
    return Calibration(**{source: min(most, there) or most})


def calibration_batches(
    calibration: Calibration,
    encoder: Encoder,
    rows: Mapping[str, Sequence[QA]],
    text: str | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Token ids int64 [B, T], without padding: sequences of one length are batched together.

    rows   those of "retain" and "forget"; a sequence is a row as the model is asked and answers, or a text row's piece
    text   of which windows of `calibration.length` tokens (or what the model takes) are drawn without overlap
    Raises ValueError for a source that is not there, or has too few sequences.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(calibration.length, encoder.max_length)
    sequences: list[list[int]] = []
    for source in SOURCES:
        wanted = getattr(calibration, source)
        if wanted:
            if source == "text" and text is None:
                raise ValueError(f"calibration: text:{wanted} needs a text; give --text FILE")
            found = _sequences(source, encoder, rows, text, length)
            sequences += [found[i] for i in _drawn(f"calibration: {source}", len(found), wanted, generator)]
    return batched(sequences)


def retraining_batches(
    retrain: Retrain, encoder: Encoder, rows: Mapping[str, Sequence[QA]], text: str | None = None
) -> list[Tensor]:
    """Token ids int64 [B, T], without padding, that a pruned model is trained on again; as calibration_batches."""
    if retrain.source == "text" and text is None:
        raise ValueError("retrain: text needs a text; give --text FILE, or t_source=retain")
    found = _sequences(retrain.source, encoder, rows, text, min(retrain.length, encoder.max_length))
    wanted = retrain.sequences or (min(DEFAULT, len(found)) if retrain.source == "text" else len(found))
    if not found:
        raise ValueError(f"retrain: {retrain.source}: there is none")
    drawn = _drawn(f"retrain: {retrain.source}", len(found), wanted, torch.Generator().manual_seed(retrain.seed))
    return batched([found[i] for i in drawn])


def _sequences(
    source: str, encoder: Encoder, rows: Mapping[str, Sequence[QA]], text: str | None, length: int
) -> list[list[int]]:
    """All of a source, at most `length` tokens each: rows as the model is asked and answers, or the text's pieces."""
    if source == "text":
        ids = list(encoder.tokenizer(text, verbose=False)["input_ids"])
        return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    pieces = encoder.windows(rows.get(source, ()), length)
    return [encoder.pair(piece.question, piece.answer)[0][:length] for piece in pieces]


def batched(sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Token ids [B, T] of sequences of equal length, at most BATCH_TOKENS a batch (one sequence at least)."""
    lengths: dict[int, list[Sequence[int]]] = {}
    for sequence in sequences:
        lengths.setdefault(len(sequence), []).append(sequence)
    batches = []
    for length, alike in sorted(lengths.items()):
        size = max(1, BATCH_TOKENS // length)
        batches += [torch.tensor(alike[start : start + size]) for start in range(0, len(alike), size)]
    return batches


def _drawn(what: str, there: int, wanted: int, generator: torch.Generator) -> list[int]:
    if there < wanted:
        raise ValueError(f"{what}:{wanted} asked for, but there are {there} sequences")
    return torch.randperm(there, generator=generator)[:wanted].tolist()
