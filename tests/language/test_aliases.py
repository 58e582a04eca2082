"""What --model takes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from lorsa.errors import LanguageModelError
from lorsa.language.aliases import ALIASES, ModelPath, resolve
from lorsa.language.load import load_config


def test_an_alias_is_a_hub_id() -> None:
    path = resolve("qwen2-7b")
    assert path.name == "Qwen/Qwen2-7B"
    assert path.offline


@pytest.mark.parametrize("given", ["Qwen2-7B", "Qwen/Qwen2-7B"])
def test_case_and_hub_ids(given: str) -> None:
    assert resolve(given).name == "Qwen/Qwen2-7B"


def test_a_folder_is_taken(model_folder: Path) -> None:
    assert resolve(str(model_folder)).name == str(model_folder)


def test_a_gguf_file_is_split(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    path = resolve(str(tmp_path / "m.gguf"))
    assert (path.name, path.gguf_file) == (str(tmp_path), "m.gguf")
    assert path.id == str(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("qwen2-7", r"no known alias; did you mean qwen2-7b"),
        ("zzzz", r"^model 'zzzz' is no known alias\. Give an alias"),
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        ("/nowhere/m.gguf", "no such file"),
    ],
)
def test_what_is_none_of_these_is_named(given: str, message: str) -> None:
    with pytest.raises(LanguageModelError, match=message):
        resolve(given)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(LanguageModelError, match=r"no config.json"):
        resolve(str(tmp_path))


def test_no_network_is_one_line() -> None:
    with pytest.raises(
        LanguageModelError, match="not on this machine, and the Hub cannot be reached"
    ):
        load_config(resolve("qwen2-7b"))


def test_a_model_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's answers, without the Hub."""

    class Hub:
        def model_info(self, *_: Any, **__: Any) -> Any:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(LanguageModelError, match="some/thing is not on the Hub, or is private"):
        resolve("some/thing")


def _refusal() -> Exception:
    response = SimpleNamespace(status_code=403, headers={}, request=None)
    return GatedRepoError("refused", response=response)  # type: ignore[arg-type]


def test_a_gated_model_is_one_line_wherever_the_hub_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the first question, where it was taken for a model that is not there, or at the files."""
    from lorsa.language import load as models

    class Hub:
        def model_info(self, *_: Any, **__: Any) -> Any:
            raise _refusal()

    def files(*_: Any, **__: Any) -> Any:
        raise OSError("You are trying to access a gated repo.\nLog in") from _refusal()

    message = "^model some/thing is gated; accept its terms on the Hub and run: hf auth login$"
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi", Hub)
        with pytest.raises(LanguageModelError, match=message):
            resolve("some/thing")
    monkeypatch.setattr(models.AutoConfig, "from_pretrained", files)
    with pytest.raises(LanguageModelError, match=message):
        load_config(ModelPath("some/thing", revision="abc"))


def test_a_pinned_model_keeps_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:

    class Hub:
        def model_info(self, *_: Any, **__: Any) -> Any:
            return type("Info", (), {"sha": "abc"})()

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    path = resolve("some/thing")
    assert (path.revision, path.offline) == ("abc", False)


@pytest.mark.parametrize(
    ("alias", "hub_id"),
    [
        ("qwen2-72b", "Qwen/Qwen2-72B"),
        ("qwen2.5-14b-instruct", "Qwen/Qwen2.5-14B-Instruct"),
        ("qwen3-14b", "Qwen/Qwen3-14B-Base"),
        ("qwen3-32b", "Qwen/Qwen3-32B"),
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("llama-3.1-70b", "meta-llama/Llama-3.1-70B"),
        ("llama-3.3-70b", "meta-llama/Llama-3.3-70B-Instruct"),
        ("pythia-12b-deduped", "EleutherAI/pythia-12b-deduped"),
        ("gemma-2-27b-it", "google/gemma-2-27b-it"),
        ("gemma-3-270m", "google/gemma-3-270m"),
        ("gemma-3-27b", "google/gemma-3-27b-pt"),
        ("smollm2-1.7b-instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
        ("gpt2", "openai-community/gpt2"),
        ("gpt2-xl", "openai-community/gpt2-xl"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.3"),
    ],
)
def test_aliases_of_models_that_people_use(alias: str, hub_id: str) -> None:
    assert ALIASES[alias] == hub_id


def test_aliases_are_lower_case_hub_ids() -> None:
    assert all(
        alias == alias.lower() and hub_id.count("/") == 1 for alias, hub_id in ALIASES.items()
    )
