"""Arms tuned alike: as many trials for each, an optimum of every cell, a rule for every arm.

tuning.py    what is tuned: arms, sizes, budgets, the grid of rates; one file a tuning, in sweeps/tunings
trials.py    the trials as a plan, which the launchers of `lab run` train; grids are moved for every arm alike
optima.py    the best rate of a cell, with its interval; noise of a trial
transfer.py  rate = c size^a tokens^b through the optima
conclude.py  from the trials' losses to rules, hold-outs, regret and cost
rounds.py    round after round until no optimum lies at the edge of its grid
rules.py     the file of rules
chosen.py    what a study takes from it
report.py    tables, tuning.md and CSV
"""
