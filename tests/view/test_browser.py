"""The page in Chromium, from the disk: what is clicked, typed, pointed at and shown."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lorsa.analyze.choices import LOWER
from lorsa.analyze.result import Analysis
from lorsa.analyze.said import said
from lorsa.analyze.schema import HEADS
from lorsa.view.build import build_page
from lorsa.view.columns import rounded
from unseal import change_json, unseal

from reading import WORDS, make_analysis

pytest.importorskip("playwright", reason="playwright is not installed: pip install playwright")

from browser import chromium, find_chromium
from playwright.sync_api import Browser, Page, expect

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="chromium is not installed: apt-get install chromium"
)
N_HEADS = 300


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_analysis(folder / "analysis", n_heads=N_HEADS, n_ctx=256, n_sources=8)
    build_page(folder)
    return folder


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A window in which nothing may go wrong unseen, nor anything be asked of a network."""
    found = browser.new_page(viewport={"width": 1200, "height": 800})
    found.set_default_timeout(10_000)
    wrong: list[str] = []
    found.on("console", lambda told: wrong.append(told.text) if told.type != "log" else None)
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
    found.on("dialog", lambda dialog: (wrong.append("a dialog"), dialog.dismiss()))
    found.on(
        "request",
        lambda r: None if re.match("(file|data|blob):", r.url) else wrong.append(r.url),
    )
    yield found
    found.close()
    assert wrong == []


def _go(page: Page, run: Path, address: str = "#/") -> None:
    page.goto(f"{(run / 'page/index.html').as_uri()}{address}")
    page.wait_for_selector("html[data-ready=yes]")


def _listed(page: Page) -> list[int]:
    return [int(n) for n in page.locator(".rows .cell.head").all_inner_texts()]


def test_overview_tells_what_it_is_and_leads_on(page: Page, run: Path) -> None:
    _go(page, run)
    expect(page.locator("h1")).to_have_text("Heads of layer 1 of tiny")
    facts = page.locator(".facts").inner_text()
    assert f"{N_HEADS}" in facts
    assert "0.2" in facts
    assert "1" in facts
    scatter = page.locator(".scatter canvas")
    box = scatter.bounding_box()
    assert box is not None
    page.select_option(".axes select >> nth=1", "entropy")
    assert "y=entropy" in page.url
    x, y = _a_point(page)
    page.mouse.move(box["x"] + x, box["y"] + y)
    expect(page.locator("#tip")).to_contain_text("entropy")
    head = page.locator("#tip b").first.inner_text()
    page.mouse.click(box["x"] + x, box["y"] + y)
    expect(page.locator("h1")).to_have_text(f"Head {head}")
    page.go_back()
    expect(page.locator("select >> nth=1")).to_have_value("entropy")
    page.locator(".bars .pick").nth(20).click()
    assert "frequency=" in page.url


def _a_point(page: Page) -> tuple[float, float]:
    """Return where a head lies in the scatter."""
    found = page.evaluate(
        """() => { const frame = document.querySelector(".scatter");
        const point = placePoints(
            makeAxis("frequency", MARGIN.left, frame.clientWidth - MARGIN.right),
            makeAxis("entropy", frame.clientHeight - MARGIN.bottom, MARGIN.top), new Set())[40];
        return [point.x, point.y]; }"""
    )
    return found[0], found[1]


def test_characters_in_pieces_are_whole(page: Page, tmp_path: Path) -> None:
    """They were shown as bytes; now whole at the first piece, and the others are marks."""
    make_analysis(tmp_path / "analysis", words=["<0xE4>", "<0xBB><0x8A>", " a"])
    build_page(tmp_path)
    _go(page, tmp_path, "#/head/3")
    page.wait_for_selector(".context .tok")
    texts = page.locator(".context .tok").all_inner_texts()
    assert ("今", "⁺") in itertools.pairwise(texts)


def test_scatter_draws_every_head_once(page: Page, run: Path) -> None:
    """Mixed and silent heads were drawn twice, and so less translucent than the others."""
    _go(page, run)
    drawn = page.evaluate(
        """() => { let n = 0;
        const pen = { beginPath() {}, moveTo() {}, fill() {}, arc() { n++; } };
        const heads = [...Array(index.n_heads).keys()];
        drawPoints(pen, heads.map((head) => ({ head, x: 0, y: 0 })));
        return n; }"""
    )
    assert drawn == N_HEADS


