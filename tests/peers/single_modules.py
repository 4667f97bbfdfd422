"""Modules of packages whose own dependencies (Ray, DeepSpeed, tensordict) are not installed.

The package is entered into sys.modules as an empty module that knows its folder, so that importing one of its modules runs that
module's file, and not the package's __init__, which would import the rest. What such a file imports from elsewhere at its head,
and what no test calls, is stood in for by an empty module with the names given.
"""

import contextlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path


@contextlib.contextmanager
def packages(*names, missing=None):
    """`names`: packages and subpackages that are entered empty. `missing`: {module: names it should have} stood in for.

    All modules of these packages and all stand-ins are taken out of sys.modules again.
    """
    ours = {name.partition(".")[0] for name in (*names, *(missing or ()))}
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ours}
    absent = {top for top in ours if top not in before and importlib.util.find_spec(top) is None}
    for module, attributes in (missing or {}).items():
        if module.partition(".")[0] in absent:
            stand_in = types.ModuleType(module)
            stand_in.__spec__ = importlib.machinery.ModuleSpec(module, None)
            stand_in.__dict__.update({name: type(name, (), {}) for name in attributes})
            sys.modules[module] = stand_in
    for name in names:
        top, *rest = name.split(".")
        spec = importlib.util.find_spec(top) if top not in sys.modules else None
        folder = Path(spec.origin).parent if spec else Path(sys.modules[top].__path__[0])
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*rest))]
        sys.modules[name] = package
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
            del sys.modules[name]
        sys.modules.update(before)
