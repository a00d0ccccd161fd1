"""Model files from strangers: what is code in them is refused, and not run."""

from __future__ import annotations

import io
import json
import pathlib
import tempfile
import zipfile

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS

from tscnc_tf import applications, gates, pruning, regularizers, schedules
from tscnc_tf._keras import files

MARK = "ran"
every_format = pytest.mark.parametrize("suffix", [".keras", ".h5"])
every_flavour = pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file"),
    pytest.mark.filterwarnings("ignore:At a sparsity of"),
]


def saved(model, path):
    model.save(path)
    return path


def rewritten(path, change):
    """Change the configuration in a file, given as text."""
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = change(file.attrs["model_config"])
        return path
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content["config.json"] = change(content["config.json"].decode()).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


@pytest.mark.strangers
@every_flavour
@every_format
def test_lambdas_are_refused_and_not_run(library, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = library.Sequential(
        [
            library.Input((4,)),
            library.layers.Lambda(lambda x: (__import__("pathlib").Path("ran").touch(), x)[1]),
        ]
    )
    path = saved(model, tmp_path / f"model{suffix}")
    pathlib.Path(MARK).unlink()  # calling the model has made it
    with pytest.raises(ValueError, match=r"Python function|arbitrary code execution"):
        files.load_model(path)
    assert not pathlib.Path(MARK).exists()


NAMED = {
    "a function of a module": ("activation", {"module": "os", "config": "system"}),
    "a builtin": ("activation", {"module": "builtins", "config": "exec"}),
    "what a module of Keras has imported": (
        "activation",
        {"module": "tf_keras.src.utils.data_utils", "config": "urlretrieve"},
    ),
    "a function of Keras that is none of networks": (
        "activation",
        {"module": "keras.utils", "config": "get_file"},
    ),
    "an attribute of what was imported": (
        "activation",
        {"module": "tf_keras.activations", "config": "backend.os.system"},
    ),
}


@pytest.mark.strangers
@pytest.mark.parametrize("case", NAMED)
def test_functions_that_a_file_names_are_refused(case, tmp_path):
    name, named = NAMED[case]
    layer = tf_keras.layers.Dense(2, activation="relu", input_shape=(3,))
    path = saved(tf_keras.Sequential([layer]), tmp_path / "model.keras")
    function = {"class_name": "function", "registered_name": named["config"], **named}

    def change(text):
        assert f'"{name}": "relu"' in text
        return text.replace(f'"{name}": "relu"', f'"{name}": {json.dumps(function)}')

    with pytest.raises(ValueError, match=r"names .*, which would be run as code") as error:
        files.load_model(rewritten(path, change))
    assert f"{named['module']}.{named['config']}" in str(error.value)
    assert "load it by tf_keras.models.load_model(path" in str(error.value)


@pytest.mark.strangers
@pytest.mark.parametrize(("module", "name"), [("subprocess", "Popen"), ("keras.utils", "get_file")])
def test_classes_that_a_file_names_are_those_of_the_libraries(module, name, tmp_path):
    layer = tf_keras.layers.Dense(2, input_shape=(3,), name="one")
    path = saved(tf_keras.Sequential([layer]), tmp_path / "model.keras")
    dense = '"module": "keras.layers", "class_name": "Dense"'

    def change(text):
        assert text.count(dense) == 1
        return text.replace(dense, f'"module": "{module}", "class_name": "{name}"')

    with pytest.raises(ValueError, match=f"names {module}.{name}, which would be run"):
        files.load_model(rewritten(path, change))


@pytest.mark.strangers
@every_format
@pytest.mark.parametrize(
    "function",
    [
        *("io.write_file", "py_function", "compat.v1.py_func", "compat.v1.write_file"),
        *("compat.v1.load_file_system_library", "experimental.register_filesystem_plugin"),
    ],
)
def test_functions_of_tensorflow_that_do_more_than_compute(function, suffix, tmp_path):
    inputs = tf_keras.Input((4,))
    model = tf_keras.Model(inputs, tf_keras.layers.Dense(2)(inputs + 1.0))
    path = saved(model, tmp_path / f"model{suffix}")
    assert files.load_model(path).count_params() == 10

    def change(text):
        assert '"function": "__operators__.add"' in text
        return text.replace('"__operators__.add"', f'"{function}"')

    with pytest.raises(ValueError, match=f"calls tf.{function}, which would be run as code"):
        files.load_model(rewritten(path, change))


@pytest.mark.strangers
def test_layers_that_run_any_operation_or_method_are_refused(tmp_path):
    inputs = tf_keras.Input((4,))
    model = tf_keras.Model(inputs, tf_keras.layers.Dense(2)(inputs + 1.0))
    path = saved(model, tmp_path / "model.keras")
    original = '"class_name": "TFOpLambda"'
    for kind in ("TensorFlowOpLayer", "ClassMethod"):
        replacement = f'"class_name": "{kind}"'
        changed = rewritten(
            saved(model, path), lambda text, new=replacement: text.replace(original, new)
        )
        with pytest.raises(ValueError, match=f"has a layer {kind}, which would be run as code"):
            files.load_model(changed)


@pytest.mark.strangers
def test_the_name_of_a_file_says_how_it_is_read(tmp_path):
    """tf_keras reads whatever is not called .keras as HDF5, also if it is a zip archive as well."""
    model = tf_keras.Sequential([tf_keras.Input((4,)), tf_keras.layers.Lambda(lambda x: 2 * x)])
    path = saved(model, tmp_path / "model.h5").rename(tmp_path / "model.hdf5")
    harmless = tf_keras.Sequential([tf_keras.Input((4,)), tf_keras.layers.Dense(1)])
    with zipfile.ZipFile(saved(harmless, tmp_path / "other.keras")) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "a") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with zipfile.ZipFile(path) as archive, h5py.File(path) as file:
        assert "config.json" in archive.namelist() and "model_config" in file.attrs
    with pytest.raises(ValueError, match=r"model\.hdf5 holds a Python function"):
        files.load_model(path)
    with pytest.raises(ValueError, match=r"model\.zip is not a model in a \.keras or \.h5 file"):
        files.load_model(path.rename(tmp_path / "model.zip"))


