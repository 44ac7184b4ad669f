"""What a run measures of itself: records, sums over ranks, time, memory, profiles, progress."""
