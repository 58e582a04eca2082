"""Hub datasets: a folder of the same layout stands in for the Hub."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from lorsa.errors import HarvestError
from lorsa.harvest.corpus import hub_data
from lorsa.harvest.corpus.counts import Counts
from lorsa.harvest.corpus.document import Column
from lorsa.harvest.corpus.hub_data import HubDataset

SHA = "0123456789abcdef0123456789abcdef01234567"
CONFIGS = """---
configs:
- config_name: first
  data_files:
  - {split: train, path: "first/train-*.jsonl"}
  - {split: test, path: "first/test.jsonl"}
- config_name: second
  data_files: "second/*.jsonl"
---
"""


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset owner/texts with two configs, that load_dataset finds."""
    root = tmp_path / "hub/owner/texts"
    for part in range(4):
        rows = [{"text": f"text {part} {i}", "n": i, "ids": [part, i]} for i in range(5)]
        _write(root / f"first/train-{part}.jsonl", rows)
    _write(root / "first/test.jsonl", [{"text": "", "n": 0, "ids": []}])
    _write(root / "second/a.jsonl", [{"text": "named", "id": "urn:1"}, {"text": None, "id": "u"}])
    (root / "README.md").write_text(CONFIGS)
    load, names = datasets.load_dataset, datasets.get_dataset_config_names
    asked: list[str] = []

    def load_there(path: str, *args: Any, revision: str, **settings: Any) -> Any:
        asked.append(revision)
        return load(str(tmp_path / "hub" / path), *args, cache_dir=str(tmp_path / "c"), **settings)

    monkeypatch.setattr(datasets, "load_dataset", load_there)
    monkeypatch.setattr(
        datasets,
        "get_dataset_config_names",
        lambda path, revision: names(str(tmp_path / "hub" / path)),
    )
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=SHA))
    return root


def _open(**settings: Any) -> HubDataset:
    given = {"config": "first", "split": "train", "column": Column("text")} | settings
    return HubDataset("owner/texts", **given)


def _read(source: HubDataset, seed: int = 0) -> list[Any]:
    return list(source.read(random.Random(seed), Counts()))


@pytest.mark.usefixtures("hub")
def test_rows_are_documents_in_a_seeded_order_of_files() -> None:
    source = _open()
    first, again = _read(source), _read(source)
    assert first == again
    assert {doc.text for doc in first} == {f"text {p} {i}" for p in range(4) for i in range(5)}
    assert first[0].name == "owner/texts:0"
    orders = {tuple(doc.text for doc in _read(source, seed)) for seed in range(4)}
    assert len(orders) > 1
    assert source.facts == {"data_config": "first", "data_split": "train", "data_revision": SHA}


@pytest.mark.usefixtures("hub")
def test_token_ids_and_own_names() -> None:
    ids = [doc.ids.tolist() for doc in _read(_open(column=Column("ids", is_ids=True)))]
    assert sorted(ids) == [[p, i] for p in range(4) for i in range(5)]
    counts = Counts()
    docs = list(_open(config="second").read(random.Random(0), counts))
    assert [(doc.name, doc.text) for doc in docs] == [("owner/texts:urn:1", "named")]
    assert counts.to_dict() == {"null_rows": 1}


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "dev"}, "no split 'dev'; there is train, test: choose one by --data-split"),
        ({"config": "third"}, "no config 'third'; there is first, second: choose .*--data-config"),
        ({"config": None}, "several configs; there is first, second: choose one by --data-config"),
        ({"column": Column("body")}, r"no column 'body'; there is text.*; choose .*--text-column"),
        ({"column": Column("n")}, "column 'n' is int, not text; choose another by --text-column"),
        ({"column": Column("n", is_ids=True)}, "'n' is int, not lists of .*--tokens-column"),
    ],
)
def test_what_is_not_there_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(HarvestError, match=message) as error:
        _read(_open(**settings))
    assert "\n" not in str(error.value)


def _raise(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def _answer(kind: type[Exception], status: int) -> Exception:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("refused", response=response)  # type: ignore[call-arg]


OUT = r"give --data FILE-OR-FOLDER, or --data stdlib"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), f"the Hub cannot be reached; connect .* {OUT}"),
        (TimeoutError(), f"the Hub cannot be reached; .* {OUT}"),
        (_answer(GatedRepoError, 403), "is gated; accept its terms .* hf auth login"),
        (_answer(RepositoryNotFoundError, 401), "no such file or folder, and no such dataset"),
    ],
)
def test_a_hub_that_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setattr(HfApi, "dataset_info", _raise(error))
    with pytest.raises(HarvestError, match=message):
        _open()


def _gated() -> Exception:
    error = datasets.exceptions.DatasetNotFoundError(
        "Dataset 'owner/texts' is a gated dataset on the Hub. You must be authenticated."
    )
    error.__cause__ = _answer(GatedRepoError, 401)
    return error


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_gated(), "is gated; accept its terms on the Hub and run: hf auth login"),
        (ConnectionError("reset"), "the Hub cannot be reached"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found texts.py"),
            "needs code of its own, which is never run",
        ),
        (OSError("strange\nthings"), "owner/texts cannot be read: strange"),
    ],
)
def test_a_dataset_that_cannot_be_opened_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", _raise(error))
    with pytest.raises(HarvestError, match=message) as raised:
        _open()
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("hub")
def test_a_network_that_goes_away_in_between_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    source = _open()
    rows = source._rows(iter([{"text": "one"}]))
    assert next(rows)[1] == {"text": "one"}

    def broken() -> Any:
        yield {"text": "one"}
        raise ConnectionError("reset")

    rows = source._rows(broken())
    next(rows)
    with pytest.raises(HarvestError, match="the Hub cannot be reached"):
        next(rows)


def test_without_the_package_the_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_data, "find_spec", lambda _name: None)
    with pytest.raises(HarvestError, match=rf"pip install 'lorsa\[datasets\]', or {OUT}"):
        _open()


def test_no_network_shows_before_datasets_tries_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests have no network: datasets alone would try again for 23 seconds."""
    monkeypatch.setattr(datasets, "load_dataset", _raise(AssertionError("was asked")))
    with pytest.raises(HarvestError, match="the Hub cannot be reached"):
        _open()
