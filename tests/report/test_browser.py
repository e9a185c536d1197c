"""The page in headless Chromium: two widths, light, dark and print, with a mouse and by keyboard."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_pair import TEXTS
from test_report import fake_results, two_arms, workspace
from tokenizer_zoo import build

from kvpipe.report.pair import write_pair
from kvpipe.report.render import write_report

pytest.importorskip("playwright", reason="playwright is not installed: make test-browser installs it")
import screenshot

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(screenshot.chromium() is None, reason="no Chromium: apt-get install -y chromium"),
]

CONTRAST = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const parts = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = colour => { const c = parts(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
  const ratio = (a, b) => { const [low, high] = [light(a), light(b)].sort((x, y) => x - y); return (high + .05) / (low + .05); };
  const solid = colour => colour && colour !== "none" && parts(colour)[3] === 255;
  const paper = element => { for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor; if (solid(colour)) return colour; } return "white"; };
  const found = [];
  const check = (text, colour, ground) => { const r = ratio(colour, ground);
    if (r < 4.5) found.push(`${text.trim().slice(0, 30)}: ${colour} on ${ground} is ${r.toFixed(2)}:1`); };
  for (const element of document.querySelectorAll("main *:not(svg *), nav *")) {
    const text = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join("");
    if (text.trim() && element.checkVisibility() && element.tagName !== "SCRIPT")
      check(text, getComputedStyle(element).color, paper(element));
  }
  // text on a bar: the last shape before it that holds its middle
  for (const svg of document.querySelectorAll("#figure-fusion svg, #figure-layers svg")) {
    const shapes = [...svg.querySelectorAll("path, text")].map(e => [e, e.getBoundingClientRect()]);
    shapes.forEach(([element, box], at) => {
      if (element.tagName !== "text") return;
      const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
      const under = shapes.slice(0, at).filter(([e, b]) => e.tagName === "path" && solid(getComputedStyle(e).fill) &&
        b.left < x && x < b.right && b.top < y && y < b.bottom && b.width > 4);
      const ground = under.length ? getComputedStyle(under.at(-1)[0]).fill : paper(svg);
      check(element.textContent, getComputedStyle(element).fill, ground);
    });
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The shipped configuration's page, and one of two arms under other names."""
    root = tmp_path_factory.mktemp("pages")
    shipped, two = workspace(root / "shipped"), two_arms(root / "two")
    fake_results(shipped)
    out = {}
    for name, work in (("shipped", shipped), ("two", two)):
        write_report(work.config, work.paths, work.paths.report)
        out[name] = work.paths.report
    return out


@pytest.fixture(scope="module")
def started():
    with screenshot.browser() as found:
        yield found


@pytest.fixture(params=["shipped", "two"])
def page(request, pages) -> Path:
    return pages[request.param]


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_hangs_over_and_all_text_has_contrast(started, page, width, dark):
    tab = screenshot.opened(started, page, width, dark)
    assert tab.evaluate("document.documentElement.scrollWidth") == width, "the page itself never scrolls sideways"
    assert tab.evaluate(CONTRAST) == []
    unreached = """() => [...document.querySelectorAll("*")].filter(e => e.scrollWidth > e.clientWidth + 1 &&
      ["auto", "scroll"].includes(getComputedStyle(e).overflowX) && e.tabIndex < 0).map(e => e.className)"""
    assert tab.evaluate(unreached) == [], "what scrolls is reached by the keyboard"
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    tab.close()


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_of_two_tokenizers_reads_as_well(started, tmp_path, width, dark):
    write_pair(
        ("a/teacher-of-a-long-name", "b/student"), (build("bert_cased"), build("llama3")), TEXTS, tmp_path / "p.html"
    )
    tab = screenshot.opened(started, tmp_path / "p.html", width, dark)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.evaluate(CONTRAST) == []
    tab.close()


PARTS = (".question", ".answer", "#figure-effects", 'p:has(> a[href="#cost"])')


def test_the_answer_its_figure_and_the_cost_are_on_the_first_screen(started, pages):
    tab = screenshot.opened(started, pages["shipped"], 1440, height=1000)
    bottoms = [tab.locator(of).first.bounding_box() for of in PARTS]
    assert [box["y"] for box in bottoms] == sorted(box["y"] for box in bottoms)
    assert bottoms[-1]["y"] < 1000
    tab.close()


def test_a_table_is_sorted_by_its_heads_within_its_groups(started, pages):
    tab = screenshot.opened(started, pages["shipped"], 1440)
    table = tab.locator("table", has_text="macro-averaged over tasks")
    cells = "t => [...t.tBodies[0].rows].map(r => parseFloat(r.cells[1].innerText.replace('★', '')))"
    before = table.evaluate(cells)
    head = table.locator("thead th button").nth(1)
    head.focus()
    tab.keyboard.press("Enter")
    assert table.evaluate(cells) == sorted(before) != before
    assert table.locator("thead th").nth(1).get_attribute("aria-sort") == "ascending"
    head.click()
    assert table.evaluate(cells) == sorted(before, reverse=True)
    grouped = tab.locator("#run ~ div table").first
    first = "t => [...t.tBodies].map(b => b.rows[0].className)"
    grouped.locator("thead th button").first.click()
    assert set(grouped.evaluate(first)) == {"group"}, "the group's name stays above it"
    tab.close()


def test_heads_stay_while_a_table_scrolls(started, pages):
    tab = screenshot.opened(started, pages["shipped"], 390)
    box = tab.locator(".scroll:has(table)", has_text="macro-averaged over tasks").first
    places = """b => { const at = e => e.getBoundingClientRect(); b.scrollTo(200, 250);
      return [at(b.querySelector("thead")).top - at(b).top, at(b.querySelector("tbody th")).left - at(b).left]; }"""
    assert box.evaluate(places) == [0, 0]
    tab.close()


def test_print_opens_what_is_closed_and_cuts_no_figure(started, page, tmp_path):
    tab = screenshot.opened(started, page, 1440)
    closed = 'document.querySelectorAll("details:not([open])").length'
    assert tab.evaluate(closed) > 3
    tab.evaluate(f"addEventListener('beforeprint', () => window.closed_in_print = {closed})")
    assert tab.pdf(path=tmp_path / "page.pdf", prefer_css_page_size=True)[:5] == b"%PDF-"
    assert tab.evaluate("window.closed_in_print") == 0
    assert tab.evaluate(closed) > 3, "closed again afterwards"
    tab.emulate_media(media="print")
    # an A4 page on its side has 273 × 186 mm inside the margins
    tab.set_viewport_size({"width": round(273 / 25.4 * 96), "height": 900})
    sizes = tab.evaluate("[...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().height)")
    assert max(sizes) < 186 / 25.4 * 96
    assert tab.evaluate(
        "[...document.querySelectorAll('.scroll')].every(e => getComputedStyle(e).overflowY === 'visible')"
    )
    assert tab.evaluate(
        "[...document.querySelectorAll('figure')].every(e => getComputedStyle(e).breakInside === 'avoid')"
    )
    tab.close()
