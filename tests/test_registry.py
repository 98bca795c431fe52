"""Registries: names, errors, entry points."""

import pytest
import torch

import vispco
from vispco import registry
from vispco.registry import Registry, adapter_for


class Red:
    """A class to register."""


class Blue:
    """Another."""


@pytest.fixture
def colours():
    """A registry of its own, without entry points."""
    return Registry("colour")


def test_decorator_and_direct_call(colours):
    assert colours.register("red")(Red) is Red and colours.register("blue", Blue) is Blue
    assert (
        colours.get("red") is Red
        and colours.get("blue") is Blue
        and colours.names() == ["blue", "red"]
    )


def test_a_name_is_taken_once(colours):
    colours.register("red", Red)
    with pytest.raises(
        ValueError, match=r"colour 'red' is already registered \(Red\).*overwrite=True"
    ):
        colours.register("red", Blue)
    with pytest.raises(ValueError, match="already registered"):
        colours.register("red")(Blue)
    assert colours.get("red") is Red
    # The same class again, as when a module is reloaded by hand.
    colours.register("red", Red)
    colours.register("red", Blue, overwrite=True)
    assert colours.get("red") is Blue and colours.names() == ["red"]


@pytest.mark.parametrize("name", ["", None, 3, Red])
def test_a_name_is_a_non_empty_string(colours, name):
    with pytest.raises(
        ValueError,
        match=r"a colour's name must be a non-empty string, got .*@register_colour\('name'\)",
    ):
        colours.register(name, Red)


def test_forgetting_the_parentheses_is_explained(colours):
    with pytest.raises(
        ValueError, match="must be a non-empty string, got <class .*write @register_colour"
    ):

        @colours.register
        class _(Red):
            pass


def test_unknown_name_comes_with_the_nearest_and_the_list(colours):
    colours.register("crimson", Red), colours.register("teal", Blue)
    with pytest.raises(
        ValueError,
        match=r"unknown colour 'crimsom': did you mean 'crimson'\? registered are crimson, "
        r"teal; add your own with vispco.register_colour\(\)",
    ):
        colours.get("crimsom")
    with pytest.raises(
        ValueError, match="unknown colour 'xyz': registered are crimson, teal"
    ) as caught:
        colours.get("xyz")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", [None, 3, ("red",), ["red"], {"red": 1}])
def test_a_name_of_another_type_is_unknown_too(colours, name):
    """A configuration edited by hand may hold anything."""
    colours.register("red", Red)
    with pytest.raises(ValueError, match="unknown colour"):
        colours.get(name)


def test_wildcards(colours):
    for name in ("sky", "sea", "sand", "Sun"):
        colours.register(name, Red)
    assert colours.names("s*") == ["sand", "sea", "sky"] and colours.names("s?a") == ["sea"]
    assert (
        colours.names("[S]*") == ["Sun"]
        and colours.names("*d*") == ["sand"]
        and colours.names("none") == []
    )


def test_remove(colours):
    colours.register("red", Red)
    colours.remove("red"), colours.remove("red")
    assert colours.names() == []


# ---- entry points --------------------------------------------------------------------------------
class Point:
    """An entry point of an installed package; counts how often it is loaded."""

    def __init__(self, name, cls):
        self.name, self.cls, self.loads = name, cls, 0

    def load(self):
        self.loads += 1
        if isinstance(self.cls, Exception):
            raise self.cls
        return self.cls


@pytest.fixture
def installed(monkeypatch):
    """Packages to install, as {group: [points]}."""
    groups = {}
    monkeypatch.setattr(registry, "entry_points", lambda group: groups.get(group, []))
    return groups


@pytest.mark.parametrize("ask", [lambda r: r.get("red"), lambda r: r.names()])
def test_installed_packages_register_themselves(installed, ask):
    point = Point("red", Red)
    installed["vispco.colours"] = [point]
    colours = Registry("colour", "vispco.colours")
    # Nothing is imported before it is asked for.
    assert point.loads == 0
    ask(colours), ask(colours)
    assert colours.get("red") is Red and colours.names() == ["red"] and point.loads == 1


