"""Finding, checking, caching and converting weights; no test leaves this machine."""

import dataclasses
import hashlib
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from torch_file_fixtures import state_dict_bytes

from topk_jax import download, networks
from topk_jax.weights import catalogue, loading
from topk_jax.weights.conversion import variables_to_state_dict
from topk_jax.weights.torch_files import read_state_dict

NAME = "squeezenet1_1"
SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "convert_weights.py"


@pytest.fixture(scope="module")
def state():
    """Arrays that fit the network, under torch's names."""
    shapes = networks.variable_shapes(networks.create_network(NAME))
    rng = np.random.default_rng(0)
    return variables_to_state_dict(
        jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    )


@pytest.fixture(scope="module")
def data(state):
    return state_dict_bytes({f"module.{name}": array for name, array in state.items()})


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TOPK_JAX_CACHE", str(folder))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return folder


@pytest.fixture(autouse=True)
def fetched(monkeypatch):
    """Addresses that were asked for; nothing is downloaded."""
    urls = []

    def fetch(url, *, filename, sha256_prefix, progress, hint):
        urls.append(url)
        raise OSError(f"{url}: no network in tests; {hint}")

    monkeypatch.setattr(download, "fetch", fetch)
    return urls


@pytest.fixture
def entry(monkeypatch, data):
    """The catalogue's entry, with the digest of `data`."""
    known = catalogue.CATALOGUE[NAME, "imagenet"]
    changed = dataclasses.replace(known, sha256=hashlib.sha256(data).hexdigest()[:8])
    monkeypatch.setitem(catalogue.CATALOGUE, (NAME, "imagenet"), changed)
    return changed


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def unpickled(monkeypatch):
    """Counts from now on how often a torch file is read."""
    paths = []

    def read(path):
        paths.append(path)
        return read_state_dict(path)

    monkeypatch.setattr(loading, "read_state_dict", read)
    return paths


def assert_loaded(variables, state):
    loaded = variables_to_state_dict(variables)
    assert set(loaded) == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)


def test_from_a_file(tmp_path, data, state):
    path = put(tmp_path / "own.pth", data)
    network = networks.create_network(NAME, topk=0.1)
    for name_or_network in (NAME, network):
        for weights in (path, str(path)):
            assert_loaded(loading.load_variables(name_or_network, weights), state)


def test_from_a_mapping(state):
    assert_loaded(loading.load_variables(NAME, state), state)


def test_the_network_runs_on_what_is_loaded(state):
    network = networks.create_network(NAME)
    variables = loading.load_variables(network, state)
    predict = jax.jit(lambda variables, images: network.apply(variables, images, train=False)[0])
    logits = predict(variables, np.ones((1, 32, 32, 3), np.float32))
    assert logits.shape == (1, 1000)
    assert np.isfinite(logits).all()
    assert np.ptp(logits) > 0


def test_second_time_without_unpickling(tmp_path, monkeypatch, cache, data, state):
    path = put(tmp_path / "own.pth", data)
    loading.load_variables(NAME, path)
    digest = hashlib.sha256(data).hexdigest()
    kept = cache / "converted" / f"{digest}-1.safetensors"
    assert [p for p in cache.rglob("*") if p.is_file()] == [kept]
    read = unpickled(monkeypatch)
    assert_loaded(loading.load_variables(NAME, path), state)
    assert read == [kept]
    # The same bytes elsewhere are the same weights; other bytes under the old name are not.
    put(tmp_path / "copy.pth", data)
    loading.load_variables(NAME, tmp_path / "copy.pth")
    assert read == [kept, kept]
    put(path, state_dict_bytes({name: array + 1 for name, array in state.items()}))
    assert_loaded(loading.load_variables(NAME, path), {k: a + 1 for k, a in state.items()})


def test_without_cache(tmp_path, cache, data, state):
    path = put(tmp_path / "own.pth", data)
    assert_loaded(loading.load_variables(NAME, path, cache=False), state)
    assert not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"rubbish", slice(-1), slice(1000)])
def test_a_damaged_cache_is_made_anew(tmp_path, monkeypatch, caplog, cache, data, state, damage):
    path = put(tmp_path / "own.pth", data)
    loading.load_variables(NAME, path)
    (kept,) = (cache / "converted").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage if isinstance(damage, bytes) else whole[damage])
    read = unpickled(monkeypatch)
    assert_loaded(loading.load_variables(NAME, path), state)
    assert read == [kept, path]
    assert f"{kept}: " in caplog.text
    assert kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, caplog, cache, data, state):
    path = put(tmp_path / "own.pth", data)
    put(cache, b"a file where the folder should be")
    assert_loaded(loading.load_variables(NAME, path), state)
    assert "converted weights are not kept" in caplog.text
    assert str(cache) in caplog.text


