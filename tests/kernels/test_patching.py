"""clp_kernels.integrations.patching on a library made up for it."""

import contextlib
import importlib.metadata
import sys
import types

import pytest
from clp_kernels.integrations import patch_liger, patch_openrlhf, patch_trl, patch_verl
from clp_kernels.integrations.patching import Replacement, patched


def original():
    return "original"


def another():
    return "another"


def replacement():
    return "replacement"


ITEMS = (Replacement("library.core", "compute", replacement), Replacement("library.core", "measure", another))


@pytest.fixture
def library(monkeypatch):
    """library.core defines two functions; library.user, library.renamed and a script imported one."""
    modules = {name: types.ModuleType(name) for name in
               ("library", "library.core", "library.user", "library.renamed", "library_of_others", "script")}  # fmt: skip
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    modules["library"].__path__ = []
    modules["library.core"].compute, modules["library.core"].measure = original, print
    modules["library.user"].compute = modules["script"].compute = modules["library_of_others"].compute = (
        original
    )
    modules["library.renamed"]._compute = original
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.0+local")
    return {name.rpartition(".")[2]: module for name, module in modules.items()}


def patch(items=ITEMS, tested=("1.1.0", "1.2.0"), skip=(), allow_untested=False):
    return patched("patch_library", "library", tested, items, skip, allow_untested)


def assert_untouched(library):
    held = [library["core"].compute, library["user"].compute, library["renamed"]._compute]
    assert all(value is original for value in held) and library["core"].measure is print


def test_every_module_of_the_library_has_the_replacement_in_the_block_alone(library):
    with patch():
        assert (
            library["core"].compute is library["user"].compute is library["renamed"]._compute is replacement
        )
        assert library["core"].measure is another
        assert library["script"].compute is library["library_of_others"].compute is original
    assert_untouched(library)


def test_an_exception_undoes_it(library):
    with pytest.raises(KeyError), patch():
        raise KeyError
    assert_untouched(library)


def test_a_module_first_imported_in_the_block_is_put_right_at_its_end(library, monkeypatch):
    with patch():
        late = types.ModuleType("library.late")
        late.compute = library["core"].compute
        monkeypatch.setitem(sys.modules, "library.late", late)
        assert late.compute is replacement
    assert late.compute is original
    assert_untouched(library)


@pytest.mark.parametrize("first_out", ["inner", "outer"])
def test_nested_blocks_end_with_the_last_of_them_in_any_order(library, first_out):
    outer, inner = contextlib.ExitStack(), contextlib.ExitStack()
    outer.enter_context(patch())
    inner.enter_context(patch(skip=["measure"]))
    order = (inner, outer) if first_out == "inner" else (outer, inner)
    order[0].close()
    assert library["user"].compute is replacement
    assert library["core"].measure is (another if first_out == "inner" else print)
    order[1].close()
    assert_untouched(library)


def test_it_decorates_functions_too(library):
    @patch()
    def train():
        return library["user"].compute()

    assert train() == "replacement" and train() == "replacement"
    assert_untouched(library)


def test_what_is_skipped_stays(library):
    with patch(skip=["compute"]):
        assert library["core"].compute is original and library["core"].measure is another
    assert_untouched(library)
    for wrong in (["calculate"], "compute"):
        with pytest.raises(
            ValueError, match="patch_library: skip is .*; expected a collection of some of compute, measure"
        ):
            with patch(skip=wrong):
                pass


def test_some_modules_alone(library):
    with patch((Replacement("library.core", "compute", replacement, only=("library.user",)),)):
        assert library["user"].compute is replacement and library["core"].compute is original
    assert_untouched(library)


def test_an_untested_version_is_refused_unless_asked_for(library):
    message = r"library 1.2.0\+local is installed; tested with 1.0.0, 1.1.0. Use pip install library==1.1.0, or patch_library"
    with pytest.raises(RuntimeError, match=message), patch(tested=("1.0.0", "1.1.0")):
        pass
    assert_untouched(library)
    with patch(tested=("1.0.0",), allow_untested=True):
        assert library["core"].compute is replacement
    assert_untouched(library)


def test_a_version_without_the_original_is_refused_and_nothing_is_left_behind(library):
    gone = (*ITEMS, Replacement("library.core", "removed", another))
    with (
        pytest.raises(RuntimeError, match=r"library.core has no removed.*patch_library\(skip=\['removed'\]"),
        patch(gone),
    ):
        pass
    assert_untouched(library)


@pytest.mark.parametrize(
    "patch_library", [patch_trl, patch_verl, patch_openrlhf, patch_liger], ids=lambda f: f.__name__
)
def test_each_library_is_refused_in_another_version(patch_library, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    with (
        pytest.raises(RuntimeError, match=rf"{patch_library.__name__}: .* 99.0 is installed; tested with"),
        patch_library(),
    ):
        pass
