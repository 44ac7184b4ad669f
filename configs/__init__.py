"""The Hydra config groups, shipped inside the wheel."""
