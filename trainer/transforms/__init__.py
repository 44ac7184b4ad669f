"""What is done to a model that is built, before it is trained: recomputation, torch.compile, fp8 experts."""
