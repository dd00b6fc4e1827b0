"""The old place of `calm_core.distributed.torchrun`, kept for launch scripts that name it."""
