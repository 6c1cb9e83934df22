"""What a shard decides, without clock, socket, thread or tensor."""
