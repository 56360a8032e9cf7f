"""The real run: stage 1 on drawings with human-written names, from installed packages to a report."""
