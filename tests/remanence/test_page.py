"""The page shows every figure in its place, whatever the texts and gaps in the document, and fetches nothing."""

import copy
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from remanence import labels
from remanence.page import html

RECIPES = ("dense", "rtn-w4a16-g64-plain")


def share_of(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def cell(method, recipe, control=None, verdict="held", share=(0.0, 0.0, 0.0), **changes):
    """A measured cell as bench/document.py writes it."""
    value, low, high = share
    return {
        "method": method,
        "recipe": recipe,
        "control": control,
        "verdict": verdict,
        "reason": f"why {method} {recipe}",
        "unforgotten": False,
        "forget": 0.04,
        "forget_interval": {"value": 0.04, "low": 0.02, "high": 0.07},
        "retain": 0.98,
        "recovered_share": {"value": value, "low": low, "high": high, "of": "unlearned..baseline"},
        "known_share": {"value": -0.02, "low": -0.05, "high": 0.01},
        "kept_share": {"value": 0.99, "low": 0.98, "high": 1.0},
        "forget_rouge": 0.3,
        "forget_verbatim": 0.0,
        "truth_ratio": {"geometric": 0.4, "arithmetic": 0.5, "prob": 0.6},
        "retain_rouge": 0.99,
        "model_utility": {"geometric": 0.93, "arithmetic": 0.9, "prob": 0.8},
        "forget_quality": {"p": 0.4, "log10_p": -0.4, "d": 0.2, "sign": 1},
        "memorisation": {"extraction_strength": share_of(0.21), "exact_memorisation": share_of(0.43)},
        "privacy": {"loss": share_of(0.52), "min_k": share_of(0.56)},
        "muse": {"verbmem_f": 0.31, "knowmem_f": 0.32, "knowmem_r": 0.97, "privleak": -12.5, "note": None},
        "health": {"entropy": 3.3, "repetition": 0.02, "empty": 0.0},
        "flags": [],
        "distance": {"oracle_to_model": 0.11, "model_to_oracle": 0.12, "js": 0.05, "output": 0.2, "hidden": 0.3},
        "pressures": {},
        "perplexity": None,
        "update_survival": {"changed_codes": 0.9, "norm": 1.5, "survival": 0.7},
        "size_bytes": 3226704,
        "size_vs_fp16": 0.8,
        "peak_memory_bytes": 3389324,
        "times": {"decode_tokens_per_s": 391.4, "decode_spread": 0.07, "measured_s": 2.3},
        **changes,
    }


def failed(method, recipe, error):
    head = {"method": method, "recipe": recipe, "control": None}
    return {**head, "verdict": "undecided", "reason": error, "error": error}


def document(audited=("npo",), controls=("baseline", "negative", "positive")):
    """`audited` models that hold, and the controls asked for, all as they should be."""
    cells = []
    for recipe in RECIPES:
        cells.append(cell("target", recipe, "baseline", "undecided", (1, 1, 1), forget=0.99, unforgotten=True))
        if "negative" in controls:
            cells.append(cell("oracle", recipe, "negative"))
        cells += [cell(name, recipe) for name in audited]
    cells.append(cell("bucketed", "dense", "positive"))
    cells.append(cell("bucketed", "rtn-w4a16-g64-plain", "positive", "returned", (1, 1, 1), forget=0.99))
    answers = [{"method": c["method"], "recipe": c["recipe"], "answer": f"{c['method']} says"} for c in cells]
    return {
        "schema": "remanence.audit/2",
        "environment": {
            "remanence": "0.1.0",
            "python": "3.11.7",
            "torch": "2.10.0",
            "transformers": "5.3.0",
            "numpy": "2.0.0",
            "scipy": "1.11.0",
            "platform": "Linux x86_64",
            "cpu": {"name": "a processor", "cores": 2},
            "kernel_isa": "avx2",
        },
        "config": {"model": "demo", "arch": "llama", "seed": 7},
        "data": {"name": "people80", "sha256": "ab" * 32, "forget": 40, "retain": 408, "holdout": 40},
        "controls": {name: {"ok": True, "detail": f"{name} detail"} for name in controls},
        "cells": cells,
        "survival": {"npo": {"rho": 0.9, "p": 0.04, "n": 5, "reason": None}},
        "quality": None,
        "examples": [{"question": "Who?", "truth": "She", "answers": answers}],
        "times": {"started": "2026-11-21T06:09:24Z", "wall_s": 275.4},
    }


def change(doc, method, recipe, **changes):
    next(c for c in doc["cells"] if (c["method"], c["recipe"]) == (method, recipe)).update(changes)


def answer(doc, method, recipe, text):
    for item in doc["examples"][0]["answers"]:
        if (item["method"], item["recipe"]) == (method, recipe):
            item["answer"] = text


class Tables(HTMLParser):
    """Tables as lists of rows of (class, title, text)."""

    def __init__(self, page):
        super().__init__()
        self.tables, self.open = {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "table":
            self.rows = []
            self.tables.setdefault(attrs["class"].split()[0], []).append(self.rows)
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.open = [attrs.get("class", ""), attrs.get("title", ""), ""]
            self.rows[-1].append(self.open)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.open = None

    def handle_data(self, data):
        if self.open:
            self.open[2] += data + " "


def matrix(page):
    """(model, recipe) -> (class, title, text) of the verdict matrix."""
    (rows,) = Tables(page).tables["matrix"]
    recipes = [text.strip() for _, _, text in rows[0][1:]]
    return {(row[0][2].split()[0], recipe): c for row in rows[1:] for recipe, c in zip(recipes, row[1:])}


def figures(page, recipe, table=0):
    """Texts of the first line for `recipe` in one of the full tables."""
    rows = Tables(page).tables["full"][table]
    return [text.strip() for _, _, text in next(row for row in rows if recipe in row[0][2])]


def svgs(page):
    found = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(found) == 2
    return [ElementTree.fromstring(text) for text in found]


def marks(svg, kind):
    return [e for e in svg.iter() if e.get("class", "").split()[:1] == [kind]]


def headline(page):
    return re.findall(r"<h1>(.*?)</h1>", page, re.S)[0]


def test_markup_in_texts_is_shown_not_run():
    evil = "<script>alert(1)</script>\"'><img src=x>"
    doc = document(audited=[evil])
    answer(doc, evil, "dense", evil)
    doc["examples"][0]["question"] = doc["data"]["name"] = doc["config"]["model"] = evil
    doc["controls"]["baseline"]["detail"] = evil
    change(doc, evil, "dense", reason=evil)
    doc["cells"][-1] = failed(evil, "rtn-w4a16-g64-plain", evil)
    page = html(doc)
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 8
    assert all(set(e.attrib) & {"onload", "onclick"} == set() for svg in svgs(page) for e in svg.iter())


def test_characters_that_hide_or_turn_text_are_gone():
    unseen = "\x00\x08\x1b\x7f\x85\u202e\u202a\u2066\u2069\u200f\u200b\u2028\ufeff\U000e0041\ud800"
    doc = document(audited=[f"n{unseen}po"])
    answer(doc, f"n{unseen}po", "dense", f"be{unseen}fore\nafter")
    page = html(doc)
    assert not set(unseen) & set(page)
    assert "before\nafter" in page
    assert ("npo", "dense") in matrix(page)
    page.encode()  # a lone surrogate would raise
    svgs(page)


def test_nothing_is_fetched_or_run():
    page = html(document())
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page
    assert not re.search(r"<(script|link|iframe|object|embed|base|form)\b", page)
    assert not re.search(r"\b(src|href|srcset|action)\s*=", page)
    assert not re.search(r"url\(|@import|https?:", page)


def test_every_verdict_stands_in_its_cell():
    doc = document(audited=["a", "b"])
    for (method, recipe), verdict in zip([(m, r) for m in "ab" for r in RECIPES], labels.VERDICTS, strict=True):
        change(doc, method, recipe, verdict=verdict)
    change(doc, "b", "dense", recovered_share={"value": 0.123, "low": -0.456, "high": 0.789, "of": "zero..baseline"})
    cells = matrix(html(doc))
    for (method, recipe), verdict in zip([(m, r) for m in "ab" for r in RECIPES], labels.VERDICTS, strict=True):
        class_, title, text = cells[method, recipe]
        assert class_ == verdict
        assert verdict in text
        assert f"why {method} {recipe}" in title
        assert [word for word in labels.VERDICTS if word in text] == [verdict]
    assert "0.12 [−0.46, 0.79]†" in " ".join(cells["b", "dense"][2].split())


def test_controls_stand_apart_and_are_named():
    page = html(document())
    order = [row[0][2].split() for row in Tables(page).tables["matrix"][0][1:]]
    assert [words[0] for words in order] == ["audited", "npo", "controls", "target", "oracle", "bucketed"]
    assert order[3] == ["target", "baseline"]
    assert order[4] == ["oracle", "negative", "control"]
    assert order[5] == ["bucketed", "positive", "control"]


def test_an_unknown_verdict_cannot_leave_its_attribute():
    doc = document()
    change(doc, "npo", "dense", verdict='x" onclick="y')
    assert 'onclick="' not in html(doc)


@pytest.mark.parametrize("method", ["npo", "target", "oracle", "bucketed"])
def test_failed_cells_say_why(method):
    doc = document()
    error = "100 input features do not divide into groups of 64"
    doc["cells"] = [
        {**failed(method, RECIPES[1], error), "control": c["control"]}
        if (c["method"], c["recipe"]) == (method, RECIPES[1])
        else c
        for c in doc["cells"]
    ]
    page = html(doc)
    class_, _, text = matrix(page)[method, RECIPES[1]]
    assert class_ == "failed"
    assert "failed" in text
    assert error in text
    assert len(svgs(page)) == 2


def test_gaps_are_dashes():
    doc = document()
    gaps = dict.fromkeys(("forget_quality", "known_share", "truth_ratio", "update_survival", "privacy", "distance"))
    muse = {"verbmem_f": 0.31, "knowmem_f": None, "knowmem_r": None, "privleak": None}
    change(doc, "npo", "rtn-w4a16-g64-plain", **gaps, peak_memory_bytes=None, kept_share=None, muse=muse)
    page = html(doc)
    texts = figures(page, "rtn-w4a16-g64-plain")
    assert texts[4:8] == ["–", "–", "–", "–"]
    assert texts[10:14] == ["–"] * 4
    assert texts[16] == "–"
    assert figures(page, "rtn-w4a16-g64-plain", 1)[3:12] == ["–", "–", "–", "0.31", "–", "–", "–", "–", "–"]
    assert "None" not in page


def test_forget_quality_and_what_is_measured_besides():
    doc = document()
    change(doc, "npo", "dense", forget_quality={"p": 0, "log10_p": -419.6, "d": 1, "sign": -1})
    assert figures(html(doc), "dense")[6:8] == ["−419.6", "1.00 lower"]
    assert figures(html(doc), "dense", 1)[1:] == [
        *("0.21 [0.11, 0.31]", "0.43", "0.52", "0.56", "−12.5", "0.31", "0.32", "0.97"),
        *("0.11", "0.05", "0.30", "3.30", "0.02", "0.00", "–"),
    ]
    assert "ρ = 0.90 over 5 recipes (p 0.040)" in html(doc)


def test_what_was_never_forgotten_is_called_so():
    cells = matrix(html(document()))
    class_, _, text = cells["target", "dense"]
    assert class_ == "undecided"
    assert text.split()[:3] == ["○", "not", "forgotten"]
    assert "undecided" not in text
    assert "held" in cells["npo", "dense"][2]


def test_signs_of_a_collapse_are_shown():
    doc = document()
    change(doc, "npo", "dense", flags=["uniform output", "empty answers"])
    assert "signs of a collapse: uniform output, empty answers" in html(doc)


def test_pressures():
    doc = document()
    assert "Under pressure" not in html(doc)
    variant = {"mean": 0.4, "gain": share_of(0.36), "beyond_oracle": share_of(0.3), "reference": False}
    told = {"mean": 0.9, "gain": share_of(0.86), "beyond_oracle": None, "reference": True}
    found = {
        "name": "in-context",
        "measure": "probability",
        "before": 0.04,
        "variants": {"other facts": variant, "the answer": told},
        "skipped": {"many facts": "the prompt is too long"},
    }
    change(doc, "npo", "dense", pressures={"in-context": [found], "relearning": {"error": "guarded"}})
    page = html(doc)
    rows = [[" ".join(t.split()) for _, _, t in row] for row in Tables(page).tables["full"][2][1:]]
    head = ["dense", "in-context, probability"]
    assert rows == [
        [*head, "other facts", "0.040", "0.400", "0.360 [0.260, 0.460]", "0.300 [0.200, 0.400]"],
        [*head, "the answer", "0.040", "0.900", "0.860 [0.760, 0.960]", "–"],
        [*head, "many facts: skipped: the prompt is too long"],
        ["dense", "relearning", "guarded"],
    ]
    assert "<em>the answer</em>" in page


def test_unified_quality():
    doc = document()
    doc["quality"] = {
        "weight": {"forget": 0.75, "retain": 0.25, "forget_rouge": 0.0},
        "rho": {},
        "stability": {"tau": 0.61, "deviation": 0.2, "draws": 10},
        "score": [{"method": m, "recipe": "dense", "score": s} for m, s in (("a", 0.1), ("npo", 0.9), ("b", 0.5))],
    }
    text = " ".join(html(doc).split())
    assert "forget 0.75, retain 0.25; under random weights the ranking keeps Kendall's τ 0.61 ± 0.20" in text
    assert text.index("<bdi>npo</bdi> dense 0.90") < text.index("<bdi>b</bdi> dense 0.50")


def test_no_oracle():
    doc = document(controls=("baseline", "positive"))
    for item in doc["cells"]:
        item["known_share"] = item["forget_quality"] = None
    page = html(doc)
    assert ("oracle", "dense") not in matrix(page)
    assert "absent" in page
    assert "no oracle was given" in page


def test_a_missing_cell_is_named():
    doc = document()
    doc["cells"] = [c for c in doc["cells"] if (c["method"], c["recipe"]) != ("npo", "rtn-w4a16-g64-plain")]
    assert "not measured" in matrix(html(doc))["npo", "rtn-w4a16-g64-plain"][2]


def test_no_negative_zero():
    tiny = {"value": -1e-9, "low": -0.004, "high": -1e-12}
    doc = document()
    for item in doc["cells"]:
        item.update(recovered_share={**tiny, "of": "unlearned..baseline"}, known_share=tiny, forget_interval=tiny)
        item["forget_quality"] = {"p": 1.0, "log10_p": -0.0, "d": -0.0, "sign": 0}
        item["forget"] = -0.0
    page = html(doc)
    assert not re.search(r"[-−]0(\.0+)?(?![\d.])", re.sub(r"<style>.*?</style>", "", page, flags=re.S))
    assert "[0.00, 0.00]" in page


@pytest.mark.parametrize("models", [1, 10])
def test_plots_are_well_formed_and_named(models):
    page = html(document(audited=[f"m<{i}>&" for i in range(models)]))
    for svg in svgs(page):
        assert svg.get("role") == "img"
        assert svg.get("aria-label") == svg.find("title").text
        assert {"held", "returned", "damaged", "undecided"} <= {e.text for e in svg.iter("text")}
    forest, scatter = svgs(page)
    cells = 2 * (models + 3)
    assert len(marks(forest, "mark")) == cells + 4  # the legend has one of each verdict
    assert len(marks(scatter, "mark")) == cells + 4
    assert len(marks(scatter, "spoke")) == models + 3


def test_everything_is_drawn_inside_the_picture():
    doc = document(audited=["a", "b"])
    change(doc, "a", "dense", recovered_share={"value": 40.0, "low": 30.0, "high": 50.0, "of": "x"})
    change(doc, "b", "dense", recovered_share={"value": -7.0, "low": -9.0, "high": 0.5, "of": "x"})
    change(doc, "b", "dense", forget=0.0, retain=0.0)
    page = html(doc)
    for svg in svgs(page):
        width, height = (float(v) for v in svg.get("viewBox").split()[2:])
        for element in svg.iter():
            for key, most in (("x", width), ("x1", width), ("x2", width), ("cx", width), ("y", height), ("cy", height)):
                if element.get(key) is not None:
                    assert 0 <= float(element.get(key)) <= most, ElementTree.tostring(element)


def test_shares_far_out_are_arrows_with_their_figures():
    doc = document(audited=["a", "b"])
    change(doc, "a", "dense", recovered_share={"value": 4.0, "low": 3.5, "high": 4.5, "of": "unlearned..baseline"})
    change(doc, "b", "dense", recovered_share={"value": 0.5, "low": -3.0, "high": 0.9, "of": "unlearned..baseline"})
    plain, clipped = svgs(html(document(audited=["a", "b"])))[0], svgs(html(doc))[0]
    assert len(marks(plain, "arrow")) == 0
    assert len(marks(clipped, "arrow")) == 2
    # The point of "a" lies outside and is an arrow only; that of "b" lies inside.
    assert len(marks(clipped, "mark")) == len(marks(plain, "mark")) - 1
    assert {"4.00 [3.50, 4.50]", "0.50 [−3.00, 0.90]"} <= {e.text for e in clipped.iter("text")}
    tips = sorted(float(e.get("points").split(",")[0]) for e in marks(clipped, "arrow"))
    axis = [float(e.get("x2")) for e in marks(clipped, "whisker")]
    assert tips[0] <= min(axis)
    assert tips[1] >= max(axis)


def test_names_in_the_scatter_do_not_cover_each_other():
    names = [f"method{i}" for i in range(10)]
    scatter = svgs(html(document(audited=names)))[1]
    written = [e for e in scatter.iter("text") if e.text in names]
    assert len(written) == 10
    boxes = [(float(e.get("x")), float(e.get("y"))) for e in written]
    for i, (x1, y1) in enumerate(boxes):
        assert all(abs(x1 - x2) >= 40 or abs(y1 - y2) >= 12 for x2, y2 in boxes[:i])


def test_headlines():
    doc = document(audited=["a", "b"])
    assert headline(html(doc)) == "Both audited methods held under every recipe."
    change(doc, "b", "rtn-w4a16-g64-plain", verdict="returned")
    said = "1 of 2 audited methods held under every recipe; b returned under rtn-w4a16-g64-plain."
    assert headline(html(doc)) == said
    change(doc, "a", "dense", verdict="undecided", unforgotten=True)
    assert "a had not forgotten even before compression" in headline(html(doc))
    assert headline(html(document(audited=["a"]))) == "a held under every recipe."
    assert headline(html(document(audited=[]))).startswith("No method was audited")
    many = document(audited=[f"m{i}" for i in range(5)])
    for i in range(4):
        change(many, f"m{i}", "rtn-w4a16-g64-plain", verdict="damaged" if i else "undecided")
    expected = "1 of 5 audited methods held under every recipe; 3 damaged and 1 undecided under at least one."
    assert headline(html(many)) == expected


def test_the_positive_control_counts_when_it_is_audited_too():
    doc = document()
    for recipe in RECIPES:
        change(doc, "bucketed", recipe, control=None)
    said = (
        "1 of 2 audited methods held under every recipe; "
        "bucketed (positive control) returned under rtn-w4a16-g64-plain."
    )
    assert headline(html(doc)) == said


def test_a_failed_control_comes_first():
    doc = document()
    assert "FAILED" not in html(doc)
    doc["controls"]["positive"] = {"ok": False, "detail": "bucketed: held, held"}
    page = html(doc)
    assert headline(page).startswith("The positive control failed, so this audit proves nothing.")
    assert page.count("FAILED") == 1
    assert "bucketed: held, held" in page


def test_identical_answers_stand_together_and_the_true_one_is_marked():
    doc = document()
    answer(doc, "bucketed", "rtn-w4a16-g64-plain", " She ")
    rows = [[" ".join(text.split()) for _, _, text in row] for row in Tables(html(doc)).tables["answers"][0]]
    assert ["npo", "npo says", "every recipe"] in rows
    assert ["bucketed positive control", "bucketed says", "dense"] in rows
    assert ["She = true answer", "rtn-w4a16-g64-plain"] in rows
    assert ["target baseline", "target says", "dense"] in rows


def test_long_answers_are_folded_and_whole():
    doc = document()
    answer(doc, "npo", "dense", "word " * 100 + "end")
    page = html(doc)
    assert "word " * 100 + "end</bdi></details>" in page


def test_the_document_is_left_as_it_was():
    doc = document(audited=["n\u202epo"])
    before = copy.deepcopy(doc)
    html(doc)
    assert doc == before


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(-0.004, 2, "0.00"), (-0.005001, 2, "−0.01"), (1234.5, 1, "1,234.5"), (None, 2, "–"), (float("nan"), 2, "–")],
)
def test_number(value, digits, text):
    assert labels.number(value, digits) == text


def test_significant():
    assert [labels.significant(v) for v in (8.0719, 0.6078, 391.4, 14500.2, 0)] == [
        "8.07",
        "0.608",
        "391",
        "14,500",
        "0",
    ]


def test_duration():
    assert [labels.duration(s) for s in (41.2, 275.4, 7500)] == ["41 s", "4 min 35 s", "2 h 05 min"]
