"""What is asked of vLLM, what is published to it, and what is done when a server is lost. vLLM itself is in tests/in_vllm."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from engine.conftest import build_model, build_policy, build_tokenizer
from engine.training.test_trainer import ROWS, high_words, low_words, settings

from clp_engine import rollout
from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError, DrawingFailed
from clp_engine.core.seeds import derive
from clp_engine.rollouts.engines.vllm.draws import Draw, Drawn, options_of
from clp_engine.rollouts.engines.vllm.engine import VllmEngine
from clp_engine.rollouts.engines.vllm.server import ATTEMPTS, Server
from clp_engine.rollouts.engines.vllm.stacks import Stack
from clp_engine.rollouts.types import SamplingParams
from clp_engine.training.trainer import CLPTrainer

PROMPTS = [[5, 6, 7], [8, 9]]
OPTIONS = options_of(SamplingParams(max_new_tokens=4, temperature=0.7), [2])


class Recorded:
    """What a way to vLLM was asked for. Every completion is two tokens."""

    def __init__(self):
        self.calls, self.draws, self.options = [], [], {}

    def load(self, stack):
        self.calls.append(("load", stack.name, (stack.path / "clp_blend.json").is_file()))

    def unload(self, stack):
        self.calls.append(("unload", stack.name, stack.path.is_dir()))

    def complete(self, draws, options, stack):
        self.draws, self.options = list(draws), options
        return [Drawn([5, 2], [-0.5, -0.25], True) for _ in draws]

    def close(self, stack):
        self.calls.append(("close", stack and stack.name, stack and stack.path.is_dir()))


@pytest.fixture
def made(tmp_path):
    policy, vllm = build_policy("llama", conditioning="lora"), Recorded()
    return policy, vllm, VllmEngine(policy, vllm, policy.export_stack, tmp_path / "stacks")


def draw(policy, engine, **options):
    conditions = policy.conditions([[0.25, 0.75]], 0.2)
    conditions = Conditions.cat([conditions, Conditions.reference(1, 2)])
    sampling = options.pop("sampling", SamplingParams(max_new_tokens=4, temperature=0.7, top_k=5))
    return rollout(
        policy, PROMPTS, conditions, num_generations=2, sampling=sampling, engine=engine, **options
    )


def test_each_draw_has_its_prompt_its_condition_and_its_seed(made):
    policy, vllm, engine = made
    seeds = torch.tensor([1, 2, -3, 4])
    drawn = draw(policy, engine, row_seeds=seeds)
    assert [d.prompt for d in vllm.draws] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    clp = {"weights": [0.25, 0.75], "kl": pytest.approx(0.2)}
    assert [d.clp for d in vllm.draws] == [clp, clp, None, None]  # the reference is the base model
    assert [d.seed for d in vllm.draws] == [1, 2, 2**63 - 3, 4]
    own = {"max_tokens": 4, "temperature": 0.7, "top_k": 5, "top_p": 1.0, "repetition_penalty": 1.0}
    assert vllm.options.items() >= own.items() and vllm.options["stop_token_ids"] == policy.stop_token_ids
    assert (drawn.engine, drawn.token_lists()) == ("vllm", [[5, 2]] * 4) and bool(drawn.terminated.all())
    assert drawn.logprobs.tolist() == [[-0.5, -0.25]] * 4 == drawn.sampled.tolist()


def test_a_completion_that_goes_on_draws_from_another_stream(made):
    policy, vllm, engine = made
    rollout(
        policy,
        PROMPTS,
        policy.conditions(rows=2),
        row_seeds=torch.tensor([7, 8]),
        begun=[[3, 4], []],
        engine=engine,
    )
    assert [d.prompt for d in vllm.draws] == [[*PROMPTS[0], 3, 4], PROMPTS[1]]
    assert [d.seed for d in vllm.draws] == [int(derive(7, 2)) & (2**63 - 1), 8]


def test_a_version_is_published_where_the_policy_has_moved_and_the_one_before_is_removed(made, tmp_path):
    policy, vllm, engine = made
    draw(policy, engine), draw(policy, engine)
    [(_, first, written)] = vllm.calls
    assert written
    with torch.no_grad():
        next(iter(policy.adapter_parameters().values())).add_(0.5)
    draw(policy, engine)
    assert [call[0] for call in vllm.calls] == ["load", "load", "unload"]
    assert vllm.calls[2] == ("unload", first, True) and vllm.calls[1][1] != first
    assert [path.name for path in (tmp_path / "stacks").iterdir()] == [vllm.calls[1][1]]
    engine.close()
    assert vllm.calls[3:] == [("close", vllm.calls[1][1], True)]
    assert not list((tmp_path / "stacks").iterdir())
    draw(policy, engine)  # begins anew
    assert vllm.calls[-1][0] == "load"


def test_a_way_to_vllm_that_fails_at_its_end_leaves_no_folder_behind(made, tmp_path):
    policy, vllm, engine = made
    draw(policy, engine)

    def fail(stack):
        raise MemoryError

    vllm.close = fail
    with pytest.raises(MemoryError):
        engine.close()
    assert not list((tmp_path / "stacks").iterdir())


def test_a_version_that_vllm_refuses_leaves_nothing_behind(made, tmp_path):
    policy, vllm, engine = made

    def refuse(stack):
        raise ConfigError("refused")

    vllm.load = refuse
    with pytest.raises(ConfigError, match="refused"):
        draw(policy, engine)
    assert not list((tmp_path / "stacks").iterdir())
    with pytest.raises(ConfigError, match="serves the policy of one training"):
        draw(build_policy("llama"), engine)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            "llama",
            {"conditioning": "attention"},
            r"deltas of whole weights \(attention\).*conditioning='lora'",
        ),
        ("llama", {"conditioning": "full"}, "deltas of whole weights"),
        ("t5", {}, "an encoder-decoder"),
        ("llama", {}, "the base model is one in memory.*save_pretrained"),
        ("saved", {"vllm_enable_sleep_mode": True}, "on a CPU vLLM has nothing to leave"),
        ("saved", {}, "vllm cannot be imported .*pip install"),
        (
            "llama",
            {"partial_rollouts": True, "max_completion_length_per_step": 2, "stop_strings": ["w1"]},
            "would miss one that a part before began",
        ),
    ],
)
def test_what_vllm_cannot_draw_from_is_refused_with_the_alternative(tmp_path, model, changes, message):
    if model == "saved":
        build_model("llama").save_pretrained(tmp_path / "base")
        model = str(tmp_path / "base")
    else:
        model = build_model(model)
    with pytest.raises(ConfigError, match=message):
        CLPTrainer(
            model,
            [low_words, high_words],
            settings(tmp_path / "run", use_vllm=True, use_cpu=True, **changes),
            ROWS,
            processing_class=build_tokenizer(),
        ).train()


# -- HTTP ---------------------------------------------------------------------------------------------------------------


class Answering(ThreadingHTTPServer):
    """A server that answers as it is told, from a function of (path, body) to (status, answer), None for no answer at all."""

    def __init__(self, answer, port=0):
        outer = self
        self.seen, self.answer = [], answer

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.respond({})

            def do_POST(self):
                self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def respond(self, body):
                outer.seen.append((self.path, body))
                found = outer.answer(self.path, body)
                if found is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                text = json.dumps(found[1]).encode()
                self.send_response(found[0])
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", port), Handler)
        self.daemon_threads = True
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def paths(self, path):
        return [body for seen, body in list(self.seen) if seen == path]


def error(text):
    return 400, {"error": {"message": text}}


def usual(path, body, allowed=0.0):
    """The answers of a server that is as it should be; a completion is its seed modulo 50, and the end token."""
    if path == "/v1/models":
        return 200, {"data": [{"id": "base"}, {"id": "other", "parent": "base"}]}
    if path == "/v1/completions":
        if body.get("vllm_xargs") == {"clp_engine": "?"}:
            return error("unknown field 'clp_engine'; expected clp")
        tokens = [body.get("seed", 0) % 50, 2]
        logprobs = {"token_logprobs": [allowed, -1.0]}
        return 200, {"choices": [{"token_ids": tokens, "logprobs": logprobs, "finish_reason": "stop"}]}
    return 200, {}


def dying():
    """As `usual`, until the completion of seed 7 is asked for; then no answer at all."""
    down = threading.Event()

    def answer(path, body):
        if body.get("seed") == 7:
            down.set()
        return None if down.is_set() else usual(path, body)

    return answer


@pytest.fixture
def answering():
    servers = []

    def start(answer=usual, port=0):
        servers.append(Answering(answer, port))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def stack(tmp_path):
    (tmp_path / "stack").mkdir()
    (tmp_path / "stack" / "adapter_config.json").write_text('{"r": 16}')
    return Stack("clp-1", tmp_path / "stack", 1)


DRAWS = [Draw([5, 6], {"weights": [1.0, 0.0], "kl": 0.1} if seed % 2 else None, seed) for seed in range(12)]
WHOLE = [Drawn([seed, 2], [0.0, -1.0], True) for seed in range(12)]


def test_adapters_and_completions_are_asked_for_as_vllm_takes_them(answering, stack, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    there = answering()
    server = Server(there.url, 5.0)
    server.load(stack)
    assert there.paths("/v1/load_lora_adapter") == [{"lora_name": "clp-1", "lora_path": str(stack.path)}]
    assert server.complete(DRAWS, OPTIONS, stack) == WHOLE
    asked = {body["seed"]: body for body in there.paths("/v1/completions") if "seed" in body}
    assert asked[0]["model"] == "base" and "vllm_xargs" not in asked[0]
    assert asked[1]["model"] == "clp-1" and asked[1].items() >= OPTIONS.items()
    assert json.loads(asked[1]["vllm_xargs"]["clp"]) == {"weights": [1.0, 0.0], "kl": 0.1}
    server.unload(stack)
    assert there.paths("/v1/unload_lora_adapter") == [{"lora_name": "clp-1"}]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda p, b: usual(p, b, allowed=-0.7), "start it with --logprobs-mode processed_logprobs"),
        (
            lambda p, b: (404, {"detail": "Not Found"}) if "load_lora" in p else usual(p, b),
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
        ),
        (  # what vLLM answers where the rank is too large or a layer has no LoRA
            lambda p, b: (500, error("no such path")[1]) if "load_lora" in p else usual(p, b),
            r"no such path\).*vllm_stack_dir.*16",
        ),
        (
            lambda p, b: usual(p, {} if b.get("vllm_xargs") else b),
            "does not blend: clp-engine's plug-in is not there",
        ),
        (lambda p, b: (404, {"detail": "?"}), "names no models"),
    ],
)
def test_a_server_that_cannot_serve_is_refused_with_what_to_change(answering, stack, answer, message):
    with pytest.raises(ConfigError, match=message):
        Server(answering(answer).url, 5.0).load(stack)


def test_a_refused_completion_is_an_error_with_vllms_message(answering, stack):
    server = Server(answering().url, 5.0)
    server.load(stack)
    there = answering(lambda p, b: error("too long") if b.get("seed") == 3 else usual(p, b))
    other = Server(there.url, 5.0)
    other.load(stack)
    with pytest.raises(ConfigError, match=r"refused a completion \(400: too long\)"):
        other.complete(DRAWS, OPTIONS, stack)
    with pytest.raises(ConfigError, match="expected an address such as"):
        Server("localhost:8000", 5.0)


def test_what_a_lost_server_had_not_answered_is_drawn_again_when_it_is_back(answering, stack):
    there = answering(dying())
    server = Server(there.url, 20.0, connections=3)
    server.load(stack)
    back = threading.Timer(0.5, lambda: setattr(there, "answer", usual))
    back.start()
    assert server.complete(DRAWS, OPTIONS, stack) == WHOLE
    seeds = [body["seed"] for body in there.paths("/v1/completions") if "seed" in body]
    assert set(seeds) == set(range(12)) and seeds.count(0) == 1 and seeds.count(7) == 2
    assert len(there.paths("/v1/load_lora_adapter")) == 2


def test_a_server_that_comes_back_in_another_way_is_refused(answering, stack):
    def changed(path, body):
        return usual(path, {} if body.get("vllm_xargs") == {"clp_engine": "?"} else body)

    there = answering(dying())
    server = Server(there.url, 20.0)
    server.load(stack)
    back = threading.Timer(0.3, lambda: setattr(there, "answer", changed))
    back.start()
    with pytest.raises(ConfigError, match="does not blend"):
        server.complete(DRAWS, OPTIONS, stack)


def test_a_server_that_dies_of_the_same_completion_is_given_up(answering, stack):
    there = answering(lambda p, b: (500, {"error": "EngineDeadError"}) if b.get("seed") == 7 else usual(p, b))
    server = Server(there.url, 20.0)
    server.load(stack)
    with pytest.raises(DrawingFailed, match=f"was lost {ATTEMPTS} times while it drew the same completions"):
        server.complete(DRAWS, OPTIONS, stack)
    assert sum(body.get("seed") == 7 for body in there.paths("/v1/completions")) == ATTEMPTS


def test_a_server_that_is_silent_is_hung_up_on_and_named(answering, stack, monkeypatch):
    monkeypatch.setattr("clp_engine.rollouts.engines.vllm.server._LOOK", 0.1)
    quiet = threading.Event()

    def silent(path, body):
        if body.get("seed") == 5:
            quiet.set()
        if quiet.is_set() and (body.get("seed") == 5 or path == "/health"):
            return None if path == "/health" else threading.Event().wait(30)
        return usual(path, body)

    server = Server(answering(silent).url, 0.5)
    server.load(stack)
    with pytest.raises(DrawingFailed, match=r"has not answered for 0.5 seconds.*vllm_server_timeout"):
        server.complete(DRAWS, OPTIONS, stack)


def test_a_server_is_waited_for_at_the_start(answering, stack):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(f"http://127.0.0.1:{port}", 0.3)
    with pytest.raises(DrawingFailed, match="does not answer .*Connection refused.* waited for 0.3 seconds"):
        server.load(stack)
    later = threading.Timer(0.5, lambda: answering(port=port))
    later.start()
    Server(f"http://127.0.0.1:{port}", 20.0).load(stack)
