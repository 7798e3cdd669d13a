"""What a run will need, told before it begins: memory by part, hours, disk, and what does not fit."""
