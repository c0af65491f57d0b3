# SPDX-License-Identifier: Apache-2.0
"""Components come from packages and go to them, wherever those are."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch

import ddo_modulus
from ddo_modulus import earth2
from ddo_modulus.data.normalization import Normalization
from ddo_modulus.diffusion.package import SHIPPED, Package
from ddo_modulus.errors import InputError

pytest.importorskip("earth2studio")

from earth2studio.models.auto import AutoModelMixin  # noqa: E402
from earth2studio.models.auto import Package as RemotePackage  # noqa: E402

from ddo_modulus.earth2.host import MissingEarth2Studio, needs_earth2studio
from ddo_modulus.earth2.packaged import CONFIG, FILES, PackagedModel, fetch_package  # noqa: E402

ROOT = Path(ddo_modulus.__file__).parents[1]


class Component(PackagedModel):
    """The least that a component may be."""

    def __init__(self, package, size=1, label=None):
        super().__init__(package, size=size, label=label)
        self.size, self.label = size, label


@pytest.fixture
def folder(untrained, tmp_path):
    return untrained().save(tmp_path / "prior")


@pytest.fixture
def memory(folder, tmp_path):
    """Root of the package on a file system that is not the local one, with its own cache."""
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/models/prior", recursive=True)
    cache = {"cache_storage": str(tmp_path / "cache")}
    yield RemotePackage("memory://models/prior", cache_options=cache)
    store.rm("/models", recursive=True)


def test_the_package_of_components_imports_neither_torch_nor_earth2studio():
    code = (
        "import sys; sys.modules['earth2studio'] = None\n"
        "import ddo_modulus.earth2; print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("name", sorted(set(earth2.__all__) - {"MissingEarth2Studio"}))
def test_a_component_without_earth2studio_says_what_to_install(name, monkeypatch):
    for module in [m for m in sys.modules if m.startswith("earth2studio")]:
        monkeypatch.setitem(sys.modules, module, None)
    for module in [m for m in sys.modules if m.startswith("ddo_modulus.earth2.")]:
        monkeypatch.delitem(sys.modules, module)
    for loaded in set(vars(earth2)) & set(earth2.__all__):
        monkeypatch.delattr(earth2, loaded)
    with pytest.raises(ImportError, match=r"pip install ddo-modulus\[earth2\]") as caught:
        getattr(earth2, name)
    assert isinstance(caught.value, InputError)


def test_another_missing_module_is_not_blamed_on_earth2studio():
    with pytest.raises(ModuleNotFoundError, match="nonsense") as caught:
        with needs_earth2studio():
            import nonsense  # noqa: F401
    assert not isinstance(caught.value, MissingEarth2Studio)


def test_names_load_late_and_unknown_ones_are_attribute_errors():
    assert earth2.PackagedModel is PackagedModel
    assert set(dir(earth2)) == set(earth2.__all__)
    with pytest.raises(AttributeError, match="attribute Nonsense"):
        _ = earth2.Nonsense


def test_it_is_an_auto_model_with_a_shipped_default():
    assert issubclass(Component, AutoModelMixin)
    package = Component.load_default_package()
    assert isinstance(package, RemotePackage) and Path(package.resolve("package.json")).is_file()
    model = Component.load_model(package)
    assert model.package.channels == ("t2m",)
    assert Component.from_pretrained().package.grid.shape == model.package.grid.shape


@pytest.mark.parametrize("form", [str, Path, "file://{}".format])
def test_a_folder_by_any_form_of_its_path(folder, form):
    model, other = Component.from_pretrained(form(str(folder))), Package.load(folder)
    for name in ("mean", "std"):
        mine, theirs = (getattr(p.normalization, name) for p in (model.package, other))
        assert torch.equal(mine, theirs)
    for key, value in other.operator.state_dict().items():
        assert torch.equal(model.operator.state_dict()[key], value)


def test_a_shipped_name_also_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "uk_t2m").mkdir()
    assert Component.from_pretrained("uk_t2m").package.grid.shape == (33, 49)


def test_a_remote_package_comes_through_the_cache(memory, tmp_path, folder):
    model = Component.load_model(memory, size=3)
    assert model.size == 3
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_file()]) >= len(FILES)
    fsspec.filesystem("memory").rm("/models/prior/operator.mdlus")  # the cache has it
    again = Component.load_model(memory)
    x = torch.randn(1, 1, *model.package.grid.shape)
    at = torch.ones(1), torch.zeros(1, 2)
    assert torch.equal(again.operator(x, *at), model.operator(x, *at))
    shutil.copytree(folder, tmp_path / "old")
    assert not list(tmp_path.glob("ddo-package-*"))


def test_options_go_round(folder, tmp_path):
    saved = Component(Package.load(folder), size=4, label="b").save(tmp_path / "saved")
    back = Component.from_pretrained(str(saved))
    assert (back.size, back.label) == (4, "b")
    assert Component.from_pretrained(str(saved), size=5).size == 5
    assert back.options == {"size": 4, "label": "b"}
    assert sorted(p.name for p in saved.iterdir()) == sorted([*FILES, CONFIG])
    # The folder remains a package like any other, and of use to other components.
    assert Package.load(saved).channels == ("t2m",)

    class Another(Component):
        """Not named in the file."""

    assert Another.from_pretrained(str(saved)).size == 1


def test_saving_does_not_overwrite_unasked(folder):
    model = Component(Package.load(folder), size=2)
    with pytest.raises(InputError, match="exists"):
        model.save(folder)
    model.save(folder, overwrite=True)
    assert Component.from_pretrained(str(folder)).size == 2


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"no {name} in .*{folder.name}"):
        Component.from_pretrained(str(folder))


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_an_error_that_names_the_package(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError) as caught:
        Component.from_pretrained(f"file://{folder}")
    assert folder.name in str(caught.value) and "ddo-package-" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 3, "components": {}}', '{"format": 2, "components": {"A": 1}}']
)
def test_a_config_of_another_form_is_refused(folder, text):
    (folder / CONFIG).write_text(text)
    with pytest.raises(InputError, match=CONFIG):
        Component.from_pretrained(str(folder))


def test_an_unknown_option_in_the_config_is_named(folder):
    config = {"format": 2, "components": {"Component": {"sice": 1}}}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match="no option 'sice'; it has size, label"):
        Component.from_pretrained(str(folder))


def test_a_config_whose_options_do_not_nest_is_refused_with_the_new_names(folder):
    config = {"format": 1, "components": {"DDOAssimilation": {"steps": 4, "quality": [0, 3]}}}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"{CONFIG} has format 1; format 2 nests") as caught:
        earth2.DDOAssimilation.from_pretrained(str(folder))
    (line,) = str(caught.value).splitlines()
    for part in ("posterior has steps, ", "accept (quality)", "background has error, length"):
        assert part in line


def test_nested_options_are_replaced_one_by_one(folder, tmp_path):
    label = {"a": 1, "b": 2}
    saved = Component(Package.load(folder), label=label).save(tmp_path / "saved")
    assert Component.from_pretrained(str(saved), label={"b": 3}).label == {"a": 1, "b": 3}
    assert Component.from_pretrained(str(saved), label="plain").label == "plain"


@pytest.mark.parametrize("root", ["nowhere/at/all", "nonsense://a/b", "ngc://models/bad"])
def test_a_place_without_a_package(root):
    with pytest.raises(InputError, match=root):
        Component.from_pretrained(root)


def test_a_file_that_cannot_be_fetched(memory, monkeypatch):
    def refuse(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(memory, "resolve", refuse)
    with pytest.raises(InputError, match="no route to host.*network"):
        fetch_package(memory)


def test_it_takes_our_packages_only():
    with pytest.raises(InputError, match="from_pretrained"):
        Component(RemotePackage(str(SHIPPED / "uk_t2m")))


@pytest.mark.parametrize("package", [str(SHIPPED / "uk_t2m"), None])
def test_load_model_takes_packages_of_earth2studios(package):
    with pytest.raises(InputError, match="from_pretrained takes names and places"):
        Component.load_model(package)


def test_moving_it_moves_operator_and_statistics(untrained, monkeypatch):
    model, asked = Component(untrained()), []
    # Statistics check their values, which those on a device without memory do not have.
    monkeypatch.setattr(Normalization, "to", lambda self, device: asked.append(device) or self)
    assert model.to("meta") is model and model.device.type == "meta"
    assert all(p.device.type == "meta" for p in model.parameters())
    assert asked == [torch.device("meta")]
