"""Models: loading them, describing their weights, and putting packed weights in place of float ones."""
