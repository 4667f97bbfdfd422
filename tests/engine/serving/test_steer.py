"""clp-engine steer: who may ask, what is answered, and what ends the server."""

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from engine.conftest import build_tokenizer
from engine.serving.running import Client, save_run, serving, session_of

from clp_engine import evaluate
from clp_engine.cli.main import main
from clp_engine.core.conditions import Conditions
from clp_engine.core.errors import ConfigError
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.rollouts.types import SamplingParams
from clp_engine.serving import from_vllm
from clp_engine.serving.batching import Full
from clp_engine.serving.requests import MAX_CHARACTERS, MAX_NEW_TOKENS, GenerateRequest
from clp_engine.serving.served import Served
from clp_engine.serving.server import TimedProtocol, listen, url_of
from clp_engine.serving.session import Session
from clp_engine.training.runs.run_spec import RunSpec

CHAT = "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} <eos>{% endif %}"

HEAD = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def even(completion_ids, **_):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def small(completion_ids, **_):
    return [sum(i < 20 for i in ids) / len(ids) for ids in completion_ids]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = save_run(tmp_path_factory.mktemp("steer"))
    policy = ConditionedPolicy.load(run / "policy")
    evaluate(policy, [even, small], ["w1 w2", "w3"], bootstrap=5, progress=False, output_dir=run)
    return run


@pytest.fixture(scope="module")
def client(run):
    session = session_of(run)
    with serving(session) as port:
        client = Client(port)
        client.session = session
        yield client


def said(session, request):
    """What a session that no server has says to a request."""

    async def ask():
        session.served.begin()
        try:
            return await session.generate(request)
        finally:
            await session.served.end()
            session.served.batch._stopping = False

    return asyncio.run(ask())


# --- what is shown ------------------------------------------------------------------------------------------


def test_the_model_says_what_can_be_moved_and_what_was_measured(client, run):
    status, model = client.json("GET", "/api/model")
    assert status == 200
    assert (
        model["run"] == "run" and model["objectives"] == ["even", "small"] and model["weights_note"] is None
    )
    assert model["defaults"] == {"temperature": 0.7, "max_new_tokens": 6}
    assert model["chat"] is None  # the tokenizer has no chat template
    assert [example["text"] for example in model["examples"]] == [f"w{i} w{i + 1}" for i in range(6)]
    assert not model["kl"]["adjustable"] and "kl_conditioning was none" in model["kl"]["reason"]
    report = json.loads((run / "report.json").read_text())
    assert [p["weights"] for p in model["front"]["points"]] == [p["weights"] for p in report["points"]]
    assert model["front"]["base"]["even"] == report["base"]["rewards"]["even"]["mean"]


def test_the_kl_coefficient_moves_over_the_range_of_training(tmp_path):
    options = {"kl_conditioning": "odds", "min_kl": 0.01, "default_kl": 0.05}
    session = session_of(save_run(tmp_path, {"alpha_range": [0.01, 0.3]}, **options))
    kl = session.describe()["kl"]
    assert (kl["name"], kl["adjustable"], kl["low"], kl["high"]) == ("alpha", True, 0.01, 0.3)
    texts = [said(session, GenerateRequest("w1 w2", kl=kl))["completion"]["text"] for kl in (0.01, 0.3)]
    assert texts[0] != texts[1]
    assert (
        said(session, GenerateRequest("w1 w2", kl=0.999999))["completion"]
        == said(session, GenerateRequest("w1 w2"))["base"]
    )


def test_without_a_report_the_command_that_writes_one_is_named(tmp_path):
    session = session_of(save_run(tmp_path))
    description = session.describe()
    assert description["front"] is None and f"clp-engine evaluate {session.run}" in description["front_note"]


def test_a_policy_folder_finds_the_report_of_its_run(run):
    assert session_of(run / "policy").describe()["front"] is not None


def test_one_objective_and_conditioning_none_say_why_the_sliders_do_nothing(tmp_path):
    assert (
        "conditioning none" in session_of(save_run(tmp_path, conditioning="none")).describe()["weights_note"]
    )


class _Resources(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "action", "data")]


def test_the_page_is_one_file_that_fetches_nothing_and_runs_no_script_but_its_own(client):
    response, content = client.ask()
    assert response.status == 200 and response.headers["Content-Type"] == "text/html; charset=utf-8"
    resources = _Resources()
    resources.feed(content.decode())
    assert resources.found == ["data:,"] and b"@import" not in content and b"url(" not in content
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and re.search(r"script-src 'sha256-\S+';", policy)
    assert "unsafe-eval" not in policy and b"innerHTML" not in content


