"""PyTorch's side of the benchmarks: torchvision's networks in eager mode, Top-K as forward hooks.

Nothing here is needed otherwise, and PyTorch is imported only when it is asked for. All functions
take the modules `torch` and `torchvision` as `import_torch` gives them.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from topk_jax.images import Preprocessing
from topk_jax.jobs import benchmark
from topk_jax.networks import ResNet, create_network
from topk_jax.topk import kept_count
from topk_jax.training.settings import Optimizer

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


def import_for_cpu(report: Callable[[str], None]) -> Torch | None:
    """Both packages, set to as many threads as XLA uses; None, said why, if not comparable."""
    backend = jax.default_backend()
    if backend != "cpu":
        report(f"topk_jax alone: the comparison with PyTorch is for the CPU, JAX is on {backend}")
        return None
    try:
        packages = import_torch()
    except ImportError as error:
        report(f"topk_jax alone: {error}; pip install torch torchvision for the comparison")
        return None
    packages.torch.set_num_threads(benchmark.cpu_count())
    return packages


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
    sites: Sequence[str] | None = None,
    num_classes: int | None = None,
    memory_format: MemoryFormat = "contiguous",
) -> Any:
    """A module with these weights, whose memory it shares where the layout allows.

    It is torchvision's, or `cifar_resnet` for the networks that torchvision lacks.

    Args:
        packages: See `import_torch`.
        name: The network.
        state_dict: Arrays under torch's names.
        activation: Put behind the sites; None is the plain network.
        sites: Names of features, the published ones by default; of a ResNet any stages.
        num_classes: Width of the logits, by default that of the network.
        memory_format: Layout of the convolutions' weights.
    """
    torch, torchvision = packages
    options = {} if num_classes is None else {"num_classes": num_classes}
    ours = create_network(name, **options)
    with torch.device("meta"):  # no memory, and no time for an initialisation
        if isinstance(ours, ResNet) and ours.shortcut == "padding":
            module = cifar_resnet(
                torch, blocks=ours.blocks, width=ours.width, num_classes=ours.num_classes
            )
        else:
            module = torchvision.models.get_model(name, weights=None, **options)
    tensors = {key: torch.from_numpy(array) for key, array in state_dict.items()}
    counters = {key for key in module.state_dict() if key.endswith("num_batches_tracked")}
    tensors |= {key: torch.zeros((), dtype=torch.long) for key in counters}
    module.load_state_dict(tensors, assign=True)
    module.eval()
    if memory_format == "channels_last":
        module.to(memory_format=torch.channels_last)
    if activation is not None:
        for site in site_modules(packages, name, module, sites):
            site.register_forward_hook(lambda module, inputs, output: activation(output))
    return module


def cifar_resnet(torch: Any, *, blocks: Sequence[int], width: int, num_classes: int) -> Any:
    """ResNet for small images with shortcuts of option A (He et al. 2016, section 4.2).

    Modules have torchvision's names. Where a block halves the map, its shortcut takes every second
    pixel and puts channels of zeros on either side.

    Args:
        torch: The module `torch`.
        blocks: Number of blocks of each stage.
        width: Channels of the first stage.
        num_classes: Width of the logits.
    """
    nn, functional = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int):
            super().__init__()
            self.stride, self.missing = stride, after - before
            self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(after)
            self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(after)

        def forward(self, x: Any) -> Any:
            y = functional.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            if self.missing:
                left = self.missing // 2
                x = x[:, :, :: self.stride, :: self.stride]
                x = functional.pad(x, (0, 0, 0, 0, left, self.missing - left))
            return functional.relu(x + y)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            before = width
            for stage, count in enumerate(blocks):
                after = width * 2**stage
                strides = [1 if stage == 0 else 2] + [1] * (count - 1)
                row = [
                    Block(before if i == 0 else after, after, stride)
                    for i, stride in enumerate(strides)
                ]
                self.add_module(f"layer{stage + 1}", nn.Sequential(*row))
                before = after
            self.fc = nn.Linear(before, num_classes)

        def forward(self, x: Any) -> Any:
            x = functional.relu(self.bn1(self.conv1(x)))
            for stage in range(1, len(blocks) + 1):
                x = getattr(self, f"layer{stage}")(x)
            return self.fc(x.mean(dim=(2, 3)))

    return Network()


def site_modules(
    packages: Torch, name: str, module: Any, sites: Sequence[str] | None = None
) -> list[Any]:
    """The modules behind which the sites of a network lie, the published ones by default."""
    ours = create_network(name)
    sites = ours.published_sites if sites is None else sites
    if isinstance(ours, ResNet):
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


def training_step(
    packages: Torch,
    module: Any,
    batch: Mapping[str, np.ndarray],
    *,
    preprocessing: Preprocessing,
    optimizer: Optimizer,
    memory_format: MemoryFormat = "contiguous",
) -> Callable[[], float]:
    """A call that trains the module on this batch once more, and gives the loss before that.

    The loss is the mean cross-entropy, the update PyTorch's SGD.

    Args:
        packages: See `import_torch`.
        module: From `network`; its parameters are changed in place.
        batch: `image` uint8 [n, h, w, 3] and `label` int32 [n].
        preprocessing: How pixels are normalised, at every call.
        optimizer: Learning rate, momentum and weight decay.
        memory_format: Layout of the images.
    """
    torch = packages.torch
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    pixels = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(batch["label"]).long()
    mean = torch.tensor(preprocessing.mean).reshape(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std).reshape(1, 3, 1, 1)
    update = torch.optim.SGD(
        module.parameters(),
        lr=optimizer.learning_rate,
        momentum=optimizer.momentum,
        weight_decay=optimizer.weight_decay,
    )
    module.train()

    def step() -> float:
        images = pixels.to(torch.float32).contiguous(memory_format=layout)
        update.zero_grad()
        loss = torch.nn.functional.cross_entropy(module((images / 255 - mean) / std), labels)
        loss.backward()
        update.step()
        return loss.item()

    return step


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
