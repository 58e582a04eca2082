"""Pass over firings of any dictionary, against all of them at once."""

import pytest
import torch
from lorsa.analyze.collect import Firings, choose_examples
from lorsa.dictionaries.code import Code

N_FEATURES, N_SEQS, N_CTX, N_SLOTS = 12, 9, 8, 3


def _code() -> Code:
    """Random firings, some slots empty; the last feature never fires."""
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(N_SEQS, N_CTX, N_FEATURES - 1, generator=generator)
    ids = chance.topk(N_SLOTS, dim=2).indices.sort(dim=2).values
    acts = torch.randn(ids.shape, generator=generator)
    acts[torch.rand(ids.shape, generator=generator) < 0.3] = 0
    return Code(acts, ids.int())


@pytest.mark.parametrize("step", [1, 4, N_SEQS])
def test_firings_are_those_of_all_sequences(step: int) -> None:
    """Counts, sums, largest and sample depend on no batch; no attention is asked for."""
    code = _code()
    found = Firings.none(N_FEATURES, n_top=4, n_sample=200)
    for start in range(0, N_SEQS, step):
        part = Code(code.acts[start : start + step], code.ids[start : start + step])
        found.add(part, start * N_CTX)
    dense = torch.zeros(N_SEQS, N_CTX, N_FEATURES).scatter_(2, code.ids.long(), code.acts)
    assert found.n_fired.tolist() == (dense != 0).sum(dim=(0, 1)).tolist()
    assert torch.allclose(found.sum_act, dense.double().sum(dim=(0, 1)))
    assert found.mean_acts.isnan().tolist() == [False] * (N_FEATURES - 1) + [True]
    largest = dense.abs().amax(dim=1).T.topk(4, dim=1).values
    assert torch.equal(found.top.acts.abs()[:-1], largest[:-1])
    assert found.sample.keys.isfinite().sum(dim=1).tolist() == found.n_fired.tolist()
    chosen, ascending = choose_examples(found, 2)
    flat = dense.flatten(0, 1)
    assert torch.equal(chosen.acts, flat[chosen.places, chosen.features])
    assert ascending[-1].isnan().all()


def test_a_copy_into_its_tensors_restores_a_pass() -> None:
    code, half = _code(), 4
    whole, again = (Firings.none(N_FEATURES, n_top=2, n_sample=5) for _ in range(2))
    whole.add(Code(code.acts[:half], code.ids[:half]), 0)
    for name, tensor in again.tensors().items():
        tensor.copy_(whole.tensors()[name])
    for each in (whole, again):
        each.add(Code(code.acts[half:], code.ids[half:]), half * N_CTX)
    for name, tensor in again.tensors().items():
        assert torch.equal(tensor, whole.tensors()[name]), name
