"""bench/gpu/sanitize.py: every kernel and every tile has a check, wrong results and kernels that nothing launches fail it."""

import contextlib
import json

import clp_kernels
import pytest
import torch
from clp_kernels.backends import forced_backend, interpreting

from bench.calls import CHECKS
from bench.calls.call import HALF, SINGLE, Call, inputs, outputs
from bench.gpu import sanitize
from bench.gpu.sanitize import Launches

pytestmark = pytest.mark.skipif(not interpreting(), reason="counts launches in Triton's interpreter")


@pytest.fixture(scope="module")
def launches():
    """What all checks launch, with nothing computed: the interpreter would take minutes."""
    kind = type(next(iter(sanitize.kernels().values())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "run", lambda *arguments, **options: None)
        found = Launches()
        with found.watched():
            for op in CHECKS:
                for dtype, check in sanitize._chosen(op, "cpu", 1):
                    # What the kernels left unwritten may be no token, and is then refused.
                    with clp_kernels.use_backend("triton"), check.context(), contextlib.suppress(ValueError):
                        outputs(check, inputs(check, dtype, "cpu"))
    return found


def test_every_kernel_is_launched(launches):
    assert len(sanitize.kernels()) >= 17
    assert sanitize.never_launched(launches, "cpu") == []


def test_every_tile_that_this_device_may_choose_is_launched(launches):
    left = [
        where for where, (module, tile) in sanitize.tiles().items() if not launches.has_tile(module, tile)
    ]
    elsewhere = ("[hip]", "[ampere]")  # other GPUs'
    assert [where for where in left if not any(word in where for word in elsewhere)] == []


def test_kernels_are_those_that_the_host_launches():
    names = sanitize.kernels().keys()
    assert {"low_rank._skinny", "products._product_described", "interpolation._add_up"} <= names
    assert not names & {"low_rank._gate_rows", "launch._halves", "token_sums._fold", "head_logits._dot"}


def test_a_kernel_that_nothing_launches_fails_once_all_ops_were_run(launches, tmp_path, capsys):
    fewer = Launches({k: v for k, v in launches.by_kernel.items() if k != "low_rank._both"})
    ops = list(CHECKS)
    fewer.save(tmp_path / "one.json", ops[:4])
    fewer.save(tmp_path / "two.json", ops[4:])
    assert sanitize.main(["--device", "cpu", "--judge", str(tmp_path / "one.json")]) == 0
    assert f"judged with {ops[4]}" in capsys.readouterr().out
    files = [str(tmp_path / "one.json"), str(tmp_path / "two.json")]
    assert sanitize.main(["--device", "cpu", "--judge", *files]) == 1
    assert "NEVER LAUNCHED low_rank._both" in capsys.readouterr().out
    launches.save(tmp_path / "two.json", ops[4:])
    assert sanitize.main(["--device", "cpu", "--judge", *files]) == 0


def test_a_run_says_what_is_right_and_keeps_what_was_launched(tmp_path, capsys):
    record = tmp_path / "r.json"
    assert sanitize.main(["sparsify", "ema_", "--device", "cpu", "--thin", "2", "--record", str(record)]) == 0
    out = capsys.readouterr().out
    assert "sparsify: random, float16 [triton]: right" in out and "0 wrong" in out
    saved = json.loads(record.read_text())
    assert saved["ops"] == ["sparsify", "ema_"] and set(saved["kernels"]) == {
        "interpolation._own",
        "interpolation._sparsify",
        "interpolation._blend",
    }


def doubled(t):
    return {"y": t["x"] * (2 if forced_backend() == "reference" else 2.02)}


def test_a_wrong_result_and_an_error_are_failures(monkeypatch, capsys):
    def raising(t):
        raise RuntimeError("no such luck")

    x = {"x": torch.linspace(1, 2, 9)}
    checks = [Call("wrong", x, doubled, dtypes=(SINGLE,)), Call("raises", x, raising, dtypes=(SINGLE,))]
    monkeypatch.setitem(CHECKS, "sparsify", lambda: iter(checks))
    assert sanitize.main(["sparsify", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "WRONG sparsify: wrong, float32" in out and "error 0.01 where torch has" in out
    assert "raised RuntimeError: no such luck" in out and "2 checks, 2 wrong" in out


def test_what_is_not_finite_or_missing_is_wrong():
    x = {"x": torch.linspace(1, 2, 9)}
    nan = Call(
        "nan",
        x,
        lambda t: {"y": t["x"] * (1 if t["x"].dtype is torch.float64 else torch.nan)},
        dtypes=(SINGLE,),
    )
    assert "not finite" in sanitize.complaint(nan, SINGLE, "cpu")
    gone = Call("gone", x, lambda t: {"y": t["x"]} if t["x"].dtype is torch.float64 else {}, dtypes=(SINGLE,))
    assert "did not return y" in sanitize.complaint(gone, SINGLE, "cpu")


def test_an_unknown_op_is_refused():
    with pytest.raises(SystemExit, match="unknown op 'nonesuch'"):
        sanitize.main(["nonesuch", "--device", "cpu"])


def test_graphs_alone_are_no_whole_op(tmp_path, capsys):
    record = tmp_path / "r.json"
    assert sanitize.main(["interpolated_linear", "--graphs", "--device", "cpu", "--record", str(record)]) == 0
    out = capsys.readouterr().out
    assert (
        "without gradients" in out and "two blends by index" not in out and "graphs were not captured" in out
    )
    assert json.loads(record.read_text())["ops"] == []


def test_every_choice_that_tuning_may_make_has_a_check(capsys):
    found = list(sanitize.candidates("cpu"))
    said = capsys.readouterr().out
    # Not asked for on a CPU: other GPUs' families, attention, and when a shared blend is merged.
    left = [line for line in said.split("\n") if "no check asks for it" in line]
    assert not [line for line in left if not any(w in line for w in ("ampere", "hip", "attention", "merge"))]
    assert len(found) >= 100 and len({label for _, label, _, _ in found}) == len(found)


def test_inputs_are_rounded_but_for_what_stays_wide():
    check = Call("x", {"x": torch.rand(3), "w": torch.rand(3), "i": torch.arange(3)}, doubled, wide=("w",))
    kinds = {name: t.dtype for name, t in inputs(check, HALF, "cpu").items()}
    assert kinds == {"x": HALF, "w": SINGLE, "i": torch.int64}
