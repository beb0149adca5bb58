"""The catalogue against spelled-out numbers and against the networks themselves."""

import hashlib
import importlib.resources
import re

import pytest
import reference_weights

from topk_jax import networks
from topk_jax.images import IMAGENET_PREPROCESSING
from topk_jax.weights import catalogue, conversion

TORCHVISION = sorted(
    entry.model for entry in catalogue.CATALOGUE.values() if "download.pytorch.org" in entry.url
)


def test_covers_every_network():
    others = {"builtin"} | reference_weights.WITHOUT_WEIGHTS
    assert sorted(set(networks.list_networks()) - others) == TORCHVISION


@pytest.mark.parametrize(
    ("model", "url", "parameters", "top1", "top5"),
    [
        ("alexnet", "alexnet-owt-7be5be79.pth", 61100840, 56.522, 79.066),
        ("vgg16", "vgg16-397923af.pth", 138357544, 71.592, 90.382),
        ("vgg19_bn", "vgg19_bn-c79401a0.pth", 143678248, 74.218, 91.842),
        ("resnet50", "resnet50-0676ba61.pth", 25557032, 76.130, 92.862),
        ("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth", 1235496, 58.178, 80.624),
    ],
)
def test_torchvision(model, url, parameters, top1, top5):
    entry = catalogue.find_entry(model, "imagenet")
    assert entry.url == f"https://download.pytorch.org/models/{url}"
    assert entry.filename == url
    assert entry.sha256 == re.findall("[0-9a-f]{8}", url)[0]
    assert (entry.parameters, entry.top1, entry.top5) == (parameters, top1, top5)
    assert entry.preprocessing == IMAGENET_PREPROCESSING
    assert "BSD-3" in entry.licence
    assert "non-commercial" in entry.licence


def test_every_entry_is_complete():
    for (model, tag), entry in catalogue.CATALOGUE.items():
        if tag == "builtin":
            continue
        assert (entry.model, entry.tag) == (model, tag)
        assert entry.url.startswith("https://")
        assert entry.url.endswith("/" + entry.filename)
        assert re.fullmatch("[0-9a-f]{8}", entry.sha256)
        if tag == "normalised":  # named by its maker, and without the classifier
            continue
        assert f"-{entry.sha256}.pth" in entry.filename
        assert entry.parameters == catalogue.find_entry(model, "imagenet").parameters
        assert len({e.filename for e in catalogue.CATALOGUE.values()}) == len(catalogue.CATALOGUE)


def test_parameters_name_the_network():
    whole = [entry for entry in catalogue.CATALOGUE.values() if entry.tag != "normalised"]
    by_count = {entry.parameters: entry.model for entry in whole}
    assert len(by_count) == len({entry.model for entry in whole})


def test_normalised_vgg19_has_every_convolution_and_no_classifier():
    shapes = networks.feature_shapes(networks.create_network("vgg19"), ["conv5_4"])
    entry = catalogue.find_entry("vgg19", "normalised")
    assert conversion.count_parameters(shapes) == entry.parameters
    levels = [round(255 * mean, 3) for mean in entry.preprocessing.mean]
    assert levels == [123.68, 116.779, 103.939]


def test_builtin_file_is_the_one_of_the_catalogue():
    entry = catalogue.find_entry("builtin", "builtin")
    data = (importlib.resources.files("topk_jax.weights") / entry.filename).read_bytes()
    assert hashlib.sha256(data).hexdigest() == entry.sha256
    assert len(data) < 2_000_000
    shapes = networks.variable_shapes(networks.create_network("builtin"))
    assert conversion.count_parameters(shapes) == entry.parameters


def test_unknown_names_list_the_nearest():
    with pytest.raises(ValueError, match=r"'imagnet' for resnet50: expected 'imagenet' or 'sin'"):
        catalogue.find_entry("resnet50", "imagnet")
    with pytest.raises(ValueError, match=r"'resnet51'.*resnet50"):
        catalogue.find_entry("resnet51", "imagenet")
    assert catalogue.list_tags("resnet50") == ("imagenet", "sin", "sin+in", "shape")
    assert catalogue.list_tags("nothing") == ()


def test_default_preprocessing():
    assert catalogue.default_preprocessing("vgg16") == IMAGENET_PREPROCESSING
    assert catalogue.default_preprocessing("builtin").image_size == 64


def test_table():
    lines = catalogue.format_catalogue().splitlines()
    assert len(lines) == 1 + len(catalogue.CATALOGUE)
    assert lines[0].split() == [
        "model",
        "weights",
        "top-1",
        "top-5",
        "parameters",
        "sha256",
        "file",
    ]
    row = next(line for line in lines if line.startswith("resnet18"))
    assert row.split() == [
        *("resnet18", "imagenet", "69.758", "89.078", "11,689,512", "f37072fd"),
        "resnet18-f37072fd.pth",
    ]
