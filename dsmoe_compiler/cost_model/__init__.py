"""What a captured model costs: parameters, operations, bytes, and the least time they take."""
