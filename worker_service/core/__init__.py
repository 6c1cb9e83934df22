"""What a worker decides, without clock, socket, thread or tensor."""
