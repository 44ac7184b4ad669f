"""What is saved, when, and how any layout reads what any other has written."""
