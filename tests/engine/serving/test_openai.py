"""OpenAI's API with the real client: what it gets, what is refused, and that every text is the one of the request alone."""

import asyncio
import concurrent.futures
import gc
import json
import os
import re
import shlex
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from engine.conftest import build_tokenizer
from engine.serving.running import Client, save_run, serving, session_of

from clp_engine.serving import openai_api, served
from clp_engine.serving.batching import Event
from clp_engine.serving.metrics import Metrics

openai = pytest.importorskip("openai")

CHAT = "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} <eos>{% endif %}"
EVEN = {"weights": {"even": 1.0}}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    session = session_of(save_run(tmp_path_factory.mktemp("openai"), tokenizer=tokenizer))
    # Rows run to their full length.
    session.served.batch._stop_ids.clear()
    session.policy.model.generation_config.eos_token_id = None
    return session


@pytest.fixture(scope="module")
def port(session):
    with serving(session) as port:
        yield port


def client_of(port, key="none", **options):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, **{"max_retries": 0, **options})


@pytest.fixture(scope="module")
def client(port):
    with client_of(port) as client:
        yield client


def complete(client, prompt="w1 w2", **options):
    return client.completions.create(model="run", prompt=prompt, **{"max_tokens": 8, **options})


def chat(client, **options):
    messages = [{"role": "user", "content": "w1 w2"}]
    return client.chat.completions.create(
        **{"model": "run", "messages": messages, "max_tokens": 8, **options}
    )


def test_the_model_is_listed_under_the_name_of_the_run(client):
    [model] = client.models.list().data
    assert (model.id, model.objectives) == ("run", ["even", "small"])
    assert client.models.retrieve("run").id == "run"
    with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist"):
        client.models.retrieve("other")


@pytest.mark.parametrize("weights", [{"even": 1.0}, {"even": 0.25, "small": 0.75}, [0.0, 1.0]])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_completion_is_the_one_that_the_policy_generates(client, session, weights, temperature):
    options = {"temperature": temperature, "seed": 7, "n": 2}
    answer = complete(client, **options, extra_body={"weights": weights})
    listed = [weights.get(name, 0.0) for name in ("even", "small")] if isinstance(weights, dict) else weights
    own = {"temperature": temperature, "seed": 7, "num_return_sequences": 2, "max_new_tokens": 8}
    assert [[c.text for c in answer.choices]] == session.policy.generate(["w1 w2"], listed, **own)
    assert [c.finish_reason for c in answer.choices] == ["length"] * 2
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        2,
        16,
        18,
    )


def test_a_chat_is_read_with_the_template(client, session):
    answer = chat(client, temperature=0, extra_body=EVEN)
    expected = session.policy.generate(
        [[{"role": "user", "content": "w1 w2"}]], [1, 0], temperature=0, max_new_tokens=8
    )
    assert answer.choices[0].message.content == expected[0]
    parts = [{"role": "user", "content": [{"type": "text", "text": "w1 w2"}]}]
    assert (
        chat(client, temperature=0, extra_body=EVEN, messages=parts).choices[0].message
        == answer.choices[0].message
    )
    assert chat(client, temperature=0, extra_body=EVEN, max_completion_tokens=3).usage.completion_tokens == 3


def test_the_base_model_and_the_default_weighting_can_be_asked_for(client, session):
    base = complete(client, temperature=0, extra_body={"base": True}).choices[0].text
    default = complete(client, temperature=0).choices[0].text
    assert default == session.policy.generate("w1 w2", temperature=0, max_new_tokens=8)[0]
    even = complete(client, temperature=0, extra_body=EVEN).choices[0].text
    assert len({base, default, even}) == 3


