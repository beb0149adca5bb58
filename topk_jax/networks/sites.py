"""Top-K sites: which named activations are made sparse, and how; the record of features."""

import difflib
from collections.abc import Mapping, Sequence
from typing import cast

from jaxtyping import Array, Float

from topk_jax.topk import TopK, kept_count

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
        kept_count(sites[name].fraction, ())
    return sites


class Features(dict[str, Array]):
    """Named activations of one forward pass, in order of computation."""

    def __init__(self, sites: Mapping[str, TopK]):
        super().__init__()
        self._sites = sites

    def site(self, name: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Records `x` under `name`, after Top-K where there is a site, and returns that."""
        if name in self._sites:
            x = cast(Array, self._sites[name].apply({}, x))
        self[name] = x
        return x
