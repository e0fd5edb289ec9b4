"""Prefixes: tokens -> blocks -> radix tree (one worker's cache) and index (the router's view of all)."""