def test_several_prompts_texts_or_tokens_are_answered_in_order(client, session):
    texts = ["w1 w2", "w3", "w4 w5 w6"]
    answer = complete(client, texts, temperature=0, n=2, extra_body=EVEN)
    assert [c.index for c in answer.choices] == list(range(6)) and answer.usage.prompt_tokens == 6
    alone = [complete(client, text, temperature=0, extra_body=EVEN).choices[0].text for text in texts]
    assert [c.text for c in answer.choices] == [text for text in alone for _ in range(2)]
    tokens = [session.policy.tokenizer(text).input_ids for text in texts]
    for prompt in (tokens, tokens[0]):
        answer = complete(client, prompt, temperature=0, extra_body=EVEN)
        assert [c.text for c in answer.choices] == alone[: len(answer.choices)]


@pytest.mark.parametrize("ask", [complete, chat])
def test_a_stream_says_piece_by_piece_what_a_whole_answer_says(client, ask):
    options = {"temperature": 0.9, "seed": 3, "n": 3, "stop": ["w7 w2", "w9"], "extra_body": EVEN}
    whole = ask(client, **options)
    texts, roles, reasons, usage, pieces = [""] * 3, [None] * 3, [None] * 3, None, 0
    for chunk in ask(client, stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text = choice.text if ask is complete else choice.delta.content
            texts[choice.index] += text or ""
            roles[choice.index] = roles[choice.index] or (ask is chat and choice.delta.role)
            reasons[choice.index] = choice.finish_reason
            pieces += bool(text)
    said = [c.text if ask is complete else c.message.content for c in whole.choices]
    assert texts == said and pieces > 3
    assert reasons == [c.finish_reason for c in whole.choices]
    assert usage == whole.usage and (ask is complete or roles == ["assistant"] * 3)


def test_a_stream_ends_as_openais_do(port):
    body = {"prompt": "w1", "max_tokens": 2, "stream": True}
    response, content = Client(port).ask("POST", "/v1/completions", body)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    events = content.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all("usage" not in json.loads(e[6:]) for e in events[:-2])


def test_a_stop_string_ends_a_completion_and_is_no_part_of_it(client):
    whole = complete(client, temperature=0, extra_body=EVEN).choices[0].text
    words = whole.split(" ")
    stop = next(word for word in words[2:] if word)
    for given in (stop, [stop], ["never", stop]):
        answer = complete(client, temperature=0, stop=given, extra_body=EVEN)
        assert answer.choices[0].text == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens < 8


def test_log_probs_are_those_that_the_engine_drew_with(client, session):
    text = complete(client, temperature=0.5, seed=1, logprobs=3, extra_body=EVEN).choices[0]
    assert len(text.logprobs.tokens) == 8 and all(len(top) <= 3 for top in text.logprobs.top_logprobs)
    assert (
        text.logprobs.text_offset[0] == 0 and sorted(text.logprobs.text_offset) == text.logprobs.text_offset
    )
    assert all(p <= 0 for p in text.logprobs.token_logprobs)
    greedy = (
        chat(client, temperature=0, logprobs=True, top_logprobs=2, extra_body=EVEN)
        .choices[0]
        .logprobs.content
    )
    assert len(greedy) == 8
    for entry in greedy:
        assert entry.token == entry.top_logprobs[0].token and len(entry.top_logprobs) == 2
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob, abs=1e-5)
        assert bytes(entry.bytes).decode() == entry.token
    streamed = [
        entry
        for chunk in chat(client, temperature=0, logprobs=True, top_logprobs=2, stream=True, extra_body=EVEN)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == greedy


def form_of(kind, spelled, top=2):
    about = SimpleNamespace(spelled=spelled.__getitem__, name="run")
    return kind(about, SimpleNamespace(top=top))


def test_the_bytes_of_a_token_are_its_own_or_none():
    form = form_of(openai_api._Chat, ["\u00e9", "a\ufffd"])
    assert form._entry(0, -1.0)["bytes"] == [0xC3, 0xA9] and form._entry(1, -1.0)["bytes"] is None


def test_of_tokens_that_are_spelled_alike_the_likeliest_is_reported():
    form = form_of(openai_api._Text, ["x", "y", "x"])
    event = Event("x", 0, -0.5, top=((0, -0.5), (1, -1.5), (2, -2.5)))
    assert form._logprobs([event], 0)["top_logprobs"] == [{"x": -0.5, "y": -1.5}]


def test_an_answer_has_only_so_many_log_probs(client, session, monkeypatch):
    monkeypatch.setattr(openai_api, "_ENTRIES", 2 * 8 * 4)
    complete(client, n=2, logprobs=3)
    known = session.served.spelled.cache_info()
    complete(client, n=2, logprobs=3, temperature=0)
    assert session.served.spelled.cache_info().hits > known.hits  # a token is spelled once
    for ask in (lambda: complete(client, n=2, logprobs=4), lambda: complete(client, ["w1"] * 3, logprobs=3)):
        with pytest.raises(
            openai.BadRequestError, match="logprobs: the answer may have .* at most 64 are given"
        ):
            ask()


@pytest.mark.parametrize("temperature", [1e-40, 1e-37, 1e-31])
def test_the_smallest_temperatures_are_greedy(client, temperature):
    coldest = complete(client, temperature=temperature, logprobs=3, extra_body=EVEN)
    assert coldest.choices == complete(client, temperature=0, logprobs=3, extra_body=EVEN).choices


def test_tokens_count_when_they_are_drawn_and_not_when_a_client_reads_them():
    metrics = Metrics(SimpleNamespace(running=0, waiting=0))
    ticket = served.Ticket(SimpleNamespace(metrics=metrics), 1)
    ticket.rows = [SimpleNamespace(drawn=2)]
    ticket.deliver(0, Event("w1", 5))
    ticket.deliver(0, Event("w2", 6, finish="stop"))
    text = metrics.text().decode()
    assert "clp_engine_completion_tokens_total 2.0" in text and ticket.completion_tokens == 2
    assert "clp_engine_time_per_token_seconds_count 1.0" in text


def test_events_for_a_loop_that_was_closed_are_dropped():
    loop = asyncio.new_event_loop()
    loop.close()
    served._post(loop, [])


def test_without_a_seed_each_request_draws_anew(client):
    assert len({complete(client, temperature=1.0).choices[0].text for _ in range(4)}) > 1


def test_without_max_tokens_a_completion_is_as_long_as_in_training(client):
    assert client.completions.create(model="run", prompt="w1").usage.completion_tokens == 6
    long = "w1 " * 125  # room for three more
    assert client.completions.create(model="run", prompt=long).usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"weights": {"odd": 1.0}}, "unknown objective 'odd'; this policy has even, small"),
        ({"weights": {"even": -1, "small": 2}}, "weights must not be negative; got even=-1, small=2"),
        ({"weights": {"even": 0.5}}, "weights must sum to 1; got even=0.5, small=0, which sums to 0.5"),
        ({"weights": [1]}, "weights has 1 entries; expected 2"),
        ({"weights": {"even": "1"}}, "expected numbers from 0 to 1"),
        ({"weights": "even"}, "weights is a text"),
        ({"kl": 0.5}, "kl was given, and the policy is not conditioned on alpha"),
        ({"base": True, "weights": {"even": 1}}, "takes no weights"),
        ({"wieghts": {"even": 1}}, "unknown field 'wieghts'"),
        ({"echo": True}, "echo=True: this server does not have echo; leave it out"),
        ({"frequency_penalty": 0.5}, "does not have frequency_penalty"),
        ({"best_of": 2}, "does not have best_of"),
        ({"logprobs": True}, "logprobs is a boolean"),
        ({"logprobs": 21}, "expected 0 to 20"),
        ({"n": 0}, "n=0: expected 1 to 128"),
        ({"n": 128, "prompt": ["w1"] * 3}, "384 completions; the queue of this server holds 256"),
        ({"max_tokens": 0}, "expected 1 to"),
        ({"max_tokens": 129}, "this model has room for 128"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"seed": 1.5}, "whole number"),
        ({"stop": [""]}, "stop="),
        ({"stop": ["a"] * 17}, "at most 16"),
        ({"stream_options": {"include_usage": True}}, "without stream: true"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": ""}, "has no tokens"),
        ({"prompt": []}, "expected a text"),
        ({"prompt": [1, "w1"]}, "expected a text"),
        ({"prompt": [99]}, "has the token 99"),
        ({"prompt": [-1]}, "has the token -1"),
        ({"prompt": [2**63]}, "expected a text"),
        ({"model": 3}, "model is a number"),
    ],
)
def test_a_wrong_request_is_answered_in_openais_form_with_the_engines_message(port, fields, complaint):
    body = {"prompt": "w1", "max_tokens": 2, **fields}
    status, answer = Client(port).json("POST", "/v1/completions", body)
    assert status == 400 and complaint in answer["error"]["message"], answer
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b'{"messages": [1, NaN]}', "expected a list of messages"),
        ({"messages": [5]}, "expected a list of messages"),
        ({"messages": [True]}, "expected a list of messages"),
        ({"messages": [1, "x"]}, "expected a list of messages"),
        ({"messages": [{"role": "user", "content": "w1"}, 5]}, "expected a list of messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "text"),
        ({"messages": [{"role": "user", "content": None}]}, "the tokenizer's chat template does not take"),
    ],
)
def test_messages_that_are_none_are_refused(port, session, monkeypatch, body, complaint):
    monkeypatch.setattr(
        session.policy.tokenizer, "chat_template", CHAT.replace("m['content']", "'' + m['content']")
    )
    status, answer = Client(port).json("POST", "/v1/chat/completions", body)
    assert status == 400 and complaint in answer["error"]["message"], answer


