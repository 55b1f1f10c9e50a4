"""SQL text: migrations and named queries, one folder a dialect. Read by `store.queries`."""
