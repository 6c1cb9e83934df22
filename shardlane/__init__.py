"""The library that the coordinator, the parameter shards and the pipeline workers all stand on."""

__version__ = "0.1.0"
