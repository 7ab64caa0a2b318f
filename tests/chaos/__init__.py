"""`make chaos`: a run in two processes, struck by faults of every kind, against the same run left in peace.

`job` is the run and its supervisor, `faults` what happens to it and what must follow, `witness` what is seen of it
from outside, `run` one such run from a seed. A fault that is added to the trainer's promises is added to
`faults.FAULTS`.
"""
