"""The page of a report: whole, self-contained, readable to all, and safe whatever the layers are called."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any
from xml.etree import ElementTree

import pytest
import reports
from old_reports import old_report
from pydantic import ValidationError

from aquant_core.report.page import content_policy, render

VOID = {"meta", "br"}
HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(1)>{{ 7 * 7 }}&amp;"""


@dataclass
class Page(HTMLParser):
    """What a reader of the markup sees."""

    text: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def shown(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def tables_of(page: Page) -> list[str]:
    tables = re.findall(r"<table\b.*?</table>", page.text, re.DOTALL)
    assert len(tables) >= 5
    return tables


def with_everything(report: dict[str, Any]) -> dict[str, Any]:
    """Adds what only some runs have."""
    report["warnings"] = ["Few images."]
    report["accuracy"]["float"]["top1"] = report["accuracy"]["quantized"]["top1"] + 0.01
    report["sensitivity"] = {
        "metric": "top1",
        "n": 1000,
        "layers": [
            {
                "layer": "second", "bits": [2, 2], "raised_bits": [4, 4], "gain": 0.0123,
                "interval": [0.004, 0.021], "cost_bytes": 81, "error_share": 0.31,
            }
        ],
    }  # fmt: skip
    tried = {"layers": {"second": [2, 2]}, "accuracy": 0.9, "drop": 0.75, "interval": [0.1, 1.4], "bytes": 900}
    candidates = [tried | {"mean_weight_bits": 2.5, "held": False}, tried | {"mean_weight_bits": 3.25, "held": True}]
    report["config"] |= {"target": {"max_accuracy_drop": 0.8}, "compare": []}
    report["sources"] = {"model": "net.onnx", "calibration": "images.npz", "evaluation": None}
    report["target"] = {
        "max_accuracy_drop": 0.8, "metric": "top1", "n": 1000, "held": True, "drop": 0.75, "interval": [0.1, 1.4],
        "candidates": candidates, "chosen": 1,
    }  # fmt: skip
    return report


@pytest.fixture
def page(report: dict[str, Any]) -> Page:
    return Page(render(with_everything(report)))


def test_it_says_so_when_no_layer_stands_out(report: dict[str, Any]) -> None:
    report = with_everything(report)
    report["sensitivity"]["layers"][0]["interval"] = [-0.001, 0.021]
    shown = Page(render(report)).shown
    assert "No single layer stands out : the bits were searched, and the target holds." in shown
    assert "Raise second" not in shown
    report["target"] = None
    assert "No single layer stands out : the loss is spread over many." in Page(render(report)).shown
    report["accuracy"]["float"]["top1"] = report["accuracy"]["quantized"]["top1"]
    assert "Nothing was lost : on these 1,000 images" in Page(render(report)).shown


def test_it_says_which_network_it_is_of_as_far_as_that_is_known(report: dict[str, Any]) -> None:
    assert "<h1>AQuant, 2-bit" in render(report)  # a module's
    report["config"]["architecture"] = "resnet18"
    assert "<h1>resnet18: AQuant, 2-bit" in render(report)
    report["sources"]["model"] = HOSTILE
    page = Page(render(report, "Job 1, finished today."))
    assert page.shown.count(f"{HOSTILE}: AQuant") == 2
    assert "Job 1, finished today." in page.shown
    plan = reports.planned() | {"sources": {"model": "net.onnx"}}
    page = Page(render(plan, "Job 2."))
    assert "net.onnx: AQuant, 2-bit weights, 2-bit activations: what it would take Job 2." in page.shown


def test_it_says_what_the_report_says(page: Page, report: dict[str, Any]) -> None:
    shown = page.shown
    accuracy = report["accuracy"]["quantized"]
    assert f"{100 * accuracy['top1']:.2f} %" in shown
    assert shown.count("net.onnx: AQuant, bits searched by layer") == 2  # title and heading
    assert "Held : the drop is 0.75 points" in shown
    assert "Few images." in shown
    assert "+1.23" in shown  # the sensitivity's gain
    assert "Raise second first" in shown
    assert '"layers": {"second": {"activation_bits": 4, "weight_bits": 4}}' in shown
    for name in ("Float", "Rounding to nearest", "QDrop", "AQuant"):
        assert name in shown
    for part in (*report["layers"], *report["blocks"]):
        assert part["name"] in shown
    assert report["repeat"]["curl"] in "".join(page.words)
    assert report["digests"]["logits"] in shown


def test_nothing_is_fetched_and_nothing_runs_but_what_the_policy_names(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "image", "use")
        assert not {"src", "srcset", "style", "action", "xlink:href"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").startswith("#")  # type: ignore[union-attr]
    for name in ("report.css", "report.js"):
        text = files("aquant_core.report").joinpath(name).read_text()
        assert not re.search(r"url\(|@import|https?:|fetch|XMLHttp|import\(", text)
        assert text in page.text
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in content_policy()
    assert (len(page.all("style")), len(page.all("script"))) == (1, 1)
    assert "default-src 'none'" in content_policy()
    policies = [tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [content_policy()]


def test_names_from_an_upload_stay_words(report: dict[str, Any]) -> None:
    """Every string of the report that an upload may decide, at every place it appears."""
    told = json.loads(json.dumps(with_everything(report)).replace('"second"', json.dumps(HOSTILE)))
    told["warnings"] = [HOSTILE]
    told["repeat"] = {"command": HOSTILE, "curl": HOSTILE}
    told["blocks"][1]["name"] = HOSTILE
    told["device"] = told["protocol"]["name"] = HOSTILE
    page = Page(render(told))
    plain = Page(render(report))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert "<script>alert" not in page.text
    assert "49" not in re.findall(r"onerror=alert\(1\)>(\d+)", page.shown)  # no template in a name is filled in
    assert page.shown.count(HOSTILE) >= 6
    for svg in re.findall(r"<svg.*?</svg>", page.text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_drawings_have_words_and_tables_have_headers(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    drawings = re.findall(r"<svg.*?</svg>", page.text, re.DOTALL)
    assert len(drawings) >= 4 + 3 + 4  # bars, differences, SQNR, gains; blocks; layers
    for text in drawings:
        svg = ElementTree.fromstring(text)
        title, description = svg.find("title"), svg.find("desc")
        assert title is not None
        assert description is not None
        assert title.text
        assert description.text
        assert svg.get("role") == "img"
        assert svg.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        width, height = (float(part) for part in svg.get("viewBox", "").split()[2:])
        for element in svg:
            for name, limit in (("x", width), ("y", height), ("x1", width), ("x2", width), ("y1", height)):
                assert 0 <= float(element.get(name, 0)) <= limit, ElementTree.tostring(element)
    for table in tables_of(page):
        assert "<caption>" in table
        assert all("scope=" in header for header in re.findall(r"<th[^>a-z][^>]*>|<th>", table))
        assert all('<th scope="row">' in row for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL) if "<td" in row)
    labelled = {attributes["for"] for attributes in page.all("label")}
    assert {attributes["id"] for attributes in page.all("select")} == labelled
    targets = [attributes["href"] for attributes in page.all("a")]
    assert targets
    assert all(str(target)[1:] in ids for target in targets)
    assert page.all("html") == [{"lang": "en"}]


def test_without_script_every_layer_is_shown(page: Page, report: dict[str, Any]) -> None:
    plots = [attributes for attributes in page.all("figure") if attributes.get("class") == "of-layer"]
    assert len(plots) == len(report["layers"])
    assert not [attributes for attributes in plots if "hidden" in attributes]
    assert [attributes for attributes in page.all("div") if "hidden" in attributes] == [
        {"class": "choice", "data-chooses": "of-layer", "hidden": None}
    ]
    values = [attributes["value"] for attributes in page.all("option")]
    assert values == [attributes["id"] for attributes in plots]


def test_columns_line_up(page: Page) -> None:
    """Each row of a table has as many cells as its header, whose second row fills what the first one spans."""
    for table in tables_of(page):
        rows = [re.findall(r"<t[hd]([^>]*)>", row) for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)]
        widths = [sum(int((re.search(r'colspan="(\d+)"', cell) or [0, 1])[1]) for cell in row) for row in rows]
        if any("rowspan" in cell for cell in rows[0]):
            assert widths.pop(1) == sum("colspan" in cell and int(cell.split('"')[-2]) for cell in rows[0])
        assert len(set(widths)) == 1


def test_older_reports(report: dict[str, Any]) -> None:
    old = Page(render(old_report()))
    assert "90.60 %" in old.shown
    assert "AQuant, 2-bit weights, 2-bit activations" in old.shown
    assert "layer3.1.conv2" in old.shown
    assert "Activations and borders" not in old.shown
    del report["gap"], report["differences"], report["operations"], report["repeat"], report["stages"]
    Page(render(report))


def test_reports_without_labels_and_of_methods_at_outputs() -> None:
    page = Page(render(reports.run(labels=False, method="brecq", border={"fusion": "none"})))
    assert "The images have no labels" in page.shown
    assert "Top-1" not in page.shown
    assert "Values quantized where they are made" in page.shown
    assert "quadratic" not in page.shown  # it has no border
    nothing = Page(render(reports.run(method="nearest", weight_bits=32, activation_bits=32)))
    assert "Rounding to nearest, float weights, float activations" in nothing.shown


def test_numbers_that_were_not_finite(report: dict[str, Any]) -> None:
    report["blocks"][0]["loss"]["values"] = [None] * len(report["blocks"][0]["loss"]["values"])
    report["blocks"][0]["error_after"] = report["fidelity"]["quantized"]["sqnr_db"] = None
    report["layers"][0]["sqnr_db"] = {"weight": None, "input": None, "output": None}
    Page(render(report))


def test_a_plan_says_whether_memory_does_and_what_it_takes() -> None:
    plan = reports.planned(compare=["qdrop", "nearest"], layers={"second": {"weight_bits": 4}})
    peak = plan["forecast"]["peak_bytes"]
    cases = [
        (2 * peak, None, "It is within the", None),
        (2 * peak, peak, "It is within the", None),
        (peak // 2, None, "and is tried all the same", "the run takes more memory than it is to fill"),
        (2 * peak, peak - 1, "a run is stopped here", "it is likely to be stopped"),
        (None, None, "up to", None),
    ]
    for plan["budget_bytes"], plan["limit_bytes"], words, caution in cases:
        page = Page(render(plan))
        assert words in page.shown
        for *_, others, warned in cases[:4]:
            assert (others in page.shown) == (others == words)
            assert warned is None or (warned in page.shown) == (warned == caution)
    assert "AQuant, 2-bit weights, 2-bit activations: what it would take" in page.shown
    assert "for 3 methods together" in page.shown
    assert "3 at other bits than asked for" in page.shown
    chosen = re.findall(r'<tr class="chosen"><th scope="row">(.*?)</th>', page.text)
    assert chosen == plan["other_bits"] == ["stem", "second", "fc"]
    assert page.shown.count("not learned") == sum(not block["learned"] for block in plan["blocks"]) == 1
    assert '"dry_run"' not in page.shown  # the command starts it
    assert "aquant quantize MODEL" in page.shown
    assert page.all("meta")[2]["content"] == content_policy()


def test_a_plan_warns_of_what_goes_to_disk() -> None:
    plan = reports.planned()
    for block in plan["blocks"]:
        block["placement"] = "disk"
    shown = Page(render(plan)).shown
    assert f"What {len(plan['blocks'])} blocks are learned from goes to disk" in shown
    assert "by keeping on disk what is beyond them" in shown
    assert "stopped" not in shown


def test_a_plan_of_what_learns_nothing() -> None:
    page = Page(render(reports.planned(method="nearest", preset="smoke")))
    assert "Nothing is learned by Rounding to nearest" in page.shown
    assert "Time of learning" not in page.shown


def test_names_in_a_plan_stay_text() -> None:
    plan = reports.planned()
    plan["layers"][0]["name"] = plan["blocks"][0]["name"] = plan["warnings"][0] = HOSTILE
    page = Page(render(plan))
    assert page.shown.count(HOSTILE) == 3
    assert "<script>alert" not in page.text


def test_what_is_no_report() -> None:
    with pytest.raises(ValidationError):
        render({"seed": 0})
    with pytest.raises(ValidationError):
        render({"dry_run": True})


def test_text_and_marks_stand_out_in_both_themes() -> None:
    """WCAG AA: text 4.5 to 1, marks 3 to 1, on every ground they stand on."""
    style = files("aquant_core.report").joinpath("report.css").read_text()
    themes = [
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{3,6})\b", part))
        for part in re.findall(r":root \{.*?\}", style, re.DOTALL)
    ]
    assert len(themes) == 3  # light, dark, print
    for theme in themes:
        for ground in ("ground", "panel"):
            for name in ("ink", "muted", "first", "second", "third"):
                assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
            assert contrast(theme["bar"], theme["ground"]) >= 3
        for name in ("ink", "caution"):
            assert contrast(theme[name], theme["caution-ground"]) >= 4.5


def contrast(one: str, other: str) -> float:
    first, second = sorted((luminance(one), luminance(other)))
    return (second + 0.05) / (first + 0.05)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