def test_what_a_chat_template_refuses_is_told(client, session, monkeypatch):
    monkeypatch.setattr(
        session.policy.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}"
    )
    with pytest.raises(openai.BadRequestError, match="roles must alternate"):
        chat(client)


def test_more_completions_than_the_queue_holds_are_refused_before_their_prompts_are_read(port, monkeypatch):
    monkeypatch.setattr(openai_api, "_encoded", lambda *_: pytest.fail("a prompt was read"))
    status, answer = Client(port).json("POST", "/v1/completions", {"prompt": ["w1"] * 300})
    assert status == 400 and "300 completions" in answer["error"]["message"]


def test_neutral_values_of_fields_that_are_not_served_are_taken(client):
    options = {"frequency_penalty": 0, "presence_penalty": 0.0, "best_of": 1, "echo": False, "user": "me"}
    assert complete(client, **options, logit_bias={}).choices
    extra = {"top_k": -1, "min_p": 0, "response_format": {"type": "text"}, "tools": []}
    assert chat(client, extra_body=extra).choices


def test_errors_are_those_of_the_client(client):
    with pytest.raises(openai.BadRequestError, match="unknown objective 'odd'"):
        chat(client, extra_body={"weights": {"odd": 1}})
    with pytest.raises(
        openai.NotFoundError, match="the model 'gpt-4' does not exist; this server has 'run'"
    ) as found:
        chat(client, model="gpt-4")
    assert found.value.code == "model_not_found" and found.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="a role and a content"):
        chat(client, messages=[{"role": "user"}])


