"""The Python blocks of docs/kernels.md."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
LIBRARIES = ("trl", "liger_kernel")


def blocks(library=None):
    """Code of the blocks that import `library`, or of those that import no other library."""
    found = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)

    def imports(block, name):
        return re.search(rf"^(from|import) {name}\b", block, re.M)

    return [
        b
        for b in found
        if (imports(b, library) if library else not any(imports(b, name) for name in LIBRARIES))
    ]


def run(code, namespace):
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace
