"""What the gateway knows of its workers' caches and load: token ids, KV events, metrics."""