@pytest.mark.strangers
@every_flavour
@pytest.mark.filterwarnings("ignore:Skipping invalid path")  # by Keras 3
def test_members_that_lead_elsewhere_are_not_written_there(
    library, tmp_path, ordinary, monkeypatch
):
    """Keras unpacks all members into a temporary folder if one of them is in `assets/`."""
    folders = [tmp_path / name for name in ("temporary", "working")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folders[0]))
    monkeypatch.chdir(folders[1])
    path = folders[1] / "model.keras"
    path.write_bytes(ordinary[library, ".keras"])
    before = files.load_model(path).get_weights()
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("assets/a", "../b", "../../b", f"{tmp_path}/c", "assets/../../../d"):
            archive.writestr(name, "text")
    for one, other in zip(files.load_model(path).get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    left = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert {file for file in left if folders[0] not in file.parents} == {path}


@pytest.mark.strangers
@every_flavour
def test_a_file_that_unpacks_to_more_than_the_memory_is_refused(library, tmp_path, monkeypatch):
    model = library.Sequential([library.Input((4,)), library.layers.Dense(1)])
    path = saved(model, tmp_path / "model.keras")
    files.load_model(path)
    monkeypatch.setattr("tscnc_tf._files.memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"model\.keras unpacks to 0\.0 GiB, and this machine has"):
        files.load_model(path)


def dense_kernel(file):
    """Return the group, and the name in it, of the dense layer's kernel in an HDF5 file."""
    found = []

    def look(name, thing):
        if isinstance(thing, h5py.Dataset) and thing.shape == (4, 3):
            found.append(name)

    file.visititems(look)
    (name,) = found
    return file[name].parent, name.rpartition("/")[2]


def replaced_by(make):
    """Return a change of a file that has something else in the place of the kernel."""

    def change(file):
        group, name = dense_kernel(file)
        del group[name]
        make(group, name)

    return change


def by_low_level(group, name, setting):
    """Write a kernel whose creation has a setting of HDF5's."""
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    setting(created)
    space = h5py.h5s.create_simple((4, 3))
    h5py.h5d.create(group.id, name.encode(), h5py.h5t.NATIVE_FLOAT, space, created)
    group[name][...] = 1.0


def odd_filter(created):
    created.set_chunk((4, 3))
    created.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))  # Zstandard's


