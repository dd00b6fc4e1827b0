"""What a training run costs, computed before it starts: ranks, memory, FLOPs, messages, days."""
