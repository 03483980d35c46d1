"""The OpenAI-compatible HTTP server: schema, streaming, keys, metrics, web page. Knows the coordinator, no models."""
