import base64
import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lorsa.analyze.choices import KINDS, LOWER, TOKEN_BAR
from lorsa.analyze.result import Analysis
from lorsa.analyze.schema import HEADS
from lorsa.errors import AnalyzeError
from lorsa.view.build import build_page
from lorsa.view.columns import rounded
from lorsa.view.contexts import AFTER, BEFORE, BESIDE, stretches
from lorsa.view.files import data_file
from unseal import change_json, unseal

from reading import WORDS, make_analysis


def _read(out: Path, name: str) -> Any:
    """Return what a data file hands to the page."""
    (path,) = out.glob(f"page-*/data-{name}.js")
    text = path.read_text("ascii")
    assert text.startswith(f'lorsaData("{name}","')
    return json.loads(gzip.decompress(base64.b64decode(text.split('"')[3])))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_analysis(tmp_path / "run/analysis", n_heads=60)
    return tmp_path / "run"


def test_page_holds_every_head_and_context(run: Path) -> None:
    page = build_page(run)
    analysis = Analysis.open(run)
    assert page.file == run / "page/index.html"
    index = _read(run / "page", "index")
    assert index["n_heads"] == page.n_heads == 60
    for name in ("frequency", "distance", "probe_induction"):
        assert index["columns"][name] == rounded(analysis.heads[name].to_pylist())
    heads = _read(run / "page", "heads-0") + _read(run / "page", "heads-1")
    for number in (0, 17, 47, 48, 58):
        asked = analysis.examples(number)
        found = heads[number]["top"] + heads[number]["sample"]
        assert [c["position"] for c in found] == [e["position"] for e in asked]
        assert [c["sources"] for c in found] == [e["sources"] for e in asked]
        for context, example in zip(found, asked, strict=True):
            assert sum(context["source_acts"]) + context["rest"] == pytest.approx(example["act"])
            tokens = analysis.tokens(example["seq"])
            for start, ids in context["parts"]:
                assert ids == tokens[start : start + len(ids)].tolist()
    assert heads[59]["top"] == []
    assert index["columns"]["type"][59] == "silent"
    assert _read(run / "page", "tokens")["texts"] == list(WORDS)


