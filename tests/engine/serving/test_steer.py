"""clp-engine steer: who may ask, what is answered, and that completions are written one after another."""

import contextlib
import dataclasses
import http.client
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
from engine.conftest import build_model, build_tokenizer

from clp_engine import evaluate
from clp_engine.cli.main import main
from clp_engine.core.errors import ConfigError
from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.serving.app import listen
from clp_engine.serving.jobs import Full, Jobs
from clp_engine.serving.requests import MAX_CHARACTERS, MAX_NEW_TOKENS, GenerateRequest
from clp_engine.serving.session import Session
from clp_engine.training.runs import trust
from clp_engine.training.runs.run_spec import RunSpec

CHAT = "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} <eos>{% endif %}"

HEAD = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def even(completion_ids, **_):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def small(completion_ids, **_):
    return [sum(i < 20 for i in ids) / len(ids) for ids in completion_ids]


def save_run(folder: Path, config=None, tokenizer=None, **options) -> Path:
    """A run folder as training leaves one, whose adapters say different things at different weightings."""
    base = folder / "base"
    build_model("llama").save_pretrained(base)
    (tokenizer or build_tokenizer()).save_pretrained(base)
    policy = ConditionedPolicy.from_pretrained(base, ["even", "small"], rank=4, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.adapter_parameters().items():
            if name.endswith("lora_b"):
                parameter.normal_(0, 0.3)
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(9))
    )
    run = folder / "run"
    policy.save_pretrained(run / "policy")
    config = {"max_completion_length": 6, "temperature": 0.7, **(config or {})}
    spec = RunSpec(str(base), ("even", "small"), dataset=str(folder / "prompts.jsonl"), config=config)
    dataclasses.replace(spec, signature=trust.sign(spec)).save(run)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = save_run(tmp_path_factory.mktemp("steer"))
    policy = ConditionedPolicy.load(run / "policy")
    evaluate(policy, [even, small], ["w1 w2", "w3"], bootstrap=5, progress=False, output_dir=run)
    return run


class Client:
    """Speaks to a server as its page does."""

    def __init__(self, server, session):
        self.server, self.session = server, session
        self.port = server.server_address[1]

    def ask(self, method="GET", path="/", body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, path, skip_host="Host" in headers)
        payload = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        given = (
            {"Content-Length": str(len(payload)), "Content-Type": "application/json"}
            if body is not None
            else {}
        )
        for name, value in {**given, **{n.replace("_", "-"): v for n, v in headers.items()}}.items():
            connection.putheader(name, value)
        connection.endheaders(payload)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response, content

    def json(self, *arguments, **options):
        response, content = self.ask(*arguments, **options)
        return response.status, json.loads(content)

    def generate(self, **fields):
        return self.json("POST", "/api/generate", {"text": "w1 w2", "max_new_tokens": 6, **fields})


@pytest.fixture(scope="module")
def client(run):
    jobs = Jobs()
    server = listen("127.0.0.1", 0, False, jobs)
    server.session = Session(run, "cpu")
    for target in (server.serve_forever, jobs.work):
        threading.Thread(target=target, daemon=True).start()
    yield Client(server, server.session)
    server.shutdown()
    server.server_close()
    jobs.stop()


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
    session = Session(save_run(tmp_path, {"alpha_range": [0.01, 0.3]}, **options))
    kl = session.describe()["kl"]
    assert (kl["name"], kl["adjustable"], kl["low"], kl["high"]) == ("alpha", True, 0.01, 0.3)
    texts = [session.generate(GenerateRequest("w1 w2", kl=kl))["completion"]["text"] for kl in (0.01, 0.3)]
    assert texts[0] != texts[1]
    assert (
        session.generate(GenerateRequest("w1 w2", kl=0.999999))["completion"]
        == session.generate(GenerateRequest("w1 w2"))["base"]
    )


def test_without_a_report_the_command_that_writes_one_is_named(tmp_path):
    session = Session(save_run(tmp_path))
    description = session.describe()
    assert description["front"] is None and f"clp-engine evaluate {session.run}" in description["front_note"]


def test_a_policy_folder_finds_the_report_of_its_run(run):
    assert Session(run / "policy").describe()["front"] is not None


