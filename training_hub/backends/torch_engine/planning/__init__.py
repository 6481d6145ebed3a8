"""What a run will need, before a weight is read: memory, room on disk, operations."""
