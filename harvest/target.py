"""What a harvest runs on, known before any weights are loaded."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..errors import HarvestError
from ..language.families import require_attention
from ..language.subject import Subject
from ..sites import Site, parse_site_names
from ..store.layers import choose_layers
from ..store.manifest import Manifest
from ..store.site_facts import OWNER
from ..store.spelling import layers_of
from .chosen import asked_names, lacks, left_out, named_alone, present
from .config import HarvestConfig
from .processes import own_devices, this_process


class Target(NamedTuple):
    """A language model, the sites of it that were asked for, and where it is to run."""

    subject: Subject
    sites: list[Site]
    """Sites that were asked for, those that give others among them"""
    devices: list[str]
    """GPUs of this process, or the CPU"""

    @property
    def layers(self) -> list[int]:
        """Layers of the sites."""
        return layers_of(self.sites)

    def named(self) -> dict[int, str]:
        """Return the layers with the names of their attention modules, or else of their blocks."""
        if all(OWNER[site.name] == "attention" for site in self.sites):
            return {layer: self.subject.attention[layer] for layer in self.layers}
        blocks = self.subject.blocks
        return {n: blocks[n].name if n in blocks else f"layer {n}" for n in self.layers}

    def load(self, layers: Sequence[int], *, dtype: str) -> Any:
        """Load the model as far as the last of some layers."""
        return self.subject.load(devices=self.devices, dtype=dtype, n_layers=max(layers) + 1)


def find_target(
    config: HarvestConfig,
    *,
    store: Manifest | None = None,
    sites: Sequence[Site] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Target:
    """Find the model and check the request against it.

    Args:
        config: the request.
        store: manifest of a store whose model it has to be, at the same commit.
        sites: sites to write, whatever the request names; None takes those of the request.
        report: is called with a line for each part of the model that is left out.

    Raises:
        HarvestError: no such model, none whose attention can be harvested, layers outside of it,
            sequences longer than it reads, or no such device.
    """
    try:
        devices = own_devices(config.device, this_process())
    except ValueError as error:
        raise HarvestError(str(error)) from None
    revisions = {} if store is None else {store.model["id"]: store.model["revision"]}
    subject = Subject.find(config.model, revisions=revisions)
    if subject.longest is not None and config.n_ctx > subject.longest:
        raise HarvestError(
            f"n_ctx is {config.n_ctx}; {subject.id} reads at most {subject.longest} tokens: use "
            f"--n-ctx {subject.longest} or less"
        )
    wanted = _asked(config, subject) if sites is None else list(sites)
    attention = [site for site in wanted if OWNER[site.name] == "attention"]
    if attention:
        require_attention(subject.found, layers_of(attention))
    there = present(wanted, subject.blocks if len(attention) < len(wanted) else {}, config)
    for line in (*subject.left_out(), left_out(wanted, there)):
        if line is not None:
            report(line)
    return Target(subject, there, devices)


def _asked(config: HarvestConfig, subject: Subject) -> list[Site]:
    """Return the sites of a model that are asked for, by layer, whether it has them or not."""
    among = list(subject.attention) if config.layers == "all" else range(subject.n_layers)
    layers = _layers(config.layers, among, where=subject.id)
    names = asked_names(config.sites, config.outputs)
    return [Site(layer, name) for layer in layers for name in names]


def asked_sites(config: HarvestConfig, manifest: Manifest) -> list[Site]:
    """Return the sites that are asked for, out of those of a store's model, by layer.

    Raises:
        HarvestError: a layer is not there, or a resid_mid that is asked for by its name.
    """
    model = manifest.model
    among = model.get("attention_layers") or range(model["n_layers"])
    if config.layers != "all" and config.sites != "attn":
        among = range(model["n_layers"])
    layers = _layers(config.layers, among, where=model["id"])
    names, plain = asked_names(config.sites, config.outputs), parse_site_names(config.sites)
    whole = [n for n in layers if all(Site(n, name) in manifest.sites for name in plain)]
    sites = [Site(n, name) for n in layers for name in (plain if n in whole else names)]
    middles = [s for s in sites if s.name == "resid_mid" and lacks(manifest.modules, s)]
    if middles and middles[0].name in named_alone(config):
        raise HarvestError(f"{middles[0]}: the layer has none; choose other --sites")
    return [site for site in sites if site not in middles]


def _layers(text: str, among: Sequence[int], *, where: str) -> list[int]:
    """Return the layers that a text names; HarvestError if they are not there."""
    try:
        return choose_layers(text, among, where=where)
    except ValueError as error:
        raise HarvestError(str(error)) from None
