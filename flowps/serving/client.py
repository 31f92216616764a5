"""`EmbeddingClient`: asks a server of `python -m flowps.serve` for rows.

with EmbeddingClient("127.0.0.1:50051") as client:
    client.lookup({"user": signs_of([7, 8], "user")})  # {"user": float32 [2, dim]}
"""

from flowps.serving.wire.client import Answer, EmbeddingClient, Served, ServedSlot

__all__ = ["Answer", "EmbeddingClient", "Served", "ServedSlot"]
