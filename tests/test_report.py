"""The page of a report: it is self-contained, escapes names, shows all numbers, fits all widths."""

import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests import report_shots, reports
from tests.reports import HOSTILE
from typer.testing import CliRunner

from virtualbatch import report
from virtualbatch.cli import app as cli
from virtualbatch.plan.plan import Plan, PlanRow
from virtualbatch.report import Report, write_html
from virtualbatch.report._svg import PALETTE

EVERYTHING = (
    reports.demo(),
    reports.plan(),
    reports.certificate(),
    reports.inexact(),
    reports.noise(),
    reports.batch_advice(),
)
KINDS = ("Demo", "Plan", "Certificate", "Certificate", "Noise scale", "Advice")
MOST_BYTES = 300_000

VOID = {"meta", "link", "img", "br", "input", "source"}
REFERENCES = {"src", "srcset", "href", "action", "data", "poster", "background"}


class Page(HTMLParser):
    """What a browser would find.

    Attributes:
        tags: every element with its attributes.
        text: what is read, styles left out.
        style: the style sheet.
        ids: of all elements.
    """

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.style = ""
        self.ids: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        if self._open:
            raise AssertionError(f"not closed: {self._open}")

    def handle_starttag(self, tag, attrs):
        self._add(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._add(tag, attrs)

    def _add(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            raise AssertionError(f"</{tag}> closes nothing")

    def handle_data(self, data):
        if self._open and self._open[-1] == "style":
            self.style += data
        else:
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.tags if found == tag]


def assert_self_contained(html: str) -> None:
    """Raises where the page would ask for something else, or run something."""
    page = Page(html)
    for tag, attributes in page.tags:
        if tag in {"script", "link", "iframe", "object", "embed", "img", "base", "form"}:
            raise AssertionError(f"<{tag}> {attributes}")
        for key, value in attributes.items():
            if key.startswith("on"):
                raise AssertionError(f"{key} of <{tag}> runs")
            if key.rpartition(":")[2] in REFERENCES and not value.startswith("#"):
                raise AssertionError(f"{key} of <{tag}> leaves the page: {value}")
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                if not target.startswith("#"):
                    raise AssertionError(f"{key} of <{tag}> leaves the page: {target}")
    if "url(" in page.style or "@import" in page.style or "@font-face" in page.style:
        raise AssertionError("the style sheet asks for something")


def written(folder: Path, *results) -> str:
    file = folder / "report.html"
    write_html(file, *results)
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("report"), *EVERYTHING)


def test_the_page_needs_nothing_else(everything: str) -> None:
    assert_self_contained(everything)
    assert "http" not in everything
    assert len(everything.encode()) < MOST_BYTES


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        ("<script>1</script>", "<script>"),
        ('<link rel="icon" href="a.png">', "<link>"),
        ('<img src="a.png">', "<img>"),
        ('<a href="//example.org">a</a>', "href of <a> leaves the page"),
        ('<svg><use xlink:href="a.svg#b"/></svg>', "xlink:href of <use> leaves the page"),
        ('<p style="background: url(a.png)">a</p>', "style of <p> leaves the page"),
        ('<p onclick="f()">a</p>', "onclick of <p> runs"),
        ("<style>@import 'a.css';</style>", "the style sheet asks"),
        ("<div>", "</body> closes nothing"),
    ],
)
def test_a_page_that_needs_something_else_is_seen(
    everything: str, poison: str, message: str
) -> None:
    with pytest.raises(AssertionError, match=re.escape(message)):
        assert_self_contained(everything.replace("</body>", f"{poison}</body>"))


def test_ids_are_unique_and_references_lead_somewhere(everything: str) -> None:
    page = Page(everything)
    assert len(page.ids) == len(set(page.ids))
    referred = {
        target
        for _, attributes in page.tags
        for key, value in attributes.items()
        for target in re.findall(r"^#(.*)$" if key == "href" else r"url\(#([^)]*)\)", value or "")
    }
    assert referred
    assert referred <= set(page.ids)


