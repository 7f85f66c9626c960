"""The recovery pressures by name, without torch, so that names are checked before it loads; apply.py runs them.

Those of asking leave the model as it is; the others take copies of it.
"""

from __future__ import annotations

import difflib

PRESSURES = {
    "in-context": "the fact, its paraphrase, or other facts of the person in the prompt (arXiv 2407.00106)",
    "persuasion": "the question framed by authority, a story, urgency, ... (SKeB)",
    "attacks": "adversarial prompts (RWKU, arXiv 2406.10890)",
    "forms": "the same fact asked as cloze, choice, paraphrase, reversed (ORT, arXiv 2506.07795)",
    "early-exit": "decoded after each layer by the model's own norm and head",
    "relearning": "a few training steps on a small part of the forget set, or on the retain set",
    "quantization": "round to nearest at 8, 4 and 3 bits",
    "pruning": "magnitude pruning of 30, 50 and 70%",
}


def pressures_named(names: tuple[str, ...]) -> tuple[str, ...]:
    """`names` once each, all for "all"; ValueError suggests the nearest for one that is unknown."""
    for name in names:
        if name not in PRESSURES and name != "all":
            near = difflib.get_close_matches(name, PRESSURES, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"known: all, {', '.join(PRESSURES)}"
            raise ValueError(f"pressures: {name!r} is unknown; {hint}")
    return tuple(PRESSURES) if "all" in names else tuple(dict.fromkeys(names))
