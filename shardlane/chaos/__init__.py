"""A cluster whose processes are killed, stopped and cut off on a seeded schedule, and what that cost."""
