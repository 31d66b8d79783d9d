"""Files, errors, images and tables, for the rest of the package."""
