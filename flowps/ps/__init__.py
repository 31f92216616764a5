"""The parameter server: signs → embedding rows, and gradients → steps of those rows.

`kernels` holds the numba code; `table` the rows of slots that are alike, over `memory` (arena, index, stripes), `recency` (what is
in flight, what is old) and a `team` of threads; `optimizer` what a row's step means; `shard` all tables of one PS partition;
`placement` which slots live on which shard; `client` what a trainer calls. Knows nothing of hubs and trainers.
"""
