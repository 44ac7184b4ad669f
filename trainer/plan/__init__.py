"""What a training run will take on a cluster, before it is paid for: memory, bytes, time, and the best choices."""