def virtual(group, name):
    layout = h5py.VirtualLayout((4, 3), "f4")
    layout[...] = h5py.VirtualSource("/etc/passwd", "x", (4, 3))
    group.create_virtual_dataset(name, layout)


def second_name(file):
    group, name = dense_kernel(file)
    group["again"] = group[name]


def cycle(file):
    file["around"] = file["/"]


def texts(group, name):
    group.create_dataset(name, data=["a"] * 12, dtype=h5py.string_dtype())


PASSWORDS = [("/etc/passwd", 0, 48)]
PLANTED = {
    "a terabyte that is not there": (
        replaced_by(lambda group, name: group.create_dataset(name, (10**12,), "f4")),
        "has 4,000,000,000,000 bytes, of which 0 are stored",
    ),
    "a terabyte of one value, packed": (
        replaced_by(
            lambda group, name: group.create_dataset(
                name, (10**12,), "f4", chunks=(10**6,), compression="gzip"
            )
        ),
        "has 4,000,000,000,000 bytes, of which 0 are stored",
    ),
    "a chunk of gigabytes": (
        replaced_by(
            lambda group, name: group.create_dataset(
                name, (1,), "f4", chunks=(10**9,), maxshape=(None,), compression="gzip"
            )
        ),
        "has 4,000,000,000 bytes, of which 0 are stored",
    ),
    "another file as storage": (
        replaced_by(
            lambda group, name: group.create_dataset(name, (4, 3), "f4", external=PASSWORDS)
        ),
        "has its values in another file",
    ),
    "a virtual dataset": (replaced_by(virtual), "has its values in another file"),
    "a link to another file": (
        replaced_by(
            lambda group, name: group.__setitem__(name, h5py.ExternalLink("/etc/passwd", "/x"))
        ),
        "a link to /x elsewhere",
    ),
    "a soft link": (
        replaced_by(lambda group, name: group.__setitem__(name, h5py.SoftLink("/elsewhere"))),
        "a link to /elsewhere elsewhere",
    ),
    "a filter that is a library": (
        replaced_by(lambda group, name: by_low_level(group, name, odd_filter)),
        "is packed by a filter that is not part of HDF5, 32015",
    ),
    "texts": (replaced_by(texts), "has values of variable length"),
    "a second name": (second_name, "has several names"),
    "a cycle": (cycle, "/ has several names"),
}


def plant(path, change):
    """Change the weights in a file of Keras."""
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            change(file)
        return path
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    weights = io.BytesIO(content["model.weights.h5"])
    with h5py.File(weights, "r+") as file:
        change(file)
    content["model.weights.h5"] = weights.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    """The content of a file of a dense layer, by the name of its Keras and its format."""
    folder = tmp_path_factory.mktemp("ordinary")
    found = {}
    for flavour, library in FLAVOURS.items():
        model = library.Sequential([library.Input((4,)), library.layers.Dense(3)])
        for suffix in (".keras", ".h5"):
            path = saved(model, folder / f"{flavour}{suffix}")
            found[library, suffix] = path.read_bytes()
    return found


@pytest.mark.strangers
@every_flavour
@every_format
@pytest.mark.parametrize("case", PLANTED)
def test_weights_that_are_not_in_the_file_are_refused(case, library, suffix, tmp_path, ordinary):
    change, words = PLANTED[case]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(ordinary[library, suffix])
    files.load_model(path)
    with pytest.raises(ValueError, match=rf"model\{suffix} has weights as Keras .*{words}"):
        files.load_model(plant(path, change))


@every_flavour
@every_format
def test_weights_that_are_packed_are_loaded(library, suffix, tmp_path, ordinary):
    """By filters that come along with HDF5, whatever they shrink a thousand zeros to."""
    path = tmp_path / f"model{suffix}"
    path.write_bytes(ordinary[library, suffix])
    before = files.load_model(path).get_weights()

    def change(file):
        group, name = dense_kernel(file)
        values = group[name][...]
        del group[name]
        options = {"compression": "gzip", "shuffle": True, "fletcher32": True}
        group.create_dataset(name, data=values, chunks=(2, 3), **options)

    after = files.load_model(plant(path, change)).get_weights()
    np.testing.assert_array_equal(after[0], before[0])
    with h5py.File(io.BytesIO(), "w") as file:
        zeros = np.zeros(10**7, np.float32)
        packed = file.create_dataset("zeros", data=zeros, chunks=(10**6,), compression=9)
        assert packed.nbytes / packed.id.get_storage_size() > 900
        assert files._fault(packed) == ""