def test_the_page_is_part_of_the_wheel(tmp_path, monkeypatch):
    build = pytest.importorskip("scikit_build_core.build")
    monkeypatch.chdir(Path(__file__).parents[3])
    name = build.build_wheel(
        str(tmp_path), {"wheel.cmake": "false"}
    )  # without the C++ extension: a second instead of minutes
    with zipfile.ZipFile(tmp_path / name) as wheel:
        assert wheel.read("clp_engine/serving/page.html") == Path("clp_engine/serving/page.html").read_bytes()


# --- what is said -------------------------------------------------------------------------------------------


def test_completions_are_those_of_the_policy_and_of_the_base_model(client):
    policy = client.session.policy
    for weights in ({"even": 1.0, "small": 0.0}, {"even": 0.0, "small": 1.0}):
        status, answer = client.generate(weights=weights)
        assert status == 200
        assert [answer["completion"]["text"]] == policy.generate(
            "w1 w2", weights, temperature=0, max_new_tokens=6
        )
    base = policy.model.generate(
        torch.tensor([policy.tokenizer("w1 w2")["input_ids"]]), max_new_tokens=6, do_sample=False
    )
    assert answer["base"]["text"] == policy.tokenizer.decode(base[0, 2:], skip_special_tokens=True)


def test_the_base_model_says_the_same_at_every_weighting_and_the_policy_does_not(client):
    answers = [client.generate(weights={"even": w, "small": 1 - w})[1] for w in (0.0, 0.5, 1.0)]
    assert len({a["base"]["text"] for a in answers}) == 1
    assert len({a["completion"]["text"] for a in answers}) == 3


def test_the_answer_says_at_which_weighting_it_was_written(client):
    asked = {"even": 0.3, "small": 0.7}
    answer = client.generate(weights=asked)[1]
    assert answer["weights"] == asked and answer["kl"] == 0.1


def test_the_same_seed_draws_the_same_again_and_another_one_does_not(client):
    def drawn(seed):
        return client.generate(temperature=1.0, seed=seed)[1]["completion"]["text"]

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(5)}) > 1


def test_a_completion_that_was_cut_says_so(client):
    assert client.generate(max_new_tokens=1)[1]["completion"] | {"text": ""} == {
        "text": "",
        "tokens": 1,
        "cut": True,
    }


def test_html_in_the_text_comes_back_as_text(client):
    status, answer = client.generate(text="<script>alert(1)</script> w5 </textarea>")
    assert status == 200 and "text/html" not in client.ask("GET", "/api/model")[0].headers["Content-Type"]
    assert answer["prompt_tokens"] == 3  # words: nothing was stripped


def test_a_long_text_is_cut_as_in_training_and_the_answer_says_so(tmp_path):
    session = session_of(save_run(tmp_path, {"max_prompt_length": 4}))
    long = said(session, GenerateRequest("w9 w9 w9 w1 w2 w3 w4"))
    assert "has 7 tokens" in long["prompt_note"] and "last 4" in long["prompt_note"]
    short = said(session, GenerateRequest("w1 w2 w3 w4"))
    assert short["prompt_note"] is None and short["completion"] == long["completion"]


def test_a_text_without_room_for_its_completion_is_refused(client):
    status, answer = client.generate(text="w1 " * 125, max_new_tokens=6)
    assert (
        status == 400
        and "has room for 128 (max_position_embeddings" in answer["error"]
        and "shorten" in answer["error"]
    )


def test_a_document_longer_than_docsum_reads_is_cut_and_the_answer_says_so():
    policy = ConditionedPolicy.from_pretrained("docsum", ["coverage", "brevity"], rank=2)
    session, served = Session.__new__(Session), Served.__new__(Served)
    session.policy, session.spec, session._config = (
        policy,
        RunSpec("docsum", ("coverage", "brevity"), task="docsum"),
        {},
    )
    session.served, served.policy, served.longest, served.room = served, policy, 1000, 1000
    request = GenerateRequest("Return the sum of the list. " * 80)
    prompt = session._read(request, policy.conditions())
    assert "left out" in prompt.note and len(prompt.token_ids) <= 128
    assert session._read(dataclasses.replace(request, text="Return it."), policy.conditions()).note is None


