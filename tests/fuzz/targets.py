"""python targets.py TARGET FOLDER [flags of libFuzzer]: coverage-guided fuzzing (atheris) of one of the engine's readers.

A target writes what the fuzzer gives it into a file in FOLDER, and reads that as the engine does. It may be taken, or refused
with a ConfigError; every other exception is a finding, and so is a number that is not finite in what was taken.

Half of the inputs are bytes as they come. The other half are a valid file with a few values replaced, left out or moved, which
gets past the parser to what looks at the values.
"""

import asyncio
import contextlib
import copy
import functools
import hashlib
import io
import json
import logging
import math
import os
import re
import sys
import tempfile
import types
from pathlib import Path

import atheris
import torch
import yaml
from safetensors.torch import save
from uvicorn.server import ServerState

from clp_engine.core import yaml_reading
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import read_tensors
from clp_engine.data import sources
from clp_engine.data.prompts import check_row
from clp_engine.evaluation.compare.work import Training
from clp_engine.evaluation.report import ParetoReport
from clp_engine.models import fingerprint
from clp_engine.policy.peft import reading, warm_start
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.policy.spec import read_spec
from clp_engine.serving.app import make_app
from clp_engine.serving.batching import Event
from clp_engine.serving.metrics import Metrics
from clp_engine.serving.served import Limits, Served
from clp_engine.serving.server import TimedProtocol, make_server
from clp_engine.serving.session import Session
from clp_engine.serving.vllm_plugin import stack
from clp_engine.training.checkpoints import checkpoint
from clp_engine.training.runs import run_folder, run_spec
from clp_engine.training.settings.config import CLPConfig

FIELDS = sorted(CLPConfig.__dataclass_fields__)
TEXTS = [
    "",
    "a",
    "a,b",
    "1e999",
    "nan",
    "-inf",
    "\x00",
    "\ud800",
    "../a",
    "/",
    "{}",
    "none",
    "docsum",
    "float32",
    "x" * 300,
]

# -- inputs ---------------------------------------------------------------------------------------------------------------


def any_json(source, depth=0):
    kind = source.ConsumeIntInRange(0, 9)
    if kind < 2:
        return [None, True, False][source.ConsumeIntInRange(0, 2)]
    if kind < 4:
        return source.ConsumeIntInRange(-3, 300) if kind == 2 else 10 ** source.ConsumeIntInRange(0, 400)
    if kind < 6:
        return source.ConsumeFloat()
    if kind < 8 or depth > 3:
        return TEXTS[source.ConsumeIntInRange(0, len(TEXTS) - 1)] if kind == 6 else source.ConsumeUnicode(8)
    items = [any_json(source, depth + 1) for _ in range(source.ConsumeIntInRange(0, 3))]
    return items if kind == 8 else {source.ConsumeUnicode(4): item for item in items}


def changed(template, source):
    """A copy of the template with up to three places replaced, left out, or given a stranger beside them."""
    template = copy.deepcopy(template)
    for _ in range(source.ConsumeIntInRange(0, 3)):
        at = template
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = keys[source.ConsumeIntInRange(0, len(keys) - 1)]
            if isinstance(at[key], (dict, list)) and at[key] and source.ConsumeBool():
                at = at[key]
                continue
            how = source.ConsumeIntInRange(0, 5)
            if how == 0:
                del at[key]
            elif how == 1 and isinstance(at, dict):
                at[source.ConsumeUnicode(6)] = any_json(source)
            else:
                at[key] = any_json(source)
            break
    return template


def damaged(content, source):
    """Bytes, some of them flipped, or cut."""
    content = bytearray(content)
    for _ in range(source.ConsumeIntInRange(0, 2)):
        if content:
            content[source.ConsumeIntInRange(0, len(content) - 1)] ^= 1 << source.ConsumeIntInRange(0, 7)
    return bytes(content[: source.ConsumeIntInRange(0, len(content))] if source.ConsumeBool() else content)


