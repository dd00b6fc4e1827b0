"""Process groups, the engine, and the optimizer that DeepSpeed shards."""
