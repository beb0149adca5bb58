"""What a training run is: the fields of a config, their defaults, and what is said of wrong ones.

A config is a nested dictionary (in `configs/`, an `ml_collections.ConfigDict`) with the fields of
`Settings`; those it leaves out have the defaults here. Names are those of the papers' recipes.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from topk_jax.images import IMAGENET_PREPROCESSING, Preprocessing
from topk_jax.networks.sites import TopKSites, parse_stages
from topk_jax.topk import TopK

Source = Literal["builtin", "folder", "zip", "tfds"]


@dataclasses.dataclass(frozen=True)
class Data:
    """Images of training and validation.

    Attributes:
        source: "folder": `path` holds the folders `train` and `validation`, with a folder a class;
            "zip": the same inside an archive; "tfds": `path` is a dataset of tensorflow-datasets
            and the two are its splits; "builtin": drawn (see `builtin_images`).
        path: Where the images are.
        train: Folder or split of the training images.
        validation: Folder or split of the validation images; for "zip" also another archive, as
            "test.zip:test".
        classes: Names of the class folders to use, in the order of the labels; () is all, sorted.
        further: Name -> folder (or archive.zip:folder) of class folders, further validation sets
            with the same classes, such as stylised ones; "" is none.
        suppressed: Cue suppressions (`stimuli.suppression`) of the validation set, as "blur2".
        cue_conflict: "builtin" or a folder of cue-conflict images, for the shape bias; "" is none.
        mapping: Which categories the cue-conflict set asks for: "imagenet16", or "identity" where
            they are the network's classes.
        long_tail: Imbalance factor that the training set is cut down by (Cui et al. 2019); 1 is
            all of it.
        in_memory: Decode all images once, at the start.
        strict: A damaged image ends the run; otherwise it is left out and counted.
        image_size: Side of the square that the network sees, pixels.
        resize_size: Validation: what the short side is resized to before the crop, pixels.
        mean: Of each channel, subtracted after division by 255.
        std: What each channel is then divided by.
        crop: Training: "random_resized" (scale 0.08 to 1, ratio 3/4 to 4/3), "padded" (a random
            square of the image with `padding` zeros around it), or "none".
        padding: Pixels on each side, for "padded".
        flip: Training: mirror every other image.
        builtin_images: Number of images drawn for training.
        builtin_shares: Congruent, silhouette and texture images among them.
        builtin_test_seed: Seed of the drawn test images.
        builtin_test_per_category: Number of them a category, in each set but the conflicts.
    """

    source: Source = "folder"
    path: str = ""
    train: str = "train"
    validation: str = "val"
    classes: tuple[str, ...] = ()
    further: Mapping[str, str] = dataclasses.field(default_factory=dict)
    suppressed: tuple[str, ...] = ()
    cue_conflict: str = ""
    mapping: Literal["imagenet16", "identity"] = "imagenet16"
    long_tail: float = 1.0
    in_memory: bool = False
    strict: bool = False
    image_size: int = IMAGENET_PREPROCESSING.image_size
    resize_size: int = IMAGENET_PREPROCESSING.resize_size
    mean: tuple[float, ...] = IMAGENET_PREPROCESSING.mean
    std: tuple[float, ...] = IMAGENET_PREPROCESSING.std
    crop: Literal["random_resized", "padded", "none"] = "random_resized"
    padding: int = 4
    flip: bool = True
    builtin_images: int = 16_000
    builtin_shares: tuple[float, ...] = (0.6, 0.05, 0.35)
    builtin_test_seed: int = 0
    builtin_test_per_category: int = 50

    @property
    def preprocessing(self) -> Preprocessing:
        """Sizes and normalisation as `images` takes them."""
        mean, std = self.mean, self.std
        return Preprocessing(
            self.image_size, self.resize_size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
        )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update rule.

    Attributes:
        name: "sgd" as PyTorch's (the decay is added to the gradient before the momentum), or
            "adamw".
        learning_rate: Its highest value.
        momentum: Of SGD.
        nesterov: Of SGD.
        weight_decay: Factor of the decay.
        decay: "all" parameters, as PyTorch does, or "kernels": no biases and no normalisation.
        clip_norm: Largest norm of a gradient, 0 for any.
        schedule: "cosine" to 0, "step" (times `factor` at each of `milestones`) or "constant".
        per: The rate changes from "step" to step, or stays for an "epoch".
        warmup_epochs: Epochs in which the rate rises linearly.
        milestones: Epochs of "step".
        factor: Of "step".
    """

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    decay: Literal["all", "kernels"] = "all"
    clip_norm: float = 0.0
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    per: Literal["step", "epoch"] = "step"
    warmup_epochs: float = 0.0
    milestones: tuple[float, ...] = ()
    factor: float = 0.1