def json_file(path, template, source):
    if source.ConsumeBool():
        content = source.ConsumeBytes(sys.maxsize)
    else:
        content = json.dumps(changed(template, source)).encode()
        if source.ConsumeIntInRange(0, 7) == 0:
            content = damaged(content, source)
    path.write_bytes(content)


def assert_finite(value):
    if isinstance(value, float):
        assert math.isfinite(value), value
    elif isinstance(value, dict):
        [assert_finite(item) for item in value.values()]
    elif isinstance(value, (list, tuple)):
        [assert_finite(item) for item in value]


# -- targets --------------------------------------------------------------------------------------------------------------

SETTINGS = {
    "model": "a", "dataset": "rows.jsonl", "rewards": {"a": "m:f", "b": "m:g"}, "objectives": ["a", "b"], "learning_rate": 1e-4,
    "beta": 0.1, "kl_conditioning": "odds", "alpha_range": [0.1, 0.5], "max_steps": 3, "temperature": 0.7,
    "reward_weights": [1, 2],
    "model_init_kwargs": {"dtype": "float32"}, "save_strategy": "steps", "logging_steps": 0.5, "estimator": "exact",
}  # fmt: skip


def settings(source, folder):
    """A YAML file of settings."""
    path = folder / "config.yaml"
    if source.ConsumeBool():
        path.write_bytes(source.ConsumeBytes(sys.maxsize))
    else:
        values = changed(SETTINGS, source)
        for _ in range(source.ConsumeIntInRange(0, 2)):
            values[FIELDS[source.ConsumeIntInRange(0, len(FIELDS) - 1)]] = any_json(source)
        with contextlib.suppress(yaml.YAMLError):
            path.write_text(yaml.safe_dump(values), errors="replace")
    values = yaml_reading.read_file(str(path))
    about = {name: values.pop(name, None) for name in run_spec.RUN_KEYS}
    config = CLPConfig.from_dict(values)
    assert_finite(config.to_dict())
    run_spec.RunSpec.from_values(about)


def flag(source, folder):
    """A flag's text."""
    name = FIELDS[source.ConsumeIntInRange(0, len(FIELDS) - 1)]
    config = CLPConfig(**{name: yaml_reading.read_flag(source.ConsumeUnicode(100), CLPConfig, name)})
    assert_finite(config.to_dict())


RUN = {
    "model": "a", "objectives": ["a", "b"], "task": None, "dataset": "rows.jsonl", "eval_dataset": None, "command": "train",
    "rewards": {"a": "m:f"}, "config": {"temperature": 0.7, "beta": 0.1, "max_completion_length": 8}, "train_seconds": 1.5,
    "run": "x",
}  # fmt: skip


def run_json(source, folder):
    json_file(folder / "run.json", RUN, source)
    spec = run_spec.RunSpec.load(folder)
    assert_finite([spec.train_seconds or 0.0, spec.config.get("temperature") or 0.0])
    spec.same_training(run_spec.RunSpec("a", ("b",)))
    ", ".join((*spec.objectives, *spec.rewards, spec.model, spec.command))
    CLPConfig.from_dict(spec.config)


STATE = {
    "config": {"rank": 4}, "scheduler": {}, "sampler": {}, "mix_controller": {"dot": 0.0, "norm": 1.0}, "metric_log": {},
    "trainer": {"global_step": 1}, "data": {}, "num_generated_tokens": 5, "step": 1, "run": "x", "written": 1.5,
    "random": {"python": [3, [1], None], "numpy": ["MT19937", 1, 0, 0.0]}, "sha256": {"training.safetensors": "0"},
}  # fmt: skip


def run_files(source, folder):
    """The manifest and a checkpoint's state, and the removal of what the manifest names."""
    canary = folder / "canary"
    canary.write_text("here")
    run = folder / "run"
    for name in ("checkpoint-1", "checkpoint-2"):
        (run / name).mkdir(parents=True, exist_ok=True)
        json_file(run / name / "trainer_state.json", STATE, source)
    files = ["log.jsonl", "checkpoint-1/trainer_state.json", "../canary"]
    json_file(run / "clp_manifest.json", {"run": "x", "files": files}, source)
    for path in run_folder.checkpoints(run):
        with contextlib.suppress(ConfigError):
            checkpoint.read_state(path)
    run_folder.check_free(run, None, True)
    run_folder.begin(run, "y")
    assert canary.is_file()


