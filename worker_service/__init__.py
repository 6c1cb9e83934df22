"""A pipeline worker: runs one stage of one replica. It holds nothing that cannot be computed again."""
