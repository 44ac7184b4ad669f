"""Worker processes: how they are started, forked and met, and what each does for a command."""