def test_table_sorts_by_every_column(page: Page, run: Path) -> None:
    _go(page, run, "#/heads")
    known = Analysis.open(run).heads
    for name in ("frequency", "probe_induction", "norm_o"):
        page.evaluate(f"document.querySelector('[data-sort={name}]').click()")
        expect(page.locator(f"[aria-sort=descending] [data-sort={name}]")).to_have_count(1)
        values = rounded(known[name].to_pylist())
        shown = [values[head] for head in _listed(page)]
        assert shown[:10] == sorted((x for x in values if x is not None), reverse=True)[:10]
    page.locator("[data-sort=type]").click()
    expect(page.locator("[aria-sort=ascending] [data-sort=type]")).to_have_count(1)
    for name in page.eval_on_selector_all("[data-sort]", "all => all.map(x => x.dataset.sort)"):
        page.evaluate(f"document.querySelector('[data-sort={name}]').click()")
        expect(page.locator(f"[data-sort={name}]")).to_have_count(1)
        assert len(_listed(page)) > 10


def test_table_keeps_only_rows_in_sight(page: Page, run: Path) -> None:
    _go(page, run, "#/heads")
    assert 10 < page.locator(".rows .row").count() < 60
    page.locator(".grid").evaluate("grid => grid.scrollTop = grid.scrollHeight")
    expect(page.locator(f"#row-{N_HEADS - 1}")).to_be_visible()


def test_table_filters_by_type_range_and_parent(page: Page, run: Path) -> None:
    _go(page, run, "#/heads")
    page.select_option("#filter-type", "induction")
    expect(page.locator(".count")).to_contain_text(f"of {N_HEADS} heads")
    assert {head % 8 for head in _listed(page)} == {1}
    page.select_option("#range-column", "distance")
    page.fill("#range-low", "20")
    page.fill("#range-high", "ten")
    page.keyboard.press("Enter")
    expect(page.locator("#range-high")).to_have_attribute("aria-invalid", "true")
    page.fill("#range-high", "")
    page.keyboard.press("Enter")
    expect(page.locator(".chip")).to_have_count(2)
    distances = Analysis.open(run).heads["distance"].to_pylist()
    assert all(distances[head] >= 20 for head in _listed(page))
    page.reload()
    page.wait_for_selector("html[data-ready=yes]")
    expect(page.locator("#filter-type")).to_have_value("induction")
    expect(page.locator(".chip")).to_have_count(2)
    page.locator(".chip").first.click()
    page.locator(".chip").first.click()
    expect(page.locator(".count")).to_have_text(f"{N_HEADS} heads")
    page.select_option("#filter-parent", "0")
    expect(page.locator(".chip")).to_have_text(re.compile("parent head 0"))
    page.go_back()
    expect(page.locator("#filter-parent")).to_have_value("")


def test_search_finds_heads_by_token_and_number(page: Page, run: Path) -> None:
    _go(page, run)
    page.keyboard.press("/")
    page.keyboard.type("promotes: 東京")
    expect(page.locator(".count")).to_contain_text("of")
    analysis = Analysis.open(run)
    token = WORDS.index(" 東京")
    scores = {
        head: each["z"]
        for head in range(N_HEADS)
        for each in said(analysis.head(head), "promoted") or []
        if each["token"] == token
    }
    assert _listed(page)[:10] == sorted(scores, key=lambda head: (-scores[head], head))[:10]
    first = page.locator(".rows .cell.match").first
    expect(first).to_have_text(f"promotes ·東京z {max(scores.values()):g}")
    expect(first.locator(".token.hit")).to_have_text("·東京")
    page.fill("#search", "no such token")
    expect(page.locator(".none")).to_be_visible()
    page.fill("#search", "↵")
    expect(page.locator(".count")).to_contain_text("heads")
    page.fill("#search", "123")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Head 123")


def test_search_says_what_matched_the_strongest_first(page: Page, tmp_path: Path) -> None:
    """Heads came by their number, and most of their rows did not show the token anywhere."""
    make_analysis(tmp_path / "analysis", n_heads=40)
    explained = {"head": 7, "text": "copies a cat", "model": "m"}
    (tmp_path / "analysis" / "explanations.jsonl").write_text(json.dumps(explained) + "\n")
    build_page(tmp_path)
    _go(page, tmp_path, "#/heads?q=cat")
    expect(page.locator("[aria-sort=descending] [data-sort=match]")).to_have_count(1)
    rows = page.locator(".rows .row")
    for row in rows.all():
        expect(row.locator(".cell.match")).to_contain_text("cat")
    relations = {"fires on", "reads", "reads embedding", "promotes", "explanation"}
    found = page.locator(".rows .match > .note").all_inner_texts()
    assert {each.strip() for each in found} == relations
    _go(page, tmp_path, "#/heads?q=explained%3A+cat")
    assert _listed(page) == [7]
    expect(page.locator(".rows .cell.match")).to_contain_text("explanation copies a cat")
    _go(page, tmp_path, "#/heads?q=cat&sort=-frequency")
    expect(page.locator("[aria-sort=descending] [data-sort=frequency]")).to_have_count(1)
    page.fill("#search", "")
    expect(page.locator("[data-sort=match]")).to_have_count(0)


