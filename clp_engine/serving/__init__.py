"""clp-engine steer: a page on this machine that shows what a trained policy says at any weighting.

    page.html     the page: text in, a slider per objective, the completions, the front with a dot that moves
    server.py     HTTP: who may ask, what is answered with which status
    request.py    what is asked for, checked
    session.py    the policy behind it: describes itself, writes completions
    jobs.py       completions are written one after another, in the main thread

Standard library alone; nothing is fetched from anywhere.
"""
