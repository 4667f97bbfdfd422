"""clp-engine steer: a page on this machine that shows the completions of a trained policy at any weighting.

    page.html     the page: a text field, a slider for each objective, the completions, and the front with a moving dot
    app.py        the HTTP server: which senders are allowed, and which status answers what
    requests.py   the page's requests, checked
    session.py    the policy behind the page: its description and its completions
    jobs.py       the queue of completions, which the main thread writes one after another

The server needs the standard library alone. The page loads nothing from other machines.
"""