def test_safetensors_are_read_where_they_are(tmp_path, cache, state):
    path = tmp_path / "own.safetensors"
    loading.write_state_dict(path, state)
    assert_loaded(loading.load_variables(NAME, path), state)
    assert not cache.exists()


def test_written_bytes_do_not_depend_on_the_layout_in_memory(tmp_path, state):
    turned = {name: np.asarray(array, order="F") for name, array in state.items()}
    for name, arrays in (("a", state), ("b", turned), ("c", state)):
        loading.write_state_dict(tmp_path / name, arrays, metadata={"source": "x"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


def test_resolve_a_file(tmp_path, data):
    path = put(tmp_path / "own.pth", data)
    found = loading.resolve_weights(NAME, str(path))
    assert found == loading.WeightsFile(path, hashlib.sha256(data).hexdigest(), str(path), None)


def test_own_cache_comes_first(cache, tmp_path, entry, data, state, fetched):
    path = put(cache / "weights" / entry.filename, data)
    put(tmp_path / "torch" / "hub" / "checkpoints" / entry.filename, data)
    found = loading.resolve_weights(NAME, "imagenet")
    digest = hashlib.sha256(data).hexdigest()
    assert found == loading.WeightsFile(path, digest, entry.url, entry)
    assert_loaded(loading.load_variables(NAME, "imagenet"), state)
    assert_loaded(loading.load_variables(NAME, found), state)
    assert fetched == []


@pytest.mark.parametrize("home", ["TORCH_HOME", "XDG_CACHE_HOME", "HOME"])
def test_torch_hub_is_honoured(tmp_path, monkeypatch, entry, data, fetched, home):
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(home, str(tmp_path / "x"))
    between = {"TORCH_HOME": "", "XDG_CACHE_HOME": "torch", "HOME": ".cache/torch"}[home]
    path = put(tmp_path / "x" / between / "hub" / "checkpoints" / entry.filename, data)
    assert loading.resolve_weights(NAME, "imagenet").path == path
    assert fetched == []


def test_a_wrong_file_of_torch_hub_is_passed_over(tmp_path, caplog, entry, data, fetched):
    path = put(tmp_path / "torch" / "hub" / "checkpoints" / entry.filename, data[:-1])
    with pytest.raises(OSError, match=r"no network in tests; or give the path"):
        loading.resolve_weights(NAME, "imagenet")
    assert fetched == [entry.url]
    assert f"{path}: sha256" in caplog.text
    assert f"expected {entry.sha256}; not used" in caplog.text
    assert path.read_bytes() == data[:-1]


def test_a_wrong_file_of_our_own_is_fetched_again(cache, entry, data, fetched):
    put(cache / "weights" / entry.filename, data[:-1])
    with pytest.raises(OSError, match="no network"):
        loading.load_variables(NAME, "imagenet")
    assert fetched == [entry.url]


def test_downloaded_file_is_used(cache, monkeypatch, entry, data, state):
    def fetch(url, *, filename, sha256_prefix, progress, hint):
        assert (url, sha256_prefix) == (entry.url, entry.sha256)
        return put(cache / filename, data)

    monkeypatch.setattr(download, "fetch", fetch)
    assert_loaded(loading.load_variables(NAME, "imagenet"), state)


def test_a_network_object_finds_its_weights(cache, entry, data, state):
    put(cache / "weights" / entry.filename, data)
    network = networks.create_network(NAME, topk={"pool1": 0.2})
    assert_loaded(loading.load_variables(network, "imagenet"), state)


def test_a_network_of_other_classes_has_no_weights_by_name(fetched):
    network = networks.create_network(NAME, num_classes=10)
    with pytest.raises(ValueError, match=r"no 'imagenet' weights.*squeezenet1_1"):
        loading.load_variables(network, "imagenet")
    assert fetched == []


def test_another_network_is_said_with_both_lists(tmp_path, data):
    path = put(tmp_path / "own.pth", data)
    with pytest.raises(ValueError, match=str(path)) as raised:
        loading.load_variables("squeezenet1_0", path)
    message = str(raised.value)
    assert "12 missing (" in message
    assert "12 not used (" in message
    assert "features.0.weight (64, 3, 3, 3), expected (96, 3, 7, 7)" in message


def test_another_number_of_classes(tmp_path, data):
    path = put(tmp_path / "own.pth", data)
    network = networks.create_network(NAME, num_classes=10)
    with pytest.raises(ValueError, match="1000 classes, the network has 10: num_classes=1000"):
        loading.load_variables(network, path)


@pytest.mark.parametrize(
    ("model", "weights", "named"),
    [
        (NAME, "imagnet", "unknown weights 'imagnet'.*did you mean imagenet"),
        (NAME, "random", "unknown weights 'random'.*builtin, imagenet"),
        (NAME, "sin", "unknown weights 'sin' for squeezenet1_1: expected 'imagenet'"),
        ("builtin", "imagenet", "unknown weights 'imagenet' for builtin: expected 'builtin'"),
        (NAME, "", "empty path"),
        (NAME, "gs://bucket/x.pth", "only local files"),
    ],
)
def test_unknown_names(model, weights, named, fetched):
    with pytest.raises(ValueError, match=named):
        loading.resolve_weights(model, weights)
    assert fetched == []


def test_missing_files(tmp_path):
    for weights in (tmp_path / "none.pth", str(tmp_path / "none"), "none.pth"):
        with pytest.raises(FileNotFoundError, match="none"):
            loading.resolve_weights(NAME, weights)
    with pytest.raises(ValueError, match="not a file"):
        loading.resolve_weights(NAME, tmp_path)
    with pytest.raises(ValueError, match="not a file"):
        loading.resolve_weights(NAME, "/dev/zero")


def test_builtin_without_a_digest_or_file_or_with_another(monkeypatch):
    key = ("builtin", "builtin")
    for changes in ({"sha256": ""}, {"sha256": "0" * 64, "filename": "none.safetensors"}):
        changed = dataclasses.replace(catalogue.CATALOGUE[key], **changes)
        monkeypatch.setitem(catalogue.CATALOGUE, key, changed)
        with pytest.raises(ValueError, match="not part of this package"):
            loading.resolve_weights("builtin", "builtin")
    changed = dataclasses.replace(changed, filename="__init__.py")
    monkeypatch.setitem(catalogue.CATALOGUE, key, changed)
    with pytest.raises(ValueError, match="the installation is damaged"):
        loading.resolve_weights("builtin", "builtin")


def test_builtin_weights_load():
    variables = loading.load_variables("builtin", "builtin")
    shapes = networks.variable_shapes(networks.create_network("builtin"))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, shapes)


def test_convert(tmp_path, data, state):
    path = put(tmp_path / "own.pth", data)
    output = tmp_path / "out" / "own.safetensors"
    done = loading.convert_file(NAME, path, output)
    assert (done.tensors, done.parameters) == (52, 1_235_496)
    assert done.sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    assert done.source.path == path
    assert_loaded(loading.load_variables(NAME, output), state)
    with pytest.raises(FileExistsError, match="--overwrite"):
        loading.convert_file(NAME, path, output)
    assert loading.convert_file(NAME, path, output, overwrite=True) == done
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        loading.convert_file(NAME, path, tmp_path / "own.npz")
    with pytest.raises(ValueError, match=r"the network has 10"):
        loading.convert_file(NAME, path, tmp_path / "ten.safetensors", num_classes=10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "own.pth"]


def run(*flags):
    return subprocess.run(
        [sys.executable, SCRIPT, *flags],
        capture_output=True,
        text=True,
        check=False,
    )


def test_script(tmp_path, data):
    path = put(tmp_path / "own.pth", data)
    output = tmp_path / "own.safetensors"
    flags = [f"--model={NAME}", f"--weights={path}", f"--output={output}"]
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(data).hexdigest() in done.stdout
    assert hashlib.sha256(output.read_bytes()).hexdigest() in done.stdout
    assert "52 tensors, 1,235,496 parameters" in done.stdout
    again = run(*flags)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith(f"error: {output}: ")
    assert again.stderr.count("\n") == 1


def test_script_lists_the_catalogue_and_names_missing_flags():
    listed = run("--list")
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.rstrip("\n") == catalogue.format_catalogue()
    missing = run(f"--model={NAME}")
    assert missing.returncode == 2
    assert missing.stderr == "error: --weights is missing; --help lists the flags\n"


@pytest.mark.real
def test_squeezenet_from_both_formats_of_cache(shared, state):
    path = shared / "weights" / "squeezenet1_1.pth"
    first, second = (loading.load_variables(NAME, path) for _ in range(2))
    raw = read_state_dict(path)
    assert_loaded(first, raw)
    assert_loaded(second, raw)
