"""Commands that results name as the next one to type."""

import pytest
from lorsa.commands.harvest import next_of_harvest


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ("attn_in attn_out", ""),
        ("attn_in attn_out mlp_in mlp_out", " --kind all"),
        ("resid_out", " --kind all"),
        ("resid_in", " --kind sae --site resid_in"),
        ("attn_in", " --kind sae --site attn_in"),
        ("mlp_in attn_out", " --kind sae --site attn_out,mlp_in"),
    ],
)
def test_what_a_harvest_is_followed_by_can_be_trained(names: str, options: str) -> None:
    """After --sites resid_in it was --kind all, which then found no site of its kinds."""
    sites = [f"{layer}.{name}" for layer in (1, 2) for name in names.split()]
    harvested = {"store": "acts", "layers": [1, 2], "sites": sites, "nonfinite_layers": []}
    assert next_of_harvest(harvested) == f"lorsa train --store acts{options}"