def test_what_is_registered_already_wins_over_an_entry_point(installed):
    installed["vispco.colours"] = [Point("red", Blue), Point("blue", Blue)]
    colours = Registry("colour", "vispco.colours")
    colours.register("red", Red)
    assert colours.get("red") is Red and colours.get("blue") is Blue


def test_a_module_that_registers_itself_when_loaded(installed):
    """The entry point imports a module whose decorator registers the class.

    That is no duplicate.
    """
    colours = Registry("colour", "vispco.colours")

    class Module(Point):
        def load(self):
            colours.register("red", Red)
            return super().load()

    installed["vispco.colours"] = [Module("red", Red)]
    assert colours.get("red") is Red


def test_a_broken_package_is_named_and_does_not_hide_the_others(installed):
    """Whatever the error is, the message says which entry point it came from.

    The rest stay usable.
    """
    installed["vispco.colours"] = [
        Point("broken", ImportError("no module named 'gone'")),
        Point("blue", Blue),
    ]
    colours = Registry("colour", "vispco.colours")
    colours.register("red", Red)
    try:
        assert colours.get("blue") is Blue
    except Exception as error:
        assert "broken" in str(error)
    assert colours.get("blue") is Blue and colours.get("red") is Red


def test_the_real_groups():
    from importlib.metadata import entry_points

    for kind, names in (
        ("methods", vispco.list_methods()),
        ("adapters", vispco.list_adapters()),
        ("kernels", vispco.list_kernels()),
    ):
        assert {point.name for point in entry_points(group=f"vispco.{kind}")} <= set(
            names
        ) and names


# ---- vispco's own --------------------------------------------------------------------------------
def test_built_in_names():
    assert {"fastv", "pdrop", "sparsevlm", "random", "strided"} <= set(vispco.list_methods())
    assert "llava" in vispco.list_adapters("ll*")
    with pytest.raises(
        ValueError, match=r"unknown method 'fastvv': did you mean 'fastv'\?.*register_method"
    ):
        vispco.PruningConfig("fastvv", [1.0])


def test_duplicate_method_and_adapter_are_refused():
    with pytest.raises(ValueError, match=r"method 'fastv' is already registered \(FastV\)"):
        vispco.register_method("fastv", type("Mine", (vispco.Method,), {}))
    with pytest.raises(ValueError, match=r"adapter 'llava' is already registered \(Llava\)"):
        vispco.register_adapter("llava")(type("Mine", (vispco.Adapter,), {}))


@pytest.mark.parametrize(
    "kind, base", [("method", "Method"), ("adapter", "Adapter"), ("kernel", "Kernel")]
)
def test_what_is_no_class_of_its_kind_is_refused(kind, base):
    register = getattr(vispco, f"register_{kind}")
    for wrong in (Red, Red(), "fastv", 3):
        with pytest.raises(ValueError, match=rf"derived from vispco\.{base}, got .*: write class"):
            register("wrong", wrong)
    assert "wrong" not in getattr(vispco, f"list_{kind}s")()


def test_adapter_for_a_model_a_subclass_and_a_configuration(llava):
    cls = registry.ADAPTERS.get("llava")
    child = object.__new__(type("MyLlava", (type(llava),), {}))
    assert adapter_for(llava) is adapter_for(llava.config) is adapter_for(child) is cls


@pytest.mark.parametrize(
    "model", [torch.nn.Linear(2, 2), object(), None, "llava-hf/llava-1.5-7b-hf"]
)
def test_no_adapter(model):
    with pytest.raises(
        ValueError,
        match="expected a model of Hugging Face or its configuration, got "
        + (f"the name '{model}': load it" if isinstance(model, str) else type(model).__name__),
    ):
        adapter_for(model)
