"""What a training run will cost, before anything is started: ranks, memory, operations, messages, days."""
