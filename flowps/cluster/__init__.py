"""Where the roles run, and how a run is put together from them.

`launch` gives a Dask client: of one process, of local processes, or of a cluster that is there; `offer` asks its workers what they
have, and `assign` decides who does what. `plan` decides all the rest before anything starts, the placement by a `forecast` of the
load. `shard_role` and `trainer_role` are what runs on workers; `run` starts them, listens, and collects what they leave in the
`run_dir`; `announce` and `shard_report` tell a person.

What a run is doing: `observer` puts the figures of all roles together, with a verdict; `dashboard` shows them on the scheduler's
own pages, `prometheus` serves them to be scraped (as `families`), `tracing` collects the way of every batch. What it survives:
`watch` says what is lost, `saver` and `cut` make checkpoints, `resume` finds one to go on from, `reroute` leads trainers to a shard
that is back.
"""