@pytest.mark.strangers
@every_flavour
@pytest.mark.parametrize("names", ["layer_names", "weight_names"])
def test_weights_that_a_file_names_again_and_again_are_refused(names, library, tmp_path, ordinary):
    path = tmp_path / "model.h5"
    path.write_bytes(ordinary[library, ".h5"])

    def change(file):
        for group in file["model_weights"], *file["model_weights"].values():
            if len(group.attrs.get(names, ())):
                first = np.array(group.attrs[names], "S")[:1]
                group.attrs[names] = np.concatenate([first, [b"./" + first[0]]])

    with pytest.raises(ValueError, match="it names a layer or weight twice"):
        files.load_model(plant(path, change))


def test_a_model_without_weights_in_hdf5_is_none(tmp_path, ordinary):
    """Keras would read arrays of NumPy's then, which neither Keras writes without pickling."""
    path = tmp_path / "model.keras"
    path.write_bytes(ordinary[keras, ".keras"])
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name.replace(".h5", ".npz"), data)
    with pytest.raises(ValueError, match=r"no item named 'model\.weights\.h5' in the archive"):
        files.load_model(path)


@pytest.mark.strangers
def test_weights_larger_than_the_memory_are_refused(tmp_path, ordinary, monkeypatch):
    """As packed ones can be, that are in the file."""
    path = tmp_path / "model.h5"
    path.write_bytes(ordinary[tf_keras, ".h5"])

    def change(file):
        file.create_dataset("more", data=np.zeros(10**6, np.float32), compression="gzip")

    files.load_model(plant(path, change))
    monkeypatch.setattr("tscnc_tf._files.memory", lambda: 10**6)
    assert path.stat().st_size < 10**5
    with pytest.raises(ValueError, match=r"model\.h5 unpacks to 0\.0 GiB, and this machine has"):
        files.load_model(path)


def test_functions_that_compute_are_known_to_tensorflow():
    for name in files._COMPUTING_TOO:
        assert callable(getattr(tf, name, None) or getattr(tf.compat.v1, name, None)), name


def models(library):
    """Models of many kinds of layers, and with what this package adds to them."""
    layers = library.layers
    shape = (8, 8, 3)
    inputs = library.Input(shape)
    plain = layers.Conv2D(4, 3, activation="gelu", kernel_initializer="he_normal")(inputs)
    plain = layers.Activation("tanh")(layers.BatchNormalization()(plain * 2.0))
    plain = layers.Dense(3, kernel_constraint="max_norm")(layers.Flatten()(plain))
    yield library.Model(inputs, plain)
    yield applications.LeNet5(input_shape=shape, classes=3, library=library.__name__, hidden=8)
    small = applications.SmallCNN(input_shape=shape, classes=3, library=library.__name__, width=4)
    small = pruning.add_regularizers(small, regularizers.TSCNC(1e-5, 1e-2))
    yield gates.add_gates(small, sparsity_factor=1.0)
    yield pruning.prune(small, schedules.CosineSparsity(0.0, 0.5, 1, 3), engine="masks")


@every_flavour
def test_all_that_this_package_and_keras_write_is_loaded(library, tmp_path, rng):
    x = rng.random((2, 8, 8, 3), np.float32)
    for index, model in enumerate(models(library)):
        loaded = files.load_model(saved(model, tmp_path / f"{index}.keras"))
        np.testing.assert_array_equal(loaded(x), model(x))


@pytest.mark.parametrize("content", [b"", b"no such thing"])
@every_format
def test_other_files_are_named(content, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.\w+ is not a model in a \.keras or \.h5 file"):
        files.load_model(path)


@pytest.mark.strangers
def test_keras_3_refuses_by_itself(tmp_path):
    layer = keras.layers.Dense(2, activation="relu")
    path = saved(keras.Sequential([keras.Input((3,)), layer]), tmp_path / "model.keras")
    function = {"class_name": "function", "module": "os", "config": "system"}
    function["registered_name"] = "system"

    def change(text):
        return text.replace('"activation": "relu"', f'"activation": {json.dumps(function)}')

    with pytest.raises((TypeError, ValueError)):
        files.load_model(rewritten(path, change))