def test_what_chance_explains_is_grey(page: Page, run: Path) -> None:
    """Tokens and heads that random directions have too stood as facts, in the table as well."""
    row = Analysis.open(run).head(17)
    _go(page, run, "#/head/17")
    for title, name in (("Makes likelier", "promoted"), ("Heads that write alike", "similar_o")):
        panel = page.locator(".panel", has_text=title)
        expect(panel.locator("li")).to_have_count(len(row[name]))
        expect(panel.locator("li:not(.chance)")).to_have_count(len(said(row, name) or []))
        expect(panel).to_contain_text("Grey is no better than random.")


def test_an_analysis_without_a_test_says_so(page: Page, tmp_path: Path) -> None:
    """Those of earlier versions have no z: their lists are grey, and nothing is said of them."""
    make_analysis(tmp_path / "analysis", tested=False)
    build_page(tmp_path)
    _go(page, tmp_path, "#/head/3")
    panel = page.locator(".panel", has_text="Makes likelier")
    expect(panel).to_contain_text("Not tested against chance: analyze again.")
    expect(panel.locator("li:not(.chance)")).to_have_count(0)
    _go(page, tmp_path, "#/heads?q=promotes%3A+cat")
    assert _listed(page) == []
    assert page.locator("[data-sort=promotes]").count() == 0


def test_head_shows_values_of_what_it_read(page: Page, run: Path) -> None:
    _go(page, run, "#/head/17")
    example = Analysis.open(run).examples(17)[0]
    text = page.locator(".text").first
    fired = text.locator(".fired")
    expect(fired).to_have_attribute("data-at", str(example["position"]))
    arcs = text.locator("path.arc")
    assert arcs.count() > 0
    source = text.locator(f'[data-at="{example["sources"][0]}"]')
    source.hover()
    tip = page.locator("#tip")
    expect(tip).to_contain_text(f"+{example['source_acts'][0]:g}")
    expect(tip).to_contain_text(f"{100 * example['source_acts'][0] / example['act']:.0f} %")
    expect(text).to_have_class(re.compile("one|all"))
    page.mouse.move(5, 5)
    expect(tip).to_be_hidden()
    fired.focus()
    expect(tip).to_contain_text("fires with")
    page.keyboard.press("ArrowLeft")
    expect(tip).to_contain_text("contributes")
    expect(page.locator(".gap").first).to_have_text(re.compile(r"… \d+ tokens? …"))
    aside = page.locator("aside").inner_text()
    for part in ("induction", "How far back", "Makes likelier", "Heads that write alike"):
        assert part in aside


def test_corpus_with_markup_is_shown_and_not_run(page: Page, run: Path) -> None:
    _go(page, run, "#/heads?q=fires%3A+alert")
    page.keyboard.press("Enter")
    page.wait_for_selector(".contexts")
    expect(page.locator("main")).to_contain_text("<script>alert(1)</script>")
    assert page.locator("main script, main b b, aside b b").count() == 0