def test_light_and_dark(everything: str) -> None:
    page = Page(everything)
    light, _, dark = page.style.partition("@media (prefers-color-scheme: dark)")
    for colour in PALETTE:
        assert f"--{colour.name}: {colour.light};" in light
        assert f"--{colour.name}: {colour.dark};" in dark
    names = {colour.name for colour in PALETTE}
    assert set(re.findall(r"var\(--([a-z]+)\)", everything)) == names
    # A colour that does not follow the page would vanish on one of the two.
    body = everything.partition("</style>")[2]
    assert not re.search(r"#[0-9a-f]{6}\b|\b(black|white)\b", body)


def contrast(one: str, other: str) -> float:
    """Source: W3C, Web Content Accessibility Guidelines 2.1, contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("name", ["ink", "quiet", "blue", "orange", "green", "red"])
def test_text_can_be_read(mode: str, name: str) -> None:
    colours = {colour.name: getattr(colour, mode) for colour in PALETTE}
    for background in ("page", "panel"):
        assert contrast(colours[name], colours[background]) >= 4.5


def test_readable_on_a_phone(everything: str) -> None:
    page = Page(everything)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named(
        "meta"
    )
    assert everything.count('<div class="scroll"') == len(page.named("table"))
    assert all("width" not in svg for svg in page.named("svg"))


def test_plots_say_what_they_show(everything: str) -> None:
    page = Page(everything)
    lines, bars = page.named("svg"), bar_plots(page)
    # The noise scale stands alone, so it is drawn for both widths.
    assert len(lines) == 2 + 2 + 2
    assert len(bars) == 3
    assert len(page.named("figcaption")) == 3 + 2 + 1 + 1 + 1
    assert all(plot["role"] == "img" for plot in lines)
    assert all(len(plot["aria-label"]) > 20 for plot in lines + bars)


def bar_plots(page: Page) -> list[dict[str, str | None]]:
    return [attributes for attributes in page.named("ul") if attributes["class"] == "bars"]


def test_a_plot_that_stands_alone_has_the_whole_width(tmp_path: Path) -> None:
    for result in (reports.noise(), plan_of(PlanRow(256, 5 * 2**20, True, None))):
        page = Page(written(tmp_path, result))
        narrow, wide = (float(svg["viewbox"].split()[2]) for svg in page.named("svg"))
        assert wide > 2 * narrow
        assert "@media (min-width: 720px)" in page.style
        classes = [attributes.get("class") for attributes in page.named("div")]
        assert classes.count("plot narrow") == classes.count("wide") == 1


def test_bars_are_as_long_as_their_values(tmp_path: Path) -> None:
    def lengths(result) -> list[float]:
        html = written(tmp_path, result)
        return [float(found) for found in re.findall(r'class="bar" style="width: ([\d.]+)%', html)]

    assert lengths(reports.demo()) == pytest.approx([100 * 39 / 257, 100, 100 * 52 / 257], abs=0.01)
    # Not finite, 0.31, 2e-16 and zero: from 2e-17 to 3.1 on a logarithmic axis.
    assert lengths(reports.inexact()) == pytest.approx([100, 94.2, 5.8, 0], abs=0.1)


def test_the_smallest_error_of_all_has_a_bar(tmp_path: Path) -> None:
    tiny = replace(reports.certificate(), parameters={"w": 5e-324}, max_error=5e-324)
    html = written(tmp_path, tiny)
    shares = [float(found) for found in re.findall(r"(?:width|left): ([\d.]+)%", html)]
    assert all(0 <= share <= 100 for share in shares)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.thorough("it starts a browser")
def test_no_page_is_wider_than_its_window(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    name = "a_layer_with_a_name_that_has_no_end/" * 9
    unbroken = replace(reports.certificate(), parameters={name: 1e-15, "w" * 300: 1e-15})
    write_html(page, *EVERYTHING, unbroken)
    widths = [380, 719, 720, 800, 1400]
    assert report_shots.wider_than_its_window(page, widths) == dict.fromkeys(widths, 0)
    page.write_text('<meta charset="utf-8"><div style="width: 900px">wide</div>')
    found = report_shots.wider_than_its_window(page, [380, 1400])
    assert found[380] > 400
    assert found[1400] == 0


def test_a_report_in_a_notebook_is_the_same_page(tmp_path: Path) -> None:
    report = Report(*EVERYTHING)
    assert report.html == written(tmp_path, *EVERYTHING)
    frame = Page(report._repr_html_())
    [(tag, attributes)] = frame.tags
    assert tag == "iframe"
    assert attributes["srcdoc"] == report.html
    # No script can run in it.
    assert attributes["sandbox"] == ""


def test_names_are_escaped(everything: str) -> None:
    page = Page(everything)
    assert page.named("script") == []
    # In a finding, in the table, and, on one line and without control characters, in the plot.
    assert page.text.count("<script>alert('x')</script>") >= 2
    assert '&amp; "$\\frac{a}{b}$" \N{REPLACEMENT CHARACTER}' in page.text
    assert HOSTILE not in everything
    assert "<script" not in everything


def test_every_result_is_there_in_order(everything: str) -> None:
    found = re.findall(r'<p class="kind">(.*)</p>', everything)
    assert tuple(found) == KINDS
    assert "<title>Demo, Plan, Certificate, Certificate, Noise scale, Advice" in everything


@pytest.mark.parametrize(
    ("result", "texts"),
    [
        (
            reports.demo(),
            [
                "✓ Accumulated from 32, the batch of 512 trains to the weights of the whole batch",
                "20%",
                "1.09 times",
                "3.8e-07",
                reports.demo().conclusion,
                "257.0 MiB",
                "peak memory (MiB)",
                "time (s)",
                "small, 32",
                "whole, 512",
                "512 accumulated",
                "seconds since training began",
            ],
        ),
        (
            reports.plan(),
            [
                "Micro-batches of 32 rows fit and are fast",
                reports.plan().reason,
                "limit 300.0 MiB",
                "32 rows: 120.8 MiB",
                "32 rows: 1.25/s",
                "micro-batch (rows)",
                "peak memory (MiB)",
                "455.2",
                "time of the whole batch (s)",
                "not timed",
                "peak memory, MiB",
                "throughput, batches/s",
            ],
        ),
        (
            reports.certificate(),
            ["✓ Exact", "6.3e-15", "tolerance 1.4e-13", "encoder/block_5", "encoder/block_5/bias"],
        ),
        (
            reports.inexact(),
            ["✗ Not exact", "not finite", "3.1e-01", "train.py:41", "(batch[:, 1:] != 0).sum()"],
        ),
        (
            reports.noise(),
            [
                "as much noise as signal at 703 rows",
                "669 to 738",
                "95% interval",
                "noise scale (rows)",
                "∞",
                "600",
            ],
        ),
        (
            reports.batch_advice(),
            [
                reports.batch_advice().verdict,
                "89.4",
                "1024",
                *map(str, reports.batch_advice().rules),
            ],
        ),
    ],
    ids=["demo", "plan", "certificate", "inexact", "noise", "advice"],
)
def test_the_numbers_are_there(result, texts: list[str], tmp_path: Path) -> None:
    page = Page(written(tmp_path, result))
    text = " ".join(page.text.split())
    for expected in texts:
        assert expected in text


def test_the_chosen_size_stands_out(tmp_path: Path) -> None:
    html = written(tmp_path, reports.plan())
    assert re.findall(r'<tr class="chosen"><th scope="row">(\d+)</th>', html) == ["32"]


def test_equal_results_give_equal_pages(everything: str, tmp_path: Path) -> None:
    assert written(tmp_path, *EVERYTHING) == everything


def test_a_large_model_stays_small(tmp_path: Path) -> None:
    html = written(tmp_path, reports.certificate(layers=400))
    assert len(html.encode()) < MOST_BYTES
    assert "The other 376 layers have no larger errors." in html
    assert "All 800 parameters" in html


def test_memory_in_a_table_has_one_unit(tmp_path: Path) -> None:
    html = written(tmp_path, plan_of(PlanRow(1, 2**20, True, 1.0), PlanRow(2, 2**31, True, 1.0)))
    assert "peak memory (GiB)" in html
    assert re.findall(r"<td>([\d.]+)</td><td>measured", html) == ["0.000977", "2"]


def plan_of(*rows: PlanRow) -> Plan:
    return Plan(rows[-1].microbatch_size, 1, 2**33, "It fits.", rows)


@pytest.mark.parametrize(
    ("result", "plots"),
    [
        (plan_of(PlanRow(1, None, False, 0.2), PlanRow(2, None, False, 0.1)), 1),
        (plan_of(PlanRow(256, 5 * 2**20, True, None)), 1),
        (plan_of(PlanRow(1, 1000, True, 1e-6)), 2),
        (plan_of(PlanRow(1, 2**20, True, 1e-6), PlanRow(2**20, 2**41, True, 1e3)), 2),
        (replace(reports.certificate(), parameters={}), 0),
        (replace(reports.certificate(), parameters={"w": 0.0}, max_error=0.0), 1),
        (replace(reports.certificate(), parameters={"w": math.nan}, exact=False), 1),
        (reports.noise()[:1], 0),
        (reports.noise()[:2], 1),
        (replace(reports.batch_advice(), best_high=math.inf, rules=()), 0),
        (
            replace(
                reports.demo(),
                small=reports.run("small", 3, 1.0, 39),
                whole=reports.run("whole", 1, 1.0, 39),
                accumulated=replace(reports.run("accumulated", 1, 1.0, 39), losses=[0.0]),
                accumulated_difference=1.0,
            ),
            3,
        ),
    ],
)
def test_results_at_the_edge(result, plots: int, tmp_path: Path) -> None:
    html = written(tmp_path, result)
    assert_self_contained(html)
    assert len(Page(html).named("figcaption")) == plots
    assert "nan" not in Page(html).text


@pytest.mark.parametrize("result", [None, "plan", [], [1, 2], [(1, 2.0)], {"a": 1}])
def test_what_has_no_report_is_refused(result: object, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    with pytest.raises(TypeError, match=r"A report shows a Plan, .* Got .*\. Pass what plan"):
        write_html(file, reports.plan(), result)
    assert not file.exists()


def test_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"A report needs a result\. Got none\. Pass for"):
        write_html(tmp_path / "report.html")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "NEEDED", ("jinja2", "no_such_package"))
    line = (
        "A report needs jinja2 and no_such_package. Got no no_such_package. "
        'Run: pip install "virtualbatch[report]"'
    )
    with pytest.raises(ModuleNotFoundError, match=re.escape(line)):
        write_html(tmp_path / "report.html", reports.plan())

    def must_not_run(*arguments: object) -> None:
        raise AssertionError("the command ran")

    monkeypatch.setattr(cli, "run_demo", must_not_run)
    outcome = CliRunner().invoke(cli.app, ["demo", "--html", str(tmp_path / "report.html")])
    assert outcome.exit_code == 2
    assert outcome.stderr == f"Error: {line}\n"


def test_the_demo_writes_and_names_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "run_demo", lambda *arguments: reports.demo())
    file = tmp_path / "report.html"
    outcome = CliRunner().invoke(cli.app, ["demo", "--html", str(file)])
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout == f"Report: {file}\n"
    assert "Accumulated from 32" in file.read_text(encoding="utf-8")