def test_a_chat_policy_reads_the_text_as_a_users_message(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    run = save_run(tmp_path, tokenizer=tokenizer)
    rows = [{"prompt": [{"role": "user", "content": "w7 w8"}]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    session = session_of(run)
    description = session.describe()
    assert description["chat"] is True and description["examples"] == [{"name": "w7 w8", "text": "w7 w8"}]
    expected = session.policy.generate(
        [[{"role": "user", "content": "w7 w8"}]], temperature=0, max_new_tokens=8
    )
    answer = said(session, GenerateRequest("w7 w8", chat=True, max_new_tokens=8))
    assert answer["completion"]["text"] == expected[0]
    assert answer["prompt_tokens"] == said(session, GenerateRequest("w7 w8"))["prompt_tokens"] + 2


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([1], "the request is a list"),
        ({}, "text is missing"),
        ({"text": ""}, "text is empty"),
        ({"text": " \n"}, "text is empty"),
        ({"text": 3}, "text is a number; expected a text"),
        ({"text": "w1" * MAX_CHARACTERS}, "at most 200,000"),
        (b'{"text": "\\ud800"}', "surrogate"),
        ({"text": "w1", "weight": {}}, "unknown field 'weight'"),
        ({"text": "w1", "weights": [0.5, 0.5]}, "weights is a list"),
        ({"text": "w1", "weights": {"even": 0.5, "odd": 0.5}}, "unknown objective 'odd'"),
        ({"text": "w1", "weights": {"even": 0.5}}, "must sum to 1"),
        ({"text": "w1", "weights": {"even": -1, "small": 1}}, "weights.even=-1: expected 0 to 1"),
        (b'{"text": "w1", "weights": {"even": NaN, "small": 1}}', "expected 0 to 1"),
        (b'{"text": "w1", "temperature": 1' + b"0" * 400 + b"}", "temperature=1000"),
        ({"text": "w1", "temperature": -1}, "temperature=-1: expected 0 to 5"),
        ({"text": "w1", "temperature": True}, "temperature is a boolean"),
        ({"text": "w1", "max_new_tokens": 0}, f"expected 1 to {MAX_NEW_TOKENS}"),
        ({"text": "w1", "max_new_tokens": 2.5}, "expected a whole number"),
        ({"text": "w1", "seed": None}, "seed is null"),
        ({"text": "w1", "chat": 1}, "expected true or false"),
        ({"text": "w1", "chat": True}, "no chat template"),
        ({"text": "w1", "kl": 0.5}, "kl was given, and the policy is not conditioned on alpha"),
    ],
)
def test_a_mistake_in_a_request_is_named(client, body, complaint):
    status, answer = client.json("POST", "/api/generate", body)
    assert status == 400 and complaint in answer["error"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/api/model", {"Host": "127.0.0.1"}, 200),
        ("GET", "/api/model", {"Host": "localhost:9000"}, 200),  # a forwarded port
        ("GET", "/api/model", {"Host": "[::1]:80"}, 200),
        ("HEAD", "/", {}, 200),
        ("GET", "/api/model", {"Host": "evil.example"}, 403),  # a foreign name made to point here
        ("GET", "/", {"Host": "evil.example:8765"}, 403),
        ("GET", "/api/model", {"Host": "10.0.0.1"}, 403),
        ("GET", "/api/model", {"Host": "127.0.0.1@evil.example"}, 403),
        ("GET", "/api/model", {"Host": ""}, 403),
        ("GET", "/api/model", {"Origin": "http://evil.example"}, 403),
        ("GET", "/api/model", {"Origin": "null"}, 403),
        ("GET", "/api/model", {"Sec_Fetch_Site": "cross-site"}, 403),
        ("GET", "/nothing", {}, 404),
        ("GET", "/../../etc/passwd", {}, 404),
        ("GET", "/api/generate", {}, 405),
        ("POST", "/", {}, 405),
        (
            "POST",
            "/api/generate",
            {"Content_Type": "text/plain"},
            415,
        ),  # what a form of another site can send
        ("POST", "/api/generate", {"Content_Type": "application/json"}, 400),
        ("POST", "/api/generate", {"Content_Type": "application/json", "Content_Length": "-1"}, 400),
        ("POST", "/api/generate", {"Content_Type": "application/json", "Content_Length": str(10**9)}, 413),
        ("POST", "/api/generate", {"Content_Type": "application/json", "Content_Length": "9" * 19}, 413),
        ("POST", "/api/generate", {"Content_Type": "application/json", "Content_Length": "9" * 5000}, 400),
        ("POST", "/api/generate", {"Content_Type": "application/json", "Content_Length": "0" * 5000}, 400),
    ],
)
def test_only_this_machines_own_page_may_ask(client, method, path, headers, status):
    response, content = client.ask(method, path, **headers)
    assert response.status == status
    if status >= 400:
        assert content == b"Invalid HTTP request received." or json.loads(content)["error"]
        assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET http://[/ HTTP/1.1", 404),
        (b"GET http://[::1/ HTTP/1.1", 404),
        (b"POST http://[/ HTTP/1.1", 404),
        (b"GET /%zz HTTP/1.1", 404),
        (b"GET /%zz\xff HTTP/1.1", 400),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1", 404),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_request_line_that_is_none_is_answered_as_such(client, line, status):
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
        connection.sendall(line + b"\r\nHost: localhost\r\n\r\n")
        assert int(connection.recv(4096).split()[1]) == status


