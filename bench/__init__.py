"""Benchmarks: `make bench` prints the tables of docs/benchmarks.md. Nothing here is a test."""
