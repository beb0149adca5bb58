import importlib.util
import pathlib

import pytest

from topk_jax.topk import TopK
from topk_jax.training import settings
from topk_jax.training.settings import from_config

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
ARGUMENTS = {
    "imagenette_topk": ("code", "paper", "code,further=stylized"),
    "imagenette96": ("plain,code", "topk,paper", "random,code", "mean,code"),
    "stylized_imagenet_resnet50": ("a", "b", "c"),
}


def config_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_read(path):
    for arguments in [(), *((argument,) for argument in ARGUMENTS.get(path.stem, ()))]:
        config = config_module(path).get_config(*arguments)
        read = from_config(config)
        assert read.network == config.network
        assert read.data.source == config.data.source
        assert read.optimizer.learning_rate == config.optimizer.learning_rate
        assert isinstance(read.data.mean, tuple)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_head_says_command_cost_and_result(path):
    head = config_module(path).__doc__
    for word in ("What:", "Command", "Cost:", "Measured"):
        assert word in head


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epoch": 3}, "config.epoch: no such field; did you mean epochs"),
        ({"data": {"flipp": True}}, "config.data.flipp: no such field; did you mean flip"),
        ({"data": 3}, "config.data is 3: expected fields"),
        ({"epochs": 0}, "config.epochs is 0: expected 1 or more"),
        ({"epochs": 1.5}, "config.epochs is 1.5: expected a whole number"),
        ({"epochs": True}, "config.epochs is True: expected a whole number"),
        ({"batch_size": -8}, "config.batch_size is -8"),
        ({"microbatch": -1}, "config.microbatch is -1"),
        ({"ema_decay": 1.0}, "config.ema_decay is 1.0: expected at least 0 and below 1"),
        ({"loss": {"beta": 1.0}}, "config.loss.beta is 1.0"),
        ({"loss": {"name": "focal"}}, "config.loss.name is 'focal': expected cross_entropy, "),
        ({"optimizer": {"learning_rate": "fast"}}, "expected a number"),
        ({"data": {"mean": (0.5,)}}, "config.data.mean is .* expected three numbers"),
        ({"data": {"mean": 0.5}}, "config.data.mean is 0.5: expected a list"),
        ({"data": {"path": ""}}, "config.data.path is empty"),
        ({"checkpoint_every": 30}, "multiple of config.log_every, 50"),
        ({"data": {"flip": 1}}, "config.data.flip is 1: expected True or False"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    config = {"network": "resnet18", "data": {"path": "photos"}} | fields
    if isinstance(fields.get("data"), dict):
        config["data"] = {"path": "photos"} | fields["data"]
    with pytest.raises(ValueError, match=message):
        from_config(config)


def test_sites():
    def sites(topk):
        return from_config({"topk": topk, "data": {"source": "builtin"}}).sites

    assert sites(None) is None
    assert sites("") is None
    assert sites(0.3) == 0.3
    assert sites("2_20") == {"layer2": 0.2}
    found = sites({"layer2": {"fraction": 0.2, "select": "random"}, "layer1": 0.5})
    assert found["layer1"] == 0.5
    assert isinstance(found["layer2"], TopK)
    assert (found["layer2"].fraction, found["layer2"].select) == (0.2, "random")


def test_flattened():
    nested = {"a": 1, "b": {"c": 2, "d": {"e": (3, 4)}}, "f": {}}
    assert settings.flattened(nested) == {"a": 1, "b.c": 2, "b.d.e": (3, 4), "f": {}}
