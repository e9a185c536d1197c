"""Keys and values: captured, stored, read on the student's positions."""
