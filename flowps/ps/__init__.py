"""The parameter server: signs → embedding rows, and gradients → steps of those rows.

`kernels` holds the numba code; `table` one arena of rows and its index; `optimizer` what a row's step means; `shard` all tables of
one PS partition; `placement` which slots live on which shard; `client` what a trainer calls. Knows nothing of hubs and trainers.
"""
