"""The way to a bundle's embeddings: gRPC as `serving.proto` describes it.

`server` answers, `client` asks, `security` is TLS on both sides. Beside `flowps.ps.wire` the only room that imports gRPC.
"""