def test_keys_lead_through_the_heads(page: Page, run: Path) -> None:
    _go(page, run, "#/heads?sort=-frequency")
    order = _listed(page)
    for key in ("j", "ArrowDown", "k"):
        page.keyboard.press(key)
    expect(page.locator("[aria-selected=true]")).to_have_attribute("data-head", str(order[1]))
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text(f"Head {order[1]}")
    page.keyboard.press("]")
    expect(page.locator("h1")).to_have_text(f"Head {order[2]}")
    page.keyboard.press("[")
    expect(page.locator("h1")).to_have_text(f"Head {order[1]}")
    page.keyboard.press("Escape")
    expect(page.locator("[aria-selected=true]")).to_have_attribute("data-head", str(order[1]))
    assert "sort=-frequency" in page.url
    page.keyboard.press("?")
    expect(page.locator("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(page.locator("h1")).to_contain_text("Heads of")


def test_addresses_reload_and_back(page: Page, run: Path) -> None:
    _go(page, run, "#/head/42")
    expect(page.locator("h1")).to_have_text("Head 42")
    page.reload()
    expect(page.locator("h1")).to_have_text("Head 42")
    page.locator(".near a").first.click()
    expect(page.locator("h1")).to_have_text("Head 43")
    page.go_back()
    expect(page.locator("h1")).to_have_text("Head 42")
    page.goto(page.url.replace("42", "9999"))
    expect(page.locator("main")).to_contain_text("Head 9999 is not there; heads are 0 to 299.")
    page.goto(page.url.replace("9999", str(N_HEADS - 1)))
    expect(page.locator("main")).to_contain_text("This head never fired on the 2,048 tokens")


def test_dark_and_light_are_kept(page: Page, run: Path) -> None:
    _go(page, run)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark != light
    page.reload()
    page.wait_for_selector("html[data-ready=yes]")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
    page.click("#theme")


@pytest.mark.parametrize("address", ["#/", "#/heads?q=cat&type=induction", "#/head/17"])
def test_phone_needs_no_scrolling_sideways(page: Page, run: Path, address: str) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    _go(page, run, address)
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_types_that_are_not_sure_are_grey_and_say_so(page: Page, run: Path) -> None:
    """A head that fired once stood there as an induction head like any other."""
    heads = Analysis.open(run).heads.select(["head", "type", "type_by"]).to_pylist()
    reasons = {"text": "by text only", "probes": "by probes only", "disputed": "by text only"}
    for by, reason in reasons.items():
        head = next(row for row in heads if row["type_by"] == by)
        _go(page, run, f"#/head/{head['head']}")
        expect(page.locator("h1")).to_have_text(f"Head {head['head']}")
        expect(page.locator(".title .unsure")).to_contain_text("?")
        expect(page.locator(".title .by")).to_have_text(reason)
    sure = next(row["head"] for row in heads if row["type_by"] == "both")
    _go(page, run, f"#/head/{sure}")
    expect(page.locator("h1")).to_have_text(f"Head {sure}")
    expect(page.locator(".title .unsure")).to_have_count(0)
    _go(page, run)
    expect(page.locator(".types")).to_contain_text(" of ")


def test_kinds_without_a_head_say_none_here(page: Page, tmp_path: Path) -> None:
    """Every kind had three heads to start with, whatever they were."""
    make_analysis(tmp_path / "analysis", n_heads=12)
    path = tmp_path / "analysis/heads.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row |= dict.fromkeys(LOWER, 0.35) | dict.fromkeys(LOWER.values(), 0.31)
    rows[3] |= {"type": "local", "local": 0.9, "probe_local": 0.9}
    rows[3] |= {"local_low": 0.7, "probe_local_low": 0.8}
    rows[4] |= {"type": "mixed", "long_range_low": 0.9, "probe_long_range_low": 0.9}
    pq.write_table(pa.Table.from_pylist(rows, HEADS), path)
    unseal(tmp_path / "analysis")
    build_page(tmp_path)
    _go(page, tmp_path)
    expect(page.locator(".card h3")).to_have_text(["local"])
    expect(page.locator(".card li")).to_have_count(1)
    expect(page.locator(".card .n")).to_have_text("0.70")
    expect(page.locator(".none-here")).to_contain_text("induction (best 0.31)")
    expect(page.locator(".none-here")).to_contain_text("long-range (those that are have a nearer")


def test_verified_families_are_marked(page: Page, tmp_path: Path) -> None:
    make_analysis(tmp_path / "analysis", n_heads=40)
    path = tmp_path / "analysis/analysis.json"
    family = {"n_heads": 7, "effect": 0.47, "low": 0.4, "null": [0.0, 0.02], "writes": 1.0}
    families = {"induction": family | {"verified": True}, "local": family | {"verified": False}}
    unseal(tmp_path / "analysis")
    change_json(path, families=families)
    build_page(tmp_path)
    _go(page, tmp_path)
    mark = page.locator(".types .verified")
    expect(mark).to_have_count(1)
    expect(mark).to_have_attribute("title", re.compile("7 heads .* 0.47 nats .* 0.02 at most"))


def test_page_without_a_model_says_how_to_get_the_rest(page: Page, tmp_path: Path) -> None:
    make_analysis(tmp_path / "analysis", with_model=False)
    build_page(tmp_path)
    _go(page, tmp_path, "#/head/3")
    expect(page.locator("aside")).to_contain_text("lorsa analyze RUN --store STORE --model MODEL")
    _go(page, tmp_path, "#/heads")
    assert page.locator("[data-sort=promotes]").count() == 0


def test_page_of_heads_that_never_fired(page: Page, tmp_path: Path) -> None:
    make_analysis(tmp_path / "analysis", n_heads=1)
    build_page(tmp_path)
    for address, text in (("#/", "No head fired."), ("#/head/0", "never fired"), ("#/heads", "1 ")):
        _go(page, tmp_path, address)
        expect(page.locator("main")).to_contain_text(text)
