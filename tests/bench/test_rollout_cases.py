"""The group `rollout`: its floor counted by hand, wrong log-probs found, its targets and tables."""

import dataclasses

import pytest
import torch

from bench.__main__ import main
from bench.cases import rollout
from bench.core import ceilings, schema, targets
from bench.core.case import Work
from bench.core.schema import Case, Floor, Times, Variant
from bench.pages import readme, report
from bench.step import decoder_truth, step_case

pytestmark = pytest.mark.check
TINY = rollout.cases("cpu", "tiny")[0]
RATES = {"copy_bytes": 2.0, "read_bytes": 2.0, "exp_rate": 1.0, "matmul_flops": {"float32": 1.0}}
MERGED, ONE, THREE = targets.MERGED, targets.of_weightings(1), targets.of_weightings(3)


@pytest.fixture(scope="module")
def subject():
    return rollout.Subject(TINY)


def test_the_floor_is_what_a_step_reads_and_multiplies_counted_by_hand(subject):
    # Two layers of hidden 32, MLP 64, 4 heads of queries and 2 of keys, 8 wide; V = 5000; 6 rows of 3 prompts.
    matrices = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 64 * 32) + 5000 * 32
    others = 2 * (32 + 16 + 16 + 2 * 32) + 32  # biases of q, k, v and norms; the last norm
    factors = 2 * 32 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))  # two adapters of rank 16
    cached = 2 * 2 * (2 * 8) * (3 * 12 + 6 * (1 + 2 + 3 + 4) / 4)  # prompts once; own tokens grow from 1 to 4
    attended = 12 + 2.5
    for low_rank in (False, True):
        extra = factors if low_rank else 0
        work = rollout.step_work(subject.policy.model, TINY, low_rank)
        assert work.bytes == 4 * (matrices + others + extra + cached + 6 * 32)
        assert work.flops == 6 * (2 * (matrices + extra) + 4 * 2 * (4 * 8) * attended)
        assert work.exps == 6 * (5000 + 2 * 4 * attended + 2 * 64)
    merged = rollout.step_work(subject.merged.model, TINY, True)
    assert merged == rollout.step_work(subject.policy.model, TINY, False)


def test_the_truth_is_transformers_merged_model(subject):
    ids = torch.randint(5000, (2, 17), generator=torch.Generator().manual_seed(0))
    coefficients = subject.policy.coefficients(subject.conditions(3))[2]
    merged = subject.policy.merge(subject.weightings[2:3])
    with torch.no_grad():
        expected = merged(ids).logits[:, 11:-1].log_softmax(-1).gather(-1, ids[:, 12:, None])[..., 0]
    for dtype in (torch.float32, torch.float64):
        found = decoder_truth.log_probs(subject.policy, coefficients, ids, 12, dtype)
        torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)
    other = decoder_truth.log_probs(subject.policy, torch.zeros(2), ids, 12, torch.float64)
    assert (other - expected).norm() > 1e-3 * expected.norm()  # the deltas are large enough to be told apart


def test_a_tiny_run_measures_every_variant_against_its_own_floor(tmp_path, capsys):
    threads, path = torch.get_num_threads(), tmp_path / "r.json"
    try:
        code = main(
            [
                "run",
                "rollout",
                "--device",
                "cpu",
                "--sizes",
                "tiny",
                "--quick",
                "--flush",
                "1",
                "--threads",
                "1",
            ]
            + ["--peers", "transformers,peft", "--out", str(path)]
        )
    finally:
        torch.set_num_threads(threads)
    result = schema.load(path)
    (case,) = result.cases
    assert code == 0 and case.bare == MERGED and case.tokens == 6
    assert case.shape == {"rows": 6, "group": 2, "prompt": 12, "new": 5}
    ours = [v for v in case.variants if v.name.startswith("clp-engine")]
    assert {v.name for v in ours} == {MERGED, ONE, THREE, "clp-engine, reference"}
    for v in case.variants:
        assert v.status in ("ok", "unavailable") and (v.status == "ok" or "not importable" in v.reason), v
    for v in ours:
        assert v.times.runs == 2 and {"set-up", "prefill", "decode"} == v.phases.keys()
        assert v.phases["decode"] == pytest.approx(4 * v.times.median)
        assert v.errors["logprob"].own <= v.errors["logprob"].allowed
    assert case.floor.bytes == case.variant(MERGED).floor.bytes < case.variant(THREE).floor.bytes
    # The ceilings were measured again after the case, and all floors brought in line with them.
    for v in ours:
        work = Work(v.floor.flops, v.floor.bytes, v.floor.exps)
        assert v.floor == ceilings.floor(work, case.dtype, result.ceilings)
    printed = capsys.readouterr().out
    assert "of the merged model's time" in printed and "| phase | set-up | prefill | decode |" in printed
    text = readme.render("<!-- bench:r/rollouts -->\n<!-- /bench -->\n", tmp_path)
    assert "| tiny | 6 in groups of 2 |" in text and "over one weighting" in text


def test_a_blend_of_other_weights_is_wrong(subject):
    right = subject._blended(3)
    assert rollout.accuracy.complaint(subject.errors(right), ("logprob",)) is None
    wrong = dataclasses.replace(right, coefficients=right.coefficients.flip(-1))
    assert "torch has" in rollout.accuracy.complaint(subject.errors(wrong), ("logprob",))


def test_a_rollout_that_ends_early_is_not_compared(subject, monkeypatch):
    monkeypatch.setattr(subject.policy.model.generation_config, "eos_token_id", list(range(5000)))
    with pytest.raises(RuntimeError, match="not comparable"):
        subject._blended(1).call(False)


