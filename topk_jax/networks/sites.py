"""Top-K sites: which named activations are made sparse, and how; the record of features."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence

from jaxtyping import Array, Float

from topk_jax.topk import SITE_PREFIX, TopK

TopKSites = None | float | Mapping[str, float | TopK]


def resolve_sites(
    topk: TopKSites, published: Sequence[str], feature_names: Sequence[str]
) -> dict[str, TopK]:
    """Setting of each site.

    Args:
        topk: None (no site), a kept fraction in (0, 1] for the published sites, or a mapping from
            feature name to a fraction or a `TopK`.
        published: Names of the published sites.
        feature_names: Every name that may be a site.

    Raises:
        ValueError: An unknown site (the nearest names are listed), or a fraction outside (0, 1].
    """
    if topk is None:
        return {}
    settings = topk if isinstance(topk, Mapping) else dict.fromkeys(published, topk)
    sites = {}
    for name, setting in settings.items():
        if name not in feature_names:
            near = difflib.get_close_matches(name, feature_names, n=3, cutoff=0.4)
            hint = ", ".join(near or feature_names)
            raise ValueError(f"unknown Top-K site {name!r}: this network has e.g. {hint}")
        # Without a parent: a module made inside another's method would become its child.
        sites[name] = setting if isinstance(setting, TopK) else TopK(setting, parent=None)
    return sites


class Features(dict[str, Array]):
    """Named activations of one forward pass, in order of computation.

    Made and used within the `__call__` of a network. A site becomes a submodule of the network,
    "topk." and its name: it has a random stream and variables of its own.
    """

    def __init__(self, sites: Mapping[str, TopK]):
        super().__init__()
        self._sites = sites

    def site(self, name: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Records `x` under `name`, after Top-K where there is a site, and returns that."""
        if name in self._sites:
            setting = self._sites[name]
            # Not the setting itself, which several sites may share. A module finds its parent when
            # it is made.
            fields = {
                field.name: getattr(setting, field.name)
                for field in dataclasses.fields(setting)
                if field.init and field.name not in ("parent", "name")
            }
            x = type(setting)(**fields, name=f"{SITE_PREFIX}{name}")(x)
        self[name] = x
        return x
