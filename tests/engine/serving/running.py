"""A server in a thread, and a run to serve."""

import contextlib
import dataclasses
import http.client
import json
import threading
import time
from pathlib import Path

import torch
from engine.conftest import build_model, build_tokenizer

from clp_engine.policy.policy import ConditionedPolicy
from clp_engine.serving.app import make_app
from clp_engine.serving.served import Limits, Served
from clp_engine.serving.server import listen, make_server, url_of
from clp_engine.serving.session import Session
from clp_engine.training.runs import trust
from clp_engine.training.runs.run_spec import RunSpec


def save_run(folder: Path, config=None, tokenizer=None, objectives=("even", "small"), **options) -> Path:
    """A run folder as training leaves one, whose adapters say different things at different weightings."""
    base = folder / "base"
    build_model("llama").save_pretrained(base)
    (tokenizer or build_tokenizer()).save_pretrained(base)
    policy = ConditionedPolicy.from_pretrained(base, list(objectives), rank=4, **options)
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
    spec = RunSpec(str(base), tuple(objectives), dataset=str(folder / "prompts.jsonl"), config=config)
    dataclasses.replace(spec, signature=trust.sign(spec)).save(run)
    return run


@contextlib.contextmanager
def serving(session, **options):
    """The port of a server of the session."""
    listening = listen("127.0.0.1", 0, False)
    server = make_server(make_app(session, url_of(listening), **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def session_of(run, examples=None, **limits):
    return Session(Served(run, "cpu", Limits(**{"max_rows": 8, "max_new_tokens": 128, **limits})), examples)


class Client:
    """Speaks to a server as its page does."""

    def __init__(self, port):
        self.port = port

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
