"""When an answer is right."""
