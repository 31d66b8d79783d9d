"""What backward recomputes instead of storing."""
