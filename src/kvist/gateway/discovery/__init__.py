"""Who the workers are: a list, names that resolve to many, or pods; each kept in step with its source."""
