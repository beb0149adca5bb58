"""Top-K sites: which named activations are made sparse, and how; the record of features."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence

from jaxtyping import Array, Float

from topk_jax.topk import SITE_PREFIX, TopK

TopKSites = None | float | str | Mapping[str, float | TopK]


def parse_stages(text: str) -> dict[str, float]:
    """Sites of an option string of Li et al.'s training script.

    Args:
        text: Stages and the percentage that they keep: "2_20" is after stage 2 at 20 %, "1-2-3_10"
            after three stages at 10 %, "" nowhere. Several such parts, separated by commas, keep
            different percentages ("1_20,3_10"; ours).

    Returns:
        Fractions by the names of the stages' outputs in a ResNet, `{"layer2": 0.2}`. They are the
        percentage times .01 in float64, from which the authors compute how many entries they keep.

    Raises:
        ValueError: Another form, a percentage outside (0, 100], or a stage named twice.
    """
    sites: dict[str, float] = {}
    for part in text.split(",") if text else ():
        found = re.fullmatch(r"([1-9]\d*(?:-[1-9]\d*)*)_(\d+(?:\.\d*)?)", part.strip())
        if not found or not 0 < float(found[2]) <= 100:
            raise ValueError(
                f"Top-K stages {text!r}: expected stages and a percentage in (0, 100], such as "
                "'2_20' (20 % after stage 2), '1-2-3_10' or '1_20,3_10'"
            )
        for stage in found[1].split("-"):
            if f"layer{stage}" in sites:
                raise ValueError(f"Top-K stages {text!r}: stage {stage} is named twice")
            sites[f"layer{stage}"] = float(found[2]) * 0.01
    return sites


def resolve_sites(
    topk: TopKSites, published: Sequence[str], feature_names: Sequence[str]
) -> dict[str, TopK]:
    """Setting of each site.

    Args:
        topk: None (no site), a kept fraction in (0, 1] for the published sites, a mapping from
            feature name to a fraction or a `TopK`, or text as `parse_stages` takes it.
        published: Names of the published sites.
        feature_names: Every name that may be a site.

    Raises:
        ValueError: An unknown site (the nearest names are listed), a fraction outside (0, 1], or
            text of another form.
    """
    if topk is None:
        return {}
    if isinstance(topk, str):
        topk = parse_stages(topk)
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