class Small(torch.nn.Linear):
    config = types.SimpleNamespace(name_or_path="small")


SMALL = Small(3, 2)
POLICY = {
    "base_model": "a", "objectives": ["a", "b"], "ranks": [4, 4], "lora_alphas": [8.0, 8.0], "target_modules": ["q"],
    "conditioning": "lora", "kl_conditioning": "none", "min_kl": None, "default_kl": 0.1, "kl_is_beta": False,
    "carrier": "lora", "prompt_template": None,
}  # fmt: skip
BLEND = {
    "conditioning": "lora", "carrier": "lora", "adapters": {"a": "a"}, "kl_conditioning": "none", "min_kl": None,
    "default_kl": 0.1, "kl_is_beta": False, "prompt_template": None,
}  # fmt: skip


STACK = {
    "stack": 1, "objectives": ["a", "b"], "ranks": [4, 4], "blended": True, "default_weights": {"a": 0.5, "b": 0.5},
    "version": hashlib.sha256(b"weights").hexdigest()[:16], "kl_conditioning": "odds", "min_kl": 0.1, "default_kl": 0.2,
    "kl_is_beta": False,
}  # fmt: skip


def policy_files(source, folder):
    which = source.ConsumeIntInRange(0, 3)
    if which == 0:
        json_file(folder / "clp_config.json", POLICY, source)
        spec = read_spec(folder / "clp_config.json")
        assert_finite([spec.default_kl, spec.min_kl or 0.0, *spec.scalings])
    elif which == 1:
        json_file(folder / warm_start.BLEND_FILE, BLEND, source)
        adapters, settings = warm_start.read_blend(folder)
        assert_finite([settings["default_kl"], settings["min_kl"] or 0.0])
    elif which == 2:
        json_file(folder / warm_start.BLEND_FILE, STACK, source)
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        stack._read.cache_clear()
        if (found := stack.read(folder)) is not None:
            assert_finite([found.blending.default_kl, *found.coefficients(kl=0.5)])
    else:
        json_file(folder / fingerprint.FILE, {n: list(t) for n, t in fingerprint.of(SMALL).items()}, source)
        fingerprint.check(folder, SMALL)


ADAPTER = {
    "peft_type": "LORA", "base_model_name_or_path": "a", "r": 2, "lora_alpha": 4, "rank_pattern": {"q": 2}, "alpha_pattern": {},
    "use_rslora": False, "lora_dropout": 0.0, "init_lora_weights": True, "target_modules": ["q"], "bias": "none",
    "task_type": "CAUSAL_LM", "fan_in_fan_out": False, "use_dora": False,
}  # fmt: skip
_LAYER = "base_model.model.layers.0.q"
TENSORS = save({f"{_LAYER}.lora_A.weight": torch.ones(2, 3), f"{_LAYER}.lora_B.weight": torch.ones(5, 2)})


def adapter(source, folder):
    json_file(folder / reading.CONFIG_FILE, ADAPTER, source)
    (folder / reading.WEIGHTS_FILE).write_bytes(damaged(TENSORS, source))
    found = reading.read_adapter(folder)
    for layer in found.layers.values():
        assert_finite([layer.scaling, layer.a.sum().item(), layer.b.sum().item()])
    found.rank, found.scaling, os.fspath(found.base_model)


def tensors(source, folder):
    path = folder / "adapters.safetensors"
    path.write_bytes(damaged(TENSORS, source) if source.ConsumeBool() else source.ConsumeBytes(sys.maxsize))
    for tensor in read_tensors(path).values():
        assert tensor.isfinite().all()


