"""Fronts: the rewards of a policy at every weighting, beside those of the base model and of other methods.

front.py      the measurements and metrics of a front, as dataclasses
pareto.py     the metrics: hypervolume, utilities, steerability
plots.py      pareto.png
report.py     ParetoReport: report.json, report.md and pareto.png
evaluate.py   the measuring of a policy
compare/      methods and their baselines over seeds
"""
