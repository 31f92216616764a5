"""Run status: the always-on timings and counters of every role, and how they are said.

`run_status` keeps them; `event` names what happens in a run; `lines`, `progress` and `record` are subscribers that print and
write. Knows nothing of the roles.
"""
