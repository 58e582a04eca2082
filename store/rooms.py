"""Folders of sites and modules in a store: whose they are, and which are nobody's."""

from collections.abc import Collection, Iterable

from ..sites import SITE_GROUPS, SITE_NAMES, Site
from .arrays import norms_at
from .manifest import Manifest
from .places import Place
from .site_facts import MODULES, PAIR, channel_of, needed_modules, scale_of, weights_at

ROOMS = ("weights", "layers")
"""Folders with one for each layer; those below layers/ come last: `rm` finds a layer by it."""


def own_folders(root: Place, manifest: Manifest, sites: Collection[Site]) -> list[Place]:
    """Return the folders that only some sites need and that exist; a layer's, if it has no others.

    Args:
        root: place of the store.
        manifest: facts of the store, with these sites or without.
        sites: the sites.
    """
    kept = {site: facts for site, facts in manifest.sites.items() if site not in sites}
    rest = {site.layer for site in kept}
    gone = sorted({site.layer for site in sites})
    known = known_folders(manifest.only(kept))
    found = [f"{room}/{layer}" for room in ROOMS for layer in gone if layer not in rest]
    for layer in gone:
        if layer in rest:
            found += [name for name in _below(root, layer) if name not in known]
    order = [root / name for room in ROOMS for name in found if name.startswith(f"{room}/")]
    return [folder for folder in order if folder.exists() or folder.is_symlink()]


def known_folders(manifest: Manifest) -> set[str]:
    """Return the folders of the arrays and weights of a store, and of its modules, by path."""
    known: set[str] = set()
    for site in manifest.sites:
        known |= {site.path, scale_of(site.path), channel_of(site.path)}
        known.add(norms_at(manifest, site).array)
    for module in needed_modules(manifest.sites, manifest.modules):
        folder = weights_at(module)
        known |= {folder, *(f"{folder}/{name}" for name in manifest.modules[module]["weights"])}
    return known


def orphaned_folders(root: Place, manifest: Manifest) -> list[str]:
    """Return the folders of layers, sites and modules that are not in the store, by name."""
    known, layers = known_folders(manifest), {str(layer) for layer in manifest.layers}
    found = []
    for room in ("layers", "weights"):
        for name in sorted(_names(root / room)):
            if name.isdecimal() and name not in layers:
                found.append(f"{room}/{name}")
    for layer in manifest.layers:
        found += [name for name in _below(root, layer) if name not in known]
    return found


def orphaned_sites(root: Place, manifest: Manifest) -> set[Site]:
    """Return the sites that orphaned folders of a store may be of."""
    found: set[Site] = set()
    for name in orphaned_folders(root, manifest):
        room, layer, *below = name.split("/")
        found |= {Site(int(layer), each) for each in _sites_of(room, below)}
    return found - manifest.sites.keys()


def _sites_of(room: str, below: list[str]) -> Iterable[str]:
    """Return the names of sites whose a folder of a layer may be."""
    if not below:
        return SITE_NAMES
    if room == "layers":
        return [n for n in SITE_NAMES if below[0].startswith(n)] or list(PAIR)
    of_module = {module: SITE_GROUPS[group] for group, module in MODULES.items()}
    return of_module.get(below[0], PAIR)


def _below(root: Place, layer: int) -> list[str]:
    """Return the folders of a layer's arrays, weights and modules that exist, by path."""
    return [
        f"{room}/{layer}/{name}"
        for room in ROOMS
        for name in sorted(_names(root / room / str(layer)))
    ]


def _names(folder: Place) -> list[str]:
    """Return the names of the folders in a folder; none where it is not there."""
    if not folder.is_dir():
        return []
    return [each.name for each in folder.iterdir() if each.is_dir() or each.is_symlink()]