def _spoil(path: Path) -> None:
    """Flip a bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda run: (run / "analysis/explanations.jsonl").touch(),
        lambda run: make_analysis(run / "analysis", n_heads=61),
        lambda run: _spoil(next((run / "page").glob("page-*/data-heads-1.js"))),
        lambda run: next((run / "page").glob("page-*/style.css")).unlink(),
        lambda run: next((run / "page").glob("page-*/made.json")).write_text("[]"),
        lambda run: (run / "page/index.html").write_text(
            '<meta name="generator" content="lorsa view">'
        ),
    ],
    ids=["explained", "another analysis", "flipped", "missing", "damaged", "no folder"],
)
def test_a_page_is_made_again_only_if_it_has_to_be(
    run: Path, change: Callable[[Path], object]
) -> None:
    """view --serve made a page of half a minute anew before it served one that was up to date."""
    told: list[int] = []
    first = build_page(run)
    second = build_page(run, report=lambda done, total: told.append(done))
    assert (first.is_new, second.is_new, told) == (True, False, [])
    assert second == first._replace(is_new=False)
    change(run)
    third = build_page(run)
    assert third.is_new
    assert not build_page(run).is_new


def test_page_names_heads_that_can_be_trusted_only(run: Path) -> None:
    """Three heads stood under every kind, by their probe alone: 11 of 24 were of it."""
    build_page(run)
    index, analysis = _read(run / "page", "index"), Analysis.open(run)
    named = {start["kind"]: start for start in index["starts"]}
    assert list(named) == list(KINDS)
    for kind in KINDS[:-1]:
        low = np.minimum(*(analysis.heads[LOWER[n]].to_numpy() for n in (kind, f"probe_{kind}")))
        low = np.nan_to_num(low, nan=-1.0)
        for head in named[kind]["heads"]:
            assert low[head] >= 0.5
            row = analysis.head(head)
            assert row["type"] == kind
            assert min(row[kind], row[f"probe_{kind}"]) >= 0.5
        assert named[kind]["best"] == pytest.approx(low.max(), abs=1e-3)
    assert any(start["heads"] for start in named.values())
    assert index["columns"]["type_by"] == analysis.heads["type_by"].to_pylist()
    heads = _read(run / "page", "heads-0")
    assert heads[3]["low"]["induction"] == pytest.approx(
        analysis.head(3)["induction_low"], abs=1e-3
    )


def test_an_analysis_of_version_1_has_sure_types_too(run: Path) -> None:
    """Its types are of the text alone; they are sure where its probes say the same."""
    rows = pq.read_table(run / "analysis/heads.parquet").to_pylist()
    gone = ("type_by", "successor_words", "successor_chance", *LOWER.values())
    old = [{name: x for name, x in row.items() if name not in gone} for row in rows]
    old[8] |= {"type": "previous_token", "previous_token": 0.9, "probe_previous_token": 0.8}
    old[9] |= {"type": "induction", "induction": 0.9, "probe_induction": 0.1}
    old[10] |= {"type": "induction", "induction": 0.9, "probe_induction": None}
    for row in old[8:11]:
        row |= {"n_fired": 20, "probe_fired": 20}
    schema = pa.schema([field for field in HEADS if field.name not in gone])
    pq.write_table(pa.Table.from_pylist(old, schema), run / "analysis/heads.parquet")
    unseal(run / "analysis")
    change_json(run / "analysis/analysis.json", version=1)
    build_page(run)
    index = _read(run / "page", "index")
    assert index["columns"]["type_by"][8:11] == ["both", "disputed", "text"]
    assert index["columns"]["trust"][8:11] == [0.8, None, None]
    named = {start["kind"]: start for start in index["starts"]}
    assert 8 in named["previous_token"]["heads"]
    assert named["successor"] == {"kind": "successor", "heads": [], "scores": [], "best": None}


def test_explanations_are_with_their_heads(run: Path) -> None:
    text = "the <b>end</b> of a list"
    said = {"head": 50, "text": text, "model": "m", "score": 0.75, "n_scored": 20, "scorer": "m"}
    (run / "analysis" / "explanations.jsonl").write_text(json.dumps(said) + "\n")
    build_page(run)
    heads = _read(run / "page", "heads-1")
    assert heads[2]["explained"]["text"] == text
    assert heads[3]["explained"] is None


def test_characters_in_pieces_are_told(tmp_path: Path) -> None:
    """A page had only the texts of single tokens, so characters in pieces were bytes on it."""
    words = ["<0xC3>", "<0xA9>", " a"]
    make_analysis(tmp_path / "analysis", words=words)
    build_page(tmp_path)
    for head in _read(tmp_path / "page", "heads-0"):
        for context in head["top"] + head["sample"]:
            told = {first for first, n, text in context["joined"] if (n, text) == (2, "é")}
            assert len(told) == len(context["joined"])
            for start, ids in context["parts"]:
                pairs = itertools.pairwise(ids)
                there = {start + i for i, pair in enumerate(pairs) if pair == (0, 1)}
                assert there <= told


def test_no_path_of_this_machine_is_on_a_page(run: Path) -> None:
    where = {"run": str(run), "store": str(run / "acts"), "model": str(run / "tiny.gguf")}
    unseal(run / "analysis")
    change_json(run / "analysis/analysis.json", **where)
    build_page(run)
    assert str(run) not in json.dumps(_read(run / "page", "index"))
    assert _read(run / "page", "index")["facts"]["model"] == "tiny.gguf"


def test_search_finds_what_a_head_promotes(run: Path) -> None:
    """What chance promotes was found, too."""
    build_page(run)
    analysis = Analysis.open(run)
    found = _read(run / "page", "search")["promotes"]
    start = sum(found["counts"][:7])
    part = slice(start, start + found["counts"][7])
    row = analysis.head(7)
    beyond = [
        (each["token"], z)
        for each, z in zip(row["promoted"], row["promoted_z"], strict=True)
        if z >= TOKEN_BAR
    ]
    assert 0 < len(beyond) < len(row["promoted"])
    assert list(zip(found["tokens"][part], found["strengths"][part], strict=True)) == [
        (token, pytest.approx(z, rel=1e-3)) for token, z in beyond
    ]


def test_size_and_number_of_files_are_reported(run: Path) -> None:
    page = build_page(run)
    files = [path for path in (run / "page").rglob("*") if path.is_file()]
    assert page.n_files == len(files)
    assert page.n_bytes == sum(path.stat().st_size for path in files)


def test_columns_of_the_model_are_null_without_one(tmp_path: Path) -> None:
    make_analysis(tmp_path / "analysis", with_model=False)
    build_page(tmp_path)
    assert set(_read(tmp_path / "page", "index")["columns"]["promotes"]) == {None}
    assert _read(tmp_path / "page", "heads-0")[0]["suppressed"] is None


def test_heads_that_never_fired_make_a_page(tmp_path: Path) -> None:
    make_analysis(tmp_path / "analysis", n_heads=1)
    build_page(tmp_path)
    assert _read(tmp_path / "page", "index")["columns"]["n_fired"] == [0]


def test_nothing_of_the_corpus_stands_in_a_file_as_it_is(run: Path) -> None:
    build_page(run)
    for path in (run / "page").rglob("data-*.js"):
        assert b"<" not in path.read_bytes()


def test_data_file_takes_any_text() -> None:
    text = '</script><script>"\u2028\ud800'
    packed = data_file("x", [text]).decode("ascii").split('"')[3]
    assert json.loads(gzip.decompress(base64.b64decode(packed))) == [text]


def test_stretches_show_far_sources_between_gaps() -> None:
    main = range(200 - BEFORE, 200 + AFTER + 1)
    assert stretches(200, [190, 50], 256) == [range(50 - BESIDE, 51 + BESIDE), main]
    assert stretches(200, [main.start - 4], 256) == [range(main.start - 6, main.stop)]
    assert stretches(10, [0], 12) == [range(12)]
    assert stretches(200, [3], 256)[0] == range(6)
    assert len(stretches(2000, list(range(0, 1000, 50)), 2048)) == 7


def test_rounded_keeps_what_is_no_number_out() -> None:
    assert rounded([1.23456, None, float("nan"), float("inf"), 2.0]) == [1.235, None, None, None, 2]


def test_new_page_replaces_the_old_one_and_nothing_else(run: Path) -> None:
    out = run / "page"
    build_page(run)
    (old,) = out.glob("page-*")
    (out / "notes.txt").write_text("mine")
    (out / "page-notes").mkdir()
    (out / "page-12345678.partial").mkdir()  # of a build that was killed
    (run / "analysis/explanations.jsonl").touch()  # or it would be up to date
    build_page(run)
    (new,) = out.glob("page-????????")
    assert new != old
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["index.html", "notes.txt", new.name, "page-notes"]
    )
    assert new.name in (out / "index.html").read_text("utf-8")


def test_foreign_file_in_an_old_page_stays(run: Path) -> None:
    build_page(run)
    (old,) = (run / "page").glob("page-*")
    (old / "notes.txt").write_text("mine")
    (run / "analysis/explanations.jsonl").touch()
    build_page(run)
    assert [path.name for path in old.iterdir()] == ["notes.txt"]


def test_failed_build_leaves_the_old_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_page(run)
    before = {path: path.read_bytes() for path in (run / "page").rglob("*.*") if path.is_file()}

    def fails(*_: Any) -> Any:
        raise AnalyzeError("half of it is not there")

    monkeypatch.setattr("lorsa.view.build.contexts", fails)
    (run / "analysis/explanations.jsonl").touch()
    with pytest.raises(AnalyzeError, match="half"):
        build_page(run)
    after = {path: path.read_bytes() for path in (run / "page").rglob("*.*") if path.is_file()}
    assert after == before
    assert not list((run / "page").glob("*.partial"))


def test_page_of_somebody_else_is_not_touched(run: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("<h1>mine</h1>")
    with pytest.raises(AnalyzeError, match="not a page of lorsa; choose another --out"):
        build_page(run, tmp_path / "site")
    with pytest.raises(AnalyzeError, match="is a file; --out takes a folder"):
        build_page(run, tmp_path / "site/index.html")


def test_missing_and_unfinished_analyses_are_reported(tmp_path: Path, run: Path) -> None:
    with pytest.raises(AnalyzeError, match="is not there: lorsa analyze"):
        build_page(tmp_path / "nothing")
    (run / "analysis/analysis.json").unlink()
    with pytest.raises(AnalyzeError, match="is unfinished"):
        build_page(run)
    assert not (run / "page").exists()
    assert not (tmp_path / "nothing").exists()


def test_example_of_a_lost_sequence_is_reported(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> Any:
        raise KeyError

    monkeypatch.setattr(Analysis, "tokens", lost)
    with pytest.raises(AnalyzeError, match="has no tokens of sequence"):
        build_page(run)
