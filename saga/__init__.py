"""The domain and the engine: knows no database, no network, no framework."""
