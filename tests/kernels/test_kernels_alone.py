"""The distribution clp-kernels installs from kernels/ alone, runs without transformers, and another version is said."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import clp_kernels
import pytest
from test_torch_alone import requirements

import clp_engine

ROOT = Path(__file__).parents[2]
USE = """
import torch, clp_kernels
from clp_kernels import expand_gate, linear_logprob, multi_lora_linear, use_backend

try:
    import transformers
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("transformers is there")
torch.manual_seed(0)
x, weight, lora_a, lora_b = torch.randn(5, 48), torch.randn(40, 48), torch.randn(8, 48), torch.randn(40, 8)
gate = expand_gate(torch.rand(5, 1), (8,), (2.0,))
results = {}
for backend in ("cpu", "reference"):
    with use_backend(backend):
        y = multi_lora_linear(x, weight, lora_a, lora_b, gate)
        stats = linear_logprob(x, weight, torch.arange(5), ref_hidden=x + 0.1, outputs=("logprob", "kl"))
        results[backend] = (y, stats.logprob, stats.kl)
for native, plain in zip(*results.values()):
    torch.testing.assert_close(native, plain, rtol=1e-4, atol=1e-4)
print(clp_kernels.__file__, clp_kernels.__version__, clp_kernels.backends()["cpu"].reason, sep="\\n")
"""


def run(*command, **options):
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=2400, **options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def link_distributions(names, folder):
    """Into `folder`, everything that the distributions hold, and nothing else of this environment."""
    folder.mkdir()
    for name in names:
        try:
            files = importlib.metadata.files(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            target = folder / top
            if not target.exists():
                target.symlink_to(Path(importlib.metadata.distribution(name).locate_file(top)))


def test_every_version_is_the_same():
    assert clp_kernels.__version__ == clp_engine.__version__
    for path in ("pyproject.toml", "kernels/pyproject.toml"):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(r'^version = "(.+)"', text, re.MULTILINE)[1] == clp_engine.__version__, path


def test_both_distributions_ask_for_the_same_torch_triton_and_numpy():
    for name in ("torch", "triton", "numpy"):
        lines = [
            re.search(rf'^    "{name}>.*$', (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)[0]
            for path in ("pyproject.toml", "kernels/pyproject.toml")
        ]
        assert lines[0] == lines[1]


def test_kernels_of_another_version_are_said_in_one_line(tmp_path, monkeypatch, recwarn):
    clp_engine._compare_kernels()
    assert not recwarn.list
    other = tmp_path / "__init__.py"
    other.write_text('__version__ = "9.8.7"\n')
    monkeypatch.setattr(clp_engine, "find_spec", lambda name: SimpleNamespace(origin=str(other)))
    with pytest.warns(RuntimeWarning) as said:
        clp_engine._compare_kernels()
    expected = f"clp-engine {clp_engine.__version__} finds clp_kernels 9.8.7 in {tmp_path}, "
    (line,) = [str(warning.message) for warning in said]
    assert line.startswith(expected) and "\n" not in line


@pytest.mark.check
def test_kernels_install_alone_and_run_without_transformers(tmp_path):
    """A C++ build: minutes. torch and what it requires are linked from this environment, as the index's is large."""
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    names = requirements("torch") | {"numpy", "triton"}
    link_distributions(names, tmp_path / "linked")
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "linked.pth").write_text(f"{tmp_path / 'linked'}\n")
    run(python, "-m", "pip", "install", "--disable-pip-version-check", ROOT / "kernels")
    file, version, native = run(python, "-c", USE, cwd=tmp_path).splitlines()
    assert file.startswith(site) and version == clp_kernels.__version__ and native.startswith("C++ kernels")
