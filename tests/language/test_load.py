"""Loading: what is damaged or missing is one line, never random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lorsa.errors import LanguageModelError
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.language import load as models
from lorsa.language.aliases import resolve
from lorsa.language.blocks import attention_sites
from lorsa.language.capture import Capture
from lorsa.language.load import load_config
from lorsa.language.subject import Subject
from lorsa.store.read.reader import ActivationStore
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, GQA, N_CTX, NEW, SIZES, TEXT, make_model, make_tokenizer, write_gguf


def _load(folder: Path, dtype: str = "auto", n_layers: int | None = None) -> Any:
    return Subject.find(str(folder)).load(devices=["cpu"], dtype=dtype, n_layers=n_layers)


def _facts(folder: Path, model: Any) -> dict[str, Any]:
    return Subject.find(str(folder)).facts(model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model that a test may damage."""
    make_model("llama-gqa").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_is_ready_to_run_in_float32(folder: Path) -> None:
    model = _load(folder)
    assert not model.training
    assert model.dtype == torch.float32
    facts = _facts(folder, model)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["n_layers"] == 3
    assert facts["revision"] is None
    assert _facts(folder, _load(folder, "bfloat16"))["dtype"] == "bfloat16"


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_after_the_last_one_asked_for_are_not_loaded(family: str, tmp_path: Path) -> None:
    make_model(family).save_pretrained(tmp_path)
    whole, short = _load(tmp_path), _load(tmp_path, n_layers=2)
    assert _facts(tmp_path, short) == _facts(tmp_path, whole)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (whole, short)]
    assert sizes[1] < sizes[0]
    found = []
    for model in (whole, short):
        with Capture(model, attention_sites(model, [0, 1])) as capture:
            found.append(capture.run(torch.arange(2 * N_CTX).view(2, N_CTX)))
    for site, values in found[0].items():
        assert torch.equal(found[1][site], values)


DEPTH: dict[str, Any] = {
    "gemma3n": lambda: transformers.Gemma3nTextConfig(
        **(SIZES | GQA | {"num_hidden_layers": 4}),
        layer_types=["sliding_attention", "full_attention"] * 2,
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=400,
        num_kv_shared_layers=1,
        laurel_rank=4,
        altup_num_inputs=2,
        sliding_window=8,
    ),
    "gpt-neox-japanese": lambda: transformers.GPTNeoXJapaneseConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=3, num_attention_heads=4
    ),
    "gemma3n-kv": lambda: transformers.Gemma3nTextConfig(
        **(SIZES | GQA | {"num_hidden_layers": 5}),
        layer_types=["full_attention"] * 5,
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=400,
        num_kv_shared_layers=2,
        laurel_rank=4,
        altup_num_inputs=2,
    ),
}
"""Models in which weights or layers depend on how many layers there are."""


