"""`make test` leaves some tests to `make check`, and still touches every op and back-end, every mode and every command."""

import re

import pytest
from clp_kernels import backends

from clp_engine.cli import main
from clp_engine.core.conditions import KL_CONDITIONING
from clp_engine.models.forms import CONDITIONING
from clp_engine.objectives.advantages import BASELINES
from clp_engine.objectives.coefficients import ESTIMATORS

# Where an op is compared with its specification, for each back-end: {} is its name among the parameters.
OPS = {
    "multi_lora_linear": r"test_multi_lora\.py::test_.*\[.*\b{}\b",
    "interpolated_linear": r"test_interpolated_linear\.py::test_output_and_every_gradient.*\[.*\b{}\b",
    "linear_logprob": r"test_linear_logprob\.py::test_outputs_and_gradients.*\[.*\b{}\b",
    "logits_logprob": r"test_logits_logprob\.py::test_each_output_alone.*\[.*\b{}\b",
    "prefix_attention": r"test_prefix_attention\.py::test_.*\[.*\b{}\b",
    "interpolate": r"test_interpolation\.py::test_a_blend_of_one_tensor.*\[.*\b{}\b",
    "slerp": r"test_interpolation\.py::test_slerp_follows_the_arc.*\[.*\b{}\b",
    "ema_": r"test_interpolation\.py::test_ema_in_place.*\[.*\b{}\b",
    "sparsify": r"test_interpolation\.py::test_magnitude_keeps.*\[.*\b{}\b",
    "merge_sign_consensus": r"test_interpolation\.py::test_sign_consensus.*\[.*\b{}\b",
    "sample_tokens": r"test_sampling\.py::test_every_backend_draws.*\[.*\b{}\b",
}
# The reference of two ops is what the others are compared with in each of their tests; flex_attention needs a GPU's compiler.
COMPARED_WITH = {
    ("linear_logprob", "reference"),
    ("logits_logprob", "reference"),
    ("prefix_attention", "triton"),
}
COMMANDS = {
    "demo": r"test_cli\.py::test_the_demo_shows",
    "train": r"test_cli\.py::test_train_writes",
    "evaluate": r"test_cli\.py::test_evaluate_writes",
    "variance": r"test_cli\.py::test_variance_measures",
    "generate": r"test_cli\.py::test_generate_prints",
    "steer": r"test_steer\.py::test_",
    "serve": r"test_openai\.py::test_",
    "export": r"test_cli\.py::test_export_writes",
    "compare": r"test_compare\.py::test_doing_it_again",
    "info": r"test_cli\.py::test_info_names",
}
OTHERS = {
    "the CUDA kernel": r"test_cuda_decode\.py::test_accurate_for_every_number_of_rows",
    "vocab_parallel_linear_logprob": r"test_vocab_parallel\.py::test_ranks_compute",
    "Triton kernels for GPUs that are not there": r"test_aot\.py::test_every_kernel_compiles_for_every_generation",
    "an encoder-decoder": r"test_encoder_decoder\.py::test_a_run_trains_resumes_to_the_bit_and_evaluates\[t5\]",
    "resuming": r"test_partial\.py::test_partial_rollouts_train_and_resume_to_the_bit",
    "decoding by the native call": r"test_native_decoding\.py::test_logits_are_those_of_the_modules",
    "decoding by a fused step": r"test_slot_decoding\.py::test_a_fused_step_says",
    "the model as transformers uses it": r"test_steerable\.py::test_forward_is_the_policy_s_own",
}


def needed() -> dict[str, str]:
    """What has to be touched -> a regular expression for the tests that do."""
    found = {
        f"{op} on {backend}": pattern.format(backend)
        for op, pattern in OPS.items()
        for backend in ("reference", "cpu", "triton")
        if (op, backend) not in COMPARED_WITH
    }
    found |= {f"clp-engine {name}": pattern for name, pattern in COMMANDS.items()}
    found |= {f"conditioning={n}": rf"test_modes\.py::test_a_whole_life\[.*-{n}\]" for n in CONDITIONING}
    found |= {f"kl_estimator={n}": rf"test_estimators\.py::.*\b{n}\b" for n in ESTIMATORS}
    found |= {f"kl_conditioning={n}": rf"test_conditions\.py::.*\b{n}\b" for n in KL_CONDITIONING}
    found |= {f"baseline={n}": rf"test_estimators\.py::.*\b{n}\b" for n in BASELINES}
    return found | OTHERS


def missing(names: list[str]) -> list[str]:
    text = "\n".join(names)
    return [what for what, pattern in needed().items() if not re.search(pattern, text)]


def test_every_op_and_every_command_is_on_the_list():
    from bench.calls.small import ALL

    assert set(OPS) == {case.name for case in ALL}
    assert set(backends()) == {"reference", "cpu", "triton", "cuda"}
    assert set(COMMANDS) == set(main._parser([])._subparsers._group_actions[0].choices)


def test_the_tests_without_the_mark_touch_all_of_it(request):
    config, root = request.config, request.config.rootpath
    asked = {(root / str(argument)).resolve() for argument in config.args}
    if config.option.keyword or asked != {(root / path).resolve() for path in config.getini("testpaths")}:
        pytest.skip("only some tests were asked for")
    names = [item.nodeid for item in request.session.items if not item.get_closest_marker("check")]
    assert not missing(names)
    # What the list says is what it takes: without a file of tests something is missing.
    for file in ("test_sampling.py", "test_modes.py", "test_cli.py", "test_aot.py", "test_estimators.py"):
        assert missing([name for name in names if f"/{file}::" not in name]), file
