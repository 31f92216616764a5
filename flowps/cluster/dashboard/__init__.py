"""The page `/flowps` on the Dask scheduler's dashboard: what a run is doing, live.

`show.show_run` is what the command uses: it registers the page with the scheduler and gives a subscriber of events. The
subscriber has a `follower` keep a `glance` of the run, and a `courier`, a thread of its own, takes that to the scheduler. There a
`board` keeps the runs, and the `page` shows one, of pieces that `html` writes.

Nothing here is called per batch. `board` and `page` run in the scheduler's process, all the rest in the command's. Bokeh is
imported by `page` alone, which nobody imports before a scheduler that serves a dashboard is asked for the page.
"""