def test_one_objective_and_conditioning_none_say_why_the_sliders_do_nothing(tmp_path):
    assert "conditioning none" in Session(save_run(tmp_path, conditioning="none")).describe()["weights_note"]


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
    session = Session(save_run(tmp_path, {"max_prompt_length": 4}))
    long = session.generate(GenerateRequest("w9 w9 w9 w1 w2 w3 w4"))
    assert "has 7 tokens" in long["prompt_note"] and "last 4" in long["prompt_note"]
    short = session.generate(GenerateRequest("w1 w2 w3 w4"))
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
    session = Session.__new__(Session)
    session.policy, session.spec = policy, RunSpec("docsum", ("coverage", "brevity"), task="docsum")
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
    session = Session(run)
    description = session.describe()
    assert description["chat"] is True and description["examples"] == [{"name": "w7 w8", "text": "w7 w8"}]
    expected = session.policy.generate(
        [[{"role": "user", "content": "w7 w8"}]], temperature=0, max_new_tokens=8
    )
    answer = session.generate(GenerateRequest("w7 w8", chat=True, max_new_tokens=8))
    assert answer["completion"]["text"] == expected[0]
    assert answer["prompt_tokens"] == session.generate(GenerateRequest("w7 w8"))["prompt_tokens"] + 2


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
        ("POST", "/api/generate", {"Content_Type": "application/json"}, 411),
        ("POST", "/api/generate", {"Content_Type": "application/json", "Content_Length": "-1"}, 411),
        ("POST", "/api/generate", {"Content_Type": "application/json", "Content_Length": str(10**9)}, 413),
        ("POST", "/api/generate", {"Content_Type": "application/json", "Content_Length": "9" * 5000}, 413),
        ("POST", "/api/generate", {"Content_Type": "application/json", "Content_Length": "0" * 5000}, 400),
    ],
)
def test_only_this_machines_own_page_may_ask(client, method, path, headers, status):
    response, content = client.ask(method, path, **headers)
    assert response.status == status
    if status >= 400:
        assert json.loads(content)["error"]
        assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET http://[/ HTTP/1.1", 400),
        (b"GET http://[::1/ HTTP/1.1", 400),
        (b"POST http://[/ HTTP/1.1", 400),
        (b"GET /%zz\xff HTTP/1.1", 404),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1", 414),
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
        listen("0.0.0.0", 0, False, Jobs())
    server = listen("0.0.0.0", 0, True, Jobs())
    assert socket.gethostname() in server.url
    server.server_close()


def test_a_browser_s_connections_wait_their_turn(monkeypatch):
    """Nobody accepts here: as many as the backlog holds are connected all the same, the others would be turned away."""
    server = listen("127.0.0.1", 0, False, Jobs())
    with contextlib.ExitStack() as stack:
        stack.callback(server.server_close)
        for _ in range(60):
            stack.enter_context(socket.create_connection(server.server_address[:2], timeout=5))


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


def test_a_folder_without_a_policy_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["steer", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err


# --- one after another --------------------------------------------------------------------------------------


def test_an_error_of_the_engine_is_answered_and_the_next_request_is_served(client, monkeypatch, capsys):
    def broken(request):
        raise RuntimeError("out of something")

    with monkeypatch.context() as patched:
        patched.setattr(client.session, "generate", broken)
        status, answer = client.generate()
    assert status == 500 and "RuntimeError: out of something" in answer["error"]
    assert "out of something" in capsys.readouterr().err  # with its traceback, on the terminal
    assert client.generate()[0] == 200


def test_completions_are_written_one_after_another(client, monkeypatch):
    running, most, generate = [0], [0], client.session.generate

    def watched(request):
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.02)
        answer = generate(request)
        running[0] -= 1
        return answer

    monkeypatch.setattr(client.session, "generate", watched)
    statuses = []
    threads = [threading.Thread(target=lambda: statuses.append(client.generate()[0])) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 6 and most == [1]


def test_a_client_that_hangs_up_takes_back_what_has_not_begun(client, monkeypatch):
    begun, release, asked = threading.Event(), threading.Event(), []

    def held(request):
        asked.append(request.text)
        begun.set()
        release.wait(20)
        return {}

    monkeypatch.setattr(client.session, "generate", held)
    first = threading.Thread(target=client.generate, kwargs={"text": "first"})
    first.start()
    assert begun.wait(20)
    gone = http.client.HTTPConnection("127.0.0.1", client.port)
    gone.request("POST", "/api/generate", json.dumps({"text": "gone"}), {"Content-Type": "application/json"})
    gone.close()
    time.sleep(1.5)  # the server looks every half second
    release.set()
    first.join(20)
    client.generate(text="last")
    assert asked == ["first", "last"]


def test_a_request_that_breaks_off_in_the_middle_leaves_the_server_as_it_was(client):
    with socket.create_connection(("127.0.0.1", client.port)) as half:
        half.sendall(HEAD % 100 + b'{"text"')
    assert client.generate()[0] == 200


def test_a_full_queue_refuses_and_cancelled_jobs_are_left_out():
    jobs, done = Jobs(most=2), []
    first, second = jobs.submit(lambda: done.append(1)), jobs.submit(lambda: done.append(2))
    with pytest.raises(Full, match="2 requests"):
        jobs.submit(lambda: None)
    assert first.cancel()
    threading.Thread(target=jobs.work, daemon=True).start()
    second.result(10)
    jobs.stop()
    assert done == [2]


def test_before_the_model_is_there_the_answer_says_so():
    jobs = Jobs()
    server = listen("127.0.0.1", 0, False, jobs)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    status, answer = Client(server, None).json("GET", "/api/model")
    server.shutdown()
    server.server_close()
    assert status == 503 and "being loaded" in answer["error"]


@pytest.mark.check
def test_the_command_serves_until_ctrl_c_also_in_the_middle_of_a_completion(run):
    command = [sys.executable, "-m", "clp_engine", "steer", str(run), "--port", "0", "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == f"loading {run} ...\n"
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())[1])
        client = Client(type("Server", (), {"server_address": ("127.0.0.1", port)}), None)
        assert client.json("GET", "/api/model")[1]["objectives"] == ["even", "small"]
        assert client.generate()[0] == 200
        with socket.create_connection(("127.0.0.1", port)) as waiting:
            body = json.dumps({"text": "w1", "max_new_tokens": 120, "temperature": 1.0}).encode()
            waiting.sendall(HEAD % len(body) + body)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0 and out.strip() == "stopped" and err == ""
