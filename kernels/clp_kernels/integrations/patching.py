"""Putting a replacement wherever a library's modules hold an original, and taking it out again.

`from library.a import f` leaves a reference to f in the importing module, so replacing `library.a.f` alone would miss it. Every
loaded module of the library is searched for the original, by identity, when the patch begins; when it ends, every one is
searched for the replacement, so that modules which were first imported in between are put right as well.

What is patched is the process, not a thread. What has made a reference of its own outside the library's modules (a script's
`from trl... import f`, a function compiled or bound to an object earlier) keeps it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Replacement:
    """`new` instead of `module`.`name`, in every module of the library that holds it, or in those named in `only`."""

    module: str
    name: str
    new: object
    only: tuple[str, ...] = ()


_lock = threading.Lock()
_in_force: dict[
    Replacement, int
] = {}  # how many patches want it; the outermost ones put it in and take it out
_originals: dict[Replacement, object] = {}


@contextlib.contextmanager
def patched(
    caller: str,
    package: str,
    tested: Sequence[str],
    replacements: Sequence[Replacement],
    skip: Collection[str],
    allow_untested: bool,
) -> Iterator[None]:
    """The replacements but those whose name is in `skip` are in place in the block, once however deeply blocks are nested.

    Raises ImportError where the package is missing, RuntimeError for a version that is not in `tested` (unless
    `allow_untested`) or one that lacks an original, ValueError for a name in `skip` that nothing has.
    """
    _check_version(caller, package, tested, allow_untested)
    names = {replacement.name for replacement in replacements}
    if isinstance(skip, str) or not names.issuperset(skip):
        raise ValueError(
            f"{caller}: skip is {skip!r}; expected a collection of some of {', '.join(sorted(names))}"
        )
    with contextlib.ExitStack() as stack:
        for replacement in replacements:
            if replacement.name not in skip:
                stack.enter_context(_in_place(caller, package, replacement))
        yield


def _check_version(caller: str, package: str, tested: Sequence[str], allow_untested: bool) -> None:
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"{caller}: {package} is not installed; pip install {package}=={tested[-1]}"
        ) from None
    if not allow_untested and found.partition("+")[0] not in tested:
        raise RuntimeError(
            f"{caller}: {package} {found} is installed; tested with {', '.join(tested)}. Use pip install "
            f"{package}=={tested[-1]}, or {caller}(allow_untested=True) after comparing a run's losses with unpatched ones"
        )


@contextlib.contextmanager
def _in_place(caller: str, package: str, replacement: Replacement) -> Iterator[None]:
    with _lock:
        if replacement not in _in_force:
            original = _original(caller, replacement)
            _originals[replacement] = original
            _exchange(package, original, replacement.new, replacement.only)
        _in_force[replacement] = _in_force.get(replacement, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _in_force[replacement] -= 1
            if not _in_force[replacement]:
                del _in_force[replacement]
                _exchange(package, replacement.new, _originals.pop(replacement), ())


def _original(caller: str, replacement: Replacement) -> object:
    module = importlib.import_module(replacement.module)
    if not hasattr(module, replacement.name):
        raise RuntimeError(
            f"{caller}: {replacement.module} has no {replacement.name}, which this patch replaces; leave it out with "
            f"{caller}(skip=[{replacement.name!r}], ...), or use a tested version"
        )
    return getattr(module, replacement.name)


def _exchange(package: str, old: object, new: object, only: Collection[str]) -> None:
    for name, module in list(sys.modules.items()):
        if (
            module is None
            or not (name == package or name.startswith(f"{package}."))
            or (only and name not in only)
        ):
            continue
        for attribute, value in list(vars(module).items()):
            if value is old:
                setattr(module, attribute, new)