@pytest.mark.parametrize("family", DEPTH)
def test_layers_that_depend_on_their_number_are_loaded_with_all(
    family: str, tmp_path: Path
) -> None:
    """Fewer were loaded than the weights are made for, and then said to be lacking."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(DEPTH[family]()).eval()
    model.save_pretrained(tmp_path)
    n_layers = model.config.num_hidden_layers
    found = []
    for loaded in (_load(tmp_path), _load(tmp_path, n_layers=2)):
        assert loaded.config.num_hidden_layers == n_layers
        with Capture(loaded, attention_sites(loaded, [0, 1])) as capture:
            found.append(capture.run(torch.arange(2 * N_CTX).view(2, N_CTX)))
    for site, values in found[0].items():
        assert torch.equal(found[1][site], values)


@pytest.mark.parametrize(
    ("kind", "lacking"),
    [
        ("AutoModel", "lm_head.weight"),
        ("AutoModelForSequenceClassification", "lm_head.weight"),
        ("AutoModelForCausalLM", "model.norm.weight"),
    ],
)
def test_weights_after_the_last_layer_are_needed_by_no_harvest(
    kind: str, lacking: str, tmp_path: Path
) -> None:
    """Any missing weight refused a model: embedding and reward models have no lm_head."""
    torch.manual_seed(0)
    config = FAMILIES["llama-gqa"]()
    config.pad_token_id = 0
    getattr(transformers, kind).from_config(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(lacking, None)
    save_file(tensors, file, {"format": "pt"})
    for n_layers in (1, 3):
        loaded = _load(tmp_path, n_layers=n_layers)
        stored = next(t for name, t in tensors.items() if "layers.0.self_attn.q_proj" in name)
        assert torch.equal(loaded.model.layers[0].self_attn.q_proj.weight, stored)
    with pytest.raises(LanguageModelError, match=rf"lacks weights .*: {lacking}$"):
        _load(tmp_path)  # for whom logits are needed


@pytest.mark.parametrize(
    "name", ["embed_tokens", "layers.0.mlp.up_proj", "layers.1.input_layernorm"]
)
def test_weights_before_the_last_layer_are_needed(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.{name}.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LanguageModelError, match=rf"lacks weights .*: .*model.{name}.weight$"):
        _load(folder, n_layers=2)


def test_a_model_is_split_where_one_gpu_does_not_take_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of accelerate as the GPUs have room; there is none here to see it done."""
    path = resolve(str(folder))
    free: dict[str, int] = {"cuda:2": 100_000, "cuda:3": 200_000}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu], 10**12))

    def placed() -> Any:
        return models._placed(path, load_config(path), "bfloat16", list(free))

    n_bytes = 2 * sum(p.numel() for p in make_model("llama-gqa").parameters())
    free["cuda:2"] = int(n_bytes / 0.79)
    assert placed() == {"device_map": {"": "cuda:2"}}
    free["cuda:2"] = free["cuda:3"] = n_bytes
    parts = placed()["device_map"]
    assert set(parts.values()) == {2, 3}
    free["cuda:2"] = free["cuda:3"] = int(n_bytes / 2 / 0.79)  # blocks are not cut: too little
    with pytest.raises(
        LanguageModelError, match=r"take .* kB, more than there is room for on cuda:2"
    ):
        placed()
    free["cuda:3"] = 0
    with pytest.raises(
        LanguageModelError, match=r"take .* kB, more than there is room for on cuda:2"
    ):
        placed()


def test_missing_weights_are_named(folder: Path) -> None:
    """transformers goes on with random numbers."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        LanguageModelError, match=r"lacks weights .*: model.layers.1.self_attn.k_proj"
    ):
        _load(folder)


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LanguageModelError, match=r"another shape: model.norm.weight$"):
        _load(folder)


def test_a_file_cut_short_is_one_line(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(LanguageModelError, match="cannot be loaded: ") as error:
        _load(folder)
    assert "\n" not in str(error.value)


def test_a_model_without_tokenizer_is_named(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(LanguageModelError, match="tokenizer"):
        Subject.find(str(folder)).tokenizer()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, make_model("llama-gqa"), make_tokenizer())
    return path


def test_a_gguf_file_is_the_model_that_it_was_made_of(gguf_file: Path) -> None:
    tokens = torch.arange(40)[None]
    loaded, original = _load(gguf_file), make_model("llama-gqa")
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, original(tokens).logits, atol=1e-4)
    tokenizer = Subject.find(str(gguf_file)).tokenizer()
    found = tokenizer(TEXT, add_special_tokens=NEW)  # for transformers 4 the file has a BOS
    assert found["input_ids"] == make_tokenizer()(TEXT)["input_ids"]


def test_a_gguf_file_is_harvested(gguf_file: Path, text_folder: Path, tmp_path: Path) -> None:
    config = HarvestConfig(
        model=str(gguf_file),
        layers="1",
        store=tmp_path / "acts",
        data=str(text_folder),
        n_ctx=N_CTX,
        tokens=4 * N_CTX,
        device="cpu",
    )
    harvest(config)
    facts = ActivationStore.open(config.store).manifest
    assert facts.modules["1.attention"]["self_check"]["passed"]
    assert facts.model["id"] == str(gguf_file)


def test_a_gguf_file_without_the_package_says_what_to_install(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: Any, **__: Any) -> Any:
        raise ImportError("gguf")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", lacking)
    monkeypatch.setattr(models, "find_spec", lambda _name: None)
    with pytest.raises(LanguageModelError, match="needs the package gguf; run: pip install gguf"):
        load_config(resolve(str(gguf_file)))
