"""The audit of leaving early as one page of HTML: no script, nothing fetched, every text in it escaped."""

from __future__ import annotations

import math
from typing import Any

from .bench.exit_audit import told_energy, tuning_rows
from .exit_plots import leak_plot, measured_joules, pareto_plot
from .labels import GLYPHS
from .page import clean, environment

_TITLES = {"as given": "The models as they are", "tuned": "Tuned for exits, on rows to keep"}
_ROLES = {"baseline": "baseline", "negative": "negative control", "positive": "positive control"}


def html(document: dict[str, Any]) -> str:
    """The page; `document` as read from exits.json."""
    document = clean(document)
    audits = document["audits"]
    return (
        environment()
        .get_template("exits.html")
        .render(
            document=document,
            headline=headline(document),
            titles=_TITLES,
            roles=_ROLES,
            glyphs=GLYPHS,
            labels={state: [c["label"] for c in _cells(audit)] for state, audit in audits.items()},
            paretos={
                state: {n: pareto_plot(n, m["cells"], audit["layers"]) for n, m in audit["models"].items()}
                for state, audit in audits.items()
            },
            curves={
                state: {n: leak_plot(n, m["leak"]) for n, m in audit["models"].items() if m["leak"]}
                for state, audit in audits.items()
            },
            tunings={state: tuning_rows(audit) for state, audit in audits.items()},
            joules={
                state: {
                    n: pareto_plot(n, m["cells"], audit["layers"], "energy")
                    for n, m in audit["models"].items()
                    if measured_joules(m["cells"])
                }
                for state, audit in audits.items()
            },
            energy=told_energy,
            metered=any(cell["energy"] for a in audits.values() for m in a["models"].values() for cell in m["cells"]),
            spread=_spread,
            figure=_figure,
        )
    )


def headline(document: dict[str, Any]) -> str:
    """What came back, in a sentence."""
    broken = [f"{name} ({state})" for state, a in document["audits"].items() for name in failed(state, a)]
    if broken:
        return f"The audit is broken: {', '.join(broken)} did not come out as it must"
    returned = []
    for state, audit in document["audits"].items():
        for name, model in audit["models"].items():
            labels = [cell["label"] for cell in model["cells"] if cell["verdict"] == "returned"]
            if labels and model["control"] is None:
                returned.append(f"{name} ({state}) under {', '.join(labels)}")
    if not returned:
        return "Leaving early brought nothing back that was shown"
    return f"Leaving early gives back what was forgotten: {'; '.join(returned)}"


def failed(state: str, audit: dict[str, Any]) -> list[str]:
    """Controls that did not come out as they must. Of tuned models the positive control says nothing: tuning itself may
    bring back what its last layers hid."""
    return [
        name
        for name, control in audit["controls"].items()
        if not control["ok"] and (state == "as given" or not name.startswith("positive"))
    ]


def _cells(audit: dict[str, Any]) -> list[dict[str, Any]]:
    return next(iter(audit["models"].values()))["cells"]


def _spread(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    ends = [f"{found[end]:.2f}" if math.isfinite(found[end]) else "∞" for end in ("low", "high")]
    return f"{found['value']:.2f} [{ends[0]}, {ends[1]}]".replace("-", "−")


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
