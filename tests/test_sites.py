"""Sites and ports: their spelling, their order, and what is no site."""

import pytest
from lorsa.sites import SITE_NAMES, Ports, Site, parse_site_names, ports_between, spell_site_names


def test_sites_are_spelled_and_read() -> None:
    """A site is its layer and name; its path is that of its array."""
    assert str(Site(12, "mlp_in")) == "12.mlp_in"
    assert Site.parse("12.mlp_in") == Site(12, "mlp_in")
    assert Site(3, "resid_mid").path == "layers/3/resid_mid"


@pytest.mark.parametrize(
    "text", ["mlp_in", "12", "012.mlp_in", "-1.mlp_in", "12.mlp_inn", "².attn_in"]
)
def test_what_is_no_site_is_refused(text: str) -> None:
    """Whatever `str` does not write is refused."""
    with pytest.raises(ValueError, match="is no site"):
        Site.parse(text)


def test_groups_and_names_come_in_order() -> None:
    """Groups stand for their members; each name comes once."""
    assert parse_site_names("resid_out, attn,attn_out") == ("attn_in", "attn_out", "resid_out")
    assert parse_site_names("attn,mlp,resid") == SITE_NAMES
    assert spell_site_names(("attn_in", "attn_out", "mlp_out")) == "attn,mlp_out"


def test_near_names_are_offered() -> None:
    """A name that is nearly right gets the right one."""
    with pytest.raises(ValueError, match="near: mlp_in"):
        parse_site_names("mlpin")


def test_ports_of_an_sae_have_one_site() -> None:
    """A site that is read and written is one site."""
    site = Site(3, "resid_out")
    assert Ports((site,), (site,)).sites == (site,)
    assert ports_between(3, "mlp_in", "mlp_out").sites == (Site(3, "mlp_in"), Site(3, "mlp_out"))
