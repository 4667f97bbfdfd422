"""clp-engine serve and steer: a policy over OpenAI's API, and a page with a slider for each objective.

    batching.py          the running batch, which rows of all weightings join and leave
    stream_text.py       the text of a completion while its tokens arrive
    served.py            the policy behind the server, and the tickets with which requests wait
    openai_requests.py   OpenAI's requests, checked; openai_api.py answers them
    page.html            the page; session.py says what it shows, requests.py checks its requests
    guards.py            which senders are allowed, and how much they may send
    app.py               the routes; server.py the socket and the process
    metrics.py           what Prometheus reads

The server needs starlette, uvicorn and prometheus_client (the extra `serve`). The page loads nothing from other machines.
"""