def test_what_raises_is_a_result_and_the_others_are_measured(monkeypatch):
    result = schema.Result(schema.VERSION, {"device_type": "cpu", "threads": 1}, {}, RATES, [], [])
    case = dataclasses.replace(TINY, peers=False)
    blended = rollout.Subject._blended

    def failing_later(self, count):
        decoder, calls = blended(self, count), []

        def call(checked):
            calls.append(checked)
            if count == 3 and len(calls) == 4:
                raise torch.OutOfMemoryError
            return decoder.call(checked)

        return dataclasses.replace(decoder, call=call)

    monkeypatch.setattr(rollout.Subject, "_blended", failing_later)
    record = case.measure({}, True, 0.0, result)
    assert record.variant(THREE).reason == "out of memory" and record.variant(ONE).status == "ok"
    monkeypatch.setattr(rollout, "make_policy", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    result.cases = [record, case.measure({}, True, 0.0, result)]
    result.cases[1].id += " again"
    assert [v.reason for v in result.cases[1].variants] == ["out of memory"] and result.cases[1].floor is None
    schema.read(dataclasses.asdict(result))


def test_the_slots_of_a_gpu_are_right_in_bfloat16(monkeypatch):
    from clp_engine.rollouts.engines import choice
    from clp_engine.rollouts.engines.cuda_graphs import GraphDecoder

    monkeypatch.setattr(choice, "step_decoder", GraphDecoder)
    for module in (step_case, rollout):
        monkeypatch.setattr(module, "FLOAT32", ())
    # Enough tokens for the errors of two computations in bfloat16 to be of one size.
    case = dataclasses.replace(TINY, new=24)
    subject = rollout.Subject(case)
    assert case.dtype == "bfloat16" and subject.merged.model.dtype is torch.bfloat16
    for make in (subject._merged, lambda: subject._blended(3), subject._reference):
        errors = subject.errors(make())
        assert errors["logprob"].torch > 1e-5 and rollout.accuracy.complaint(errors, ("logprob",)) is None
    half = rollout.step_work(subject.policy.model, case, True).bytes
    monkeypatch.undo()
    assert half == rollout.step_work(subject.policy.model, case, True).bytes / 2


def timed(**seconds):
    """A case with these medians, floors of 4 and 5 bytes, and a wrong variant for a negative time."""
    names = {"merged": MERGED, "one": ONE, "many": targets.of_weightings(64)}
    variants = []
    for name, s in seconds.items():
        times = Times(abs(s), abs(s), abs(s), abs(s), abs(s), 3)
        floor = Floor(1.0, 4.0 if name == "merged" else 5.0, 0.0, 1.0, "memory")
        status = {"status": "wrong", "reason": "logprob: error"} if s < 0 else {"status": "ok"}
        variants.append(Variant(names[name], times=times, floor=floor, **status))
    shape = {"rows": 64, "group": 1, "prompt": 8, "new": 8}
    case = Case(
        "r", "rollout", "decode_step", "decode step", shape, "bfloat16", variants, {"model": "m"}, MERGED
    )
    case.floor = Floor(1.0, 4.0, 0.0, 1.0, "memory")
    return case


def judged(case, device="NVIDIA H200"):
    environment = (
        {"device": device, "device_type": "cuda"} if device else {"device_type": "cpu", "threads": 2}
    )
    rates = {"copy_bytes": 2.0, "read_bytes": 2.0, "exp_rate": 1.0, "matmul_flops": {"bfloat16": 1.0}}
    names = [name for name in targets.TARGETS if name.startswith("rollout")]
    return {v.target.rpartition(", ")[2]: v for v in targets.verdicts(tuple(names), case, rates, environment)}


def test_targets_compare_the_most_weightings_with_floor_merged_model_and_one():
    found = judged(timed(merged=3.0, one=3.1, many=3.2))
    assert {v.limit: (round(v.value, 3), v.met) for v in found.values()} == {
        0.7: (0.781, True),  # 5 bytes in 3.2 s of a bandwidth of 2
        1.1: (1.067, True),
        1.02: (1.032, False),
    }
    cpu = judged(timed(merged=3.0, one=3.2, many=3.4), device=None)
    assert sorted(v.limit for v in cpu.values()) == [1.02, 1.1] and not any(v.met for v in cpu.values())


@pytest.mark.parametrize("missing", ["many", "merged", "one"])
def test_a_wrong_variant_gives_no_verdict(missing):
    case = timed(**{"merged": 3.0, "one": 3.1, "many": 3.2, missing: -1.0})
    found = judged(case)
    # Without the most weightings nothing is said of fewer.
    none = {"merged": {1.1}, "one": {0.7, 1.1, 1.02}, "many": {0.7, 1.1, 1.02}}[missing]
    assert {v.limit for v in found.values() if v.value is None} == none
    assert report.decode_table([case]) == []


def test_new_ceilings_change_the_floors_of_variants_too():
    case = timed(merged=3.0, one=3.1, many=3.2)
    rates = {"copy_bytes": 10.0, "read_bytes": 10.0, "exp_rate": 1.0, "matmul_flops": {"bfloat16": 100.0}}
    environment = {"device": "NVIDIA H200", "device_type": "cuda"}
    ceilings.apply(schema.Result(schema.VERSION, environment, {}, rates, [], [case]))
    assert [v.floor.seconds for v in case.variants] == [0.4, 0.5, 0.5] and case.floor.seconds == 0.4
