"""Networks measured side by side."""
