"""What a prompt is: parts, spec, token ids, who sees whom. Knows no model and no file."""