INTERVAL = {"mean": 1.0, "low": 0.5, "high": 1.5}
REPORT = {
    "task": None, "model": "a", "objectives": ["a"], "reference_point": {"a": 0.0}, "hypervolume": 1.0, "regret": {"a": 0.1},
    "points": [{"weights": {"a": 1.0}, "kl_coef": 0.1, "rewards": {"a": INTERVAL}, "kl": 1.0, "length": 2.0, "truncated": 0.0,
                "non_dominated": True}],
    "base": {"rewards": {"a": INTERVAL}, "hypervolume": 0.0, "hypervolume_interval": INTERVAL, "length": 2, "truncated": 0},
    "hypervolume_interval": INTERVAL, "hypervolume_gain": INTERVAL, "hypervolume_chance": 0.1, "expected_utility": 1.0,
    "realised_utility": 1.0, "realised_utility_interval": INTERVAL, "steerability": {"a": None}, "seconds": {"evaluation": 1.0},
    "setup": {"kl_name": "alpha"}, "versions": {"torch": "2"}, "commit": None, "kl_hypervolume": None,
}  # fmt: skip
TRAINING = {
    "seconds": 1.0, "steps": 2, "completions": 3, "generated_tokens": 4, "trained_parameters": 5, "threads": 1, "device": "cpu",
    "versions": {}, "commit": None,
}  # fmt: skip


def reports(source, folder):
    if source.ConsumeBool():
        json_file(folder / "report.json", REPORT, source)
        report = ParetoReport.load(folder)
        report.kl_coefs, report.kl_name, report.to_dict()
        [point.rewards[name].mean + base.mean for point in report.points for name, base in report.base.rewards.items()
         if name in point.rewards]  # fmt: skip
    else:
        json_file(folder / "training.json", TRAINING, source)
        record = Training.load(folder / "training.json")
        record.seconds + record.steps


ROWS = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}], "extra": 1}]


def rows(source, folder):
    path = folder / ["rows.jsonl", "rows.txt"][source.ConsumeBool()]
    if source.ConsumeBool():
        path.write_bytes(source.ConsumeBytes(sys.maxsize))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in changed(ROWS, source)))
    for number, row in enumerate(sources.read_rows(path)):
        check_row(row, f"row {number}")


class Transport(asyncio.Transport):
    """As much of a connection as uvicorn looks at."""

    def __init__(self):
        super().__init__()
        self.answer, self.closed = b"", False

    def write(self, data):
        self.answer += data

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


class Batch:
    """Every row gets one token at once, and looks at its options."""

    running = waiting = 0

    def submit(self, rows):
        for row in rows:
            s = row.sampling
            assert_finite([s.temperature, s.top_p or 0.0, s.min_p or 0.0, *row.blend.tolist()])
            assert row.ids and 0 <= min(row.ids) and -(2**63) <= row.seed < 2**63 and s.max_new_tokens > 0
            text, _ = row.text.push(7)
            row.drawn = 1
            row.deliver(Event(text + row.text.rest(), 7, -1.0, ((7, -1.0),) * row.top, "stop"))

    def cancel(self, rows):
        pass


@functools.cache
def port():
    """(event loop, configuration) of a server whose running batch alone is not the real one."""
    policy = ConditionedPolicy.from_pretrained("docsum", ["a", "b"], rank=1)
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    with tempfile.TemporaryDirectory() as run:
        policy.save_pretrained(run)
        served = Served(run, "cpu", Limits(8, 64, 128, 128))
    served.name, served.batch = "a", Batch()
    served.metrics = Metrics(served.batch)
    config = make_server(make_app(Session(served))).config
    config.load()
    return asyncio.new_event_loop(), config


async def answered(content, config, loop):
    transport, state = Transport(), ServerState()
    connection = TimedProtocol(config=config, server_state=state, app_state={}, _loop=loop)
    connection.connection_made(transport)
    if content:  # asyncio hands nothing over where nothing came
        connection.data_received(content)
    for _ in range(300):
        if not state.tasks:
            break
        await asyncio.sleep(0)
    connection.connection_lost(None)  # whoever waits for more of a body
    await asyncio.wait_for(asyncio.gather(*state.tasks, return_exceptions=True), 10)
    return transport.answer