def test_the_pages_own_origin_may_ask(client):
    host = f"127.0.0.1:{client.port}"
    status, _ = client.json("POST", "/api/generate", {"text": "w1"}, Host=host, Origin=f"http://{host}")
    assert status == 200


def test_a_host_that_others_can_reach_is_refused_unless_asked_for():
    with pytest.raises(ConfigError, match="--allow-remote"):
        listen("0.0.0.0", 0, False)
    with listen("0.0.0.0", 0, True) as listening:
        assert socket.gethostname() in url_of(listening)


def test_a_browser_s_connections_wait_their_turn():
    """Nobody accepts here: as many as the backlog holds are connected all the same, the others would be turned away."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(listen("127.0.0.1", 0, False))
        for _ in range(60):
            stack.enter_context(socket.create_connection(listening.getsockname(), timeout=5))


def test_an_occupied_port_is_named_before_the_model_is_loaded(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (tmp_path / "clp_config.json").write_text(
            "not even JSON"
        )  # would be the complaint if it were read first
        assert main(["steer", str(tmp_path), "--port", str(port), "--no-browser"]) == 2
    complaint = capsys.readouterr().err
    assert f"port {port}" in complaint and "--port 0" in complaint and complaint.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--port", "70000"], "--port: 70000: expected a whole number from 0 to 65535"),
        (["--host", "no.such.host.invalid"], "is not known here"),
        (["--host", "0.0.0.0"], "--allow-remote"),
    ],
)
def test_an_address_that_cannot_be_had_is_one_line_and_exit_code_2(run, flags, complaint, capsys):
    assert main(["steer", str(run), "--no-browser", *flags]) == 2
    assert complaint in capsys.readouterr().err


def test_the_longest_prompt_is_a_flag(run, monkeypatch):
    made = []
    monkeypatch.setattr("clp_engine.serving.server.serve", lambda run, source, **_: made.append(source()))
    assert main(["steer", str(run), "--no-browser"]) == 0
    assert main(["steer", str(run), "--no-browser", "--max-prompt-tokens", "3", "--device", "cpu"]) == 0
    assert [one.longest for one in made] == [128, 3]  # the model has room for 128


def test_a_folder_without_a_policy_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["steer", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err


# --- while it runs, and its end -------------------------------------------------------------------------------


def test_an_error_of_the_engine_is_answered_and_the_next_request_is_served(client, monkeypatch, capsys):
    async def broken(request):
        raise RuntimeError("out of something")

    with monkeypatch.context() as patched:
        patched.setattr(client.session, "generate", broken)
        status, answer = client.generate()
    assert status == 500 and "RuntimeError: out of something" in answer["error"]
    assert "out of something" in capsys.readouterr().err  # with its traceback, on the terminal
    assert client.generate()[0] == 200


def test_a_refused_completion_ends_the_one_beside_it(run, monkeypatch):
    session, ended = session_of(run), []

    async def long(*_):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def refused(*_):
        await asyncio.sleep(0)
        raise Full("no room")

    monkeypatch.setattr(session, "_complete", long)
    monkeypatch.setattr(session, "_base_completion", refused)

    async def ask():
        with pytest.raises(Full):
            await session.generate(GenerateRequest("w1 w2"))
        assert ended == [True]

    asyncio.run(ask())


def test_a_vllm_server_is_asked_for_so_many_completions_and_those_of_clients_that_left_count(
    run, monkeypatch
):
    answers = threading.Event()

    def ask(method, path, body=None, timeout=None):
        if body is None:
            return 200, {"data": [{"id": "base"}, {"id": "stack", "parent": "base"}]}
        if timeout is not None:
            answers.wait(20)
        return 200, {"choices": [{"text": "w1", "token_ids": [3], "finish_reason": "stop"}]}

    monkeypatch.setattr(from_vllm, "_AT_ONCE", 2)
    server = from_vllm.Server("http://127.0.0.1:9", 1.0)
    server.ask, server.check_blending = ask, lambda name: None
    monkeypatch.setattr(from_vllm, "Server", lambda url, timeout: server)
    source = from_vllm.FromVllm(run, "http://127.0.0.1:9")

    async def ask_all():
        def complete():
            return source.complete([1], Conditions.reference(1, 2), SamplingParams(3), 0)

        gone, stays = asyncio.ensure_future(complete()), asyncio.ensure_future(complete())
        while len(source._asked) < 2:
            await asyncio.sleep(0.001)
        while sum(future.running() for future in source._asked) < 2:
            await asyncio.sleep(0.001)
        gone.cancel()
        with pytest.raises(Full, match="2 completions are asked for already"):
            await complete()
        answers.set()
        assert (await stays).text == "w1"
        while source._asked:
            await asyncio.sleep(0.001)
        assert (await complete()).text == "w1"

    asyncio.run(ask_all())


def test_a_request_that_breaks_off_in_the_middle_leaves_the_server_as_it_was(client):
    with socket.create_connection(("127.0.0.1", client.port)) as half:
        half.sendall(HEAD % 100 + b'{"text"')
    assert client.generate()[0] == 200


def test_a_body_without_a_length_is_read_as_far_as_is_allowed(client):
    head = HEAD.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked")
    body = json.dumps({"text": "w1", "max_new_tokens": 2}).encode()
    part = b"%x\r\n%s\r\n"
    for content, status in ((part % (len(body), body), 200), (part % (1 << 16, b" " * (1 << 16)) * 40, 413)):
        with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
            with contextlib.suppress(ConnectionError):  # it need not take all of it
                connection.sendall(head + content + b"0\r\n\r\n")
            assert int(connection.recv(4096).split()[1]) == status


def test_a_head_or_a_body_that_does_not_come_is_not_waited_for(run, monkeypatch):
    for module in ("guards", "server"):
        monkeypatch.setattr(f"clp_engine.serving.{module}.PATIENCE", 0.3)
    with serving(session_of(run)) as port:
        for sent, status in ((b"", None), (b"GET / HT", None), (HEAD % 100 + b"{", b"408")):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(sent)
                answer = connection.recv(4096)
                assert (answer.split()[1] if status else answer) == (status or b"")
        # The second request of a connection, too.
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status": "ok"}'):
                answer += connection.recv(4096)
            connection.sendall(b"GET /")
            assert connection.recv(4096) == b""
        assert Client(port).generate()[0] == 200
    assert TimedProtocol._ending is None


@pytest.mark.parametrize("command", ["steer", "serve"])
def test_a_missing_library_is_one_line(command, run, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "clp_engine.cli.arguments.find_spec", lambda name: None if name == "uvicorn" else found(name)
    )
    assert main([command, str(run)]) == 2
    assert capsys.readouterr().err == (
        f"clp-engine: error: clp-engine {command} needs uvicorn: pip install 'clp-engine[serve]'\n"
    )


@pytest.mark.check
@pytest.mark.parametrize("command", ["steer", "serve"])
def test_the_command_serves_until_ctrl_c_and_finishes_what_runs(command, run):
    flags = ["--no-browser"] if command == "steer" else ["--max-rows", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "clp_engine", command, str(run), "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == f"loading {run} ...\n"
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())[1])
        client = Client(port)
        assert client.json("GET", "/api/model")[1]["objectives"] == ["even", "small"]
        assert client.generate()[0] == 200
        with socket.create_connection(("127.0.0.1", port), timeout=20) as waiting:
            body = json.dumps({"text": "w1", "max_new_tokens": 120, "temperature": 1.0}).encode()
            waiting.sendall(HEAD % len(body) + body)
            time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert waiting.recv(4096).split()[1] == b"200"
            out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0 and out.strip() == "stopped" and err == ""
