"""Parts of a stranger's model besides its weights: none runs, none is left out without a word."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.errors import LanguageModelError
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.language import strangers
from lorsa.language.aliases import ModelPath
from lorsa.language.subject import Subject
from tiny import N_CTX, make_model, make_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model that a test may damage."""
    make_model("llama-gqa").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def _code(folder: Path, name: str) -> Path:
    """Write a module that leaves a trace when it runs; return the trace's path."""
    trace = folder.parent / "ran"
    (folder / name).write_text(f"open({str(trace)!r}, 'w').close()\n")
    return trace


@pytest.fixture(autouse=True)
def yes_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer every question with yes, as a script's stdin may."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


def _all_of(folder: Path) -> None:
    found = Subject.find(str(folder))
    found.tokenizer()
    found.load(devices=["cpu"], n_layers=1)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": [None, "odd.OddFast"]}, "tokenizer_class": "OddFast"},
        ),
        (
            "config.json",
            {
                "model_type": "odd",
                "auto_map": {"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.OddModel"},
            },
        ),
        ("config.json", {"model_type": "odd", "auto_map": {"AutoConfig": "me/other--odd.Odd"}}),
    ],
)
def test_code_that_a_model_needs_is_refused(
    folder: Path, file: str, settings: dict[str, Any]
) -> None:
    """transformers asked on the terminal, and a 'y' on stdin ran it."""
    trace = _code(folder, "odd.py")
    _change(folder / file, **settings)
    with pytest.raises(LanguageModelError, match="needs code of its own, and lorsa runs no") as e:
        _all_of(folder)
    assert "trust_remote_code" not in str(e.value)
    assert not trace.exists()


def test_code_that_a_model_does_not_need_is_left_out_and_said(
    folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    trace = _code(folder, "odd.py")
    _change(folder / "config.json", auto_map={"AutoModelForCausalLM": "odd.OddModel"})
    _change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["odd.Slow", None]})
    lines: list[Any] = []
    settings = {"model": str(folder), "layers": "0", "data": str(text_folder), "n_ctx": N_CTX}
    store = tmp_path / "acts"
    harvest(HarvestConfig(**settings, store=store, tokens=4 * N_CTX), report=lines.append)
    said = [line for line in lines if isinstance(line, str) and "code of its own" in line]
    assert said == [
        f"config.json of {folder} names code of its own (odd.py), which is not run: transformers' "
        "own llama is used",
        f"tokenizer_config.json of {folder} names code of its own (odd.py), which is not run: "
        "transformers' own tokenizer is used",
    ]
    assert not trace.exists()


def test_a_kernel_that_a_config_names_is_not_fetched(folder: Path) -> None:
    """It is code of the Hub, which transformers would load for the attention."""
    _change(folder / "config.json", attn_implementation="someone/kernel")
    found = Subject.find(str(folder))
    assert found.load(devices=["cpu"]).config._attn_implementation == "sdpa"


def test_generation_of_its_own_is_not_loaded(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    trace = _code(folder / "custom_generate", "generate.py")
    _all_of(folder)
    assert not trace.exists()
    assert not (folder / "ran").exists()


class _Runs:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return open, (str(self.trace), "w")


def test_weights_as_a_pickle_run_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({"model.norm.weight": _Runs(tmp_path / "ran")}, file)
    with pytest.raises(LanguageModelError, match=r"cannot be loaded: "):
        Subject.find(str(folder)).load(devices=["cpu"])
    torch.save({"model.norm.weight": _Runs(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(LanguageModelError, match=r"cannot be loaded: "):
        Subject.find(str(folder)).load(devices=["cpu"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", strangers.ADAPTER_FILES)
def test_an_adapter_beside_a_model_is_refused(folder: Path, name: str) -> None:
    """Without the package peft it was passed over without a word; with it, it was applied."""
    (folder / name).write_text('{"base_model_name_or_path": "me/base\\n"}')
    with pytest.raises(
        LanguageModelError, match=rf"has an adapter \({name}.*merge it into its"
    ) as e:
        Subject.find(str(folder))
    assert "\n" not in str(e.value)
    assert ("of me/base" in str(e.value)) == (name == "adapter_config.json")


def test_an_adapter_in_place_of_a_model_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(LanguageModelError, match=r"has an adapter \(adapter_config.json\), which"):
        Subject.find(str(folder))


def test_an_adapter_of_the_hub_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text('{"base_model_name_or_path": "me/base"}')
    monkeypatch.setattr(strangers, "find_adapter_config_file", lambda *_, **__: str(file))
    with pytest.raises(LanguageModelError, match=r"model me/tuned has an adapter .*, of me/base"):
        strangers.require_no_adapter(ModelPath("me/tuned", revision="main"))