def test_requests_of_many_weightings_at_once_get_what_each_gets_alone(client):
    def ask(i):
        share = (i % 16) / 15
        options = {"temperature": 0 if i % 3 == 0 else 1.0, "seed": i, "max_tokens": 4 + i % 9}
        extra = {"base": True} if i % 7 == 0 else {"weights": {"even": share, "small": 1 - share}}
        return complete(client, f"w{3 + i % 40} w{3 + i % 11}", **options, extra_body=extra).choices[0].text

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        together = list(pool.map(ask, range(32)))
    assert together == [ask(i) for i in range(32)] and len(set(together)) > 20


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(stream, port, session, monkeypatch):
    batch, rows = session.served.batch, []
    submit = batch.submit
    monkeypatch.setattr(batch, "submit", lambda given: (rows.extend(given), submit(given)))
    with socket.create_connection(("127.0.0.1", port)) as gone:
        content = json.dumps({"prompt": "w1", "max_tokens": 120, "n": 80, "stream": stream}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        gone.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        while not batch.running:
            time.sleep(0.001)
    while batch.running or batch.waiting:
        time.sleep(0.005)
    assert len(rows) == 80 and all(row.cancelled for row in rows)
    assert sum(row.drawn for row in rows) < 40 * 120


def test_a_full_queue_is_429_and_the_client_comes_again(tmp_path):
    session = session_of(save_run(tmp_path), queue=4, max_rows=2)
    session.served.batch._stop_ids.clear()
    with serving(session) as port, client_of(port) as client, client_of(port, max_retries=20) as patient:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            options = {"n": 4, "max_tokens": 50}
            asked = [pool.submit(complete, client, **options) for _ in range(8)]
            refused = [f.exception() for f in asked if f.exception() is not None]
        assert refused and all(isinstance(error, openai.RateLimitError) for error in refused)
        assert refused[0].response.headers["retry-after"] == "1"
        assert "the queue holds 4" in refused[0].message and refused[0].type == "rate_limit_error"
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert len(list(pool.map(lambda _: complete(patient, **options), range(4)))) == 4


def test_the_lengths_that_the_server_has_buffers_for_are_its_limits(session):
    with (
        serving(session_of(session.run, max_prompt_tokens=3, max_new_tokens=5)) as port,
        client_of(port) as client,
    ):
        assert complete(client, "w1 w2 w3", max_tokens=5).usage.prompt_tokens == 3
        with pytest.raises(openai.BadRequestError, match=r"takes at most 3 \(--max-prompt-tokens\)"):
            complete(client, "w1 w2 w3 w4", max_tokens=5)
        with pytest.raises(openai.BadRequestError, match=r"takes at most 5 \(--max-new-tokens\)"):
            complete(client, "w1", max_tokens=6)
        assert client.completions.create(model="run", prompt="w1").usage.completion_tokens <= 5


def test_an_error_of_the_engine_is_500_and_the_next_request_is_served(client, session, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("out of something")

    with monkeypatch.context() as patched:
        patched.setattr(session.served.batch, "_draw", broken)
        for _ in range(20):  # over one connection, which stays
            with pytest.raises(openai.InternalServerError, match="RuntimeError: out of something"):
                complete(client)
        with pytest.raises(openai.APIError, match="out of something"):
            list(complete(client, stream=True))
    assert "out of something" in capsys.readouterr().err
    assert complete(client).choices


def test_a_key_is_asked_for_where_there_is_one(session, port):
    with serving(session_of(session.run), api_key="secret") as guarded:
        with client_of(guarded, "secret") as client:
            assert client.models.list().data
        with client_of(guarded, "wrong") as client, pytest.raises(openai.AuthenticationError) as refused:
            client.models.list()
        assert refused.value.code == "invalid_api_key"
        for path, status in (
            ("/health", 200),
            ("/metrics", 200),
            ("/", 401),
            ("/api/model", 401),
            ("/v1/models", 401),
        ):
            assert httpx.get(f"http://127.0.0.1:{guarded}{path}").status_code == status
        headers = {"Host": "any.example", "Authorization": "Bearer secret"}
        assert httpx.get(f"http://127.0.0.1:{guarded}/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=headers).status_code == 403


def test_metrics_count_requests_tokens_and_rows(session):
    session = session_of(session.run)
    with serving(session) as port, client_of(port) as client:
        for _ in range(3):
            complete(client, n=2, extra_body=EVEN)
        with pytest.raises(openai.BadRequestError):
            complete(client, extra_body={"weights": {"odd": 1}})
        response, content = Client(port).ask("GET", "/metrics")
        httpx.get(f"http://127.0.0.1:{port}/no/{'x' * 50}")
    assert response.headers["Content-Type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in content.decode().splitlines() if not line.startswith("#"))
    completions = 'clp_engine_requests_total{path="/v1/completions",status="%d"}'
    assert lines[completions % 200] == "3.0" and lines[completions % 400] == "1.0"
    assert lines["clp_engine_prompt_tokens_total"] == "6.0"
    tokens = float(lines["clp_engine_completion_tokens_total"])
    assert 6 <= tokens <= 48
    assert lines["clp_engine_time_to_first_token_seconds_count"] == "6.0"
    assert lines["clp_engine_running_rows"] == lines["clp_engine_queue_length"] == "0.0"
    assert "xxxxx" not in session.served.metrics.text().decode()


# --- the examples of docs/serving.md ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """The port of a server of a run with the names of the documentation, and the blocks of its section."""
    folder = save_run(tmp_path_factory.mktemp("docs"), objectives=["coverage", "brevity"]).rename(
        tmp_path_factory.mktemp("runs") / "mine"
    )
    text = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    section = text[text.index("## A server of our own") : text.index("# vLLM\n")]
    with serving(session_of(folder)) as port:
        blocks = {kind: block for kind, block in re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)}
        yield (
            port,
            {kind: block.replace("localhost:8000", f"localhost:{port}") for kind, block in blocks.items()},
        )


def test_the_documented_python_runs(documented):
    port, blocks = documented
    names = {}
    exec(blocks["python"], names)
    # It names no seed: a completion may be the end token alone.
    assert names["base"].usage.completion_tokens > 0 and names["base"].model == "mine"
    assert names["chunk"].choices[0].finish_reason in ("stop", "length")
    names["client"].close()


def test_the_documented_curl_runs(documented):
    port, blocks = documented
    command, address, *options = shlex.split(blocks["bash"].replace("\\\n", ""))
    assert command == "curl" and options[::2] == ["-H", "-d"]
    name, _, value = options[1].partition(": ")
    answer = httpx.post(address, headers={name: value}, content=options[3])
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"]


# --- under load ---------------------------------------------------------------------------------------------


@pytest.mark.check
def test_under_load_no_request_is_lost_and_each_says_what_it_says_alone(port):
    """200 requests at a time with 64 weightings, greedy and seeded, whole and streamed."""

    def body(i):
        share = (i % 64) / 63
        options = {"temperature": 0 if i % 2 else 1.0, "seed": i, "max_tokens": 3 + i % 13}
        return {"prompt": f"w{3 + i % 50} w{3 + i % 7}", "weights": [share, 1 - share], **options}

    async def ask(http, i, stream):
        answer = await http.post("/v1/completions", json=body(i) | {"stream": stream})
        assert answer.status_code == 200, answer.text
        if not stream:
            return answer.json()["choices"][0]["text"]
        events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
        return "".join(event["choices"][0]["text"] for event in events)

    async def all_of_them():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=120) as http:
            together = await asyncio.gather(*(ask(http, i, i % 3 == 0) for i in range(200)))
            alone = [await ask(http, i, False) for i in range(200)]
        return together, alone

    together, alone = asyncio.run(all_of_them())
    assert together == alone and len(set(alone)) > 100


@pytest.mark.check
def test_memory_stays_flat_over_thousands_of_requests(port, session):
    """5,000 requests, some refused and some left by their clients. The first 1,500 fill caches and pools."""

    async def ask(i, reader, writer):
        fields = {
            "prompt": f"w{3 + i % 50}",
            "max_tokens": 2,
            "weights": [i % 5 / 4, 1 - i % 5 / 4],
        }
        if i % 50 == 0:
            fields["weights"] = [1, 1]
        body = json.dumps(fields).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if i % 97 == 0:
            return False
        head = await reader.readuntil(b"\r\n\r\n")
        assert int(head.split()[1]) == (400 if i % 50 == 0 else 200)
        await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
        return True

    async def ask_all(first, last):
        waiting = iter(range(first, last))

        async def worker():
            stays = False
            for i in waiting:
                if not stays:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                stays = await ask(i, reader, writer)
                if not stays:  # it leaves without its answer
                    writer.close()
            writer.close()

        await asyncio.gather(*(worker() for _ in range(32)))

    def resident():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    asyncio.run(ask_all(0, 1500))
    before, objects = resident(), len(gc.get_objects())
    asyncio.run(ask_all(1500, 5000))
    while session.served.batch.running:  # of a client that left
        time.sleep(0.01)
    assert resident() - before < 8e6  # 3,500 requests of 2.3 kB
    assert len(gc.get_objects()) - objects < 1000
