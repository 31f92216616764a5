"""Where the roles run, and how a run is put together from them.

`plan` decides everything before anything starts; `launch` gives a Dask client; `roles` is what runs on workers; `run` starts the
roles, listens, and collects what they leave in the `run_dir`; `announce` tells a person.
"""
