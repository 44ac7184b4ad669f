"""AdamW and Muon, their parameter groups and the schedule of the learning rate."""