REQUESTS = {
    "/api/generate": {
        "text": "a", "weights": {"a": 1.0}, "kl": None, "temperature": 0.5, "max_new_tokens": 4, "seed": 1, "chat": False,
        "base": True,
    },
    "/v1/completions": {
        "model": "a", "prompt": ["a", [5, 6]], "weights": {"a": 0.5, "b": 0.5}, "max_tokens": 4, "temperature": 0.5,
        "top_p": 0.9, "top_k": 5, "min_p": 0.1, "n": 2, "seed": 1, "stop": ["a"], "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": 2, "echo": False, "user": "a",
    },
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "base": True, "max_completion_tokens": 4,
        "temperature": 0, "logprobs": True, "top_logprobs": 1, "stream": False, "tools": [], "logit_bias": {}, "n": 1,
    },
}  # fmt: skip


def request(source, folder):
    """What comes in at the port of a server."""
    if source.ConsumeIntInRange(0, 3) == 0:
        content = source.ConsumeBytes(sys.maxsize)
    else:
        path = sorted(REQUESTS)[source.ConsumeIntInRange(0, len(REQUESTS) - 1)]
        body = json.dumps(changed(REQUESTS[path], source)).encode()
        if source.ConsumeIntInRange(0, 3) == 0:
            body = damaged(body, source)
        length = len(body) if source.ConsumeIntInRange(0, 7) else source.ConsumeIntInRange(-2, 10**30)
        content = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
        content += f"Content-Length: {length}\r\n\r\n".encode() + body
        if source.ConsumeIntInRange(0, 3) == 0:
            content = damaged(content, source)
    (folder / "request").write_bytes(content)
    errors, (loop, config) = io.StringIO(), port()
    with contextlib.redirect_stderr(errors):
        answer = loop.run_until_complete(answered(content, config, loop))
    assert not re.search(rb"HTTP/1.1 500 |Traceback|server_error", answer), errors.getvalue() or answer
    assert "Traceback" not in errors.getvalue(), errors.getvalue()
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    if length and b"application/json" in head and not content.startswith(b"HEAD"):
        json.loads(body[: int(length[1])])
    for event in re.findall(rb"^data: (\{.*\})\n", body, re.MULTILINE):
        json.loads(event)


TARGETS = {
    f.__name__: f
    for f in (settings, flag, run_json, run_files, policy_files, adapter, tensors, reports, rows, request)
}


def instrument(package):
    """Count the branches of every function of a package. (atheris' hook for imports passes over editable installations.)"""
    modules = [
        m for name, m in sorted(sys.modules.items()) if name == package or name.startswith(package + ".")
    ]
    found = {}
    for module in modules:
        members = [
            member
            for member in vars(module).values()
            if getattr(member, "__module__", None) == module.__name__
        ]
        for owner in [module, *(member for member in members if isinstance(member, type))]:
            for member in vars(owner).values():
                member = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
                if isinstance(member, types.FunctionType) and member.__module__ == module.__name__:
                    found[id(member)] = member
    for function in found.values():
        atheris.instrument_func(function)


def main(name, folder, *flags):
    logging.disable()
    target, folder = TARGETS[name], Path(folder)
    os.chdir(folder)
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n')
    reading._PATIENCE = 1
    instrument("clp_engine")
    instrument("yaml")

    def one_input(content):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                target(atheris.FuzzedDataProvider(content), folder)
        except ConfigError as error:
            assert len(str(error)) < 2000 and str(error).strip(), error
        except Exception:
            for path in sorted(folder.rglob("*")):
                if path.is_file() and path.stat().st_size < 20_000:
                    print(f"{path.relative_to(folder)}: {path.read_bytes()!r}", file=sys.stderr)
            raise

    atheris.Setup([sys.argv[0], *flags], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