@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss, see `training.losses.make_loss`.

    Attributes:
        name: "cross_entropy", "class_balanced" or "class_balanced_focal".
        beta: Of the effective number of images (Cui et al. 2019), in [0, 1).
        gamma: Of the focal loss, at least 0.
        form: Of the focal loss: "outside", "inside" or "sigmoid".
        label_smoothing: Share of the target spread over all classes, in [0, 1).
    """

    name: Literal["cross_entropy", "class_balanced", "class_balanced_focal"] = "cross_entropy"
    beta: float = 0.0
    gamma: float = 0.0
    form: Literal["outside", "inside", "sigmoid"] = "outside"
    label_smoothing: float = 0.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """A training run.

    Attributes:
        network: Name for `create_network`.
        network_options: Further fields of the network.
        topk: None; a kept fraction for the published sites; stages as the authors write them,
            "2_20" for 20 % after stage 2; or feature name -> fraction or fields of `TopK`, as
            `{"layer2": {"fraction": 0.2, "select": "random"}}`.
        weights: Tag or file that training starts from; "" starts at random.
        seed: Of weights, order, augmentation and noise.
        epochs: Number of passes over the training images.
        batch_size: Images a step, over all devices of all processes.
        microbatch: Images of a device that gradients are taken of at a time; 0 is all. Not for
            networks with batch normalisation.
        precision: "bfloat16" computes activations in 16 bits; parameters stay in 32.
        ema_decay: Weight of the old in the moving average of the variables, which is then what is
            validated and written; 0 is none.
        log_every: Steps between records.
        evaluate_every: Epochs between validations; the last epoch always has one.
        checkpoint_every: Steps between checkpoints within an epoch, a multiple of `log_every`; 0
            for one an epoch.
        data: Images.
        optimizer: Update rule.
        loss: Loss.
    """

    network: str = ""
    network_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    topk: float | str | Mapping[str, Any] | None = None
    weights: str = ""
    seed: int = 0
    epochs: int = 1
    batch_size: int = 32
    microbatch: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    ema_decay: float = 0.0
    log_every: int = 50
    evaluate_every: int = 1
    checkpoint_every: int = 0
    data: Data = dataclasses.field(default_factory=Data)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    loss: Loss = dataclasses.field(default_factory=Loss)

    def __post_init__(self) -> None:
        """Checks what no part of the run would check before it begins.

        Raises:
            ValueError: A field out of range; the message names it.
        """
        least = {
            "epochs": self.epochs, "batch_size": self.batch_size, "log_every": self.log_every,
            "evaluate_every": self.evaluate_every, "data.image_size": self.data.image_size,
            "data.resize_size": self.data.resize_size, "data.long_tail": self.data.long_tail,
            "data.builtin_images": self.data.builtin_images,
            "data.builtin_test_per_category": self.data.builtin_test_per_category,
            "microbatch": self.microbatch or 1,
        }  # fmt: skip
        for name, value in least.items():
            if not value >= 1:
                raise ValueError(f"config.{name} is {value}: expected 1 or more")
        for name, values in {"data.mean": self.data.mean, "data.std": self.data.std}.items():
            if len(values) != 3:
                raise ValueError(f"config.{name} is {values}: expected three numbers")
        unit = {
            "ema_decay": self.ema_decay, "loss.beta": self.loss.beta,
            "loss.label_smoothing": self.loss.label_smoothing,
            "optimizer.momentum": self.optimizer.momentum,
        }  # fmt: skip
        for name, value in unit.items():
            if not 0 <= value < 1:
                raise ValueError(f"config.{name} is {value}: expected at least 0 and below 1")
        if self.checkpoint_every % self.log_every or self.checkpoint_every < 0:
            raise ValueError(
                f"config.checkpoint_every is {self.checkpoint_every}: expected 0 or a multiple of "
                f"config.log_every, {self.log_every}"
            )
        if self.data.source != "builtin" and not self.data.path:
            raise ValueError(
                "config.data.path is empty: name the images, for example --config.data.path=photos"
            )

    @property
    def sites(self) -> TopKSites:
        """`topk` as `create_network` takes it."""
        if isinstance(self.topk, str):
            return parse_stages(self.topk) if self.topk else None
        if isinstance(self.topk, Mapping):
            return {
                name: TopK(**setting) if isinstance(setting, Mapping) else setting
                for name, setting in self.topk.items()
            }
        return self.topk


def from_config(config: Mapping[str, Any]) -> Settings:
    """Reads a config.

    Args:
        config: A nested dictionary, or anything with `to_dict`.

    Raises:
        ValueError: An unknown field (the nearest are named), a value of a wrong kind or out of
            range.
    """
    to_dict = getattr(config, "to_dict", None)
    return _read(Settings, dict(config) if to_dict is None else to_dict(), "config")


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a nested config by dotted names, so that single ones can be compared."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _read(kind: Any, values: Mapping[str, Any], place: str) -> Any:
    hints = get_type_hints(kind)
    fields = {}
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=3, cutoff=0.5) or hints
            raise ValueError(f"{place}.{name}: no such field; did you mean {', '.join(near)}?")
        fields[name] = _converted(hints[name], value, f"{place}.{name}")
    return kind(**fields)


def _converted(hint: Any, value: Any, place: str) -> Any:
    if hint in (Data, Optimizer, Loss):
        if not isinstance(value, Mapping):
            raise ValueError(f"{place} is {value!r}: expected fields")
        return _read(hint, value, place)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{place} is {value!r}: expected {', '.join(get_args(hint))}")
        return value
    if get_origin(hint) is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ValueError(f"{place} is {value!r}: expected a list")
        return tuple(value)
    simple = {int: (int, "a whole number"), float: (int | float, "a number"),
              str: (str, "text"), bool: (bool, "True or False")}  # fmt: skip
    if hint in simple:
        allowed, words = simple[hint]
        if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
            raise ValueError(f"{place} is {value!r}: expected {words}")
        return hint(value)
    return value
