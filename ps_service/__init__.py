"""A parameter shard: primary for some chunks of the model, backup for others."""
