"""`vllm serve` with the plug-in, in processes of its own, asked over HTTP as users ask it."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from engine.conftest import build_tokenizer
from rollouts_from_vllm import GAP, GAPS, log_of, trainer_of
from served import CHAT_TEMPLATE, DEFAULT, NEW_TOKENS, PLAIN, prepare, prompt
from starlette.testclient import TestClient

from clp_engine import ConditionedPolicy
from clp_engine.core.errors import ConfigError, DrawingFailed
from clp_engine.rollouts.engines.vllm.server import Server as VllmServer
from clp_engine.rollouts.engines.vllm.stacks import Stack
from clp_engine.serving.app import make_app
from clp_engine.serving.from_vllm import FromVllm
from clp_engine.serving.requests import GenerateRequest
from clp_engine.serving.session import Session

START, ANSWER = 300, 120  # seconds
WEIGHTS = {"a": 0.3, "b": 0.7}


class Server:
    def __init__(self, served, log):
        self.served, self.log = served, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [
            # What `vllm serve` runs; the command itself asks for the version of a package "vllm", which the CPU build is not.
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(served.base)),
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "base"),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", "128"),
            *("--max-num-batched-tokens", "32", "--max-num-seqs", "16", "--gpu-memory-utilization", "0.05"),
            *(
                "--logprobs-mode",
                "processed_logprobs",
                "--enable-lora",
                "--max-loras",
                "2",
                "--max-lora-rank",
                str(served.max_lora_rank),
            ),
            *("--lora-modules", f"stack={served.stack}", f"plain={served.plain}"),
        ]
        self.start()

    def start(self):
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        }
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise

    def wait(self):
        end = time.monotonic() + START
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        pytest.fail(f"vllm serve did not start: {self.log.read_text(errors='replace')[-4000:]}")

    def stop(self):
        """vLLM's own end of its processes, and the end of the group that it may leave."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(10)

    def post(self, path, **body):
        """(status, answer), by the standard library alone: what curl sends."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=ANSWER) as answer:
            return answer.status, json.load(answer)

    def tokens(self, model, ids, xargs=None):
        body = {"model": model, "prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 0}
        status, answer = self.post("/v1/completions", **body, return_token_ids=True, vllm_xargs=xargs)
        assert status == 200, answer
        return answer["choices"][0]["token_ids"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    made = Server(prepare(folder, "llama"), folder / "log.txt")
    yield made
    made.stop()


XARGS = [
    {"clp": json.dumps({"weights": WEIGHTS, "kl": 0.2})},
    {"clp_weights": "a=0.3,b=0.7", "clp_kl": 0.2},
    {"clp_weights": [0.3, 0.7], "clp_kl": 0.2},
]


def test_every_form_that_vllm_xargs_carries(server):
    ids = prompt(9, 0)
    own = server.served.tokens([ids], WEIGHTS, 0.2)
    assert [server.tokens("stack", ids, xargs) for xargs in XARGS] == own * 3


def test_no_weights_a_plain_adapter_and_the_base_model(server):
    ids = prompt(9, 1)
    assert server.tokens("stack", ids) == server.served.tokens([ids], DEFAULT, 0.1)[0]
    assert server.tokens("plain", ids) == server.served.tokens([ids], PLAIN, 0.1)[0]
    assert server.tokens("base", ids) == server.served.base_tokens([ids])[0]


def test_many_requests_at_once_each_under_its_own_weighting(server):
    weightings = [[i / 15, 1 - i / 15] for i in range(16)] * 2
    prompts = [prompt(5 + 3 * i, i) for i in range(32)]
    with ThreadPoolExecutor(16) as pool:
        found = list(
            pool.map(
                lambda ids, w: server.tokens("stack", ids, {"clp": json.dumps({"weights": w})}),
                prompts,
                weightings,
            )
        )
    assert found == server.served.tokens(prompts, weightings, 0.1)


def test_openai_python_completes_and_chats(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=ANSWER, max_retries=0)
    extra = {"vllm_xargs": {"clp": json.dumps({"weights": WEIGHTS, "kl": 0.2})}}
    tokenizer = build_tokenizer()
    text = tokenizer.decode(prompt(8, 2))
    done = client.completions.create(
        model="stack", prompt=text, max_tokens=NEW_TOKENS, temperature=0, extra_body=extra
    )
    ids = tokenizer(text)["input_ids"]
    own = server.served.tokens([ids], WEIGHTS, 0.2)[0]
    assert done.choices[0].text.split() == tokenizer.decode(own, skip_special_tokens=True).split()
    tokenizer.chat_template = CHAT_TEMPLATE
    messages = [{"role": "user", "content": text}]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
    own = server.served.tokens([ids], WEIGHTS, 0.2)[0]
    stream = client.chat.completions.create(
        model="stack", messages=messages, max_tokens=NEW_TOKENS, temperature=0, extra_body=extra, stream=True
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert said.split() == tokenizer.decode(own, skip_special_tokens=True).split()


def test_a_stack_of_too_many_ranks_is_refused_with_the_remedy(server, tmp_path):
    policy = ConditionedPolicy.from_pretrained(server.served.base, ("a", "b"), rank=12)
    policy.export_stack(tmp_path / "large")
    with pytest.raises(ConfigError, match="refused the adapters .*its --max-lora-rank must be at least 32"):
        VllmServer(server.url, 30.0).load(Stack("large", tmp_path / "large", 1))


def test_the_steering_page_shows_what_the_server_completes(server, tmp_path):
    served, text = server.served, "w5 w6 w7"
    served.policy.save_pretrained(tmp_path / "policy")
    with pytest.raises(ConfigError, match=r"the adapters stack, plain; give one of them with --model"):
        FromVllm(tmp_path, server.url)
    with pytest.raises(ConfigError, match="does not answer.*start it"):
        FromVllm(tmp_path, "http://127.0.0.1:9", "stack")
    with pytest.raises(ConfigError, match="plain on vLLM .* is no stack of this run"):
        FromVllm(tmp_path, server.url, "plain")
    session = Session(FromVllm(tmp_path, server.url, "stack"))
    assert session.describe()["objectives"] == ["a", "b"]
    ids = served.policy.tokenizer(text).input_ids
    own, base = served.tokens([ids], WEIGHTS, 0.2)[0], served.base_tokens([ids])[0]
    answer = asyncio.run(session.generate(GenerateRequest(text, WEIGHTS, kl=0.2, max_new_tokens=NEW_TOKENS)))
    for found, tokens in ((answer["completion"], own), (answer["base"], base)):
        assert (
            found["text"].split() == served.policy.tokenizer.decode(tokens, skip_special_tokens=True).split()
        )
        assert found["tokens"] == len(tokens) and found["cut"] == (tokens[-1] != 2)
    with pytest.raises(ConfigError, match="c.*; this policy has a, b"):
        asyncio.run(session.generate(GenerateRequest(text, {"c": 1.0})))
    with pytest.raises(ConfigError, match="vLLM refused the request .*max"):
        asyncio.run(session.generate(GenerateRequest(text, WEIGHTS, max_new_tokens=1000)))
    client = TestClient(make_app(session), base_url="http://127.0.0.1")
    assert client.get("/").status_code == 200 and client.get("/metrics").status_code == 404
    assert client.post("/v1/completions", json={"prompt": text}).status_code == 404


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"clp": '{"weights": {"a": 0.5, "c": 0.5}}'}, "unknown objective 'c'; this policy has a, b"),
        ({"clp_weights": "a=1.5,b=-0.5"}, "weights must not be negative; got a=1.5, b=-0.5"),
        ({"clp_weights": [0.5, 0.6]}, "weights must sum to 1; got a=0.5, b=0.6, which sums to 1.1"),
        ({"clp_kl": 2}, "kl=2.0: expected alpha between 0 and 1"),
        ({"clp_weight": "a=1"}, "unknown field 'clp_weight'; expected clp, or clp_weights and clp_kl"),
        ({"clp": "{"}, "expected a JSON object with weights and kl"),
    ],
)
def test_a_wrong_request_is_answered_with_400_and_the_server_lives_on(server, xargs, message):
    ids = prompt(9, 3)
    for path, asked in (
        ("/v1/completions", {"prompt": ids}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w1"}]}),
    ):
        status, answer = server.post(path, model="stack", max_tokens=4, vllm_xargs=xargs, **asked)
        assert status == 400 and message in answer["error"]["message"], answer
    status, answer = server.post(
        "/v1/completions", model="base", prompt=ids, max_tokens=4, vllm_xargs=XARGS[0]
    )
    assert status == 400 and "the base model has no objectives" in answer["error"]["message"]
    assert server.tokens("stack", ids, XARGS[0]) == server.served.tokens([ids], WEIGHTS, 0.2)[0]


def test_a_beam_search_with_weights_is_refused(server):
    body = {
        "model": "stack",
        "prompt": prompt(9, 4),
        "max_tokens": 4,
        "use_beam_search": True,
        "n": 2,
        "temperature": 0,
    }
    status, answer = server.post("/v1/completions", **body, vllm_xargs=XARGS[0])
    assert status == 400 and "beam search passes no vllm_xargs on" in answer["error"]["message"]


def kill_after(server, count, trainer, then):
    """Kill the server when it has answered so many completions of `trainer`, some others being under way."""
    vllm, answered, lock = trainer.rollout_engine._vllm, [], threading.Lock()
    completed = vllm._completed

    def counting(*arguments):
        found = completed(*arguments)
        with lock:
            answered.append(found)
            if len(answered) == count:
                os.killpg(server.process.pid, signal.SIGKILL)
                server.process.wait()
                then(vllm)
        return found

    vllm._completed = counting


def test_a_server_that_dies_within_a_step_is_waited_for_or_ends_the_run_with_a_checkpoint(server, tmp_path):
    """The last test of this server."""
    policy = ConditionedPolicy.from_pretrained(
        server.served.base, ("a", "b"), rank=4, kl_conditioning="linear", seed=1
    )
    of_server = {"vllm_mode": "server", "vllm_server_base_url": server.url, "rollout_rows": 4}
    trainer = trainer_of(policy, tmp_path, **of_server)

    def again(_):
        threading.Thread(target=server.start).start()

    def for_good(vllm):
        vllm._timeout = 2.0

    kill_after(server, 16 + 6, trainer, again)  # in the second step, whose 10 others are drawn again
    kill_after(server, 32 + 6, trainer, for_good)
    with pytest.raises(DrawingFailed, match="does not answer .* waited for 2 seconds .*last checkpoint"):
        trainer.train()
    log = log_of(tmp_path)
    assert [entry["step"] for entry in log] == [1, 2] and all(entry[GAPS] < GAP for entry in log)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list((tmp_path / "vllm").iterdir())


def test_the_plug_in_is_found_by_its_entry_point_and_refuses_another_vllm(tmp_path):
    """In a process that vLLM starts itself: an untested version ends it with the range."""
    script = (
        "from clp_engine.serving.vllm_plugin import patching\n"
        "patching.TESTED = '>=0.40'\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=ANSWER)
    assert done.returncode != 0
    assert "clp-engine's plug-in was tested with vllm >=0.40, and this is vllm 0.32.0" in done.stderr
