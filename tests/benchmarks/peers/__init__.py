"""Trainers of one and the same decoder-only transformer, as other people write them, for `trainers.py`.

Each module has `Trainer(case)`, whose `step()` takes one AdamW step on the next batch of the case and returns something
that `wait` blocks on. All start from the case's parameters, so that equal mathematics shows in equal losses.
"""
