"""Encoder and reranker as one Ray Serve application."""
