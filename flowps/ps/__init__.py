"""The parameter server: signs → embedding rows, and gradients → steps of those rows.

`kernels` holds the numba code; `table` the rows of slots that are alike, over `memory` (arena, index, stripes), `recency` (what is
in flight, what is old) and a `team` of threads; `optimizer` what a row's step means; `shard` all tables of one PS partition;
`snapshot` copies a table's rows for a checkpoint, `restore` puts them back from what `source` reads.
`load` counts what the slots ask for and `placement` spreads them over shards by it. `client` is what a trainer calls: it cuts a
batch into `parcel`s and asks every shard's `endpoint`, which is in the same process or, by way of `wire`, in another; `together`
makes one step of the rows of a step of several trainers. Knows nothing of hubs and trainers.
"""
