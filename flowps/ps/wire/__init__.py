"""The way to a shard in another process: gRPC as `flowps.proto` describes it.

`service` puts an endpoint on the network, `remote` is an endpoint reached over it; between them `message` (arrays ↔ messages),
`frame` (large arrays beside protobuf), `once` (what may come twice), `security` and `protocol`. The only room that imports gRPC.
"""
