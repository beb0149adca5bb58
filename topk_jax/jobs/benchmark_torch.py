"""PyTorch's side of the benchmarks: torchvision's networks in eager mode, Top-K as forward hooks.

Nothing here is needed otherwise, and PyTorch is imported only when it is asked for. All functions
take the modules `torch` and `torchvision` as `import_torch` gives them.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from topk_jax.jobs import benchmark
from topk_jax.networks import create_network
from topk_jax.topk import kept_count

MemoryFormat = Literal["contiguous", "channels_last"]
Activation = Callable[[Any], Any]


class Torch(NamedTuple):
    """Both packages."""

    torch: Any
    torchvision: Any


def import_torch() -> Torch:
    """Imports both packages.

    Raises:
        ImportError: One of them is not installed, or the two do not fit each other; the message
            says which.
    """
    modules = []
    for name in Torch._fields:
        try:
            modules.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            raise ImportError(f"{error.name} is not installed") from error
        except (RuntimeError, OSError) as error:
            # torchvision registers its operators on import and fails with another build of torch.
            reason = " ".join(str(error).split())
            raise ImportError(f"{name} is installed but cannot be imported: {reason}") from error
    return Torch(*modules)


def import_alone(report: Callable[[str], None]) -> Any:
    """The module `torch`, set to as many threads as XLA uses; None, said why, if not comparable."""
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        report(f"topk_jax alone: {error.name} is not installed; pip install torch to compare")
        return None
    backend = jax.default_backend()
    if backend != "cpu" and not (backend == "gpu" and torch.cuda.is_available()):
        report(f"topk_jax alone: JAX is on {backend}, which this PyTorch cannot use")
        return None
    torch.set_num_threads(benchmark.cpu_count())
    return torch


def authors_topk(packages: Torch, fraction: float) -> Activation:
    """Top-K as Li et al. compute it: the indices of `topk`, scattered into a mask of ones.

    `topk` leaves open which of equal values it takes. On [n, c, h, w].
    """
    torch = packages.torch

    def activation(x: Any) -> Any:
        rows = x.reshape(*x.shape[:2], -1)
        kept = rows.abs().topk(kept_count(fraction, x.shape[2:]), dim=2).indices
        mask = torch.zeros_like(rows).scatter_(2, kept, 1)
        return (rows * mask).reshape(x.shape)

    return activation


def stable_topk(packages: Torch, fraction: float) -> Activation:
    """Top-K by a stable sort: of equal values the first, as `topk_jax.topk` has it."""
    torch = packages.torch

    def activation(x: Any) -> Any:
        rows = x.reshape(*x.shape[:2], -1)
        order = rows.abs().sort(dim=2, descending=True, stable=True).indices
        kept = order[..., : kept_count(fraction, x.shape[2:])]
        mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(2, kept, True)
        return torch.where(mask, rows, torch.zeros((), dtype=rows.dtype)).reshape(x.shape)

    return activation


def network(
    packages: Torch,
    name: str,
    state_dict: Mapping[str, np.ndarray],
    *,
    activation: Activation | None = None,
    memory_format: MemoryFormat = "contiguous",
) -> Any:
    """Torchvision's module with these weights, whose memory it shares where the layout allows.

    Args:
        packages: See `import_torch`.
        name: The network.
        state_dict: Arrays under torch's names.
        activation: Put behind the published sites; None is the plain network.
        memory_format: Layout of the convolutions' weights.
    """
    torch, torchvision = packages
    with torch.device("meta"):  # no memory, and no time for an initialisation
        module = torchvision.models.get_model(name, weights=None)
    tensors = {key: torch.from_numpy(array) for key, array in state_dict.items()}
    counters = {key for key in module.state_dict() if key.endswith("num_batches_tracked")}
    tensors |= {key: torch.zeros((), dtype=torch.long) for key in counters}
    module.load_state_dict(tensors, assign=True)
    module.eval()
    if memory_format == "channels_last":
        module.to(memory_format=torch.channels_last)
    if activation is not None:
        for site in site_modules(packages, name, module):
            site.register_forward_hook(lambda module, inputs, output: activation(output))
    return module


def site_modules(packages: Torch, name: str, module: Any) -> list[Any]:
    """The modules behind which the published sites of a network lie, in order of computation."""
    sites = create_network(name).published_sites
    if name.startswith("resnet"):
        return [getattr(module, site) for site in sites]
    kinds = packages.torch.nn
    relus = [each for each in module.features if isinstance(each, kinds.ReLU)]
    pools = (each for each in module.features if isinstance(each, kinds.MaxPool2d))
    return [
        next(pools) if site.startswith("pool") else relus[int(site.removeprefix("relu")) - 1]
        for site in sites
    ]


def inference(
    packages: Torch,
    module: Any,
    images: Float32[np.ndarray, "n h w 3"],
    *,
    memory_format: MemoryFormat = "contiguous",
) -> Callable[[], Float32[np.ndarray, "n classes"]]:
    """A call of the module on these images, in inference mode."""
    torch = packages.torch
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=layout)

    def call() -> Any:
        with torch.inference_mode():
            return module(batch).numpy()

    return call


def topk_forms(torch: Any, x: Array, fraction: float) -> dict[str, Callable[[], None]]:
    """Calls of Top-K on the tensor, as PyTorch's users write it.

    "authors" is the published formulation on NCHW. The others do less: unsorted indices, the kept
    values scattered instead of a mask, the k-th value compared with (keeps all ties), and the
    tensor left as it lies in memory (NHWC).

    Args:
        torch: The module.
        x: NHWC, float32 or bfloat16.
        fraction: Part kept.
    """
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    n, h, w, c = x.shape
    k = kept_count(fraction, (h, w))
    host = torch.from_numpy(np.array(x.astype(jnp.float32)).reshape(n, h * w, c))
    last = host.to(device=device, dtype=getattr(torch, x.dtype.name))
    first = last.transpose(1, 2).contiguous()

    def mask(rows: Any, dim: int, sort: bool) -> Any:
        kept = rows.abs().topk(k, dim=dim, sorted=sort).indices
        return rows * torch.zeros_like(rows).scatter_(dim, kept, 1)

    def values(rows: Any) -> Any:
        kept = rows.abs().topk(k, dim=2, sorted=False).indices
        return torch.zeros_like(rows).scatter_(2, kept, rows.gather(2, kept))

    def threshold(rows: Any) -> Any:
        magnitude = rows.abs()
        kth = magnitude.kthvalue(h * w - k + 1, dim=2, keepdim=True).values
        return torch.where(magnitude >= kth, rows, 0)

    def call(function: Callable[..., Any], *args: Any) -> Callable[[], None]:
        def timed() -> None:
            with torch.inference_mode():
                function(*args)
            if device == "cuda":
                torch.cuda.synchronize()

        return timed

    return {
        "authors": call(mask, first, 2, True),
        "unsorted mask": call(mask, first, 2, False),
        "unsorted values": call(values, first),
        "kthvalue": call(threshold, first),
        "channels last": call(mask, last, 1, False),
    }
