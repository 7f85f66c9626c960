"""What a model asks of a device, what the device gives at most, and what it gave."""
