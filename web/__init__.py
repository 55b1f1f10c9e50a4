"""HTTP: the JSON API, OpenAPI, health and metrics."""
